"""The launcher of Apache Kafka: what it does that the embedded broker does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient

from tests.services.brokers import TIMEOUT_S, consumer_of, create_topic, produce, read_to_end
from tests.services.kafka import KafkaCluster, SharedKafka

pytestmark = pytest.mark.apache_kafka


@pytest.fixture
def own_cluster(tmp_path: Path, apache_kafka_libs: Path) -> Iterator[KafkaCluster]:
    cluster = KafkaCluster(tmp_path, apache_kafka_libs)
    cluster.start()
    yield cluster
    cluster.close()


@pytest.mark.chaos
def test_a_killed_node_comes_back_with_its_log(own_cluster: KafkaCluster) -> None:
    create_topic(own_cluster.bootstrap, "kept")
    produce(own_cluster.bootstrap, "kept", 0, [b"a", b"b"])
    [node] = own_cluster.nodes
    node.process.kill9()
    assert not node.process.alive
    own_cluster.start()
    consumer = consumer_of(own_cluster.bootstrap)
    messages, end = read_to_end(consumer, "kept", 0, 0)
    consumer.close()
    assert ([m.value() for m in messages], end) == ([b"a", b"b"], 2)


def test_a_position_beyond_the_end_is_an_error(apache_kafka: SharedKafka) -> None:
    create_topic(apache_kafka.bootstrap, "short")
    consumer = consumer_of(apache_kafka.bootstrap)
    consumer.assign([TopicPartition("short", 0, 100)])
    message = consumer.poll(TIMEOUT_S)
    consumer.close()
    assert message is not None
    error = message.error()
    assert error is not None
    assert error.code() == KafkaError._AUTO_OFFSET_RESET


def leader_of(cluster: KafkaCluster, topic: str) -> int:
    """The node that leads its only partition. Whoever is asked may not have heard of it yet."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        known = AdminClient({"bootstrap.servers": cluster.bootstrap}).list_topics(timeout=TIMEOUT_S).topics.get(topic)
        if known is not None and known.partitions and known.partitions[0].leader > 0:
            return known.partitions[0].leader
        assert time.monotonic() < deadline, cluster.out_of_sync()
        time.sleep(0.02)


@pytest.mark.chaos
def test_three_nodes_keep_what_was_acknowledged_when_one_dies(tmp_path: Path, apache_kafka_libs: Path) -> None:
    cluster = KafkaCluster(tmp_path, apache_kafka_libs, nodes=3)
    cluster.start()
    try:
        create_topic(cluster.bootstrap, "replicated", replicas=3)
        assert produce(cluster.bootstrap, "replicated", 0, [b"before"]) == [0]
        cluster.nodes[leader_of(cluster, "replicated") - 1].process.kill9()
        assert produce(cluster.bootstrap, "replicated", 0, [b"after"]) == [1]
        consumer = consumer_of(cluster.bootstrap)
        messages, _ = read_to_end(consumer, "replicated", 0, 0)
        consumer.close()
        assert [m.value() for m in messages] == [b"before", b"after"]
    finally:
        cluster.close()
