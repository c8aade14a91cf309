"""The meter: what `record` costs its caller, and how many events a second become durable.

The baseline is the ordinary way: one row and one commit an event, in the same SQLite settings on the same disk. The events
carry what a gateway's do. Each figure is the best of three rounds, because other work on the machine can only make it worse.
"""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from benchmarks.measure import Measurement
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_CHAT,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageEvent,
)
from producers.meter import MeterSettings, UsageMeter

EVENTS = 50_000
WAITERS = 1_000
BASELINE_EVENTS = 1_000
ROUNDS = 3
PARTITIONS = 8

_T = TypeVar("_T")


class _Recorded(NamedTuple):
    cpu_us: float
    p50_us: float
    p99_us: float
    durable: float


def run() -> list[Measurement]:
    """Measure."""
    events = [_event(number) for number in range(EVENTS)]
    one_by_one = max(_in_folder(lambda folder: _commit_one_by_one(folder, events[:BASELINE_EVENTS])) for _ in range(ROUNDS))
    records = [_in_folder(lambda folder: _record(folder, events)) for _ in range(ROUNDS)]
    durable = max(record.durable for record in records)
    awaited = max(_in_folder(lambda folder: _await_each(folder, events)) for _ in range(ROUNDS))
    baseline = f"one commit an event: {one_by_one:,.0f} events/s"
    return [
        Measurement("meter: record(), the caller's CPU, mean", min(record.cpu_us for record in records), "µs", target="< 20"),
        Measurement("meter: record(), by the clock, median", min(record.p50_us for record in records), "µs", target="< 20"),
        Measurement("meter: record(), by the clock, 99th percentile", min(record.p99_us for record in records), "µs"),
        Measurement("meter: recorded until durable, one caller", durable, "events/s", baseline, durable / one_by_one),
        Measurement(
            f"meter: each awaited, {WAITERS:,} coroutines", awaited, "events/s", baseline, awaited / one_by_one, target="> 5000"
        ),
    ]


def _event(number: int) -> UsageEvent:
    return UsageEvent(
        request_id=f"0192f1c2-7c1e-7d50-8f00-{number:012x}",
        tenant_id=f"tenant-{number % 50}",
        project_id="default",
        user_id=f"user-{number % 500}",
        api_key_id=f"key-{number % 50}",
        model="llama-3.1-8b-instruct",
        operation=OPERATION_CHAT,
        service_class=SERVICE_CLASS_STANDARD,
        outcome=OUTCOME_COMPLETED,
        count_source=COUNT_SOURCE_BACKEND,
        started_ms=1_760_000_000_000 + number,
        ended_ms=1_760_000_001_000 + number,
        uncached_input_tokens=1_155,
        output_tokens=211,
        time_to_first_token_ms=120,
        latency_ms=1_000,
        server_id="gateway-1",
    )


def _in_folder(work: Callable[[Path], _T]) -> _T:
    with tempfile.TemporaryDirectory(prefix="meter-") as folder:
        return work(Path(folder))


def _record(folder: Path, events: list[UsageEvent]) -> _Recorded:
    """One caller that records as fast as it can, while the writer commits beside it."""
    meter = UsageMeter(MeterSettings(folder / "journal", PARTITIONS))
    record = meter.record
    times_ns = []
    clock_ns = time.perf_counter_ns
    receipts = set()
    began_ns = clock_ns()
    began_cpu_ns = time.thread_time_ns()
    for event in events:
        before_ns = clock_ns()
        receipts.add(record(event))
        times_ns.append(clock_ns() - before_ns)
    cpu_ns = time.thread_time_ns() - began_cpu_ns
    for receipt in receipts:
        receipt.durable()
    durable = len(events) / (clock_ns() - began_ns) * 1e9
    assert meter.metrics()["durable"] == len(events)
    meter.close()
    times_ns.sort()
    count = len(events)
    return _Recorded(cpu_ns / count / 1e3, times_ns[count // 2] / 1e3, times_ns[count * 99 // 100] / 1e3, durable)


def _await_each(folder: Path, events: list[UsageEvent]) -> float:
    """Durable events/s where each is awaited by its own coroutine before that one records its next."""
    meter = UsageMeter(MeterSettings(folder / "journal", PARTITIONS))

    async def serve(part: list[UsageEvent]) -> None:
        for event in part:
            await meter.record(event).wait()

    async def serve_all() -> None:
        await asyncio.gather(*(serve(events[start::WAITERS]) for start in range(WAITERS)))

    began = time.perf_counter()
    asyncio.run(serve_all())
    elapsed_s = time.perf_counter() - began
    assert meter.metrics()["durable"] == len(events)
    meter.close()
    return len(events) / elapsed_s


def _commit_one_by_one(folder: Path, events: list[UsageEvent]) -> float:
    """Durable events/s with a commit for each."""
    connection = sqlite3.connect(folder / "baseline", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE events (sequence INTEGER PRIMARY KEY, event BLOB NOT NULL)")
    began = time.perf_counter()
    for event in events:
        connection.execute("INSERT INTO events (event) VALUES (?)", (event.SerializeToString(deterministic=True),))
    elapsed_s = time.perf_counter() - began
    connection.close()
    return len(events) / elapsed_s
