"""Read and rewrite KServe v2 inference messages without copying what is not asked for.

The protobufs are those of the `tritonclient` wheel. A tensor's data stands in one of three places: in the typed field
`contents`, in `raw_input_contents` (whose position advances only for inputs that have neither `contents` nor shared
memory), or in shared memory, where nobody but the back end can see it. Outputs map by position to
`raw_output_contents`, so whoever removes an output removes its raw entry with it.

Everything that comes from a peer is checked before it is used: a length that does not fit raises `TensorError`, which
names the tensor, the value and the mend. A tensor that is not there is `None`, never an error.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from tritonclient.grpc import service_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "DTYPE_SIZE_BYTES",
    "EMPTY_FINAL_PARAMETER",
    "FINAL_PARAMETER",
    "MAX_MESSAGE_BYTES",
    "SERVICE_NAME",
    "InferMessage",
    "ModelInferRequest",
    "ModelInferResponse",
    "TensorError",
    "add_bool_input",
    "add_bytes_input",
    "add_bytes_output",
    "add_integer_output",
    "count_elements",
    "drop_parameter",
    "find_input",
    "find_output",
    "get_parameter",
    "has_shared_memory",
    "pack_bytes",
    "raw_input_position",
    "read_bool_input",
    "read_bytes_input",
    "read_bytes_output",
    "read_integer_input",
    "read_integer_output",
    "read_integers_input",
    "read_integers_output",
    "read_text_input",
    "read_texts_input",
    "request_output",
    "set_parameter",
    "strip_input",
    "strip_output",
    "unpack_bytes",
]

SERVICE_NAME: Final = "inference.GRPCInferenceService"
# Triton's own bound; gRPC's default of 4 MiB refuses what a long prompt needs.
MAX_MESSAGE_BYTES: Final = 2**31 - 1
# A response says by this parameter that it is the last one of its request.
FINAL_PARAMETER: Final = "triton_final_response"
# A request asks by this parameter for the last response even when it carries nothing else.
EMPTY_FINAL_PARAMETER: Final = "triton_enable_empty_final_response"

# tritonclient ships no types, so its messages are Any to a type checker; these names say which ones are meant.
ModelInferRequest: TypeAlias = Any
ModelInferResponse: TypeAlias = Any
InferMessage: TypeAlias = Any
_Tensor: TypeAlias = Any

DTYPE_SIZE_BYTES: Final[dict[str, int]] = {
    "BOOL": 1,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
}
# Also of what is only counted here, never read.
_ITEM_SIZE_BYTES: Final = {**DTYPE_SIZE_BYTES, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}
_STRUCT_CODE: Final[dict[str, str]] = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
}
_TYPED_FIELD: Final[dict[str, str]] = {
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
}
_SHARED_MEMORY_PARAMETER: Final = "shared_memory_region"
_LENGTH: Final = struct.Struct("<I")
# A scalar or a short vector is what token counts are; a tensor of a gigabyte of ones is not a count.
_MAX_ELEMENTS: Final = 1 << 20
# The product of a million dimensions takes minutes.
_MAX_RANK: Final = 32


class TensorError(ValueError):
    """A tensor that cannot be read: its name, the value that does not fit, and what would."""

    def __init__(self, tensor: str, value: object, mend: str) -> None:
        super().__init__(f"tensor {tensor!r}: {value}: {mend}")
        self.tensor = tensor
        self.value = value
        self.mend = mend


# -- BYTES -------------------------------------------------------------------------------------------------------------


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    """The raw form of a BYTES tensor: each element behind its little-endian uint32 length."""
    parts: list[bytes] = []
    for element in elements:
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def unpack_bytes(raw: bytes, *, tensor: str, max_elements: int = _MAX_ELEMENTS) -> list[bytes]:
    """The elements of a raw BYTES tensor."""
    end = len(raw)
    if end >= _LENGTH.size and _LENGTH.unpack_from(raw)[0] == end - _LENGTH.size and max_elements:
        return [raw[_LENGTH.size :]]
    elements: list[bytes] = []
    position = 0
    while position < end:
        if len(elements) == max_elements:
            raise TensorError(tensor, f"more than {max_elements} elements", "send fewer elements")
        if end - position < _LENGTH.size:
            raise TensorError(
                tensor,
                f"{end - position} bytes left at offset {position}",
                "an element starts with a 4-byte little-endian length",
            )
        (length,) = _LENGTH.unpack_from(raw, position)
        position += _LENGTH.size
        if length > end - position:
            raise TensorError(
                tensor,
                f"element {len(elements)} claims {length} bytes, {end - position} follow",
                "the length before an element must be the element's own",
            )
        elements.append(raw[position : position + length])
        position += length
    return elements


# -- finding -----------------------------------------------------------------------------------------------------------


def has_shared_memory(tensor: _Tensor) -> bool:
    """Whether the tensor's data is in shared memory, where only the back end can read it."""
    return _SHARED_MEMORY_PARAMETER in tensor.parameters


