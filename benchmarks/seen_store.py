"""The dedupe memory at 10 million request IDs: CPU time a key, disk and RAM a key, opening it again.

The work is that of the ledger: batches of 500 keys, each looked for and then remembered, blobs written with the local store's
batch, runs written and merged on the side. RAM is what grows with the keys (filters); disk is the files once merges are over.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Measurement
from billing.chain import record_hash
from billing.v1.ledger_pb2 import LedgerRecord, RememberedKeys, UsageApplied
from stream_processors.local_store import Acknowledged, LocalStore

BATCH = 500
KEYS = int(os.environ.get("TAXIMETER_BENCH_KEYS", "10000000"))
DAY = 20_500


def run() -> list[Measurement]:
    """Measure."""
    folder = Path(tempfile.mkdtemp(prefix="seen-"))
    try:
        return _run(folder)
    finally:
        shutil.rmtree(folder)


def _run(folder: Path) -> list[Measurement]:
    store = LocalStore(folder, 0)
    spent_s = 0.0
    making_s = 0.0
    batches = KEYS // BATCH
    began_cpu_s = time.process_time()
    last = b""
    for number in range(batches):
        began = time.thread_time()
        random_bytes = os.urandom(24 * BATCH)
        digests = [random_bytes[i : i + 16] for i in range(0, 24 * BATCH, 24)]
        fingerprints = [random_bytes[i + 16 : i + 24] for i in range(0, 24 * BATCH, 24)]
        # 36 days of keys, as a horizon holds them.
        day = DAY + number * 36 // batches
        record = LedgerRecord(
            generation=b"g" * 16,
            sequence=number + 1,
            usage=UsageApplied(remembered=[RememberedKeys(expires_day=day, entries=random_bytes)]),
        )
        acknowledged = Acknowledged(record, random_bytes, number)
        making_s += time.thread_time() - began
        began = time.thread_time()
        found = store.seen.find(digests)
        store.seen.remember(day, digests, fingerprints)
        store.apply([acknowledged])
        spent_s += time.thread_time() - began
        assert not any(found)
        last = random_bytes
    cpu_s = time.process_time() - began_cpu_s - making_s
    assert record_hash(last) == store.place.record_hash
    _settle(store)
    on_disk = store.seen.keys_on_disk
    disk_bytes = sum(path.stat().st_size for path in (folder / "seen").iterdir())
    ram_bytes = store.seen.filter_bytes
    repeated = [last[i : i + 16] for i in range(0, 24 * BATCH, 24)]
    began = time.perf_counter()
    for _ in range(20):
        assert None not in store.seen.find(repeated)
    again_s = (time.perf_counter() - began) / 20
    store.close()
    began = time.perf_counter()
    store = LocalStore(folder, 0)
    open_s = time.perf_counter() - began
    assert None not in store.seen.find(repeated)
    store.close()
    return [
        Measurement("seen: find, remember and keep, CPU of all threads", cpu_s / KEYS * 1e6, "µs/key", target="<= 1.2"),
        Measurement("seen: the same, the stream's own thread", spent_s / KEYS * 1e6, "µs/key"),
        Measurement("seen: find what is there", again_s / BATCH * 1e6, "µs/key"),
        Measurement("seen: disk per remembered request ID", disk_bytes / on_disk, "bytes", target="<= 48"),
        Measurement("seen: RAM per remembered request ID", ram_bytes / on_disk, "bytes", target="<= 4"),
        Measurement(f"seen: open again with {KEYS:,} keys", open_s, "s"),
    ]


def _settle(store: LocalStore) -> None:
    """Let merges come to their end, as they do while input goes on."""
    place = store.place.position
    for number in range(50):
        store.seen.settle()
        record = LedgerRecord(generation=place.generation, sequence=place.sequence + 1 + number)
        last = store.place.record_hash
        store.apply([Acknowledged(record, b"", 0)])
        store.place.record_hash = last


if __name__ == "__main__":
    for measurement in run():
        print(measurement)
