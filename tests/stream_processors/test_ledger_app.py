"""The ledger worker on real brokers: every event once, whatever is killed, moved, doubled or damaged."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions

from billing.identity import partition_of
from billing.v1.account_pb2 import AccountUpdate, Progress
from billing.v1.ledger_pb2 import DROP_REASON_INVALID, LedgerRecord
from billing.v1.rejected_pb2 import RejectedInput
from billing.v1.usage_pb2 import UsageBatch
from stream_processors.local_store import LocalStore
from taximeter.embedded.broker import TansuBroker, TansuSettings
from tests.services.kafka import SharedKafka
from tests.stream_processors.harness import TIMEOUT_S, Ledger, PartitionLog, charged_in, event, finish
from tests.stream_processors.worker_main import REFUSED

pytestmark = pytest.mark.timeout(900)

# Two members in one group: Tansu's coordinator was seen, on a loaded machine, to let both join again and again in the same
# generation, so that neither ever worked. The embedded set-up runs one worker; several are for Apache Kafka.
two_workers = pytest.mark.parametrize(
    "bootstrap", [pytest.param("apache_kafka", marks=pytest.mark.apache_kafka)], indirect=True
)


@pytest.fixture
def ledger(bootstrap: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ledger]:
    ledger = Ledger(bootstrap, tmp_path, quick_sessions="tansu" in request.node.name)
    ledger.found()
    yield ledger
    ledger.stop()


def _digests(ledger: Ledger, folder: Path) -> list[str]:
    digests = []
    for partition in range(ledger.partitions):
        store = LocalStore(folder / f"partition-{partition}", partition)
        state = store.load()
        store.close()
        assert state is not None
        digests.append(state.digest())
    return digests


def test_every_event_is_charged_once_and_a_new_disk_comes_to_the_same_state(ledger: Ledger) -> None:
    worker = ledger.worker()
    for _ in range(10):
        ledger.send([event(f"tenant-{i % 7}") for i in range(50)])
    again = list(ledger.sent.values())[:100]
    ledger.wait_charged()
    ledger.send(again)
    ledger.wait(
        lambda: sum(log.state.accounts[t].duplicates for log in ledger.logs() for t in log.state.accounts) == 100, "duplicates"
    )
    ledger.assert_exact()
    finish(worker)
    logs = ledger.logs()
    assert [log.ignored for log in logs] == [0, 0]
    assert _digests(ledger, ledger.folder / "one") == [log.state.digest() for log in logs]

    fresh = ledger.worker("fresh")
    ledger.send([event("tenant-1")])
    ledger.wait_charged()
    finish(fresh)
    assert _digests(ledger, ledger.folder / "fresh") == [log.state.digest() for log in ledger.logs()]


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("point", "after"),
    # A local write takes what came in one go; each partition's takeover is one.
    [("before produce", 6), ("after produce", 6), ("before the local write", 4), ("after the local write", 4)],
)
def test_kill_9_at_a_named_point(ledger: Ledger, point: str, after: int) -> None:
    first = ledger.worker("one", point=point, after=after)
    for _ in range(12):
        ledger.send([event(f"tenant-{i % 5}") for i in range(20)])
    ledger.wait(lambda: not first.alive, "the crash")
    assert first.exit_code == -9, first.log_tail()
    second = ledger.worker("one")
    # Everything may be in the log already: the second worker is there when it has charged something itself.
    ledger.send([event(f"tenant-{i}") for i in range(5)])
    # A record of the dead may land behind its takeover.
    ledger.wait_charged(revived=[second])
    ledger.assert_exact()
    finish(second)
    assert _digests(ledger, ledger.folder / "one") == [log.state.digest() for log in ledger.logs()]


@pytest.mark.chaos
@two_workers
def test_kill_9_at_random_while_two_workers_share_the_partitions(ledger: Ledger) -> None:
    rng = random.Random(4)
    workers = {name: ledger.worker(name) for name in ("one", "two")}
    for round_number in range(3):
        for _ in range(8):
            ledger.send([event(f"tenant-{i % 9}") for i in range(20)])
            time.sleep(rng.random() / 2)
        name = rng.choice(sorted(workers))
        workers[name].kill9()
        workers[name] = ledger.worker(name)
        if round_number == 1:
            ledger.send(list(ledger.sent.values())[:40])
    ledger.wait_charged(revived=workers.values())
    ledger.assert_exact()


@pytest.mark.chaos
@two_workers
def test_a_zombie_changes_nothing(ledger: Ledger) -> None:
    zombie = ledger.worker("zombie", publish=False)
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.wait_charged()
    zombie.pause()
    heir = ledger.worker("heir", publish=False)
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.wait_charged()
    zombie.resume()
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    # Whoever finds a foreign record ends, and its supervisor starts it again.
    ledger.wait_charged(revived=(zombie, heir))
    ledger.assert_exact()


def test_somebody_else_writes_to_the_ledger(ledger: Ledger) -> None:
    worker = ledger.worker(publish=False, tick_interval_s=60.0)
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.wait_charged()
    ledger.send_bytes(ledger.read(ledger.names.ledger, 0)[0], 0, ledger.names.ledger)
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.wait(lambda: not worker.alive, "the stop")
    assert worker.exit_code == REFUSED
    assert "somebody else wrote" in worker.log_tail()
    ledger.worker()
    ledger.wait_charged()
    ledger.assert_exact()


def test_an_event_in_the_wrong_partition_is_forwarded_once(ledger: Ledger) -> None:
    events = [event(f"tenant-{i}") for i in range(20)]
    ledger.send(events, partition=0)
    ledger.worker()
    ledger.wait_charged()
    ledger.assert_exact()
    logs = ledger.logs()
    for log in logs:
        for tenant_id in log.state.accounts:
            assert partition_of(tenant_id, ledger.partitions) == log.state.partition
    stray = UsageBatch(schema_version=1, events=[event("tenant-0")], forwarded=True)
    wrong = 1 - partition_of("tenant-0", 2)
    ledger.send_bytes(stray.SerializeToString(), wrong)
    ledger.wait(lambda: _drops(ledger.log(wrong), DROP_REASON_INVALID) == 1, "the refusal")


def test_what_cannot_be_decoded_is_rejected_and_the_topic_goes_on(ledger: Ledger) -> None:
    ledger.send_bytes(b"\xff\xff not a batch", 0)
    ledger.send_bytes(UsageBatch(schema_version=99).SerializeToString(), 0)
    ledger.send_bytes(b"", 1)
    ledger.send_bytes(b"\x07 not a command", 0, ledger.names.commands)
    bad = event("tenant-1")
    bad.ended_ms = 0
    ledger.send_bytes(UsageBatch(schema_version=1, events=[bad]).SerializeToString(), partition_of("tenant-1", 2))
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.worker()
    ledger.wait_charged()
    ledger.assert_exact()

    def rejected() -> list[RejectedInput]:
        return [RejectedInput.FromString(v) for p in range(2) for v in ledger.read(ledger.names.rejected, p)]

    ledger.wait(lambda: len(rejected()) >= 5, "the rejections")
    by_payload = {one.payload: one for one in rejected()}
    assert by_payload[b"\xff\xff not a batch"].topic == ledger.names.events
    assert by_payload[b"\x07 not a command"].topic == ledger.names.commands
    assert by_payload[bad.SerializeToString()].request_id == bad.request_id
    assert all(one.reason for one in rejected())


def test_the_publisher_tells_how_far_producers_are_covered_and_resumes(ledger: Ledger) -> None:
    partition = partition_of("tenant-1", 2)

    def send(first: int) -> None:
        events = [event("tenant-1") for _ in range(10)]
        ledger.sent.update({one.request_id: one for one in events})
        batch = UsageBatch(schema_version=1, producer_id="p1", first_sequence=first, highest_sequence=first + 9, events=events)
        ledger.send_bytes(batch.SerializeToString(), partition)

    def covered() -> int:
        marks = [Progress.FromString(value) for value in ledger.read(ledger.names.progress, partition)]
        return max((mark.covered_sequence for mark in marks if mark.producer_id == "p1"), default=0)

    def spend_events() -> int:
        updates = [AccountUpdate.FromString(value) for value in ledger.read(ledger.names.accounts, partition)]
        return max((update.account.events for update in updates if update.account.tenant_id == "tenant-1"), default=0)

    worker = ledger.worker()
    send(1)
    ledger.wait(lambda: covered() == 10, "the mark")
    worker.kill9()
    send(11)
    ledger.worker()
    ledger.wait(lambda: covered() == 20, "the mark")
    ledger.wait(lambda: spend_events() == 20, "the account")


def test_without_a_founding_record_it_refuses(bootstrap: str, tmp_path: Path) -> None:
    ledger = Ledger(bootstrap, tmp_path)
    try:
        worker = ledger.worker()
        ledger.wait(lambda: not worker.alive, "the refusal")
        assert worker.exit_code == REFUSED
        assert "run: taximeter topics apply" in worker.log_tail()
    finally:
        ledger.stop()


@pytest.mark.apache_kafka
def test_another_number_of_partitions_is_refused(apache_kafka: SharedKafka, tmp_path: Path) -> None:
    ledger = Ledger(apache_kafka.bootstrap, tmp_path)
    ledger.found()
    admin = AdminClient({"bootstrap.servers": ledger.bootstrap})
    existing = [name for name in admin.list_topics(timeout=TIMEOUT_S).topics if name.startswith(ledger.prefix)]
    assert len(existing) == 9
    for future in admin.create_partitions([NewPartitions(name, 3) for name in existing]).values():
        future.result(TIMEOUT_S)

    def grown() -> bool:
        topics = admin.list_topics(timeout=TIMEOUT_S).topics
        return all(len(topics[name].partitions) == 3 for name in existing)

    # The controller says yes a moment before the broker tells others.
    ledger.wait(grown, "the third partition of each topic")
    try:
        worker = ledger.worker()
        ledger.wait(lambda: not worker.alive, "the refusal")
        assert worker.exit_code == REFUSED
        assert "founded with 2 partitions" in worker.log_tail() or "no founding record" in worker.log_tail()
    finally:
        ledger.stop()


def test_a_log_that_was_recreated_is_refused(ledger: Ledger) -> None:
    worker = ledger.worker(publish=False)
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.wait_charged()
    finish(worker)
    admin = AdminClient({"bootstrap.servers": ledger.bootstrap})
    admin.delete_topics([ledger.names.ledger])[ledger.names.ledger].result(TIMEOUT_S)
    ledger.wait(lambda: ledger.names.ledger not in admin.list_topics(timeout=TIMEOUT_S).topics, "the deletion")
    ledger.found()
    worker = ledger.worker(publish=False)
    ledger.wait(lambda: not worker.alive, "the refusal")
    assert worker.exit_code == REFUSED
    assert "it was deleted, cut, or recreated" in worker.log_tail()


def test_input_that_was_recreated_is_refused(ledger: Ledger) -> None:
    worker = ledger.worker(publish=False)
    ledger.send([event(f"tenant-{i}") for i in range(20)])
    ledger.wait_charged()
    finish(worker)
    admin = AdminClient({"bootstrap.servers": ledger.bootstrap})
    admin.delete_topics([ledger.names.events])[ledger.names.events].result(TIMEOUT_S)
    ledger.wait(lambda: ledger.names.events not in admin.list_topics(timeout=TIMEOUT_S).topics, "the deletion")
    ledger.found()
    worker = ledger.worker(publish=False)
    ledger.wait(lambda: not worker.alive, "the refusal")
    assert worker.exit_code == REFUSED
    assert "recreated or cut" in worker.log_tail()


def test_a_broker_that_forgot_everything_is_founded_again_on_the_local_state(tmp_path: Path) -> None:
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker.log"))
    broker.start()
    ledger = Ledger(broker.bootstrap, tmp_path, quick_sessions=True)
    folder = tmp_path / "one"
    try:
        ledger.found(folder)
        worker = ledger.worker(keep_unconfirmed_for="sink/clickhouse")
        for _ in range(4):
            ledger.send([event(f"tenant-{i}") for i in range(20)])
        ledger.wait_charged()
        before = {a.tenant_id: a.events for log in ledger.logs() for a in log.state.accounts.values()}
        first_logs = [ledger.read(ledger.names.ledger, partition) for partition in range(2)]

        def ticked_twice() -> bool:
            return all(len(ledger.read(ledger.names.ledger, number)) >= len(log) + 2 for number, log in enumerate(first_logs))

        # A tick is written when nothing is on its way: behind the second one, all before the first is on the local disk.
        ledger.wait(ticked_twice, "two ticks")
        worker.kill9()
        broker.stop()

        for partition in range(2):
            store = LocalStore(folder / f"partition-{partition}", partition, keep_unconfirmed=True)
            kept = list(store.unconfirmed_records(-1))
            # The log was read before the kill: more was written since.
            assert kept[: len(first_logs[partition])] == first_logs[partition]
            charging = [log for log in first_logs[partition] if charged_in(LedgerRecord.FromString(log))]
            assert set(kept) >= set(charging)
            store.close()

        broker.start()
        ledger.bootstrap = broker.bootstrap
        changes = ledger.found(folder)
        assert sum("on the local state" in change.detail for change in changes) == 2
        worker = ledger.worker(keep_unconfirmed_for="sink/clickhouse")
        ledger.send(list(ledger.sent.values()))
        fresh = [event(f"tenant-{i}") for i in range(20)]
        ledger.send(fresh)
        ledger.wait(lambda: sum(ledger.charged().values()) >= 20, "the new charges")
        ledger.wait(
            lambda: sum(a.duplicates for log in ledger.logs() for a in log.state.accounts.values()) == 80, "the duplicates"
        )
        assert set(ledger.charged()) == {one.request_id for one in fresh}
        after = {a.tenant_id: a.events for log in ledger.logs() for a in log.state.accounts.values()}
        assert after == {tenant_id: events + 1 for tenant_id, events in before.items()}
    finally:
        ledger.stop()
        broker.stop()


def _drops(log: PartitionLog, reason: int) -> int:
    return sum(1 for record in log.records for dropped in record.usage.dropped if dropped.reason == reason)
