"""Publishes the journal to Kafka, and lets go of what the ledger has.

Promise: every durable event is sent, in its numbering's order, until `usage.progress` says that the ledger covers it, and only
then leaves the journal. It goes out again when Kafka refuses it, when Kafka shows that it lost its log, when the ledger's
generation changes, and when the ledger does not cover it in time. Memory is bounded: events are read from the journal a batch
at a time, and no more than `in_flight_bytes_max` wait for Kafka's word; Kafka away for a day costs disk, nothing else.

Each partition's batches and heartbeats carry the highest number assigned there, so that a tail that never arrives shows. Where
nothing was ever numbered, no heartbeat is due, but in the partition of the producer's own name: there its silence is noticed,
and there it tells, as often as a heartbeat is due, what its recount of answers has found. Who closes with nothing left to send
says so.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from billing.identity import partition_of
from billing.limits import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, COUNT_DRIFTS_MAX, SCHEMA_VERSION
from billing.registrations import sign_batch
from billing.v1.account_pb2 import Progress
from billing.v1.usage_pb2 import CountDrift, RawUsageBatch, UsageBatch
from producers.delivery import Delivery
from producers.follower import TopicFollower
from producers.journal import BATCH_ENVELOPE_BYTES, Journal

__all__ = ["Publisher", "PublisherSettings"]

logger = logging.getLogger(__name__)

_METADATA_TIMEOUT_S = 2.0
_RETRY_S = 0.5
# While batches are in flight, how long a look for their acknowledgements may keep new events waiting.
_POLL_S = 0.005
_IDLE_S = 1.0


@dataclass(frozen=True)
class PublisherSettings:
    """`security` is handed to librdkafka as it is (security.protocol, sasl.*, ssl.*) and never shown."""

    bootstrap: str
    partitions: int
    topic: str = "usage.events"
    progress_topic: str = "usage.progress"
    # While the ledger is at work on what was sent before, five times as long.
    linger_ms: int = 50
    batch_events: int = BATCH_EVENTS_MAX
    batch_bytes: int = BATCH_BYTES_MAX
    in_flight_bytes_max: int = 16 << 20
    compression: str = "none"
    # What Kafka acknowledged and the ledger does not cover goes out again after this; then after twice as long, up to 32-fold.
    resend_after_s: float = 30.0
    heartbeat_s: float = 30.0
    message_timeout_s: float = 30.0
    # At the start, how long to wait for the ledger's word on what was sent before.
    progress_wait_s: float = 10.0
    security: Mapping[str, str] = field(default_factory=dict, repr=False)
    # Of the producer's registration: batches are signed with it. Empty: they are not.
    key: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        for name, lowest, highest in (
            ("partitions", 1, 1 << 20),
            ("linger_ms", 0, 60_000),
            ("batch_events", 1, BATCH_EVENTS_MAX),
            ("batch_bytes", 2 * BATCH_ENVELOPE_BYTES, BATCH_BYTES_MAX),
            ("in_flight_bytes_max", 1, 1 << 30),
        ):
            if not lowest <= getattr(self, name) <= highest:
                raise ValueError(f"{name}={getattr(self, name)}: set it between {lowest} and {highest}")
        for name in ("resend_after_s", "heartbeat_s", "message_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: set it above 0")


def _no_drifts() -> Sequence[CountDrift]:
    return ()


class Publisher:
    """One thread for one journal. `start` once, `close` once, before the journal is closed."""

    def __init__(
        self, journal: Journal, settings: PublisherSettings, count_drifts: Callable[[], Sequence[CountDrift]] = _no_drifts
    ) -> None:
        """`count_drifts` says, from the publisher's thread, what the producer's recount has found by now."""
        if settings.partitions != journal.settings.partitions:
            raise ValueError(
                f"partitions={settings.partitions}: the journal {journal.path} numbers its events for "
                f"{journal.settings.partitions}; set both to the ledger's"
            )
        self.settings = settings
        self._journal = journal
        self._deliveries = [Delivery.begin(p, journal.freed_sequence(p)) for p in range(settings.partitions)]
        self._progress: dict[int, Progress] = {}
        self._progress_lock = threading.Lock()
        self._home = partition_of(journal.producer_id, settings.partitions)
        self._count_drifts = count_drifts
        self._drifts_told_at = -math.inf
        self._key_prefix = f"producer/{journal.producer_id}/".encode()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._abandoned = threading.Event()
        self._needs_producer = False
        self._problem = ""
        self._in_flight_bytes = 0
        self._counts = dict.fromkeys(
            (
                "published",
                "covered",
                "resent",
                "batches",
                "heartbeats",
                "delivery_failures",
                "reconnects",
                "numbering_conflicts",
                "faults",
            ),
            0,
        )
        self._follower = TopicFollower(
            settings.bootstrap, settings.progress_topic, self._on_progress, security=settings.security
        )
        self._thread = threading.Thread(target=self._run, name="usage-publisher", daemon=True)
        journal.subscribe(self._wake)

    def start(self) -> None:
        self._follower.start()
        self._thread.start()

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what is durable, then stop; whether Kafka has acknowledged all of it. What it has not stays in the journal.

        A broker that does not answer may add a few seconds to `timeout_s`.
        """
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            self._abandoned.set()
            self._wake.set()
            # Bounded by what one metadata request may take.
            self._thread.join(_METADATA_TIMEOUT_S + 1.0)
        self._follower.close()
        return all(d.acknowledged >= self._journal.highest_sequence(d.partition) for d in self._deliveries)

    def metrics(self) -> dict[str, int]:
        """Events counted since the start, and how things stand now."""
        highest = [self._journal.highest_sequence(d.partition) for d in self._deliveries]
        return {
            **self._counts,
            "in_flight_bytes": self._in_flight_bytes,
            "unsent": sum(h - d.sent for h, d in zip(highest, self._deliveries, strict=True)),
            "uncovered": sum(h - d.covered for h, d in zip(highest, self._deliveries, strict=True)),
            "oldest_unacknowledged_ms": self._journal.oldest_unacknowledged_ms(time.time_ns() // 1_000_000),
        }

    # The follower's thread.

    def _on_progress(self, key: bytes, value: bytes, partition: int) -> None:
        if key.startswith(self._key_prefix) and value:
            progress = Progress.FromString(value)
            # A producer's name may begin with that of another and a slash.
            is_own = progress.producer_id == self._journal.producer_id
            if is_own and progress.partition < self.settings.partitions:
                with self._progress_lock:
                    self._progress[progress.partition] = progress
                self._wake.set()

    # The publisher's thread.

    def _run(self) -> None:
        is_first = True
        while not self._is_done():
            try:
                producer = self._connect()
                if producer is None:
                    continue
                if is_first:
                    self._await_progress()
                    is_first = False
                self._publish(producer)
                if not self._abandoned.is_set() and self._is_done():
                    self._say_goodbye(producer)
                self._discard(producer)
            except Exception:
                # Ending here would leave usage unpublished for as long as the process lives.
                self._counts["faults"] += 1
                logger.exception("topic %s: publishing failed; beginning again", self.settings.topic)
                self._abandoned.wait(_RETRY_S)

    def _say_goodbye(self, producer: Producer) -> None:
        """Everything is acknowledged: silence from now on is no alarm. Where Kafka does not hear it, it will be one."""
        for delivery in self._deliveries:
            highest = self._journal.highest_sequence(delivery.partition)
            if highest or delivery.partition == self._home:
                self._send(producer, delivery, UsageBatch(highest_sequence=highest, closed=True), b"", 0, time.monotonic())
        producer.flush(_METADATA_TIMEOUT_S)

    def _discard(self, producer: Producer) -> None:
        """Everything that this producer has not delivered is sent anew by the next one."""
        producer.purge()
        producer.poll(0)
        self._in_flight_bytes = 0
        if not self._is_done():
            self._counts["reconnects"] += 1
            for delivery in self._deliveries:
                delivery.go_back(delivery.acknowledged)
                # A heartbeat at once: the offset that it gets shows whether Kafka still has its log.
                delivery.sent_at = -math.inf

    def _is_done(self) -> bool:
        if self._abandoned.is_set():
            return True
        return self._stopping.is_set() and all(
            d.acknowledged >= self._journal.highest_sequence(d.partition) for d in self._deliveries
        )

    def _connect(self) -> Producer | None:
        """A producer whose topic is there as the journal expects it, or None after a pause."""
        producer = Producer(
            {
                "bootstrap.servers": self.settings.bootstrap,
                "enable.idempotence": True,
                "acks": "all",
                # Batches are made here; librdkafka need not wait for more.
                "linger.ms": 0,
                "compression.type": self.settings.compression,
                # A batch and what Kafka adds to a message; below the broker's default bound.
                "message.max.bytes": BATCH_BYTES_MAX + 40_000,
                "message.timeout.ms": int(self.settings.message_timeout_s * 1_000),
                "queue.buffering.max.kbytes": 2 * (self.settings.in_flight_bytes_max >> 10) + 2_048,
                "allow.auto.create.topics": False,
                "reconnect.backoff.max.ms": 1_000,
                "log.connection.close": False,
                **self.settings.security,
                "error_cb": self._on_error,
                "logger": logger,
                # Each failed connection would be a line, twenty times a second: what matters is logged here.
                "log_level": 2,
            }
        )
        try:
            topic = producer.list_topics(self.settings.topic, timeout=_METADATA_TIMEOUT_S).topics[self.settings.topic]
        except KafkaException as error:
            problem = str(error)
        else:
            if topic.error is None and len(topic.partitions) == self.settings.partitions:
                # What it complained about while it was connecting is past.
                producer.poll(0)
                self._needs_producer = False
                if self._problem:
                    logger.info("topic %s: there again", self.settings.topic)
                    self._problem = ""
                return producer
            problem = str(topic.error or f"it has {len(topic.partitions)} partitions, the ledger {self.settings.partitions}")
        if problem != self._problem:
            logger.warning("topic %s: %s; the journal keeps the usage meanwhile", self.settings.topic, problem)
            self._problem = problem
        self._abandoned.wait(_RETRY_S)
        return None

    def _await_progress(self) -> None:
        deadline = time.monotonic() + self.settings.progress_wait_s
        while not (self._follower.ready.wait(0.1) or self._stopping.is_set() or time.monotonic() >= deadline):
            continue

    def _publish(self, producer: Producer) -> None:
        """Serve all partitions until there is reason for another producer, or nothing is left to do."""
        while not self._needs_producer and not self._is_done():
            # Cleared before looking, so that what comes while looking wakes the next round.
            self._wake.clear()
            self._take_progress()
            now = time.monotonic()
            pause_s = min(self._serve(producer, delivery, now) for delivery in self._deliveries)
            if self._in_flight_bytes:
                producer.poll(min(pause_s, _POLL_S))
            else:
                producer.poll(0)
                self._wake.wait(pause_s)

    def _serve(self, producer: Producer, delivery: Delivery, now: float) -> float:
        """Send what is due in one partition; returns for how long nothing will be."""
        if now < delivery.not_before:
            return delivery.not_before - now
        if delivery.is_overdue(self.settings.resend_after_s, now):
            delivery.on_overdue()
            self._go_back(delivery, delivery.covered, "the ledger has not covered it in time")
        highest = self._journal.highest_sequence(delivery.partition)
        while delivery.sent < highest:
            if delivery.unsent_since is None:
                delivery.unsent_since = now
            lingered_s = now - delivery.unsent_since
            linger_s = delivery.linger_s(self.settings.linger_ms)
            if lingered_s < linger_s and highest - delivery.sent < self.settings.batch_events and not self._stopping.is_set():
                return linger_s - lingered_s
            if not self._send_batch(producer, delivery, highest, now):
                return _POLL_S
        if not highest and delivery.partition != self._home:
            return _IDLE_S
        if delivery.partition == self._home and not self._tell_drifts(producer, delivery, highest, now):
            return _POLL_S
        if now - delivery.sent_at >= self.settings.heartbeat_s:
            if not self._send(producer, delivery, UsageBatch(highest_sequence=highest), b"", 0, now):
                return _POLL_S
            self._counts["heartbeats"] += 1
        return min(_IDLE_S, max(0.0, delivery.sent_at + self.settings.heartbeat_s - now))

    def _tell_drifts(self, producer: Producer, delivery: Delivery, highest: int, now: float) -> bool:
        """With a heartbeat of their own: batches may come too fast for any other to be due. False when there is no room."""
        if now - self._drifts_told_at < self.settings.heartbeat_s:
            return True
        drifts = self._count_drifts()[:COUNT_DRIFTS_MAX]
        if drifts:
            batch = UsageBatch(highest_sequence=highest, count_drifts=drifts)
            if not self._send(producer, delivery, batch, b"", 0, now):
                return False
            self._counts["heartbeats"] += 1
        self._drifts_told_at = now
        return True

    def _send_batch(self, producer: Producer, delivery: Delivery, highest: int, now: float) -> bool:
        if self._in_flight_bytes >= self.settings.in_flight_bytes_max:
            return False
        events_max = self.settings.batch_events
        page = self._journal.read(
            delivery.partition, delivery.sent, events_max, self.settings.batch_bytes - BATCH_ENVELOPE_BYTES
        )
        if not page.events:
            # It was let go since, because the ledger covered it before its generation changed.
            delivery.on_freed(self._journal.freed_sequence(delivery.partition))
            return False
        last = page.first_sequence + len(page.events) - 1
        # Two messages one after the other are their merger: the events go out as they lie in the journal.
        events = RawUsageBatch(events=page.events).SerializeToString()
        header = UsageBatch(first_sequence=page.first_sequence, highest_sequence=highest)
        if not self._send(producer, delivery, header, events, len(page.events), now, last):
            return False
        self._counts["resent"] += max(0, min(delivery.furthest, last) - page.first_sequence + 1)
        delivery.on_sent(last, now)
        return True

    def _send(
        self, producer: Producer, delivery: Delivery, header: UsageBatch, events: bytes, count: int, now: float, last: int = 0
    ) -> bool:
        """Hand one message to librdkafka; False when its queue is full."""
        header.schema_version = SCHEMA_VERSION
        header.producer_id = self._journal.producer_id
        value = header.SerializeToString() + events
        if self.settings.key:
            value = sign_batch(value, self.settings.key)
        on_delivery = partial(self._on_delivery, delivery, delivery.epoch, header.first_sequence, last, count, len(value))
        try:
            producer.produce(self.settings.topic, value=value, partition=delivery.partition, on_delivery=on_delivery)
        except BufferError:
            return False
        delivery.sent_at = now
        self._in_flight_bytes += len(value)
        self._counts["batches"] += bool(count)
        return True

    def _on_delivery(
        self,
        delivery: Delivery,
        epoch: int,
        first: int,
        last: int,
        count: int,
        size: int,
        error: KafkaError | None,
        message: Message,
    ) -> None:
        self._in_flight_bytes -= size
        now = time.monotonic()
        if error is None:
            self._counts["published"] += count
            offset = message.offset()
            if not delivery.on_acknowledged(last, epoch, -1 if offset is None else offset, now):
                self._go_back(delivery, delivery.covered, "Kafka has begun a new log")
        elif error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            self._counts["delivery_failures"] += 1
            # An idempotent producer may be unable to go on after a failure, and some brokers never take it back.
            self._needs_producer = True
            delivery.not_before = now + _RETRY_S
            reason = f"topic {self.settings.topic}: {error.str()}"
            if count and epoch == delivery.epoch:
                self._go_back(delivery, first - 1, reason)

    def _take_progress(self) -> None:
        with self._progress_lock:
            taken, self._progress = self._progress, {}
        now = time.monotonic()
        for partition, progress in taken.items():
            delivery = self._deliveries[partition]
            before, conflict_before = delivery.covered, delivery.numbering_conflict
            highest, freed = self._journal.highest_sequence(partition), self._journal.freed_sequence(partition)
            generation = progress.position.generation
            if not delivery.on_progress(progress.covered_sequence, generation, highest, freed, now):
                self._go_back(delivery, delivery.covered, f"the ledger's generation is now {generation.hex()}")
            self._counts["covered"] += max(0, delivery.covered - before)
            if delivery.numbering_conflict and not conflict_before:
                self._counts["numbering_conflicts"] += 1
                logger.error(
                    "producer_id=%s: the ledger covers %d in partition %d, this journal has assigned %d; another journal uses "
                    "this ID or this one was restored from a copy. Nothing is freed there: begin a journal with another ID",
                    self._journal.producer_id,
                    progress.covered_sequence,
                    partition,
                    highest,
                )
            if not delivery.numbering_conflict:
                self._journal.free(partition, delivery.covered)

    def _go_back(self, delivery: Delivery, sequence: int, reason: str) -> None:
        until = delivery.sent
        if delivery.go_back(sequence):
            logger.warning("partition %d: %s; sending %d to %d again", delivery.partition, reason, sequence + 1, until)

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN or error.fatal():
            self._needs_producer = True
