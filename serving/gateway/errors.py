"""Why an RPC ends without an answer, as one exception that carries what the client is told.

Who may try again later is told when: as `retry-after` in seconds, and as google.rpc.RetryInfo in `grpc-status-details-bin`,
where gRPC's clients look for it. The two messages around it are written here by hand: they have four fields, and the package
that has them is another dependency.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration

if TYPE_CHECKING:
    from serving.gateway.admission import Refusal
    from serving.kserve import TensorError

__all__ = ["CallError"]


class CallError(Exception):
    """The gateway ends this call itself, with a status and a sentence."""

    def __init__(self, status: grpc.StatusCode, message: str, answer: Any = None, *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        # The back end's own words on a stream, which a client is to get as they are.
        self.answer = answer
        self.retry_after_s = retry_after_s

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """What ends the call beside its status."""
        if not self.retry_after_s:
            return ()
        details = _retry_details(self.status, self.message, self.retry_after_s)
        return ("retry-after", str(self.retry_after_s)), ("grpc-status-details-bin", details)

    async def abort(self, context: Any) -> NoReturn:
        """End the call with it."""
        await context.abort(self.status, self.message, self.trailers)
        raise AssertionError("abort raises") from self

    @classmethod
    def refused(cls, refusal: Refusal) -> CallError:
        return cls(refusal.status, refusal.message, retry_after_s=refusal.retry_after_s)

    @classmethod
    def invalid(cls, error: TensorError) -> CallError:
        return cls(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def _bytes_field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message that is text, bytes or a message."""
    size = bytearray()
    rest = len(value)
    while rest > 0x7F:
        size.append(rest & 0x7F | 0x80)
        rest >>= 7
    size.append(rest)
    return bytes([number << 3 | 2]) + bytes(size) + value


def _retry_details(status: grpc.StatusCode, message: str, retry_after_s: int) -> bytes:
    """google.rpc.Status {code = 1, message = 2, details = 3} around google.rpc.RetryInfo {retry_delay = 1}."""
    retry_info = _bytes_field(1, Duration(seconds=retry_after_s).SerializeToString())
    wrapped = AnyMessage(type_url="type.googleapis.com/google.rpc.RetryInfo", value=retry_info).SerializeToString()
    code: int = status.value[0]
    return bytes([1 << 3, code]) + _bytes_field(2, message.encode()) + _bytes_field(3, wrapped)
