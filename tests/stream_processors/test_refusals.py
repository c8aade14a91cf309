"""On Apache Kafka: what must not go on stops and says what to do, and what is repeated changes nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import OFFSET_END, ConsumerGroupTopicPartitions, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from billing.limits import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, REJECTED_PAYLOAD_BYTES_MAX
from billing.v1.account_pb2 import Progress
from billing.v1.rejected_pb2 import RejectedInput
from billing.v1.usage_pb2 import UsageBatch, UsageEvent
from stream_processors.kafka_ports import MESSAGE_BYTES_MAX
from stream_processors.local_store import LocalStore
from taximeter.embedded.process import Child
from tests.services.kafka import SharedKafka
from tests.stream_processors.harness import TIMEOUT_S, Ledger, event, finish
from tests.stream_processors.worker_main import REFUSED

pytestmark = [pytest.mark.timeout(900), pytest.mark.apache_kafka]


@pytest.fixture
def ledger(apache_kafka: SharedKafka, tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(apache_kafka.bootstrap, tmp_path)
    ledger.found()
    yield ledger
    ledger.stop()


def refusal(ledger: Ledger, worker: Child) -> str:
    """What a worker says that must end by itself."""
    ledger.wait(lambda: not worker.alive, "the refusal")
    assert worker.exit_code == REFUSED, worker.log_tail()
    return worker.log_tail()


def test_a_worker_whose_clock_is_ahead_writes_nothing_and_another_goes_on(ledger: Ledger) -> None:
    events = [event(f"tenant-{i}") for i in range(20)]
    ledger.send(events)
    ahead = ledger.worker("ahead", publish=False, clock_ahead_ms=365 * 86_400_000)
    said = refusal(ledger, ahead)
    assert "ahead of Kafka's clock" in said
    assert "set this machine's clock" in said
    assert all(len(log.records) == 1 for log in ledger.logs()), "the founding record alone"
    ledger.worker()
    ledger.wait_charged()
    ledger.assert_exact()
    # The logs first: the worker goes on ticking.
    logs = ledger.logs()
    assert all(log.state.log_time_ms <= time.time_ns() // 1_000_000 for log in logs)


def test_a_producer_whose_clock_is_wrong_is_heard_and_judged_by_the_ledger(ledger: Ledger) -> None:
    """Its messages are stamped on arrival: neither refused by Kafka for the future, nor deleted at once for the past."""
    now_ms = time.time_ns() // 1_000_000
    ledger.worker()
    for shift_ms in (-400 * 86_400_000, 20 * 3_600_000):
        one = event("tenant-1")
        batch = UsageBatch(schema_version=1, events=[one]).SerializeToString()
        ledger.send_bytes(batch, 0, time_ms=now_ms + shift_ms)
        ledger.sent[one.request_id] = one
    ledger.wait_charged()
    ledger.assert_exact()


def admin(ledger: Ledger) -> AdminClient:
    """Hold it until the answers are there: they die with it."""
    return AdminClient({"bootstrap.servers": ledger.bootstrap})


def some(count: int = 20) -> list[UsageEvent]:
    return [event(f"tenant-{number}") for number in range(count)]


def totals(ledger: Ledger) -> dict[str, object]:
    """Everything that a tenant would be charged by: accounts, and each window as it was last stated."""
    found: dict[str, object] = {}
    for log in ledger.logs():
        found |= {name: (one.events, one.spend_pico, one.credit_pico) for name, one in log.state.accounts.items()}
        for record in log.records:
            for total in record.totals:
                found[total.key.SerializeToString(deterministic=True).hex()] = total.SerializeToString(deterministic=True)
    return found


def test_a_full_replay_of_the_input_changes_not_one_total(ledger: Ledger) -> None:
    worker = ledger.worker("one", publish=False)
    for _ in range(3):
        ledger.send(some())
    ledger.wait_charged()
    finish(worker)
    before = totals(ledger)
    inputs = [ledger.read(ledger.names.events, partition) for partition in range(ledger.partitions)]
    # The group's offsets say that nothing was taken; then the very same messages come once more.
    group = ConsumerGroupTopicPartitions(
        f"{ledger.prefix}ledger", [TopicPartition(ledger.names.events, partition, 0) for partition in range(ledger.partitions)]
    )
    client = admin(ledger)

    def rewound() -> bool:
        # A group that has a member yet is refused, and whoever did not say that it leaves is one until its session ends.
        [altered] = client.alter_consumer_group_offsets([group]).values()
        try:
            return all(place.error is None for place in altered.result(TIMEOUT_S).topic_partitions)
        except KafkaException:
            return False

    ledger.wait(rewound, "the group's old offsets")
    ledger.worker("new", publish=False)
    for partition, values in enumerate(inputs):
        for value in values:
            ledger.send_bytes(value, partition)
    ledger.wait(lambda: sum(one.duplicates for log in ledger.logs() for one in log.state.accounts.values()) >= 60, "the replay")
    assert sum(one.duplicates for log in ledger.logs() for one in log.state.accounts.values()) == 60
    assert totals(ledger) == before
    ledger.assert_exact()


def test_input_that_was_deleted_unread_is_refused(ledger: Ledger) -> None:
    worker = ledger.worker(publish=False)
    ledger.send(some())
    ledger.wait_charged()
    finish(worker)
    ledger.send(some())
    places = [TopicPartition(ledger.names.events, partition, OFFSET_END) for partition in range(ledger.partitions)]
    client = admin(ledger)
    for future in client.delete_records(places).values():
        future.result(TIMEOUT_S)
    said = refusal(ledger, ledger.worker(publish=False))
    assert "1 messages were deleted unread" in said
    assert "have the producers send again what usage.progress does not cover" in said


def test_bytes_that_are_no_ledger_record_are_refused_told_and_passed_over(ledger: Ledger) -> None:
    worker = ledger.worker("one", publish=False)
    publisher = ledger.worker("publisher", ledger=False)
    ledger.send(some())
    ledger.wait_charged()

    def published() -> bool:
        return any(Progress.FromString(value).reader for value in ledger.read(ledger.names.progress, 0))

    ledger.wait(published, "the publisher")
    ledger.send_bytes(b"\xff\xff no record", 0, ledger.names.ledger)
    said = "12 bytes are no ledger record"
    ledger.wait(lambda: said in publisher.log_path.read_text(), "the publisher's refusal")
    assert "somebody else wrote to this partition; starting over from the log" in refusal(ledger, worker)
    ledger.worker("one", publish=False)
    ledger.send(some())
    ledger.wait_charged()
    ledger.assert_exact()

    def told() -> list[str]:
        return [refused.reason for record in ledger.logs()[0].records for refused in record.tick.refused]

    ledger.wait(lambda: bool(told()), "the ledger's own word of it")
    [reason] = told()
    assert said in reason
    assert publisher.alive, publisher.log_tail()


def digests(ledger: Ledger, folder: Path) -> list[str]:
    """Of the states that a disk holds."""
    found = []
    for partition in range(ledger.partitions):
        store = LocalStore(folder / f"partition-{partition}", partition)
        state = store.load()
        store.close()
        assert state is not None
        found.append(state.digest())
    return found


def test_a_worker_on_an_old_disk_comes_to_the_logs_state_or_says_what_to_do(ledger: Ledger) -> None:
    def work(name: str) -> None:
        worker = ledger.worker(name, publish=False)
        ledger.send(some())
        ledger.wait_charged()
        finish(worker)

    work("one")
    for name in ("old", "older"):
        shutil.copytree(ledger.folder / "one", ledger.folder / name)
    work("one")
    work("old")
    assert digests(ledger, ledger.folder / "old") == [log.state.digest() for log in ledger.logs()]
    ledger.assert_exact()

    # The log's beginning is deleted, and what the other old disk has not seen with it.
    places = [
        TopicPartition(ledger.names.ledger, partition, len(log.records) - 1) for partition, log in enumerate(ledger.logs())
    ]
    client = admin(ledger)
    for future in client.delete_records(places).values():
        future.result(TIMEOUT_S)
    said = refusal(ledger, ledger.worker("older", publish=False))
    assert "the local store stands at generation" in said
    assert "does not have that record" in said
    assert "Restore the topic from its replicas or a backup" in said


def of_size(size: int) -> tuple[bytes, list[UsageEvent]]:
    """A batch of exactly so many bytes and as many events as one may have, by what they say beside the counts."""
    events = [event("tenant-1") for _ in range(BATCH_EVENTS_MAX)]
    room = size // BATCH_EVENTS_MAX - len(_batch(events[:1])) - 40
    for one in events:
        for name in "abcd":
            one.attributes[name] = "x" * (room // 4 - 8)
    left = size - len(_batch(events))
    for one in events:
        # The field costs three bytes beside its text, up to 127.
        one.region = "y" * (left - 3 if left <= 130 else 100)
        left -= 3 + len(one.region)
        if not left:
            break
    return _batch(events), events


def _batch(events: list[UsageEvent]) -> bytes:
    return UsageBatch(schema_version=1, events=events).SerializeToString()


def test_input_at_its_bounds_is_charged_and_over_them_refused_with_the_reason(ledger: Ledger) -> None:
    ledger.worker()
    largest, events = of_size(BATCH_BYTES_MAX)
    assert len(largest) == BATCH_BYTES_MAX
    too_large, _ = of_size(BATCH_BYTES_MAX + 1)
    too_many = _batch([event("tenant-1") for _ in range(BATCH_EVENTS_MAX + 1)])
    beyond_any = bytes(MESSAGE_BYTES_MAX - 200)
    # The first in the partition where its tenant does not live: it is sent on, with two bytes more than it had.
    for value in (largest, too_large, too_many, beyond_any):
        ledger.send_bytes(value, 0)
    at_home, others = of_size(BATCH_BYTES_MAX)
    ledger.send_bytes(at_home, 1)
    ledger.sent = {one.request_id: one for one in events + others}
    last = event("tenant-1", "the last")
    ledger.sent[last.request_id] = last
    ledger.send_bytes(_batch([last]), 0)
    # More than the topic takes never comes in: Kafka tells the sender.
    problems: list[KafkaError | None] = []
    sender = Producer({"bootstrap.servers": ledger.bootstrap, "message.max.bytes": 2 * MESSAGE_BYTES_MAX})
    sender.produce(
        ledger.names.events, bytes(MESSAGE_BYTES_MAX + 1), partition=0, on_delivery=lambda error, _: problems.append(error)
    )
    assert sender.flush(TIMEOUT_S) == 0
    [problem] = problems
    assert problem is not None
    assert problem.code() == KafkaError.MSG_SIZE_TOO_LARGE

    ledger.wait_charged()
    ledger.assert_exact()
    ledger.wait(lambda: len(ledger.read(ledger.names.rejected, 0)) == 3, "three refusals told")
    told = [RejectedInput.FromString(value) for value in ledger.read(ledger.names.rejected, 0)]
    assert [(one.offset, one.index, one.payload_bytes) for one in told] == [
        (1, -1, len(too_large)),
        (2, -1, len(too_many)),
        (3, -1, len(beyond_any)),
    ]
    assert [one.reason for one in told] == [
        f"batch: {BATCH_BYTES_MAX + 1} bytes; send at most {BATCH_BYTES_MAX}",
        f"events: {BATCH_EVENTS_MAX + 1} in one batch; send at most {BATCH_EVENTS_MAX}",
        f"batch: {len(beyond_any)} bytes; send at most {BATCH_BYTES_MAX}",
    ]
    assert [one.payload for one in told] == [value[:REJECTED_PAYLOAD_BYTES_MAX] for value in (too_large, too_many, beyond_any)]
