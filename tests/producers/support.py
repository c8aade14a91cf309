"""What the tests of producers share: events, meters, topics, and a stand-in for the ledger that counts what arrives."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from billing.v1.account_pb2 import LedgerPosition, Progress
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_CHAT,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageBatch,
    UsageEvent,
)
from producers.follower import TopicFollower
from producers.journal import Journal
from producers.meter import MeterSettings, UsageMeter
from producers.publisher import PublisherSettings

PARTITIONS = 4


def usage_event(number: int, *, tenant_id: str = "", output_tokens: int = 20) -> UsageEvent:
    return UsageEvent(
        request_id=f"request-{number:08}",
        tenant_id=tenant_id or f"tenant-{number % 10}",
        model="small",
        operation=OPERATION_CHAT,
        service_class=SERVICE_CLASS_STANDARD,
        outcome=OUTCOME_COMPLETED,
        count_source=COUNT_SOURCE_BACKEND,
        started_ms=1_760_000_000_000 + number,
        ended_ms=1_760_000_001_000 + number,
        uncached_input_tokens=100,
        output_tokens=output_tokens,
    )


def open_meter(folder: Path, **settings: int | str) -> UsageMeter:
    return UsageMeter(MeterSettings(journal_path=folder / "usage.journal", **{"partitions": PARTITIONS, **settings}))  # type: ignore[arg-type]


def journaled(journal: Journal) -> dict[int, dict[int, UsageEvent]]:
    """All that the journal holds: partition, sequence, event."""
    held: dict[int, dict[int, UsageEvent]] = {}
    for partition in range(journal.settings.partitions):
        after = 0
        while (page := journal.read(partition, after, 1_000, 1_000_000)).events:
            for sequence, event in enumerate(page.events, start=page.first_sequence):
                held.setdefault(partition, {})[sequence] = UsageEvent.FromString(event)
            after = page.first_sequence + len(page.events) - 1
    return held


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    """For what happens in another process: there is no event to wait for."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def create_topics(bootstrap: str, *topics: NewTopic) -> None:
    """Make them, and return when whoever asks is told of all their partitions: Kafka says yes a moment before."""
    # Held until the answers are there: they die with it.
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.create_topics(list(topics)).values():
        future.result(60)

    def are_led() -> bool:
        known = admin.list_topics(timeout=60).topics
        return all(
            (found := known.get(topic.topic)) is not None
            and len(found.partitions) == topic.num_partitions
            and all(partition.leader >= 0 for partition in found.partitions.values())
            for topic in topics
        )

    wait_until(are_led, "the topics known")


def ordered_producer(bootstrap: str) -> Producer:
    """What it sends arrives once and in order, also where the broker takes only the second attempt."""
    return Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "allow.auto.create.topics": False})


class Topics:
    """Two topics of a test, under names of its own."""

    def __init__(self, bootstrap: str, events: str, progress: str) -> None:
        self.bootstrap = bootstrap
        self.events = events
        self.progress = progress

    def create(self) -> None:
        create_topics(
            self.bootstrap,
            NewTopic(self.events, PARTITIONS, 1),
            NewTopic(self.progress, PARTITIONS, 1, config={"cleanup.policy": "compact"}),
        )

    def publisher_settings(self, **settings: float) -> PublisherSettings:
        return PublisherSettings(
            bootstrap=self.bootstrap,
            partitions=PARTITIONS,
            topic=self.events,
            progress_topic=self.progress,
            # What goes out again, a test says: a machine that stands still for a while is no reason.
            **{"linger_ms": 5, "resend_after_s": 3_600.0, "progress_wait_s": 180.0, **settings},  # type: ignore[arg-type]
        )


class LedgerStandIn:
    """Reads usage.events, remembers each event as often as it came, and says on usage.progress what it covers when told to."""

    def __init__(self, topics: Topics, generation: bytes = b"generation-1") -> None:
        self._topics = topics
        self.generation = generation
        self.requests: Counter[str] = Counter()
        self.batches: list[tuple[int, UsageBatch]] = []
        self.numbers: dict[tuple[str, int], dict[int, str]] = {}
        self._lock = threading.Lock()
        self._follower = TopicFollower(topics.bootstrap, topics.events, self._take)
        self._follower.start()

    def _take(self, key: bytes, value: bytes, partition: int) -> None:
        batch = UsageBatch.FromString(value)
        with self._lock:
            self.batches.append((partition, batch))
            numbers = self.numbers.setdefault((batch.producer_id, partition), {})
            for sequence, event in enumerate(batch.events, start=batch.first_sequence):
                # The same number always names the same event. What is counted has its number already.
                assert numbers.setdefault(sequence, event.request_id) == event.request_id
                self.requests[event.request_id] += 1

    def covered(self, producer_id: str, partition: int) -> int:
        with self._lock:
            numbers = self.numbers.get((producer_id, partition), {})
        covered = 0
        while covered + 1 in numbers:
            covered += 1
        return covered

    def cover(self, producer_id: str, covered: dict[int, int] | None = None) -> None:
        """Say that the ledger covers what has arrived, or what is given."""
        producer = ordered_producer(self._topics.bootstrap)
        for partition in range(PARTITIONS):
            sequence = self.covered(producer_id, partition) if covered is None else covered.get(partition, 0)
            progress = Progress(
                partition=partition,
                producer_id=producer_id,
                covered_sequence=sequence,
                position=LedgerPosition(generation=self.generation, sequence=sequence),
            )
            producer.produce(
                self._topics.progress,
                key=f"producer/{producer_id}/{partition}",
                value=progress.SerializeToString(),
                partition=partition,
            )
        assert producer.flush(60) == 0

    def close(self) -> None:
        self._follower.close()


def read_batches(topics: Topics, until: Callable[[list[UsageBatch]], bool], timeout_s: float = 180.0) -> list[UsageBatch]:
    """All batches in the topic, from its beginning, until there is enough."""
    consumer = Consumer(
        {"bootstrap.servers": topics.bootstrap, "group.id": "test", "enable.auto.commit": False, "fetch.queue.backoff.ms": 5}
    )
    consumer.assign([TopicPartition(topics.events, partition, 0) for partition in range(PARTITIONS)])
    batches: list[UsageBatch] = []
    deadline = time.monotonic() + timeout_s
    try:
        while not until(batches):
            assert time.monotonic() < deadline, f"only {len(batches)} batches within {timeout_s:g} s"
            for message in consumer.consume(500, timeout=0.2):
                value = message.value()
                if message.error() is None and isinstance(value, bytes):
                    batches.append(UsageBatch.FromString(value))
    finally:
        consumer.close()
    return batches
