"""The host's ports on Kafka: librdkafka's consumer without a group, and its idempotent producer.

Promise: `KafkaLogWriter` reports each message's fate once, on the event loop, in order per partition; after one failure the
caller must take a new writer, because what follows a hole is not sent in order any more. `KafkaLogReader` reads to the true end
of a partition, also on a broker whose ListOffsets falls short of it (Tansu answers the base of the last batch plus one).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from billing.limits import RECORD_BYTES_MAX
from stream_processors.errors import RefusedToStart
from stream_processors.settings import KafkaSettings

__all__ = ["KafkaLogReader", "KafkaLogWriter"]

MESSAGE_BYTES_MAX = RECORD_BYTES_MAX + 200_000
_CHUNK_MESSAGES = 100
_POLL_S = 0.2
# A log time that ran ahead would make all later usage too old, for ever, so the topic refuses it: see `topics`.
_AHEAD = (
    "its time is further ahead of Kafka's clock than the topic's message.timestamp.after.max.ms: set this machine's clock, or "
    "the broker's, then start again; nothing was written"
)
# Outside of any group; librdkafka wants a name all the same.
_NO_GROUP = "taximeter-reader"


class KafkaLogReader:
    """`LogReader` on Kafka. Each call has a consumer to itself, used on threads of the default executor.

    A takeover makes dozens of calls, and to connect costs more than to ask: the next call takes the consumer of one that ended
    well, if that was within `idle_s`. So what it knows of topics is as fresh as what a new one would.
    """

    def __init__(self, settings: KafkaSettings, *, idle_s: float = 1.0) -> None:
        self._settings = settings
        self._timeout_s = settings.request_timeout_ms / 1000
        self._idle_s = idle_s
        # Each with when its call ended; the first one's is the earliest.
        self._idle: deque[tuple[float, Consumer]] = deque()
        self._closing = threading.Lock()

    def _borrow(self) -> Consumer:
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread has taken the last one
                since_s, consumer = self._idle.pop()
                # What it has to say now, to nobody, is that a connection broke.
                if time.monotonic() - since_s < self._idle_s and consumer.poll(0) is None:
                    return consumer
                consumer.close()
        return Consumer(self._options())

    def _give_back(self, consumer: Consumer, *, well: bool) -> None:
        if not well:
            consumer.close()
            return
        consumer.unassign()
        self._idle.append((time.monotonic(), consumer))
        if self._closing.acquire(blocking=False):
            threading.Thread(target=self._close_idle, name="ledger-readers", daemon=True).start()

    def _close_idle(self) -> None:
        while True:
            time.sleep(self._idle_s)
            with contextlib.suppress(IndexError):
                while time.monotonic() - self._idle[0][0] >= self._idle_s:
                    self._idle.popleft()[1].close()
            if not self._idle:
                self._closing.release()
                # One may have come before that, and found this at work.
                if not self._idle or not self._closing.acquire(blocking=False):
                    return

    def _options(self) -> dict[str, str | int | float | bool]:
        return {
            **self._settings.client(),
            "group.id": _NO_GROUP,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "fetch.queue.backoff.ms": 5,
            # At the end of the log the broker is to say so at once.
            "fetch.wait.max.ms": 10,
            "fetch.message.max.bytes": MESSAGE_BYTES_MAX,
            "queued.max.messages.kbytes": 65_536,
            "isolation.level": "read_uncommitted",
        }

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """The first offset that is there, and the one that the next message will get."""
        return await asyncio.to_thread(self._bounds, topic, partition)

    def _bounds(self, topic: str, partition: int) -> tuple[int, int]:
        consumer, well = self._borrow(), False
        try:
            found = self._bounds_by(consumer, topic, partition)
            well = True
        except KafkaException as error:
            raise RefusedToStart(f"{topic}[{partition}]: cannot be read ({error})") from error
        finally:
            self._give_back(consumer, well=well)
        return found

    def _bounds_by(self, consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
        place = TopicPartition(topic, partition)
        low, high = consumer.get_watermark_offsets(place, timeout=self._timeout_s)
        if low == high:
            return int(low), int(high)
        # From the last batch that ListOffsets knows of, to wherever the log really ends.
        consumer.assign([TopicPartition(topic, partition, max(low, high - 1))])
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            message = consumer.poll(_POLL_S)
            if message is None:
                continue
            error = message.error()
            if error is not None and error.code() == KafkaError._PARTITION_EOF:
                return int(low), int(message.offset() or high)
            if error is not None:
                raise KafkaException(error)
        raise RefusedToStart(f"{topic}[{partition}]: its end was not found in {self._timeout_s:g} s; is Kafka well?")

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        """The messages from `start` up to and without `end`, in chunks."""
        if start >= end:
            return
        consumer, well = self._borrow(), False
        try:
            # Assigned before it knows the leader, librdkafka starts to fetch half a second later.
            await asyncio.to_thread(consumer.list_topics, topic, self._timeout_s)
            consumer.assign([TopicPartition(topic, partition, start if start > 0 else OFFSET_BEGINNING)])
            heard = time.monotonic()
            reached = start
            while reached < end:
                messages = await asyncio.to_thread(_take, consumer)
                chunk, reached = _values(messages, reached, end)
                if chunk:
                    heard = time.monotonic()
                    yield chunk
                elif time.monotonic() - heard > self._timeout_s:
                    raise RefusedToStart(
                        f"{topic}[{partition}]: nothing came after offset {reached} of {end} for {self._timeout_s:g} s; "
                        "is Kafka well, and does the log reach that far?"
                    )
            well = True
        except KafkaException as error:
            raise RefusedToStart(f"{topic}[{partition}]: cannot be read from offset {start} ({error})") from error
        finally:
            await asyncio.to_thread(self._give_back, consumer, well=well)

    async def follow(self, topic: str, partitions: int, every_s: float) -> AsyncGenerator[tuple[int, bytes], None]:
        """Partition and value of every message from the topic's beginning on, looked for that often; one consumer for all."""
        # Whoever looks now and then need not have the broker asked a hundred times in between.
        consumer = Consumer({**self._options(), "fetch.wait.max.ms": int(every_s * 1000)})
        try:
            await asyncio.to_thread(consumer.list_topics, topic, self._timeout_s)
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in range(partitions)])
            while True:
                messages = await asyncio.to_thread(consumer.consume, _CHUNK_MESSAGES, 0)
                for message in messages:
                    error, partition = message.error(), message.partition()
                    # While Kafka is away nothing comes, and its client tries again by itself.
                    if error is not None and error.code() == KafkaError._AUTO_OFFSET_RESET:
                        raise KafkaException(error)
                    if error is None and partition is not None:
                        yield partition, bytes(message.value() or b"")
                if not messages:
                    await asyncio.sleep(every_s)
        except KafkaException as error:
            raise RefusedToStart(f"{topic}: cannot be followed ({error})") from error
        finally:
            await asyncio.to_thread(consumer.close)


