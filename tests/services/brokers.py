"""What tests do with a broker, whichever it is: create a topic, produce, read to the end. Bounded by one timeout."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

__all__ = ["TIMEOUT_S", "consumer_of", "create_topic", "produce", "read_to_end"]

TIMEOUT_S = 60.0


def create_topic(
    bootstrap: str, name: str, partitions: int = 1, replicas: int = 1, config: Mapping[str, str] | None = None
) -> None:
    """Create it, and return when each partition's leader answers; Apache Kafka says that it is created a moment earlier."""
    # The client is held until its future is done: one that is collected before cancels what it was asked.
    admin = AdminClient({"bootstrap.servers": bootstrap})
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            admin.create_topics([NewTopic(name, partitions, replicas, config=dict(config or {}))])[name].result(TIMEOUT_S)
            break
        except KafkaException as error:
            # A node that stood still for its session is no place for replicas until it is heard again.
            if error.args[0].code() != KafkaError.INVALID_REPLICATION_FACTOR or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    for partition in range(partitions):
        asked = {TopicPartition(name, partition): OffsetSpec.latest()}
        while True:
            try:
                [answer] = admin.list_offsets(asked, request_timeout=TIMEOUT_S).values()
                answer.result(TIMEOUT_S)
                break
            except KafkaException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def produce(bootstrap: str, topic: str, partition: int, values: Sequence[bytes]) -> list[int]:
    """Send all of them through one idempotent producer; the acknowledged offsets, in order of acknowledgement."""
    offsets: list[int] = []

    def delivered(error: KafkaError | None, message: Message) -> None:
        assert error is None, error
        assert message.partition() == partition
        offset = message.offset()
        assert offset is not None
        offsets.append(offset)

    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "acks": "all",
            # One batch, however slowly they come: to flush ends the wait.
            "linger.ms": 10_000,
            "allow.auto.create.topics": False,
            "message.max.bytes": 8_388_608,
        }
    )
    for value in values:
        producer.produce(topic, value=value, key=b"key", partition=partition, on_delivery=delivered)
    assert producer.flush(TIMEOUT_S) == 0
    return offsets


def consumer_of(bootstrap: str) -> Consumer:
    """A consumer that is told of the end and of a position that does not exist. The caller closes it."""
    return Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "facts",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "fetch.queue.backoff.ms": 5,
        }
    )


def read_to_end(consumer: Consumer, topic: str, partition: int, offset: int) -> tuple[list[Message], int]:
    """The messages from `offset`, and the log's end as the broker's fetch states it."""
    consumer.assign([TopicPartition(topic, partition, offset)])
    messages: list[Message] = []
    while True:
        message = consumer.poll(TIMEOUT_S)
        assert message is not None, "the broker went silent"
        error = message.error()
        if error is None:
            messages.append(message)
        else:
            assert error.code() == KafkaError._PARTITION_EOF, error
            end = message.offset()
            assert end is not None
            return messages, end
