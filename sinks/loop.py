"""The sink: reads usage.ledger, writes ClickHouse, and says on usage.progress how far it is.

Two threads: one reads, checks and makes columns, the other writes; between them stands one batch, so what the sink holds is
bounded by three batches. Many records in few batches are what ClickHouse likes, and people want to see balances at once, so a
third thread shows the accounts of the batch that is being collected, unless the sink has to catch up. Now and then a fourth
one sums by day what is over (`day_totals`), and takes erased users out of what was written before (`erasing`).
ClickHouse away: the writing thread waits and repeats, the reading one stops at its bound, nothing is shown.
Kafka away: the reading thread waits. What the ledger's key did not seal is refused, and told. A record that cannot be read
though it must be, a log that does not fit the database (one that was cut and written on while the sink ran, too), a refused
insert: the sink ends with the error; it never skips.
"""

from __future__ import annotations

import logging
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from billing.limits import RECORD_BYTES_MAX
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.collecting import Collected
from sinks.columns import NO_OFFSET, Accepted
from sinks.day_totals import sum_days
from sinks.engine import Engine
from sinks.erasing import erase_pending
from sinks.errors import EngineUnavailable, LedgerUnavailable, SinkError
from sinks.follow import Follower, generation_of
from sinks.locate import locate
from sinks.progress import ProgressPublisher
from sinks.settings import SinkSettings
from sinks.status import SinkStatus
from sinks.writer import Position, Prepared, Writer

__all__ = ["run_sink"]

_LOG = logging.getLogger(__name__)

_POLL_MESSAGES = 64
_POLL_S_MIN, _POLL_S_MAX = 0.005, 0.05
_METADATA_TIMEOUT_S = 10.0
# Ticks come more often than this. After it, the sink asks whether the log still reaches to where it stands.
_SILENCE_S = 5.0
# A writer that is well follows a zombie's record with one of its own, a tick at least, within about so long.
_DOUBT_S = 2.0
# How often days that are over are summed; until then they are read by the minute.
_SUM_DAYS_S = 900.0
# After an attempt to finish an erasure, the next one begins no sooner.
_ERASE_AGAIN_S = 5.0
# The log is not what it was: look for our place in it again.
_MOVED = frozenset(
    {
        KafkaError._AUTO_OFFSET_RESET,
        KafkaError._LOG_TRUNCATION,
        KafkaError.OFFSET_OUT_OF_RANGE,
        KafkaError.UNKNOWN_TOPIC_ID,
    }
)

T = TypeVar("T")


class _Stopped(Exception):
    """The sink was told to stop while it waited."""


def run_sink(
    settings: SinkSettings,
    engine: Engine,
    stop: threading.Event | None = None,
    status: SinkStatus | None = None,
    on_stored: Callable[..., None] | None = None,
) -> None:
    """Follow the ledger until `stop` is set; without one, until SIGTERM or SIGINT. The engine stays the caller's.

    `on_stored` hears of the records of each batch, as arguments, when the database has them; it neither waits nor raises.

    Raises LedgerError (LedgerGap among them), UnreadableRecord, EngineError: what stopped it, and what to do.
    """
    if stop is None:
        stop = threading.Event()
        _stop_on_signals(stop)
    sink = _Sink(settings, engine, stop, status or SinkStatus(), on_stored)
    try:
        sink.run()
    except _Stopped:
        _LOG.info("sink stopped")
    finally:
        sink.close()


def _stop_on_signals(stop: threading.Event) -> None:
    def ask(number: int, _frame: FrameType | None) -> None:
        _LOG.info("signal %d: the sink finishes the batch that is being written", number)
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