def _take(consumer: Consumer) -> list[Message]:
    """What is there, as soon as there is something: asked for many at once, librdkafka waits until it has as many."""
    messages = consumer.consume(1, _POLL_S)
    return messages + consumer.consume(_CHUNK_MESSAGES, 0) if messages else messages


def _values(messages: Sequence[Message], reached: int, end: int) -> tuple[list[tuple[int, bytes]], int]:
    chunk: list[tuple[int, bytes]] = []
    for message in messages:
        error = message.error()
        offset = message.offset()
        if error is not None:
            if error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            # Its offset is the log's end, which covers a gap before it (a transaction's marker, say).
            reached = max(reached, offset or 0)
        elif offset is not None and offset < end:
            chunk.append((offset, bytes(message.value() or b"")))
            reached = offset + 1
        else:
            reached = end
    return chunk, reached


class KafkaLogWriter:
    """`LogWriter` on Kafka; also sends keyed messages. Make it on the event loop that is to hear of deliveries."""

    def __init__(self, settings: KafkaSettings, *, linger_ms: float = 1.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._producer = Producer(
            {
                **settings.client(),
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": linger_ms,
                "message.max.bytes": MESSAGE_BYTES_MAX,
                "message.timeout.ms": settings.delivery_timeout_ms,
                # What is on its way is bounded by the hosts; this only has to be more.
                "queue.buffering.max.kbytes": 1_048_576,
            }
        )
        self._done: list[Callable[[], None]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._poll, name="ledger-writer", daemon=True)
        self._thread.start()

    def write(
        self,
        topic: str,
        partition: int,
        value: bytes | None,
        on_done: Callable[[int, str], None],
        key: bytes | None = None,
        *,
        time_ms: int = 0,
    ) -> None:
        """Send; `on_done(offset, problem)` follows on the event loop, problem empty when it was acknowledged.

        `time_ms` is the message's time; 0: the client's clock. Without a value, compaction takes out what the key had.
        """
        try:
            self._producer.produce(
                topic,
                value=value,
                key=key,
                partition=partition,
                on_delivery=partial(self._delivered, on_done),
                timestamp=time_ms,
            )
        except (BufferError, KafkaException) as error:
            self._loop.call_soon(on_done, -1, str(error))

    def _delivered(self, on_done: Callable[[int, str], None], error: KafkaError | None, message: Message) -> None:
        offset = message.offset()
        problem = ""
        if error is not None:
            problem = _AHEAD if error.code() == KafkaError.INVALID_TIMESTAMP else str(error)
        self._done.append(partial(on_done, -1 if offset is None else offset, problem))

    def _poll(self) -> None:
        while not self._closing:
            # Callbacks run inside poll; they are handed over in one go. More than one waits when the loop was busy.
            if self._producer.poll(_POLL_S) and self._done:
                done, self._done = self._done, []
                self._loop.call_soon_threadsafe(_run_all, done)

    async def close(self, timeout_s: float) -> None:
        """Stop. What was not acknowledged by then is reported by nobody: the log tells."""
        await asyncio.to_thread(self._producer.flush, timeout_s)
        self._closing = True
        await asyncio.to_thread(self._thread.join)
        _run_all(self._done)


def _run_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