def find_input(request: ModelInferRequest, name: str) -> _Tensor | None:
    """The input tensor called `name`."""
    for tensor in request.inputs:
        if tensor.name == name:
            return tensor
    return None


def find_output(response: ModelInferResponse, name: str) -> _Tensor | None:
    """The output tensor called `name`."""
    return next((tensor for tensor in response.outputs if tensor.name == name), None)


def raw_input_position(request: ModelInferRequest, name: str) -> int | None:
    """Where in `raw_input_contents` the input's data stands; None if it has no place there."""
    position = 0
    for tensor in request.inputs:
        raw = not tensor.HasField("contents") and not has_shared_memory(tensor)
        if tensor.name == name:
            return position if raw else None
        position += raw
    return None


def _output_index(response: ModelInferResponse, name: str) -> int | None:
    index = next((i for i, tensor in enumerate(response.outputs) if tensor.name == name), None)
    if index is None:
        return None
    outputs, raws = len(response.outputs), len(response.raw_output_contents)
    if raws not in (0, outputs):
        raise TensorError(
            name,
            f"{raws} raw_output_contents for {outputs} outputs",
            "outputs map by position to raw_output_contents, so there must be one each, or none at all",
        )
    return index


def _no_data(name: str, position: int, raws: int) -> TensorError:
    return TensorError(
        name,
        f"no data: its place is {position}, raw_input_contents has {raws}",
        "send the data in contents or in raw_input_contents",
    )


# -- reading -----------------------------------------------------------------------------------------------------------


def _elements(tensor: _Tensor) -> int:
    shape: list[int] = list(tensor.shape)
    if shape == [1]:
        return 1
    if len(shape) > _MAX_RANK:
        raise TensorError(tensor.name, f"a shape of {len(shape)} dimensions", f"at most {_MAX_RANK} dimensions")
    if any(dimension < 0 for dimension in shape):
        raise TensorError(tensor.name, f"shape {shape}", "dimensions are not negative")
    count = math.prod(shape)
    if count > _MAX_ELEMENTS:
        raise TensorError(tensor.name, f"shape {shape}", f"at most {_MAX_ELEMENTS} elements")
    return count


def _check_count(tensor: _Tensor, found: int) -> None:
    expected = _elements(tensor)
    if found != expected:
        raise TensorError(
            tensor.name,
            f"{found} elements for shape {list(tensor.shape)}",
            f"the data must have the {expected} elements of its shape",
        )


def _check_dtype(tensor: _Tensor, allowed: Sequence[str]) -> None:
    if tensor.datatype not in allowed:
        raise TensorError(tensor.name, f"datatype {tensor.datatype!r}", f"must be {' or '.join(allowed)}")


def _refuse_shared_memory(tensor: _Tensor) -> None:
    if has_shared_memory(tensor):
        raise TensorError(tensor.name, "data in shared memory", "send it in the request: shared memory cannot be read here")


def _decode_bytes(tensor: _Tensor, raw: bytes | None) -> list[bytes]:
    _check_dtype(tensor, ("BYTES",))
    if raw is None:
        elements = list(tensor.contents.bytes_contents)
        _check_count(tensor, len(elements))
        return elements
    expected = _elements(tensor)
    elements = unpack_bytes(raw, tensor=tensor.name, max_elements=expected)
    if len(elements) != expected:
        _check_count(tensor, len(elements))
    return elements


_INTEGERS: Final = tuple(name for name in DTYPE_SIZE_BYTES if name != "BOOL")


def _decode_numbers(tensor: _Tensor, raw: bytes | None, allowed: Sequence[str]) -> list[int]:
    _check_dtype(tensor, allowed)
    dtype: str = tensor.datatype
    if raw is None:
        values = list(getattr(tensor.contents, _TYPED_FIELD[dtype]))
        _check_count(tensor, len(values))
        return values
    count, size = _elements(tensor), DTYPE_SIZE_BYTES[dtype]
    if len(raw) != count * size:
        raise TensorError(
            tensor.name,
            f"{len(raw)} bytes for {dtype} of shape {list(tensor.shape)}",
            f"must be {count * size} bytes",
        )
    return list(struct.unpack(f"<{count}{_STRUCT_CODE[dtype]}", raw))


