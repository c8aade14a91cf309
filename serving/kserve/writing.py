"""Add and remove tensors of inference messages, each with its data.

Servers refuse requests that mix typed and raw data, so the form that a request already has decides; whoever removes a tensor
removes its raw entry with it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from serving.kserve.tensors import (
    STRUCT_CODE,
    TYPED_FIELD,
    TensorError,
    find_input,
    no_data,
    output_index,
    pack_bytes,
    raw_input_position,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.kserve.tensors import ModelInferRequest, ModelInferResponse, Tensor

__all__ = [
    "add_bool_input",
    "add_bytes_input",
    "add_bytes_output",
    "add_integer_input",
    "add_integer_output",
    "request_output",
    "strip_input",
    "strip_output",
]


def _add_input(request: ModelInferRequest, name: str, dtype: str, shape: Sequence[int]) -> tuple[Tensor, bool]:
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
        request.raw_input_contents.append(struct.pack(f"<{STRUCT_CODE[dtype]}", value))
    else:
        getattr(tensor.contents, TYPED_FIELD[dtype]).append(value)


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
            raise no_data(name, position, len(request.raw_input_contents))
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
        raw = struct.pack(f"<{STRUCT_CODE[dtype]}", value)
    except struct.error as error:
        raise TensorError(name, value, f"must fit {dtype}") from error
    response.outputs.add(name=name, datatype=dtype, shape=shape)
    response.raw_output_contents.append(raw)


def strip_output(response: ModelInferResponse, name: str) -> bool:
    """Remove the output and its raw data; False if it was not there."""
    index = output_index(response, name)
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
