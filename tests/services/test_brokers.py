"""What the ledger relies on, held on the embedded broker and on Apache Kafka alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from tests.services.brokers import TIMEOUT_S, consumer_of, create_topic, produce, read_to_end


@pytest.fixture
def topic(bootstrap: str, unique_name: Callable[[str], str]) -> str:
    name = unique_name("facts")
    settings = {"cleanup.policy": "compact", "retention.ms": "-1", "max.message.bytes": "8388608"}
    create_topic(bootstrap, name, partitions=4, config=settings)
    return name


def test_each_record_of_a_batch_is_acknowledged_with_its_offset(bootstrap: str, topic: str) -> None:
    assert produce(bootstrap, topic, 2, [b"%d" % i for i in range(10)]) == list(range(10))
    assert produce(bootstrap, topic, 2, [b"%d" % i for i in range(3)]) == [10, 11, 12]
    assert produce(bootstrap, topic, 3, [b"other partition"]) == [0]


def test_reading_starts_in_the_middle_of_a_batch_and_ends_at_the_true_end(bootstrap: str, topic: str) -> None:
    produce(bootstrap, topic, 1, [b"%d" % i for i in range(10)])
    consumer = consumer_of(bootstrap)
    messages, end = read_to_end(consumer, topic, 1, 4)
    assert [(m.offset(), m.value()) for m in messages] == [(i, b"%d" % i) for i in range(4, 10)]
    assert end == 10
    assert consumer.get_watermark_offsets(TopicPartition(topic, 1), cached=True)[1] == 10
    consumer.close()


def test_an_empty_partition_ends_at_zero(bootstrap: str, topic: str) -> None:
    consumer = consumer_of(bootstrap)
    assert consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=TIMEOUT_S) == (0, 0)
    assert read_to_end(consumer, topic, 0, 0) == ([], 0)
    consumer.close()


def test_a_record_of_nearly_eight_megabytes_fits_where_the_topic_allows_it(bootstrap: str, topic: str) -> None:
    value = bytes(8_000_000)
    assert produce(bootstrap, topic, 0, [value]) == [0]
    consumer = consumer_of(bootstrap)
    messages, _ = read_to_end(consumer, topic, 0, 0)
    assert messages[0].value() == value
    consumer.close()


def test_topic_settings_are_described_as_they_were_given(bootstrap: str, topic: str) -> None:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    admin = AdminClient({"bootstrap.servers": bootstrap})
    described = admin.describe_configs([resource])[resource].result(TIMEOUT_S)
    assert described["cleanup.policy"].value == "compact"
    assert described["retention.ms"].value == "-1"


def test_a_topic_is_created_once_and_deleted(bootstrap: str, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    with pytest.raises(KafkaException) as raised:
        admin.create_topics([NewTopic(topic, 4, 1)])[topic].result(TIMEOUT_S)
    assert raised.value.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS
    admin.delete_topics([topic])[topic].result(TIMEOUT_S)
    # Apache Kafka's controller says so, and the broker hears of it.
    deadline = time.monotonic() + TIMEOUT_S
    while topic in AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=TIMEOUT_S).topics:
        assert time.monotonic() < deadline, "it is there still"
        time.sleep(0.02)
