"""One served call, metered: what the interceptor, the middlewares and the decorator have in common.

Promise: `begin` refuses before any work is done (`JournalFull`, `InvalidEvent`); what it returns is open in the journal once
its receipt says so. `progress` and `close` state what was used so far and in the end, and their receipts say when that is on
disk: whoever answers a client waits for them before the bytes leave that they pay for. Who pays comes from the credentials
alone, by a function that the server's owner gives; nothing of a request's body says it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from billing.limits import ID_CHARS_MAX
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_GENERATE,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_BACKEND_ERROR_PARTIAL,
    OUTCOME_INTERRUPTED,
    SERVICE_CLASS_STANDARD,
    UnitQuantity,
    UsageEvent,
)

if TYPE_CHECKING:
    from producers.meter import OpenRequest, UsageMeter
    from producers.receipt import Receipt

__all__ = ["CallMeter", "Identity", "MeteredCall", "Used", "bearer_secret"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who pays for a call, and for what: from its credentials."""

    tenant_id: str
    project_id: str = ""
    user_id: str = ""
    api_key_id: str = ""


@dataclass(frozen=True, slots=True)
class Used:
    """What a call has used. The classes of tokens are disjoint: each token stands in one of them."""

    uncached_input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    image_input_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    units: Mapping[str, int] = field(default_factory=dict)
    """What is not text: "characters", "audio_ms", "pages"."""

    def __add__(self, other: Used) -> Used:
        units = dict(self.units)
        for unit, quantity in other.units.items():
            units[unit] = units.get(unit, 0) + quantity
        return Used(**{name: getattr(self, name) + getattr(other, name) for name in _TOKENS}, units=units)

    def fill(self, event: UsageEvent) -> None:
        """Put the quantities into `event`, in place of what it had."""
        for name in _TOKENS:
            setattr(event, name, getattr(self, name))
        event.context_tokens = (
            self.uncached_input_tokens
            + self.cache_read_tokens
            + self.cache_write_tokens
            + self.image_input_tokens
            + self.audio_input_tokens
        )
        del event.units[:]
        event.units.extend(UnitQuantity(unit=unit, quantity=quantity) for unit, quantity in sorted(self.units.items()))


_TOKENS: Final = tuple(name for name in Used.__slots__ if name.endswith("_tokens"))


def bearer_secret(credentials: Mapping[str, str]) -> str:
    """The secret of `authorization: Bearer …`, else of `x-api-key`; empty where there is none. Names are in lower case."""
    kind, _, secret = credentials.get("authorization", "").partition(" ")
    return (secret if kind.lower() == "bearer" else credentials.get("x-api-key", "")).strip()


@dataclass(frozen=True)
class CallMeter:
    """What all calls of one server share. May be used from any thread."""

    meter: UsageMeter
    server_id: str = ""
    region: str = ""
    durable_timeout_s: float = 30.0
    """How long a call waits for the journal's disk before it fails."""

    def begin(
        self, identity: Identity, model: str, operation: int = OPERATION_GENERATE, client_request_id: str = ""
    ) -> MeteredCall:
        """Open a call. Raises `JournalFull` and `InvalidEvent`: then nothing may be done for it."""
        started_ms = _now_ms()
        event = UsageEvent(
            request_id=uuid4().hex,
            tenant_id=identity.tenant_id,
            project_id=identity.project_id,
            user_id=identity.user_id,
            api_key_id=identity.api_key_id,
            model=model,
            operation=operation,  # type: ignore[arg-type]
            service_class=SERVICE_CLASS_STANDARD,
            outcome=OUTCOME_INTERRUPTED,
            count_source=COUNT_SOURCE_BACKEND,
            started_ms=started_ms,
            ended_ms=started_ms,
            server_id=self.server_id,
            region=self.region,
            client_request_id=client_request_id[:ID_CHARS_MAX],
        )
        return MeteredCall(self.meter.open(event), event)


class MeteredCall:
    """A call that runs. Belongs to one thread or task at a time."""

    __slots__ = ("_closing", "_event", "_open", "_progress", "_started", "_used", "receipt")

    def __init__(self, opened: OpenRequest, event: UsageEvent) -> None:
        self.receipt = opened.receipt
        """Says when the call is open on disk: work begins then."""
        self._open = opened
        self._event = event
        self._used = Used()
        self._started = time.monotonic()
        self._progress: Receipt | None = None
        self._closing: Receipt | None = None

    @property
    def request_id(self) -> str:
        """What the usage event is called."""
        return self._event.request_id

    @property
    def is_closed(self) -> bool:
        """Whether its bill is written, or being written."""
        return self._closing is not None

    def progress(self, used: Used) -> Receipt:
        """What it has used by now: what it is billed for if this process dies. Wait for the receipt before that leaves."""
        if self._progress is None or used != self._used:
            self._fill(used)
            self._progress = self._open.progress(self._event)
        return self._progress

    def close(self, outcome: int, used: Used | None = None, source: int = COUNT_SOURCE_BACKEND) -> Receipt:
        """What it used in the end; None: what the last progress said. Later calls change nothing, unless the journal failed."""
        if self._closing is not None and not self._closing.has_failed:
            return self._closing
        self._fill(self._used if used is None else used)
        self._event.count_source = source  # type: ignore[assignment]
        self._event.outcome = outcome  # type: ignore[assignment]
        self._closing = self._open.close(self._event)
        return self._closing

    def fail(self, used: Used | None = None, *, delivered: bool) -> Receipt:
        """It ended with an error of the server: what was delivered is billed, an error before that costs nothing."""
        return self.close(OUTCOME_BACKEND_ERROR_PARTIAL if delivered else OUTCOME_BACKEND_ERROR, used)

    def saw_answer(self) -> None:
        """The first part of the answer is there: its time is kept."""
        if not self._event.time_to_first_token_ms:
            self._event.time_to_first_token_ms = max(1, self._elapsed_ms())

    def _elapsed_ms(self) -> int:
        return min(int((time.monotonic() - self._started) * 1_000), 2**32 - 1)

    def _fill(self, used: Used) -> None:
        self._used = used
        used.fill(self._event)
        self._event.latency_ms = self._elapsed_ms()
        # The wall clock may have been set back since the start.
        self._event.ended_ms = max(_now_ms(), self._event.started_ms)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
