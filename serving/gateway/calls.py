"""One call as the gateway holds it: who calls, and the request that was let through."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from serving.gateway.tracing import another_span, with_span

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serving.gateway.counting import PreparedRequest
    from serving.gateway.limits import RequestSlot
    from serving.gateway.metering import RequestMeter
    from serving.gateway.profiles import ModelProfile
    from serving.kserve import ModelInferRequest

__all__ = ["Admitted", "Caller", "Metadata"]

# Between timers of several processes on a busy machine.
_LATE_S: Final = 0.05

Metadata = tuple[tuple[str, str | bytes], ...]


class Caller(NamedTuple):
    """One call's client: the hash of its secret, what is passed on of its metadata, and when it stops waiting."""

    secret_hash: bytes | None
    metadata: Metadata
    deadline: float | None
    """On the monotonic clock."""
    wants_status: bool
    """`triton_grpc_error: true`: errors of a stream are to end it with their status."""
    span: str = ""
    """The gateway's own in the client's trace; empty: it is not traced."""

    def for_one_request(self) -> Caller:
        """The same for one request of a stream, which is a span of its own."""
        if not self.span:
            return self
        span = another_span(self.span)
        # It stands last, where it was put.
        return self._replace(span=span, metadata=with_span(self.metadata[:-1], span))

    def time_left_s(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def is_late(self) -> bool:
        """Whether the client has stopped waiting. gRPC's timers, here and at the back end, may be a moment ahead of ours."""
        left_s = self.time_left_s()
        return left_s is not None and left_s < _LATE_S


@dataclass(slots=True)
class Admitted:
    """A request that may be forwarded: rewritten, open in the journal, and counted among those that run."""

    request: ModelInferRequest
    profile: ModelProfile
    prepared: PreparedRequest
    meter: RequestMeter
    tenant_id: str
    slot: RequestSlot
    end: Callable[[], Awaitable[None]] | None = None
    """Where its client is gone and the back end has been left to end the answer: what returns when it has."""
