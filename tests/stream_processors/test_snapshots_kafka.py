"""Snapshots by real workers on real brokers: kill -9 while one is written, new disks, a ledger whose beginning is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from billing import replay
from billing.chain import Chain
from billing.state import LedgerState
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageEvent
from stream_processors.bucket import Bucket
from stream_processors.local_store import LocalStore
from stream_processors.snapshots import Snapshot, SnapshotStore
from tests.services.kafka import SharedKafka
from tests.stream_processors.harness import TIMEOUT_S, Ledger, charged_in, event, finish
from tests.stream_processors.worker_main import SEAL_KEY

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def ledger(bootstrap: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    ledger = Ledger(bootstrap, tmp_path, quick_sessions="tansu" in request.node.name)
    ledger.found()
    yield ledger
    ledger.stop()


def _taken(ledger: Ledger, partition: int) -> list[Snapshot]:
    return SnapshotStore(Bucket((ledger.folder / "bucket").as_uri()), partition, SEAL_KEY).find()


def _snapshots(ledger: Ledger) -> dict[str, object]:
    return {"url": (ledger.folder / "bucket").as_uri(), "interval_s": 1.0}


def _state(folder: Path, partition: int) -> LedgerState:
    """What a disk holds, no run yet, so that all of the memory is in the dictionaries that outlive the store."""
    store = LocalStore(folder / f"partition-{partition}", partition)
    state = store.load()
    store.close()
    assert state is not None
    return state


def _assert_state_is_the_logs(ledger: Ledger, folder: Path) -> None:
    for partition, log in enumerate(ledger.logs()):
        assert _state(folder, partition).digest() == log.state.digest()


def _events(batches: int) -> list[UsageEvent]:
    return [event(f"tenant-{i % 7}") for _ in range(batches) for i in range(20)]


def _send(ledger: Ledger, batches: int) -> None:
    """Send, and wait until all that was sent is charged in what is left of the log."""
    events = _events(batches)
    ledger.send(events)
    ledger.wait(lambda: {one.request_id for one in events} <= _charged(ledger), "the charges")


def _charged(ledger: Ledger) -> set[str]:
    stored = [each for partition in range(2) for each in ledger.read(ledger.names.ledger, partition)]
    return {request_id for each in stored for request_id in charged_in(LedgerRecord.FromString(each))}


def _announced(ledger: Ledger, partition: int) -> list[bytes]:
    return [r.tick.snapshot.digest for r in ledger.log(partition).records if r.tick.HasField("snapshot")]


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("bootstrap", "point"),
    [
        pytest.param("apache_kafka", "before a snapshot's manifest", marks=pytest.mark.apache_kafka),
        ("tansu", "before the announcement"),
    ],
    indirect=["bootstrap"],
)
def test_kill_9_while_a_snapshot_is_written_and_a_new_disk(ledger: Ledger, point: str) -> None:
    first = ledger.worker("one", snapshots=_snapshots(ledger), point=point, after=3)
    # Whether all of it is charged before the crash or after it is the machine's matter.
    ledger.send(_events(4))
    ledger.wait(lambda: not first.alive, "the crash")
    assert first.exit_code == -9, first.log_tail()
    second = ledger.worker("two", snapshots=_snapshots(ledger))
    _send(ledger, 2)
    ledger.wait(lambda: all(_announced(ledger, partition) for partition in range(2)), "an announcement in each partition")
    finish(second)
    _assert_state_is_the_logs(ledger, ledger.folder / "two")
    assert all(_taken(ledger, partition) for partition in range(2))
    third = ledger.worker("three", snapshots=_snapshots(ledger))
    _send(ledger, 1)
    finish(third)
    assert third.log_path.read_text().count(" restored in ") == 2
    ledger.assert_exact()
    _assert_state_is_the_logs(ledger, ledger.folder / "three")


@pytest.mark.apache_kafka
def test_a_new_disk_starts_although_the_ledgers_beginning_was_deleted(apache_kafka: SharedKafka, tmp_path: Path) -> None:
    ledger = Ledger(apache_kafka.bootstrap, tmp_path)
    ledger.found()
    try:
        first = ledger.worker("one", snapshots=_snapshots(ledger))
        _send(ledger, 4)
        ledger.wait(lambda: all(_taken(ledger, partition) for partition in range(2)), "a snapshot of each partition")
        finish(first)
        admin = AdminClient({"bootstrap.servers": ledger.bootstrap})
        places = [
            TopicPartition(ledger.names.ledger, partition, _taken(ledger, partition)[0].place.ledger_offset)
            for partition in range(2)
        ]
        for future in admin.delete_records(places).values():
            future.result(TIMEOUT_S)
        without = ledger.worker("without")
        ledger.wait(lambda: not without.alive, "the refusal")
        assert "its beginning was deleted" in without.log_tail()
        fresh = ledger.worker("fresh", snapshots=_snapshots(ledger))
        _send(ledger, 1)
        finish(fresh)
        assert fresh.log_path.read_text().count(" restored in ") == 2
        for partition in range(2):
            # The first disk has the whole log's state up to where its worker ended.
            state = _state(ledger.folder / "one", partition)
            chain = Chain(partition, SEAL_KEY, state.generation, state.sequence, state.record_hash)
            for stored in ledger.read(ledger.names.ledger, partition):
                record = chain.accept(stored)
                if record is not None:
                    replay.apply(state, record, stored)
            assert state.digest() == _state(ledger.folder / "fresh", partition).digest()
    finally:
        ledger.stop()
