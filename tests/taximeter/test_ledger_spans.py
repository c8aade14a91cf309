"""What worker and sink tell a collector of traced requests, as a real OTLP receiver gets it, and what they do without one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_DUPLICATE,
    Dropped,
    DropReason,
    LedgerRecord,
    Tick,
    UsageApplied,
)
from billing.v1.usage_pb2 import UsageBatch, UsageEvent
from taximeter.collectors import sink_spans, worker_spans
from taximeter.config import load
from taximeter.errors import ConfigError
from taximeter.ledger_spans import SPANS_MAX, LedgerSpans
from tests.serving.otlp_collector import Collector, deaf_collector, values

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_IDS = [f"00f067aa0ba902{number:02x}" for number in range(100)]
ENDED_MS, LOG_TIME_MS = 1_700_000_000_000, 1_700_000_000_250
CLOSE_S = 60.0


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    # One that stands still for a moment has not refused anything.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
    made = Collector()
    yield made
    made.close()


def event(request_id: str, traceparent: str | None = None) -> UsageEvent:
    attributes = {} if traceparent is None else {"traceparent": traceparent}
    return UsageEvent(request_id=request_id, tenant_id="t", started_ms=ENDED_MS - 5, ended_ms=ENDED_MS, attributes=attributes)


def sampled(number: int) -> UsageEvent:
    return event(f"r{number}", f"00-{TRACE_ID}-{SPAN_IDS[number]}-01")


def record(*events: UsageEvent, dropped: Mapping[int, DropReason.ValueType] | None = None) -> LedgerRecord:
    gone = [Dropped(index=index, reason=reason) for index, reason in (dropped or {}).items()]
    usage = UsageApplied(batch=UsageBatch(events=events).SerializeToString(), dropped=gone)
    return LedgerRecord(partition=3, sequence=7, log_time_ms=LOG_TIME_MS, usage=usage)


@pytest.mark.parametrize(
    ("part", "topic", "began_ms"), [("worker", "usage.events", ENDED_MS), ("sink", "usage.ledger", LOG_TIME_MS)]
)
def test_a_traced_request_is_a_span_under_the_gateways_and_says_what_became_of_it(
    collector: Collector, part: str, topic: str, began_ms: int
) -> None:
    spans = LedgerSpans(collector.endpoint, part=part, topic=topic)
    others = (
        event("untraced"),
        event("unsampled", f"00-{TRACE_ID}-{SPAN_IDS[9]}-00"),
        event("no trace", f"00-{'0' * 32}-{SPAN_IDS[9]}-01"),
        event("nonsense", "00-traceparent-01"),
    )
    spans.took(LedgerRecord(tick=Tick()), record(event("untraced")))
    dropped = {5: DROP_REASON_DUPLICATE, 6: DROP_REASON_CONFLICT}
    spans.took(record(*others, sampled(0), sampled(1), sampled(2), dropped=dropped))
    spans.close(CLOSE_S)
    assert collector.services == {f"taximeter-{part}"}
    found = {values(span.attributes)["gen_ai.response.id"]: span for span in collector.spans}
    assert len(collector.spans) == len(found) == 3
    results = {"r0": "accepted", "r1": "duplicate", "r2": "conflict"}
    for number, (request_id, result) in enumerate(results.items()):
        span, told = found[request_id], values(found[request_id].attributes)
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, SPAN_IDS[number])
        assert (span.name, span.kind) == (f"process {topic}", Span.SPAN_KIND_CONSUMER)
        assert span.start_time_unix_nano == began_ms * 10**6 < span.end_time_unix_nano
        assert told["taximeter.ledger.result"] == result
        assert (told["messaging.destination.partition.id"], told["taximeter.ledger.sequence"]) == ("3", 7)
        failed = result == "conflict"
        assert span.status.code == (Status.STATUS_CODE_ERROR if failed else Status.STATUS_CODE_UNSET)
        assert told.get("error.type") == (result if failed else None)


def test_a_record_has_so_many_spans_at_most_and_a_clock_that_is_ahead_ends_none_before_it_began(collector: Collector) -> None:
    spans = LedgerSpans(collector.endpoint, part="worker", topic="usage.events")
    ahead = [sampled(number) for number in range(100)]
    for each in ahead:
        each.ended_ms = 4_000_000_000_000
    spans.took(record(*ahead))
    spans.close(CLOSE_S)
    assert [values(span.attributes)["gen_ai.response.id"] for span in collector.spans] == [f"r{n}" for n in range(SPANS_MAX)]
    assert all(span.start_time_unix_nano == span.end_time_unix_nano for span in collector.spans)


@pytest.mark.parametrize("kind", ["away", "silent"])
def test_nobody_waits_for_a_collector(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing that this is about ends by itself while the test runs.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    with deaf_collector(kind) as endpoint:
        spans = LedgerSpans(endpoint, part="sink", topic="usage.ledger")
        traced = record(*(sampled(number) for number in range(100)))
        # More than the queues of records and of spans hold.
        for _ in range(1_000):
            spans.took(traced)
        spans.close(0.1)
    # A thread that was told to end may still be on its way out.
    for thread in threading.enumerate():
        if thread.name.startswith(("otlp", "Otel")):
            thread.join(CLOSE_S)
            assert not thread.is_alive(), thread.name


def test_what_is_told_to_another_machine_without_tls_must_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "taximeter.toml"
    path.write_text("")
    far = ("ledger.otlp_endpoint=http://collector:4317", "clickhouse.otlp_endpoint=http://collector:4317")
    config = load(path, far)
    for make, section in ((worker_spans, "ledger"), (sink_spans, "clickhouse")):
        with pytest.raises(ConfigError, match=rf"{section}\.otlp_endpoint: .* write https"):
            make(config)
        assert make(load(path)) is None
        allowed = make(load(path, (*far, "kafka.allow_plaintext=true")))
        assert allowed is not None
        allowed.close(CLOSE_S)
