"""A worker on a new disk with 10 million remembered request IDs: from a snapshot, and from the log beside it.

The log of 10 million is in memory and its records hold 500 dedupe keys each and no usage: it makes the state, and both ways
must come to the same one, by hash. What the replay of a log with usage costs is measured on a shorter one of 200,000 events, in
memory too, so without Kafka; for 10 million it is extrapolated from that. The snapshot lies in a folder, synced. Ready: the
host has its state and the log's end, and would take input.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from benchmarks.ledger import GENERATION, SETTINGS, make_batch, price_book
from benchmarks.ledger import KEYS as LEDGER_KEYS
from benchmarks.measure import Measurement
from billing import replay
from billing.chain import record_hash, seal_and_hash
from billing.founding import found
from billing.limits import SCHEMA_VERSION
from billing.state import LedgerState, MemorySeenKeys
from billing.step import CommandInput, UsageInput, step
from billing.v1.ledger_pb2 import LedgerRecord, RememberedKeys, UsageApplied
from stream_processors.bucket import Bucket
from stream_processors.ledger_host import HostSettings, LedgerHost
from stream_processors.local_store import LocalStore
from stream_processors.restoring import Restoring
from stream_processors.snapshots import SnapshotStore

BATCH = 500
KEYS = int(os.environ.get("TAXIMETER_BENCH_KEYS", "10000000"))
BEHIND_RECORDS = 200
USAGE_BATCHES = 400
NOW_MS = 1_800_000_000_000
DAY = NOW_MS // 86_400_000


class Log:
    """`LogReader` on a list, and a writer that nobody uses."""

    def __init__(self) -> None:
        self.records: list[bytes] = []

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self.records)

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        for first in range(start, end, 100):
            last = min(first + 100, end)
            yield list(zip(range(first, last), self.records[first:last], strict=True))

    def write(self, topic: str, partition: int, value: bytes, on_done: Callable[[int, str], None], *, time_ms: int = 0) -> None:
        raise AssertionError("nothing is written here")

    def fill(self) -> None:
        _, stored = found(SETTINGS, 0, GENERATION, NOW_MS, LEDGER_KEYS.seal_key, "bench")
        self.records = [stored]
        previous = record_hash(stored)
        batches = KEYS // BATCH
        for number in range(batches):
            # 36 days of keys, as a horizon holds them.
            keys = RememberedKeys(expires_day=DAY + 1 + number * 36 // batches, entries=os.urandom(24 * BATCH))
            record = LedgerRecord(
                schema_version=SCHEMA_VERSION,
                generation=GENERATION,
                sequence=number + 1,
                previous_hash=previous,
                log_time_ms=NOW_MS,
                usage=UsageApplied(remembered=[keys]),
            )
            stored, previous = seal_and_hash(record, LEDGER_KEYS.seal_key)
            self.records.append(stored)


def usage_log() -> Log:
    """Of events as the ledger's benchmark has them."""
    log, state = Log(), LedgerState(MemorySeenKeys())
    record, stored = found(SETTINGS, 0, GENERATION, time.time_ns() // 1_000_000, LEDGER_KEYS.seal_key, "bench")
    replay.apply(state, record, stored)
    log.records.append(stored)
    for offset in range(USAGE_BATCHES + 1):
        source = UsageInput("e", offset, make_batch(offset * BATCH)) if offset else CommandInput("c", 0, price_book())
        now_ms = time.time_ns() // 1_000_000
        log.records.append(step(state, source, now_ms, keys=LEDGER_KEYS, writer="bench").stored)
    assert sum(account.events for account in state.accounts.values()) == USAGE_BATCHES * BATCH
    return log


async def replay_usage(folder: Path) -> float:
    """Seconds for each event of the log of usage."""
    log = usage_log()
    settings = HostSettings("events", "ledger", 1, LEDGER_KEYS, "bench")
    began = time.perf_counter()
    store = LocalStore(folder, 0)
    host = LedgerHost(settings, 0, store, log, log, lambda: NOW_MS)
    await host.recover()
    took_s = time.perf_counter() - began
    store.close()
    return took_s / (USAGE_BATCHES * BATCH)


def run() -> list[Measurement]:
    """Measure."""
    folder = Path(tempfile.mkdtemp(prefix="snapshot-"))
    try:
        return asyncio.run(_run(folder))
    finally:
        shutil.rmtree(folder)


async def _run(folder: Path) -> list[Measurement]:
    log = Log()
    log.fill()
    behind, log.records = log.records[-BEHIND_RECORDS:], log.records[:-BEHIND_RECORDS]
    snapshots = SnapshotStore(Bucket((folder / "bucket").as_uri()), 0, LEDGER_KEYS.seal_key)

    async def start(name: str) -> tuple[LedgerHost, float]:
        began = time.perf_counter()
        restoring = Restoring(log, "ledger", LEDGER_KEYS.seal_key, snapshots, folder / name)
        store, snapshot = await restoring.open()
        restored = None if snapshot is None else snapshot.taken
        settings = HostSettings("events", "ledger", 1, LEDGER_KEYS, "bench")
        host = LedgerHost(settings, 0, store, log, log, lambda: NOW_MS, restored=restored)
        await host.recover()
        return host, time.perf_counter() - began

    replay_s = await replay_usage(folder / "usage") * KEYS
    host, _ = await start("whole-log")
    began = time.perf_counter()
    captured = host.store.capture()
    capture_s = time.perf_counter() - began
    began = time.perf_counter()
    snapshot = snapshots.write(captured, NOW_MS, lambda: False)
    write_s = time.perf_counter() - began
    log.records += behind
    host.store.close()
    again, _ = await start("whole-log")
    fresh, ready_s = await start("new-disk")
    assert fresh.replayed_records == BEHIND_RECORDS
    assert fresh.state.digest() == again.state.digest(), "the same state by hash"
    again.store.close()
    fresh.store.close()
    baseline = f"replay of {KEYS:,} events, extrapolated from {USAGE_BATCHES * BATCH:,}"
    return [
        Measurement(
            f"snapshot: a new disk is ready, {KEYS:,} request IDs", ready_s, "s", baseline, ready_s / replay_s, target="< 30"
        ),
        Measurement("snapshot: the log replayed instead, extrapolated", replay_s, "s", baseline, 1.0),
        Measurement("snapshot: taken, on another thread", write_s, "s"),
        Measurement("snapshot: the stream is held up", capture_s * 1000, "ms", target="< 10"),
        Measurement("snapshot: bytes a remembered request ID", snapshot.size_bytes / KEYS, "bytes"),
    ]


if __name__ == "__main__":
    for measurement in run():
        print(measurement)
