"""The embedded broker: it starts, ends and forgets as stated, and differs from Apache Kafka where its docstring says so."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from taximeter.embedded.broker import BrokerError, TansuBroker, TansuSettings
from tests.services.brokers import TIMEOUT_S, consumer_of, create_topic, produce, read_to_end

PRODUCER = {"enable.idempotence": True, "acks": "all", "allow.auto.create.topics": False, "log_level": 0}


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[TansuBroker]:
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker.log"))
    broker.start()
    yield broker
    broker.stop()


def topics_of(broker: TansuBroker) -> set[str]:
    return set(AdminClient({"bootstrap.servers": broker.bootstrap}).list_topics(timeout=TIMEOUT_S).topics)


def test_a_restart_forgets_everything(tmp_path: Path, free_port: Callable[[], int]) -> None:
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker.log", port=free_port()))
    broker.start()
    address = broker.bootstrap
    create_topic(broker.bootstrap, "forgotten")
    assert topics_of(broker) == {"forgotten"}
    broker.stop()
    assert not broker.alive
    broker.start()
    assert broker.bootstrap == address
    assert topics_of(broker) == set()
    broker.stop()


def test_stop_ends_the_process_though_clients_are_connected(own_broker: TansuBroker) -> None:
    consumer = consumer_of(own_broker.bootstrap)
    consumer.list_topics(timeout=TIMEOUT_S)
    pid = own_broker.pid
    own_broker.stop()
    own_broker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    consumer.close()


def test_a_taken_port_is_named(own_broker: TansuBroker, tmp_path: Path) -> None:
    port = int(own_broker.bootstrap.rpartition(":")[2])
    with pytest.raises(BrokerError, match=f"port {port} on 127.0.0.1 is taken"):
        TansuBroker(TansuSettings(log_path=tmp_path / "second.log", port=port)).start()


def test_it_is_not_started_twice(own_broker: TansuBroker) -> None:
    with pytest.raises(BrokerError, match="runs already"):
        own_broker.start()


def test_before_the_start_there_is_no_address(tmp_path: Path) -> None:
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker.log"))
    assert not broker.alive
    with pytest.raises(BrokerError, match="not started"):
        _ = broker.bootstrap


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(tmp_path: Path, port: int) -> None:
    with pytest.raises(ValueError, match=f"port is {port}"):
        TansuSettings(log_path=tmp_path / "broker.log", port=port)


@pytest.mark.chaos
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed parent")
def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from taximeter.embedded.broker import TansuBroker, TansuSettings\n"
        "broker = TansuBroker(TansuSettings(log_path=Path(sys.argv[1])))\n"
        "broker.start(); print(broker.pid, flush=True); time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "broker.log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        ended = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
    try:
        assert select.select([ended], [], [], TIMEOUT_S)[0], "the broker outlived its parent"
    finally:
        os.close(ended)


def test_the_listed_end_falls_short_within_a_batch(tansu: TansuBroker, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("short")
    create_topic(tansu.bootstrap, topic)
    produce(tansu.bootstrap, topic, 0, [b"%d" % i for i in range(10)])
    consumer = consumer_of(tansu.bootstrap)
    assert consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=TIMEOUT_S) == (0, 1)
    assert read_to_end(consumer, topic, 0, 0)[1] == 10
    consumer.close()


def test_a_position_beyond_the_end_stays_silent(tansu: TansuBroker, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("silent")
    create_topic(tansu.bootstrap, topic)
    consumer = consumer_of(tansu.bootstrap)
    consumer.assign([TopicPartition(topic, 0, 100)])
    assert consumer.poll(1.0) is None
    consumer.close()


@pytest.mark.parametrize(("allowed", "created"), [(True, True), (False, False)])
def test_a_producer_creates_an_unknown_topic_unless_told_not_to(own_broker: TansuBroker, allowed: bool, created: bool) -> None:
    producer = Producer({"bootstrap.servers": own_broker.bootstrap, **PRODUCER, "allow.auto.create.topics": allowed})
    producer.list_topics("unknown", timeout=TIMEOUT_S)
    producer.produce("unknown", value=b"x", partition=0)
    producer.flush(1.0)
    assert ("unknown" in topics_of(own_broker)) is created
    producer.purge()
    producer.flush(TIMEOUT_S)


def test_a_producer_that_outlived_the_broker_must_be_replaced(tmp_path: Path, free_port: Callable[[], int]) -> None:
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "broker.log", port=free_port()))
    broker.start()
    create_topic(broker.bootstrap, "t")
    outcomes: list[KafkaError | None] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        outcomes.append(error)

    old = Producer({"bootstrap.servers": broker.bootstrap, **PRODUCER})
    old.produce("t", value=b"before", partition=0, on_delivery=delivered)
    assert old.flush(TIMEOUT_S) == 0
    assert outcomes == [None]
    broker.kill9()
    broker.start()
    create_topic(broker.bootstrap, "t")
    old.produce("t", value=b"after", partition=0, on_delivery=delivered)
    assert old.flush(4.0) == 1
    # The broker takes what comes, and has nothing of the old one.
    assert produce(broker.bootstrap, "t", 0, [b"by a new one"]) == [0]
    assert old.flush(0.0) == 1
    old.purge()
    old.flush(TIMEOUT_S)
    error = outcomes[1]
    assert error is not None
    assert error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT)
    broker.stop()


def test_offsets_of_a_group_are_kept_while_it_runs(tansu: TansuBroker, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("committed")
    create_topic(tansu.bootstrap, topic)
    produce(tansu.bootstrap, topic, 0, [b"a", b"b"])
    consumer = Consumer({"bootstrap.servers": tansu.bootstrap, "group.id": topic, "enable.auto.commit": False})
    consumer.commit(offsets=[TopicPartition(topic, 0, 1)], asynchronous=False)
    [committed] = consumer.committed([TopicPartition(topic, 0)], timeout=TIMEOUT_S)
    assert committed.offset == 1
    consumer.close()
