"""Spans of what became of traced requests' usage behind the gateway: in the ledger, and in the database.

Promise: worker and sink never wait for it, and nothing that it does fails them. Each traced and sampled request of a record is
a span in the request's own trace, child of the gateway's, `SPANS_MAX` of a record at most; records wait in a bounded queue for
the thread that looks into them, and what comes while it is full is left out.

A worker's span begins when the request ended at its metering point and ends when the ledger has the record; a sink's begins at
the record's log time and ends when ClickHouse has its rows. A record that is written again, after a crash say, is told again.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from typing import TYPE_CHECKING, Final

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context

from billing.v1.ledger_pb2 import DropReason
from billing.v1.usage_pb2 import UsageBatch
from serving.otlp_spans import SpanSender, close_within

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from billing.v1.ledger_pb2 import LedgerRecord
    from billing.v1.usage_pb2 import UsageEvent

__all__ = ["SPANS_MAX", "LedgerSpans"]

_LOG = logging.getLogger(__name__)
SPANS_MAX: Final = 64
_RECORDS_MAX: Final = 256
_TRACEPARENT: Final = "traceparent"
# In a batch's bytes, where any of its events has the attribute.
_MARK: Final = _TRACEPARENT.encode()
_SAMPLED: Final = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f][13579bdf])")
_NS_PER_MS: Final = 1_000_000
_ACCEPTED: Final = "accepted"
_RESULTS: Final[dict[int, str]] = {number: name.removeprefix("DROP_REASON_").lower() for name, number in DropReason.items()}
# What is no error: it was charged already, or is charged in its own partition.
_WELL: Final = frozenset({_ACCEPTED, "duplicate", "forwarded"})


class LedgerSpans:
    """What one worker or sink tells a collector. `took` may be called from any one thread; `close` it once."""

    def __init__(self, endpoint: str, *, part: str, topic: str) -> None:
        """`topic`: what the part reads."""
        self._sender = SpanSender(endpoint, f"taximeter-{part}")
        self._topic = topic
        self._is_sink = part == "sink"
        self._records: queue.Queue[tuple[LedgerRecord, int] | None] = queue.Queue(_RECORDS_MAX)
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="otlp-records", daemon=True)
        self._thread.start()

    def took(self, *records: LedgerRecord) -> None:
        """The part has dealt with these."""
        now_ns = time.time_ns()
        for record in records:
            if _MARK in record.usage.batch:
                try:
                    self._records.put_nowait((record, now_ns))
                except queue.Full:
                    return

    def close(self, timeout_s: float) -> None:
        """Tell the collector what it was not told yet, for so long at most."""
        deadline = time.monotonic() + timeout_s
        # Whatever waits for a collector stands behind this thread.
        self._records.put(None)
        self._thread.join(timeout_s)
        self._given_up = True
        self._thread.join()
        close_within(max(0.0, deadline - time.monotonic()), (self._sender.close, self._sender.give_up))

    def _run(self) -> None:
        while (found := self._records.get()) is not None and not self._given_up:
            try:
                self._tell(*found)
            except Exception:  # noqa: BLE001  the record is where it belongs, whatever comes of its spans
                _LOG.exception("spans could not be made of a record")

    def _tell(self, record: LedgerRecord, now_ns: int) -> None:
        attributes: dict[str, str | int] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": self._topic,
            "messaging.destination.partition.id": str(record.partition),
            "taximeter.ledger.sequence": record.sequence,
        }
        for event, result, parent in _sampled(record):
            began_ns = (record.log_time_ms if self._is_sink else event.ended_ms) * _NS_PER_MS
            span = self._sender.tracer.start_span(
                f"process {self._topic}",
                set_span_in_context(NonRecordingSpan(parent), Context()),
                SpanKind.CONSUMER,
                attributes | {"gen_ai.response.id": event.request_id, "taximeter.ledger.result": result},
                # Clocks of several machines: none ends before it began.
                start_time=min(began_ns, now_ns),
            )
            if result not in _WELL:
                span.set_status(Status(StatusCode.ERROR, result))
                span.set_attribute("error.type", result)
            span.end(now_ns)


def _sampled(record: LedgerRecord) -> Iterator[tuple[UsageEvent, str, SpanContext]]:
    """The first traced and sampled events of a record, what became of each, and the gateway's span of it."""
    dropped = {each.index: _RESULTS.get(each.reason, "unspecified") for each in record.usage.dropped}
    found = 0
    for index, event in enumerate(_events(record)):
        match = _SAMPLED.fullmatch(event.attributes[_TRACEPARENT]) if _TRACEPARENT in event.attributes else None
        if match is not None:
            trace_id, span_id, flags = (int(text, 16) for text in match.groups())
            yield event, dropped.get(index, _ACCEPTED), SpanContext(trace_id, span_id, True, TraceFlags(flags))
            found += 1
            if found == SPANS_MAX:
                return


def _events(record: LedgerRecord) -> Iterable[UsageEvent]:
    return UsageBatch.FromString(record.usage.batch).events
