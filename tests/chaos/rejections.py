"""What the ledger refused, as it tells the world: usage.rejected, read from where it ended when a trial began."""

from __future__ import annotations

import time
from typing import Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from billing.v1.rejected_pb2 import RejectedInput
from taximeter import compose
from taximeter.config import Config

__all__ = ["Place", "RejectedTopic", "place_of"]

_TIMEOUT_S: Final = 10.0

# Where a refused input lies: topic, partition, offset, and the event's index in its batch; -1: the whole message.
Place = tuple[str, int, int, int]


def place_of(rejected: RejectedInput) -> Place:
    return rejected.topic, rejected.partition, rejected.offset, rejected.index


class RejectedTopic:
    """Remembers what it has read. One thread; `close` at the end."""

    def __init__(self, config: Config) -> None:
        topic = compose.topic_names(config).rejected
        self.seen: list[RejectedInput] = []
        self._consumer = Consumer(
            {
                "bootstrap.servers": config.kafka.bootstrap,
                "group.id": "chaos-rejections",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 10,
            }
        )
        partitions = self._consumer.list_topics(topic, timeout=_TIMEOUT_S).topics[topic].partitions
        ends = [self._consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=_TIMEOUT_S)[1] for p in partitions]
        self._places = [TopicPartition(topic, partition, end) for partition, end in zip(partitions, ends, strict=True)]

    def read(self) -> list[RejectedInput]:
        """Everything by now, since this object was made."""
        self._consumer.assign(self._places)
        left = {each.partition for each in self._places}
        deadline = time.monotonic() + _TIMEOUT_S
        while left and time.monotonic() < deadline:
            for message in self._consumer.consume(500, 0.1):
                partition, error = message.partition() or 0, message.error()
                if error is None:
                    self.seen.append(RejectedInput.FromString(bytes(message.value() or b"")))
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(partition)
                else:
                    raise KafkaException(error)
        self._places = self._consumer.position(self._places)
        return self.seen

    def close(self) -> None:
        self._consumer.close()
