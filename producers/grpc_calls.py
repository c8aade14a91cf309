"""What the two gRPC interceptors have in common: which methods are metered, by which reader, and how an RPC's bill is made.

Promise: an RPC of a metered method reaches the server's own code only when it is open in the journal; each response leaves when
what it adds is durable, and the RPC ends when its bill is. One RPC is one bill: on a stream the reader adds its requests up.
A key that `identify` does not know is UNAUTHENTICATED, a full journal RESOURCE_EXHAUSTED, a disk that fails UNAVAILABLE.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from billing.v1.usage_pb2 import OUTCOME_CANCELLED, OUTCOME_COMPLETED, OUTCOME_DEADLINE_EXCEEDED
from producers.calls import CallMeter, Identity, Used
from producers.errors import InvalidEvent, JournalFull, ProducerError

if TYPE_CHECKING:
    from producers.calls import MeteredCall
    from producers.receipt import Receipt

__all__ = ["GrpcMetering", "Identify", "MeteredRpc", "RpcRefused", "UsageReader"]

Identify = Callable[[Mapping[str, str]], Identity | Awaitable[Identity | None] | None]

_LATE_S = 0.005


class RpcRefused(ProducerError):
    """An RPC that ends with a status of the metering's own."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class UsageReader(Protocol):
    """Reads one RPC's messages. Raises `RpcRefused` for what it cannot meter."""

    model: str
    """Known once the first request was taken."""
    operation: int
    failed: bool
    """The server has said in a response that it failed."""

    def take_request(self, request: Any) -> Any:
        """What the server gets: the request, or one that makes it count."""
        ...

    def take_response(self, response: Any) -> Any:
        """What the client gets; None: nothing."""
        ...

    def used(self) -> Used:
        """All so far."""
        ...


@dataclass(frozen=True)
class GrpcMetering:
    """How a gRPC server's methods are metered."""

    calls: CallMeter
    identify: Identify
    """From the metadata of the call to who pays; None: nobody, the call is refused."""
    readers: Mapping[str, Callable[[], UsageReader]]
    """By the full name of the method, as "/package.Service/Method", what makes a reader for one RPC. Others pass unmetered."""


class MeteredRpc:
    """One RPC."""

    def __init__(self, metering: GrpcMetering, method: str, context: Any) -> None:
        self.metering = metering
        self._context = context
        self._reader = metering.readers[method]()
        self._identity: Identity | None = None
        self._call: MeteredCall | None = None
        self._delivered_any = False

    @property
    def timeout_s(self) -> float:
        """How long it waits for the journal."""
        return self.metering.calls.durable_timeout_s

    def credentials(self) -> dict[str, str]:
        """The metadata that is text."""
        pairs = ((key, value) for key, value in self._context.invocation_metadata() or ())
        return {key.lower(): value for key, value in pairs if isinstance(value, str)}

    def know(self, identity: Identity | None) -> None:
        """Who pays. Raises `RpcRefused` where nobody does."""
        if identity is None:
            raise RpcRefused(grpc.StatusCode.UNAUTHENTICATED, "API key: missing, unknown or expired: send a valid one")
        self._identity = identity

    def take_request(self, request: Any) -> tuple[Any, Receipt | None]:
        """What the server gets, once the receipt of the first request is durable."""
        assert self._identity is not None, "who pays is known first"
        request = self._reader.take_request(request)
        if self._call is not None:
            return request, None
        self._call = self.metering.calls.begin(self._identity, self._reader.model, self._reader.operation)
        return request, self._call.receipt

    def take_response(self, response: Any) -> tuple[Any, Receipt | None]:
        """What the client gets once the receipt is durable."""
        response = self._reader.take_response(response)
        if self._call is None:
            # It answers before it is asked: that costs nothing yet.
            return response, None
        self._call.saw_answer()
        self._delivered_any = True
        return response, self._call.progress(self._reader.used())

    def finish(self) -> Receipt | None:
        """The server's own code has ended well; the RPC may when the receipt is durable."""
        if self._call is None:
            return None
        status = self._context.code()
        if self._reader.failed or status not in (None, 0, grpc.StatusCode.OK):
            return self._call.fail(self._reader.used(), delivered=self._delivered_any)
        return self._call.close(OUTCOME_COMPLETED, self._reader.used())

    def leave(self) -> None:
        """The client is gone, or has stopped waiting."""
        if self._call is not None and not self._call.is_closed:
            left_s = self._context.time_remaining()
            is_late = left_s is not None and left_s < _LATE_S
            self._call.close(OUTCOME_DEADLINE_EXCEEDED if is_late else OUTCOME_CANCELLED, self._reader.used())

    def fail(self) -> None:
        """The server's own code has failed."""
        if self._call is not None and not self._call.is_closed:
            self._call.fail(self._reader.used() if self._delivered_any else Used(), delivered=self._delivered_any)

    @staticmethod
    def refusal(error: ProducerError) -> RpcRefused:
        """What the client is told."""
        if isinstance(error, RpcRefused):
            return error
        if isinstance(error, InvalidEvent):
            return RpcRefused(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        full = isinstance(error, JournalFull)
        status = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNAVAILABLE
        return RpcRefused(status, f"usage cannot be recorded: {error}")
