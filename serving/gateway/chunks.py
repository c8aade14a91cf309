"""Chunks of an answer as the bytes that they are: what they repeat is read, and written, once.

The chunks of one answer differ in their data, and hardly ever in what stands before it: IDs, parameters, the outputs' names,
types and shapes. So one chunk is read as a message, and of those that follow with the same bytes in front only the data is
looked at. What the client gets of them is the front as it is to be, made once, and the data that it may see, as it came. That
says the same as reading and writing each: a protobuf message is what its fields say in their order, wherever it is cut between
two of them. A chunk that begins otherwise, or has anything but data behind its front, is read in full.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.kserve import FINAL_PARAMETER, TensorError

if TYPE_CHECKING:
    from serving.gateway.counting import DataPlan

__all__ = ["Arrivals", "ChunkForm", "StreamResponse", "learn_form", "read_response", "serialize"]

StreamResponse = Any  # inference.ModelStreamInferResponse, which has no types

_LENGTHS: Final = 2  # the wire type of what says its length first
_RESPONSE_TAG: Final = service_pb2.ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number << 3 | _LENGTHS
_DATA_TAG: Final = service_pb2.ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number << 3 | _LENGTHS
# Bytes of what has a fixed length, by wire type.
_FIXED: Final = {1: 8, 5: 4}
_VARINT_BYTES_MAX: Final = 10

_Item = TypeVar("_Item")


def read_response(data: bytes) -> StreamResponse:
    """A back end's chunk. Raises TensorError for what is none."""
    try:
        return service_pb2.ModelStreamInferResponse.FromString(data)
    except DecodeError as error:
        raise TensorError("infer_response", f"{len(data)} bytes that are no response", "one of KServe v2") from error


def serialize(response: StreamResponse | bytes) -> bytes:
    """What leaves: bytes as they are, a message as bytes."""
    if isinstance(response, bytes):
        return response
    data: bytes = response.SerializeToString()
    return data


class ChunkForm:
    """What chunks with one front have in common."""

    __slots__ = ("_front", "_front_bytes", "_front_out", "_outputs", "_seen", "is_final", "plan")

    def __init__(self, front: bytes, front_out: bytes, outputs: int, seen: int, plan: DataPlan, is_final: object) -> None:
        self._front = front
        self._front_bytes = len(front)
        self._front_out = front_out
        self._outputs = range(outputs)
        # The client sees so many of them: the first.
        self._seen = seen
        self.plan = plan
        self.is_final = is_final
        """What they say of themselves; None: nothing."""

    def read(self, chunk: bytes) -> tuple[list[bytes], bytes] | None:
        """The chunk's data, and the chunk as the client gets it; None: it has another form."""
        try:
            length, at = chunk[1], 2
            if length >= 0x80:
                length, at = _varint(chunk, 1)
            end = len(chunk)
            if at + length != end or chunk[0] != _RESPONSE_TAG or not chunk.startswith(self._front, at):
                return None
            begin = at = at + self._front_bytes
            seen, seen_end = self._seen, end
            raws: list[bytes] = []
            for number in self._outputs:
                if number == seen:
                    seen_end = at
                if chunk[at] != _DATA_TAG:
                    return None
                length = chunk[at + 1]
                at += 2
                if length >= 0x80:
                    length, at = _varint(chunk, at - 1)
                data_end = at + length
                raws.append(chunk[at:data_end])
                at = data_end
        except IndexError:
            return None
        if at != end:
            return None
        front_out = self._front_out
        return raws, b"".join((_head(len(front_out) + seen_end - begin), front_out, chunk[begin:seen_end]))


def learn_form(chunk: bytes, response: StreamResponse, plan: DataPlan) -> ChunkForm | None:
    """The form of a chunk that has been read: `response` is it as the client gets it. None: it has none to be used again."""
    infer = response.infer_response
    seen = len(infer.outputs)
    if tuple([tensor.name for tensor in infer.outputs]) != plan.outputs[:seen]:
        # What is hidden stands between others.
        return None
    front = _front(chunk)
    if front is None:
        return None
    shown = service_pb2.ModelInferResponse()
    shown.CopyFrom(infer)
    del shown.raw_output_contents[:]
    final = kserve.get_parameter(infer, FINAL_PARAMETER)
    form = ChunkForm(front, shown.SerializeToString(), len(plan.outputs), seen, plan, final)
    # Of a chunk that has more than data behind its front, nothing follows for others.
    return None if form.read(chunk) is None else form


def _front(chunk: bytes) -> bytes | None:
    """All of the response before its data; None where something stands beside the response."""
    try:
        length, begin = _varint(chunk, 1)
        if chunk[0] != _RESPONSE_TAG or begin + length != len(chunk):
            return None
        at = begin
        while at < len(chunk) and chunk[at] != _DATA_TAG:
            tag, at = _varint(chunk, at)
            kind = tag & 7
            if kind == 0:
                _, at = _varint(chunk, at)
            elif kind == _LENGTHS:
                length, at = _varint(chunk, at)
                at += length
            elif kind in _FIXED:
                at += _FIXED[kind]
            else:
                return None
    except IndexError:
        return None
    return chunk[begin:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends. Raises IndexError where it does not."""
    value = 0
    for place in range(_VARINT_BYTES_MAX):
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError(at)


def _head(length: int) -> bytes:
    """What stands before a response of this length in its message."""
    if length < 0x80:
        return bytes((_RESPONSE_TAG, length))
    if length < 0x4000:
        return bytes((_RESPONSE_TAG, length & 0x7F | 0x80, length >> 7))
    head = [_RESPONSE_TAG]
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head)


class Arrivals(Generic[_Item]):
    """What has come and nobody has taken: one task puts, another takes all that there is. Who puts keeps the bound."""

    __slots__ = ("_items", "_items_max", "_room", "_taker")

    def __init__(self, items_max: int) -> None:
        self._items: list[_Item] = []
        self._items_max = items_max
        self._taker: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def put(self, item: _Item) -> bool:
        """Put it in, full or not; whether there is room for more."""
        items = self._items
        items.append(item)
        if self._taker is not None:
            _wake(self._taker)
            self._taker = None
        return len(items) < self._items_max

    async def room(self) -> None:
        """Return when there is room."""
        while len(self._items) >= self._items_max:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def take(self) -> list[_Item]:
        """All that has come, at least one."""
        while not self._items:
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        return self.take_now()

    def take_now(self) -> list[_Item]:
        """All that has come, if anything has."""
        items, self._items = self._items, []
        if self._room is not None:
            _wake(self._room)
            self._room = None
        return items


def _wake(waiter: asyncio.Future[None]) -> None:
    # Whoever waited may have been cancelled.
    if not waiter.done():
        waiter.set_result(None)
