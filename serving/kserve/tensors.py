"""Where tensors and their data stand in inference messages, how their elements are laid out, and what is said of one that
cannot be read.

A tensor's data stands in one of three places: in the typed field `contents`, in `raw_input_contents` (whose position advances
only for inputs that have neither `contents` nor shared memory), or in shared memory, where nobody but the back end can see it.
Outputs map by position to `raw_output_contents`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "DTYPE_SIZE_BYTES",
    "ELEMENTS_MAX",
    "STRUCT_CODE",
    "TYPED_FIELD",
    "InferMessage",
    "ModelInferRequest",
    "ModelInferResponse",
    "Tensor",
    "TensorError",
    "find_input",
    "find_output",
    "has_shared_memory",
    "no_data",
    "output_index",
    "pack_bytes",
    "raw_input_position",
    "unpack_bytes",
]

# tritonclient ships no types, so its messages are Any to a type checker; these names say which ones are meant.
ModelInferRequest: TypeAlias = Any
ModelInferResponse: TypeAlias = Any
InferMessage: TypeAlias = Any
Tensor: TypeAlias = Any

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
STRUCT_CODE: Final[dict[str, str]] = {
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
TYPED_FIELD: Final[dict[str, str]] = {
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
ELEMENTS_MAX: Final = 1 << 20


class TensorError(ValueError):
    """A tensor that cannot be read: its name, the value that does not fit, and what would."""

    def __init__(self, tensor: str, value: object, mend: str) -> None:
        super().__init__(f"tensor {tensor!r}: {value}: {mend}")
        self.tensor = tensor
        self.value = value
        self.mend = mend


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    """The raw form of a BYTES tensor: each element behind its little-endian uint32 length."""
    parts: list[bytes] = []
    for element in elements:
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def unpack_bytes(raw: bytes, *, tensor: str, max_elements: int = ELEMENTS_MAX) -> list[bytes]:
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


def has_shared_memory(tensor: Tensor) -> bool:
    """Whether the tensor's data is in shared memory, where only the back end can read it."""
    return _SHARED_MEMORY_PARAMETER in tensor.parameters


def find_input(request: ModelInferRequest, name: str) -> Tensor | None:
    """The input tensor called `name`."""
    for tensor in request.inputs:
        if tensor.name == name:
            return tensor
    return None


def find_output(response: ModelInferResponse, name: str) -> Tensor | None:
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


def output_index(response: ModelInferResponse, name: str) -> int | None:
    """Where the output stands among the outputs and, if there are any, among `raw_output_contents`."""
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


def no_data(name: str, position: int, raws: int) -> TensorError:
    """Of an input whose place in `raw_input_contents` is beyond its end."""
    return TensorError(
        name,
        f"no data: its place is {position}, raw_input_contents has {raws}",
        "send the data in contents or in raw_input_contents",
    )
