"""What the ASGI and the WSGI middleware have in common: which requests are metered, and how an answer is held and counted.

Promise: an answer that is one document leaves when its usage is durable. Of a stream, an event that says usage leaves when that
is durable, and the last event (`[DONE]`, or the end of the body) when the bill is. A stream that the client leaves is billed by
the latest usage that it said, else by what `estimate` makes of what was delivered.

What a full journal means: the request is refused with 503 and Retry-After before the server sees it. One that no bill can be
written for (a model's name that is too long) is refused with 400. A credential that
`identify` does not know: 401. A disk that fails under an answer: a document becomes a 503, a stream breaks off before its end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_ESTIMATE,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
)
from producers.calls import CallMeter, Identity, Used
from producers.errors import InvalidEvent, ProducerError
from producers.openai_usage import OPERATIONS, EventStream, OpenAIRequest, read_answer

if TYPE_CHECKING:
    from producers.calls import MeteredCall
    from producers.receipt import Receipt

__all__ = ["AnswerTooLarge", "Identify", "MeteredAnswer", "OpenAIMetering", "Refusal"]

_LOG = logging.getLogger(__name__)

Identify = Callable[[Mapping[str, str]], Identity | Awaitable[Identity | None] | None]
Estimate = Callable[[bytes, bytes], Used]

# The answer must be readable here; compress outside of the middleware. The body has another length than the client's.
NOT_HANDED_ON: Final = frozenset({"accept-encoding", "content-length", "transfer-encoding"})


class AnswerTooLarge(ProducerError):
    """An answer that is one document is over the bound within which it can be held until its usage is durable."""


@dataclass(frozen=True)
class OpenAIMetering:
    """How a server's OpenAI-shaped endpoints are metered."""

    calls: CallMeter
    identify: Identify
    """From the request's headers (names in lower case) to who pays; None: nobody, the request is refused."""
    operations: Mapping[str, int] = field(default_factory=lambda: OPERATIONS)
    """By the end of the path of a POST, with or without a slash behind it; others pass unmetered."""
    model: str = ""
    """For requests that name none: a server of one model."""
    continuous_usage: bool = False
    """Ask for usage with each event (vLLM's `continuous_usage_stats`): a stream that is cut off is then billed to the token."""
    estimate: Estimate | None = None
    """From the request's body and what was delivered of the answer to what it used, where the server does not say."""
    request_bytes_max: int = 32 << 20
    answer_bytes_max: int = 64 << 20

    def operation(self, method: str, path: str) -> tuple[str, int] | None:
        """The endpoint and its operation, where the request is metered."""
        if method != "POST":
            return None
        return next(((end, number) for end, number in self.operations.items() if path.rstrip("/").endswith(end)), None)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer of the middleware itself, shaped as OpenAI's errors are."""

    status: int
    reason: str
    message: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        return json.dumps({"error": {"message": self.message, "type": self.reason, "code": self.status}}).encode()

    @property
    def all_headers(self) -> list[tuple[str, str]]:
        return [("content-type", "application/json"), ("content-length", str(len(self.body))), *self.headers]

    @classmethod
    def unknown(cls) -> Refusal:
        """Nobody pays for it."""
        return cls(401, "invalid_api_key", "API key: missing, unknown or expired: send a valid one as 'Authorization: Bearer'")

    @classmethod
    def too_large(cls, bytes_max: int) -> Refusal:
        return cls(413, "request_too_large", f"body: over {bytes_max} bytes: send a shorter request")

    @classmethod
    def unrecorded(cls, error: Exception) -> Refusal:
        """Nothing is done that cannot be billed."""
        if isinstance(error, InvalidEvent):
            return cls(400, "request_invalid", str(error))
        return cls(503, "usage_unrecorded", f"usage cannot be recorded: {error}", (("retry-after", "1"),))


class MeteredAnswer:
    """One answer on its way to the client."""

    def __init__(self, metering: OpenAIMetering, call: MeteredCall, request: OpenAIRequest) -> None:
        self.streams = False
        """Its parts leave as they come; else it is held whole."""
        self._metering = metering
        self._call = call
        self._request = request
        self._status = 0
        self._events = EventStream(hides_usage=request.hides_usage)
        self._kept = bytearray()
        self._delivered_any = False

    def start(self, status: int, content_type: str) -> None:
        """The server has begun to answer."""
        self._status = status
        self.streams = status < 400 and content_type.lower().startswith("text/event-stream")

    def feed(self, chunk: bytes, *, last: bool) -> tuple[bytes, Receipt | None]:
        """What may leave, once the receipt is durable. Raises `AnswerTooLarge`."""
        if chunk:
            self._call.saw_answer()
        return self._feed_stream(chunk, last=last) if self.streams else self._feed_document(chunk, last=last)

    def _feed_document(self, chunk: bytes, *, last: bool) -> tuple[bytes, Receipt | None]:
        self._kept += chunk
        if len(self._kept) > self._metering.answer_bytes_max:
            raise AnswerTooLarge(f"answer_bytes_max={self._metering.answer_bytes_max}: the answer is larger: set it higher")
        if not last:
            return b"", None
        if self._status >= 400:
            return bytes(self._kept), self._call.fail(Used(), delivered=False)
        return bytes(self._kept), self._close(OUTCOME_COMPLETED, read_answer(bytes(self._kept)))

    def _feed_stream(self, chunk: bytes, *, last: bool) -> tuple[bytes, Receipt | None]:
        events = self._events.feed(chunk)
        if last:
            events += self._events.finish()
        data = b"".join(event.data for event in events)
        if self._metering.estimate is not None and len(self._kept) <= self._metering.answer_bytes_max:
            self._kept += data
        self._delivered_any |= bool(data)
        if self._call.is_closed:
            return data, None
        if last or any(event.ends for event in events):
            if self._events.failed:
                return data, self._call.fail(self._events.used, delivered=True)
            return data, self._close(OUTCOME_COMPLETED, self._events.used)
        return data, None if self._events.used is None else self._call.progress(self._events.used)

    def _close(self, outcome: int, used: Used | None) -> Receipt:
        if used is not None:
            return self._call.close(outcome, used, COUNT_SOURCE_BACKEND)
        if self._metering.estimate is not None:
            estimated = self._metering.estimate(self._request.body, bytes(self._kept))
            return self._call.close(outcome, estimated, COUNT_SOURCE_ESTIMATE)
        _LOG.warning(
            "request %s of model %r: the server said no usage, so it is billed none: let it report usage, or give an estimate",
            self._call.request_id,
            self._request.model,
        )
        return self._call.close(outcome, None, COUNT_SOURCE_ESTIMATE)

    def leave(self) -> None:
        """The client is gone. Nobody waits for the receipt: the journal commits it all the same."""
        if not self._call.is_closed:
            self._close(OUTCOME_CANCELLED, self._events.used)

    def fail(self) -> None:
        """The server has failed."""
        if not self._call.is_closed:
            self._call.fail(self._events.used if self._delivered_any else Used(), delivered=self._delivered_any)
