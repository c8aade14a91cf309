"""Follows a compacted topic: every key's last value from the topic's beginning, then each change.

Promise: `on_message` is called for every message that is in the topic, in each partition's order, on the follower's own
thread; `ready` is set once the end that was there at the start has been reached. No consumer group is joined and nothing is
committed. When the connection to the brokers was lost, or a partition reports an error, the topic is read from its beginning
again: a broker may have come back without what it held, and then an old position means nothing (the embedded broker does not
even answer a fetch beyond its end). So a message may come again: the last value of a key is what counts.

An `on_message` that raises is logged and counted, and the next message follows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

__all__ = ["TopicFollower"]

logger = logging.getLogger(__name__)

_METADATA_TIMEOUT_S = 2.0
_POLL_TIMEOUT_S = 0.2
_POLL_MESSAGES_MAX = 500
_RETRY_S = 0.5
# In place of a partition, while no topic is read.
_NOT_READING = -1


class TopicFollower:
    """One thread that reads one topic. `start` once, `close` once."""

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        on_message: Callable[[bytes, bytes, int], None],
        *,
        security: Mapping[str, str] | None = None,
    ) -> None:
        """`on_message` takes key, value (empty for a key that was deleted) and partition. `security` is librdkafka's."""
        self.topic = topic
        self.ready = threading.Event()
        self._on_message = on_message
        self._stopping = threading.Event()
        self._disconnected = threading.Event()
        self._messages = self._failed = self._readings = 0
        # Since when, on the monotonic clock, something may be in a partition that was not handed on.
        self._behind_since_s = {_NOT_READING: time.monotonic()}
        self._settings: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            # librdkafka wants one; without subscribe and commit it is never sent.
            "group.id": "taximeter-follower",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "allow.auto.create.topics": False,
            "fetch.queue.backoff.ms": 5,
            # Kafka answers a fetch that waits as soon as there is something. The embedded broker looks a few times while it
            # waits; every fetch costs it a millisecond, and a process has several followers.
            "fetch.wait.max.ms": 250,
            "reconnect.backoff.max.ms": 1_000,
            "log.connection.close": False,
            **(security or {}),
            "error_cb": self._on_error,
            "logger": logger,
            # Each failed connection would be a line, twenty times a second.
            "log_level": 2,
        }
        self._thread = threading.Thread(target=self._run, name=f"follower-{topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop reading. Raises `TimeoutError` if an `on_message` does not return in time."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TimeoutError(f"timeout_s={timeout_s:g}: the follower of {self.topic} has not ended; is on_message stuck?")

    def metrics(self) -> dict[str, int]:
        return {"messages": self._messages, "failed": self._failed, "readings": self._readings}

    def behind_s(self) -> float:
        """For how long it has not been at the topic's end; 0: it is there. While no broker answers, it is not known to be."""
        since_s = min(self._behind_since_s.values(), default=None)
        return 0.0 if since_s is None else time.monotonic() - since_s

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._disconnected.clear()
            consumer = Consumer(self._settings)
            try:
                self._read(consumer)
            except KafkaException as error:
                logger.info("topic %s: %s; reading it from the beginning", self.topic, error)
            finally:
                self._behind_since_s = {_NOT_READING: min(self._behind_since_s.values(), default=time.monotonic())}
                consumer.close()
            self._stopping.wait(_RETRY_S)

    def _read(self, consumer: Consumer) -> None:
        """Read from the beginning until there is reason to begin again."""
        partitions = self._partitions(consumer)
        if not partitions:
            return
        self._readings += 1
        unread = set(partitions)
        self._behind_since_s = dict.fromkeys(partitions, min(self._behind_since_s.values()))
        consumer.assign([TopicPartition(self.topic, partition, OFFSET_BEGINNING) for partition in partitions])
        while not self._stopping.is_set() and not self._disconnected.is_set():
            for message in _next(consumer):
                error = message.error()
                if error is None:
                    if _partition(message) not in self._behind_since_s:
                        self._behind_since_s[_partition(message)] = time.monotonic()
                    self._hand_on(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._behind_since_s.pop(_partition(message), None)
                    unread.discard(_partition(message))
                    if not unread:
                        self.ready.set()
                else:
                    raise KafkaException(error)

    def _partitions(self, consumer: Consumer) -> list[int]:
        """The topic's partitions; none while no broker answers or the topic does not exist yet."""
        try:
            metadata = consumer.list_topics(self.topic, timeout=_METADATA_TIMEOUT_S).topics[self.topic]
        except KafkaException:
            return []
        return [] if metadata.error is not None else sorted(metadata.partitions)

    def _hand_on(self, message: Message) -> None:
        self._messages += 1
        try:
            self._on_message(_bytes(message.key()), _bytes(message.value()), _partition(message))
        except Exception:
            self._failed += 1
            logger.exception("topic %s, partition %s, offset %s", self.topic, message.partition(), message.offset())

    def _on_error(self, error: KafkaError) -> None:
        if error.code() == KafkaError._ALL_BROKERS_DOWN and not self._disconnected.is_set():
            logger.info("topic %s: %s; reading it from the beginning when a broker is back", self.topic, error.str())
            self._disconnected.set()


def _next(consumer: Consumer) -> list[Message]:
    """The next message as soon as it comes, and what is here behind it: `consume` alone waits its whole time for more."""
    first = consumer.poll(_POLL_TIMEOUT_S)
    return [] if first is None else [first, *consumer.consume(_POLL_MESSAGES_MAX - 1, timeout=0)]


def _partition(message: Message) -> int:
    partition = message.partition()
    assert partition is not None, "a message that was read has a partition"
    return partition


def _bytes(value: str | bytes | None) -> bytes:
    return value if isinstance(value, bytes) else (value or "").encode()