class _Sink:
    def __init__(
        self,
        settings: SinkSettings,
        engine: Engine,
        stop: threading.Event,
        status: SinkStatus,
        on_stored: Callable[..., None] | None,
    ) -> None:
        self._settings = settings
        self._on_stored = on_stored
        self._stop = stop
        self._status = status
        self._engine = engine
        self._writer = Writer(engine, usage_topic=settings.usage_topic, seal_keys=settings.seal_key)
        self._consumer = Consumer(
            {
                "bootstrap.servers": settings.bootstrap,
                # Demanded by the client; partitions are assigned by hand and nothing is committed.
                "group.id": "taximeter-sink",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "allow.auto.create.topics": False,
                "enable.partition.eof": True,
                # The default of one second starves a consumer that is faster than the network.
                "fetch.queue.backoff.ms": 5,
                # Kafka answers a fetch that waits as soon as there is something; the embedded broker looks now and then.
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": RECORD_BYTES_MAX,
                "queued.max.messages.kbytes": max(2 * settings.batch_bytes // 1024, 16_384),
                **settings.security,
            },
            logger=_LOG,
        )
        self._progress = ProgressPublisher(settings)
        self._followers: dict[int, Follower] = {}
        self._offsets: dict[int, int] = {}
        # Generations that were seen in the log and found not to be ours, by partition.
        self._foreign: dict[int, set[bytes]] = {}
        # Since when records came that do not follow ours, and none that does; and the offset up to which that was found to be a
        # zombie's doing, the log being the one that we follow.
        self._doubted_s: dict[int, float] = {}
        self._last_ignored: dict[int, int] = {}
        self._last_refused: dict[int, int] = {}
        self._cleared: dict[int, int] = {}
        self._heard_s = 0.0
        # A batch, and its records where somebody wants to hear of them.
        self._ready: queue.Queue[tuple[Prepared, list[LedgerRecord]]] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._storing = threading.Thread(target=self._store_all, name="sink-writer", daemon=True)
        self._shower = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sink-preview")
        self._showing: Future[None] = Future()
        self._showing.set_result(None)
        self._summer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sink-days")
        self._summing: Future[None] = self._showing
        self._sum_days_at_s = time.monotonic() + _SUM_DAYS_S
        self._erasing: Future[None] = self._showing
        self._erase_at_s = time.monotonic()

    def run(self) -> None:
        positions = self._persist("reading the position", self._writer.positions)
        self._begin(positions)
        self._assign()
        self._storing.start()
        collected = Collected(self._settings)
        self._heard_s = time.monotonic()
        while True:
            self._check()
            now_s = time.monotonic()
            if now_s - self._heard_s > _SILENCE_S:
                self._look_at_silence()
                self._heard_s = now_s
            if any(now_s - since_s > _DOUBT_S for since_s in self._doubted_s.values()):
                self._look_at_doubts()
            if now_s >= self._sum_days_at_s and self._summing.done():
                self._sum_days_at_s = now_s + _SUM_DAYS_S
                self._summing = self._summer.submit(self._sum_days)
            if self._writer.erasing_due and now_s >= self._erase_at_s and self._erasing.done():
                self._erase_at_s = now_s + _ERASE_AGAIN_S
                self._erasing = self._summer.submit(self._erase)
            # What is due and was not done waits for another thread.
            found = self._poll(max(min(collected.wait_s(now_s), _POLL_S_MAX), _POLL_S_MIN))
            now_s = time.monotonic()
            if found:
                collected.add(found, now_s)
            # While the writer is busy a batch may grow to its bound; then it waits here, and Kafka keeps.
            if collected.is_full or (collected.is_due(now_s) and self._ready.empty()):
                batch = collected.take()
                records = [] if self._on_stored is None else [accepted.record for accepted in batch]
                self._hand_over(self._writer.prepare(batch), records)
            elif collected.is_to_show(now_s) and len(found) < _POLL_MESSAGES and self._showing.done():
                self._showing = self._shower.submit(self._show, collected.show())

    def close(self) -> None:
        """Let the batch that is being written end; what was read beyond it is read again next time."""
        self._stop.set()
        if self._storing.is_alive():
            self._storing.join()
        self._shower.shutdown()
        self._summer.shutdown()
        self._consumer.close()
        self._progress.close()

    # -- reading --------------------------------------------------------------------------------------------------------

    def _begin(self, positions: dict[int, Position]) -> None:
        settings = self._settings
        partitions = settings.partitions
        if partitions is None:
            partitions = self._persist("asking Kafka for the ledger's partitions", self._all_partitions)
        for partition in partitions:
            position = positions.get(partition)
            self._followers[partition] = Follower(partition, position, settings.seal_key, accept_gap=settings.accept_gap)
            self._offsets[partition] = position.ledger_offset if position is not None else NO_OFFSET
            self._foreign[partition] = set()
            self._status.at(partition, position)

    def _all_partitions(self) -> tuple[int, ...]:
        topic = self._settings.ledger_topic
        found = self._consumer.list_topics(topic, timeout=_METADATA_TIMEOUT_S).topics[topic]
        if found.error is not None:
            raise LedgerUnavailable(f"{topic}: {found.error.str()}; `taximeter topics apply` makes the topics")
        return tuple(sorted(found.partitions))

    def _assign(self) -> None:
        """Find our place in each partition's log, and read from there."""
        places = []
        for partition, follower in sorted(self._followers.items()):
            offset = self._persist(
                "finding the place in the ledger",
                lambda follower=follower: locate(  # type: ignore[misc]
                    self._consumer, self._settings.ledger_topic, follower, self._offsets[follower.partition]
                ),
            )
            places.append(TopicPartition(self._settings.ledger_topic, partition, offset))
        self._consumer.assign(places)

    def _poll(self, timeout_s: float) -> list[Accepted]:
        accepted: list[Accepted] = []
        for message in self._consumer.consume(_POLL_MESSAGES, timeout=timeout_s):
            error = message.error()
            if error is not None:
                self._on_error(error)
                if error.code() in _MOVED:
                    break
                continue
            # What is not ours is no silence: whoever looked for our place then would read it all again, and never be through.
            self._heard_s = time.monotonic()
            entry = self._accept(message)
            if entry is not None:
                accepted.append(entry)
        return accepted

    def _accept(self, message: Message) -> Accepted | None:
        partition, offset, stored = message.partition(), message.offset(), message.value()
        assert partition is not None
        assert offset is not None
        follower = self._followers[partition]
        if stored is None:
            # Compaction leaves the like, and anybody can write it: it has no seal either.
            stored = b""
        entry = follower.accept(stored, offset)
        if entry is not None:
            self._offsets[partition] = offset
            self._doubted_s.pop(partition, None)
            return entry
        self._status.ignored(partition, follower.ignored, follower.refused)
        self._last_ignored[partition] = offset
        if follower.refusal and offset > self._last_refused.get(partition, NO_OFFSET):
            self._last_refused[partition] = offset
            _LOG.error("%s[%d]: offset %d was refused: %s", self._settings.ledger_topic, partition, offset, follower.refusal)
        if offset > self._cleared.get(partition, NO_OFFSET):
            self._doubted_s.setdefault(partition, time.monotonic())
        if not follower.refusal:
            self._look_at_foreign(follower, stored)
        return None

    def _look_at_doubts(self) -> None:
        """A log that was cut and written on looks like a zombie's work; whether it has our place tells them apart."""
        _LOG.warning("partitions %s: records that do not follow ours: looking for our place", sorted(self._doubted_s))
        self._assign()
        for partition in self._doubted_s:
            # They are read again, and ignored again.
            self._cleared[partition] = self._last_ignored[partition]
        self._doubted_s.clear()

    def _look_at_foreign(self, follower: Follower, stored: bytes) -> None:
        """A record of a generation that we don't know: either a zombie's, or the log was made anew under our feet."""
        generation = generation_of(stored)
        known = self._foreign[follower.partition]
        if generation != follower.generation and generation not in known:
            known.add(generation)
            _LOG.warning("partition %d: records of generation %s: looking for our place", follower.partition, generation.hex())
            self._assign()

    def _look_at_silence(self) -> None:
        """A broker that forgot its log may answer a fetch behind the end with silence instead of an error."""
        topic = self._settings.ledger_topic
        try:
            partitions = self._consumer.list_topics(topic, timeout=_METADATA_TIMEOUT_S).topics[topic].partitions
            ends = {
                partition: self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=_METADATA_TIMEOUT_S)[
                    1
                ]
                for partition in self._offsets
                if partition in partitions
            }
        except KafkaException as error:
            self._status.waiting(f"Kafka: {error}")
            return
        if any(ends.get(partition, 0) <= offset for partition, offset in self._offsets.items()):
            self._assign()

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            return
        if error.code() in _MOVED:
            _LOG.warning("the ledger's log has moved (%s): looking for our place", error.str())
            self._assign()
        elif error.fatal():
            raise KafkaException(error)
        else:
            # The client tries again by itself.
            self._status.waiting(f"Kafka: {error.str()}")

    # -- writing --------------------------------------------------------------------------------------------------------

    def _hand_over(self, prepared: Prepared, records: list[LedgerRecord]) -> None:
        while True:
            self._check()
            try:
                self._ready.put((prepared, records), timeout=0.1)
            except queue.Full:
                continue
            return

    def _store_all(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    prepared, records = self._ready.get(timeout=0.1)
                except queue.Empty:
                    self._progress.serve()
                    continue
                began_s = time.monotonic()
                positions = self._persist("writing", lambda prepared=prepared: self._writer.store(prepared))  # type: ignore[misc]
                self._status.stored(prepared.records, time.monotonic() - began_s)
                for partition, position in positions.items():
                    self._status.at(partition, position)
                    self._progress.publish(position)
                if self._on_stored is not None:
                    self._on_stored(*records)
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - the reading thread raises it
            self._failure = error

    def _show(self, part: Sequence[Accepted]) -> None:
        try:
            self._writer.preview(part)
        except SinkError as error:
            # The batch writes the same rows, again and again if need be, and says what is wrong.
            _LOG.debug("balances are shown later: %s", error)

    def _sum_days(self) -> None:
        try:
            sum_days(self._engine, self._followers, self._stop.is_set)
        except SinkError as error:
            _LOG.warning("days are summed later, and read by the minute until then: %s", error)

    def _erase(self) -> None:
        assert self._settings.seal_key is not None, "the writer takes no erasure without it"
        # What comes meanwhile makes it due again.
        self._writer.erasing_due = False
        try:
            over = erase_pending(
                self._engine, self._settings.seal_key, self._stop.is_set, usage_topic=self._settings.usage_topic
            )
        except SinkError as error:
            over = False
            _LOG.warning("erased users are taken out of earlier rows later: %s", error)
        if not over:
            self._writer.erasing_due = True

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise _Stopped

    def _persist(self, doing: str, call: Callable[[], T]) -> T:
        """`call()`, again and again while what it needs is away."""
        wait_ms = 100
        while True:
            try:
                result = call()
            except (EngineUnavailable, LedgerUnavailable, KafkaException) as error:
                self._status.waiting(f"{doing}: {error}")
                _LOG.warning("%s: %s; again in %d ms", doing, error, wait_ms)
            else:
                self._status.waiting("")
                return result
            if self._stop.wait(wait_ms / 1000 * random.uniform(0.5, 1.0)):  # noqa: S311 - spreads retries, guards nothing
                raise _Stopped
            wait_ms = min(2 * wait_ms, self._settings.retry_ms_max)