def _input_data(request: ModelInferRequest, name: str) -> tuple[_Tensor, bytes | None] | None:
    """An input and its raw data, or None in place of that where it has typed contents. One walk: each input that is looked at
    costs, and this is on the way of every request."""
    position = 0
    for tensor in request.inputs:
        typed = tensor.HasField("contents")
        if tensor.name == name:
            _refuse_shared_memory(tensor)
            if typed:
                return tensor, None
            raws = request.raw_input_contents
            if position >= len(raws):
                raise _no_data(name, position, len(raws))
            return tensor, raws[position]
        position += not typed and not has_shared_memory(tensor)
    return None


def read_bytes_input(request: ModelInferRequest, name: str) -> list[bytes] | None:
    """The elements of a BYTES input."""
    found = _input_data(request, name)
    return None if found is None else _decode_bytes(*found)


def read_texts_input(request: ModelInferRequest, name: str) -> list[str] | None:
    """The UTF-8 texts of a BYTES input."""
    elements = read_bytes_input(request, name)
    if elements is None:
        return None
    try:
        return [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        raise TensorError(name, f"byte {error.start} is not UTF-8", "send UTF-8 text") from error


def read_text_input(request: ModelInferRequest, name: str) -> str | None:
    """The single UTF-8 text of a BYTES input."""
    texts = read_texts_input(request, name)
    if texts is not None and len(texts) != 1:
        raise TensorError(name, f"{len(texts)} elements", "send exactly one text")
    return None if texts is None else texts[0]


def read_integers_input(request: ModelInferRequest, name: str) -> list[int] | None:
    """The elements of an input of any integer type, in order; its shape may have any rank."""
    found = _input_data(request, name)
    return None if found is None else _decode_numbers(*found, _INTEGERS)


def read_integer_input(request: ModelInferRequest, name: str) -> int | None:
    """The one element of an integer input of shape [], [1], [1, 1], ..."""
    return _single(name, read_integers_input(request, name))


def read_bool_input(request: ModelInferRequest, name: str) -> bool | None:
    """The one element of a BOOL input."""
    found = _input_data(request, name)
    if found is None:
        return None
    value = _single(name, _decode_numbers(*found, ("BOOL",)))
    return None if value is None else bool(value)


def _single(name: str, values: list[int] | None) -> int | None:
    if values is None:
        return None
    if len(values) != 1:
        raise TensorError(name, f"{len(values)} elements", "exactly one is read here")
    return values[0]


def _output_data(response: ModelInferResponse, index: int, tensor: _Tensor) -> bytes | None:
    _refuse_shared_memory(tensor)
    if response.raw_output_contents:
        raw: bytes = response.raw_output_contents[index]
        return raw
    return None


def read_bytes_output(response: ModelInferResponse, name: str) -> list[bytes] | None:
    """The elements of a BYTES output."""
    index = _output_index(response, name)
    if index is None:
        return None
    tensor = response.outputs[index]
    return _decode_bytes(tensor, _output_data(response, index, tensor))


def read_integers_output(response: ModelInferResponse, name: str) -> list[int] | None:
    """The elements of an output of any integer type, in order; its shape may have any rank."""
    index = _output_index(response, name)
    if index is None:
        return None
    tensor = response.outputs[index]
    return _decode_numbers(tensor, _output_data(response, index, tensor), _INTEGERS)


def read_integer_output(response: ModelInferResponse, name: str) -> int | None:
    """The one element of an integer output of shape [], [1], [1, 1], ..."""
    return _single(name, read_integers_output(response, name))


def count_elements(request: ModelInferRequest, name: str) -> int | None:
    """How many numbers an input of any numeric type has, by its shape, which its data must fit."""
    given = _input_data(request, name)
    if given is None:
        return None
    tensor, raw = given
    size = _ITEM_SIZE_BYTES.get(tensor.datatype)
    if size is None:
        raise TensorError(name, f"datatype {tensor.datatype!r}", f"must be one of {', '.join(_ITEM_SIZE_BYTES)}")
    if len(tensor.shape) > _MAX_RANK or any(dimension < 0 for dimension in tensor.shape):
        raise TensorError(name, f"shape {list(tensor.shape)[:_MAX_RANK]}", f"at most {_MAX_RANK} dimensions, none negative")
    count: int = math.prod(tensor.shape)
    if raw is None:
        found = max((len(values) for field, values in tensor.contents.ListFields()), default=0)
    else:
        found, rest = divmod(len(raw), size)
        found += bool(rest)
    if found != count:
        raise TensorError(name, f"{found} elements for shape {list(tensor.shape)}", f"the data must have the shape's {count}")
    return count


# -- writing -----------------------------------------------------------------------------------------------------------


def _add_input(request: ModelInferRequest, name: str, dtype: str, shape: Sequence[int]) -> tuple[_Tensor, bool]:
    """A new last input, and whether its data goes to raw_input_contents.

    Servers refuse requests that mix the two forms, so the form that the request already has decides.
    """
    if find_input(request, name) is not None:
        raise TensorError(name, "already in the request", "strip_input first")
    typed = bool(request.inputs) and not request.raw_input_contents
    return request.inputs.add(name=name, datatype=dtype, shape=shape), not typed


def add_bytes_input(request: ModelInferRequest, name: str, elements: Sequence[bytes]) -> None:
    """Append a BYTES input of shape [len(elements)]."""
    tensor, raw = _add_input(request, name, "BYTES", [len(elements)])
    if raw:
        request.raw_input_contents.append(pack_bytes(elements))
    else:
        tensor.contents.bytes_contents.extend(elements)


def add_integer_input(request: ModelInferRequest, name: str, value: int, *, dtype: str, shape: Sequence[int] = (1,)) -> None:
    """Append an input of one whole number, of any of the integer datatypes."""
    tensor, raw = _add_input(request, name, dtype, shape)
    if raw:
        request.raw_input_contents.append(struct.pack(f"<{_STRUCT_CODE[dtype]}", value))
    else:
        getattr(tensor.contents, _TYPED_FIELD[dtype]).append(value)


def add_bool_input(request: ModelInferRequest, name: str, value: bool, *, shape: Sequence[int] = (1,)) -> None:
    """Append a BOOL input with one element."""
    tensor, raw = _add_input(request, name, "BOOL", shape)
    if raw:
        request.raw_input_contents.append(b"\x01" if value else b"\x00")
    else:
        tensor.contents.bool_contents.append(value)


def strip_input(request: ModelInferRequest, name: str) -> bool:
    """Remove the input and its data; False if it was not there."""
    index = next((i for i, tensor in enumerate(request.inputs) if tensor.name == name), None)
    if index is None:
        return False
    position = raw_input_position(request, name)
    if position is not None:
        if position >= len(request.raw_input_contents):
            raise _no_data(name, position, len(request.raw_input_contents))
        del request.raw_input_contents[position]
    del request.inputs[index]
    return True


def add_bytes_output(
    response: ModelInferResponse, name: str, elements: Sequence[bytes], *, shape: Sequence[int] | None = None
) -> None:
    """Append a BYTES output with its raw data."""
    response.outputs.add(name=name, datatype="BYTES", shape=[len(elements)] if shape is None else shape)
    response.raw_output_contents.append(pack_bytes(elements))


def add_integer_output(
    response: ModelInferResponse, name: str, value: int, *, dtype: str = "UINT32", shape: Sequence[int] = (1,)
) -> None:
    """Append an integer output with one element and its raw data."""
    try:
        raw = struct.pack(f"<{_STRUCT_CODE[dtype]}", value)
    except struct.error as error:
        raise TensorError(name, value, f"must fit {dtype}") from error
    response.outputs.add(name=name, datatype=dtype, shape=shape)
    response.raw_output_contents.append(raw)


def strip_output(response: ModelInferResponse, name: str) -> bool:
    """Remove the output and its raw data; False if it was not there."""
    index = _output_index(response, name)
    if index is None:
        return False
    if response.raw_output_contents:
        del response.raw_output_contents[index]
    del response.outputs[index]
    return True


def request_output(request: ModelInferRequest, name: str) -> bool:
    """Ask for an output; True if the client had not. A request that names no outputs gets all of them."""
    if not request.outputs or any(output.name == name for output in request.outputs):
        return False
    request.outputs.add(name=name)
    return True


# -- parameters --------------------------------------------------------------------------------------------------------


def get_parameter(message: InferMessage, name: str) -> bool | int | float | str | None:
    """The parameter's value, of whichever type it has; None if it is absent or empty."""
    parameters = message.parameters
    if name not in parameters:
        return None
    parameter = parameters[name]
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        return None
    value: bool | int | float | str = getattr(parameter, choice)
    return value


def set_parameter(message: InferMessage, name: str, value: bool | int | float | str) -> None:
    """Set the parameter in the field of the value's type, whatever it was before."""
    parameter = service_pb2.InferParameter()
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    elif -(2**63) <= value < 2**63:
        parameter.int64_param = value
    elif 0 <= value < 2**64:
        parameter.uint64_param = value
    else:
        raise ValueError(f"parameter {name!r}: {value}: must fit 64 bits")
    message.parameters[name].CopyFrom(parameter)


def drop_parameter(message: InferMessage, name: str) -> bool:
    """Remove the parameter; False if it was not there."""
    if name not in message.parameters:
        return False
    del message.parameters[name]
    return True
