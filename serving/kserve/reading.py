"""Read tensors of inference messages: bytes, texts, whole numbers, flags, without copying what is not asked for.

Everything that comes from a peer is checked before it is used: data that does not fit its shape raises `TensorError`. A tensor
that is not there is `None`, never an error.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final

from serving.kserve.tensors import (
    DTYPE_SIZE_BYTES,
    ELEMENTS_MAX,
    STRUCT_CODE,
    TYPED_FIELD,
    TensorError,
    has_shared_memory,
    no_data,
    output_index,
    unpack_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.kserve.tensors import ModelInferRequest, ModelInferResponse, Tensor

__all__ = [
    "count_elements",
    "read_bool_input",
    "read_bytes_input",
    "read_bytes_output",
    "read_integer_input",
    "read_integer_output",
    "read_integers_input",
    "read_integers_output",
    "read_text_input",
    "read_texts_input",
]

# Also of what is only counted here, never read.
_ITEM_SIZE_BYTES: Final = {**DTYPE_SIZE_BYTES, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}
# The product of a million dimensions takes minutes.
_RANK_MAX: Final = 32


def _elements(tensor: Tensor) -> int:
    shape: list[int] = list(tensor.shape)
    if shape == [1]:
        return 1
    if len(shape) > _RANK_MAX:
        raise TensorError(tensor.name, f"a shape of {len(shape)} dimensions", f"at most {_RANK_MAX} dimensions")
    if any(dimension < 0 for dimension in shape):
        raise TensorError(tensor.name, f"shape {shape}", "dimensions are not negative")
    count = math.prod(shape)
    if count > ELEMENTS_MAX:
        raise TensorError(tensor.name, f"shape {shape}", f"at most {ELEMENTS_MAX} elements")
    return count


def _check_count(tensor: Tensor, found: int) -> None:
    expected = _elements(tensor)
    if found != expected:
        raise TensorError(
            tensor.name,
            f"{found} elements for shape {list(tensor.shape)}",
            f"the data must have the {expected} elements of its shape",
        )


def _check_dtype(tensor: Tensor, allowed: Sequence[str]) -> None:
    if tensor.datatype not in allowed:
        raise TensorError(tensor.name, f"datatype {tensor.datatype!r}", f"must be {' or '.join(allowed)}")


def _refuse_shared_memory(tensor: Tensor) -> None:
    if has_shared_memory(tensor):
        raise TensorError(tensor.name, "data in shared memory", "send it in the request: shared memory cannot be read here")


def _decode_bytes(tensor: Tensor, raw: bytes | None) -> list[bytes]:
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


def _decode_numbers(tensor: Tensor, raw: bytes | None, allowed: Sequence[str]) -> list[int]:
    _check_dtype(tensor, allowed)
    dtype: str = tensor.datatype
    if raw is None:
        values = list(getattr(tensor.contents, TYPED_FIELD[dtype]))
        _check_count(tensor, len(values))
        return values
    count, size = _elements(tensor), DTYPE_SIZE_BYTES[dtype]
    if len(raw) != count * size:
        raise TensorError(
            tensor.name,
            f"{len(raw)} bytes for {dtype} of shape {list(tensor.shape)}",
            f"must be {count * size} bytes",
        )
    return list(struct.unpack(f"<{count}{STRUCT_CODE[dtype]}", raw))


def _input_data(request: ModelInferRequest, name: str) -> tuple[Tensor, bytes | None] | None:
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
                raise no_data(name, position, len(raws))
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


def _output_data(response: ModelInferResponse, index: int, tensor: Tensor) -> bytes | None:
    _refuse_shared_memory(tensor)
    if response.raw_output_contents:
        raw: bytes = response.raw_output_contents[index]
        return raw
    return None


def read_bytes_output(response: ModelInferResponse, name: str) -> list[bytes] | None:
    """The elements of a BYTES output."""
    index = output_index(response, name)
    if index is None:
        return None
    tensor = response.outputs[index]
    return _decode_bytes(tensor, _output_data(response, index, tensor))


def read_integers_output(response: ModelInferResponse, name: str) -> list[int] | None:
    """The elements of an output of any integer type, in order; its shape may have any rank."""
    index = output_index(response, name)
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
    if len(tensor.shape) > _RANK_MAX or any(dimension < 0 for dimension in tensor.shape):
        raise TensorError(name, f"shape {list(tensor.shape)[:_RANK_MAX]}", f"at most {_RANK_MAX} dimensions, none negative")
    count: int = math.prod(tensor.shape)
    if raw is None:
        found = max((len(values) for field, values in tensor.contents.ListFields()), default=0)
    else:
        found, rest = divmod(len(raw), size)
        found += bool(rest)
    if found != count:
        raise TensorError(name, f"{found} elements for shape {list(tensor.shape)}", f"the data must have the shape's {count}")
    return count
