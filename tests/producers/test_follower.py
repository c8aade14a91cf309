"""The follower: from the beginning, then every change, whatever the broker does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from producers.follower import TopicFollower
from taximeter.embedded.broker import TansuBroker, TansuSettings
from tests.producers.support import create_topics, ordered_producer, wait_until
from tests.services.kafka import SharedKafka
from tests.services.ports import free_port as find_free_port

PARTITIONS = 3


def create(bootstrap: str, topic: str) -> None:
    create_topics(bootstrap, NewTopic(topic, PARTITIONS, 1, config={"cleanup.policy": "compact"}))


def publish(bootstrap: str, topic: str, values: dict[str, str | None]) -> None:
    producer = ordered_producer(bootstrap)
    for key, value in values.items():
        producer.produce(topic, key=key, value=value, partition=sum(key.encode()) % PARTITIONS)
    assert producer.flush(60) == 0


class Table:
    """The last value of each key."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.thread_names: set[str] = set()

    def take(self, key: bytes, value: bytes, partition: int) -> None:
        assert partition == sum(key) % PARTITIONS
        self.thread_names.add(threading.current_thread().name)
        self.values[key.decode()] = value.decode()


def test_ready_means_that_everything_that_was_there_has_been_read(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic, table = unique_name("accounts"), Table()
    create(bootstrap, topic)
    publish(bootstrap, topic, {f"k{number}": str(number) for number in range(2_000)})
    publish(bootstrap, topic, {"k1": "new", "k2": None})
    follower = TopicFollower(bootstrap, topic, table.take)
    follower.start()
    assert follower.ready.wait(180)
    assert len(table.values) == 2_000
    assert (table.values["k1"], table.values["k2"], table.values["k3"]) == ("new", "", "3")
    publish(bootstrap, topic, {"k3": "later"})
    wait_until(lambda: table.values["k3"] == "later", "a later change")
    follower.close()
    assert table.thread_names == {f"follower-{topic}"}
    assert follower.metrics() == {"messages": 2_003, "failed": 0, "readings": 1}


def test_an_empty_topic_is_ready_and_a_missing_one_when_it_exists(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic, table = unique_name("accounts"), Table()
    follower = TopicFollower(bootstrap, topic, table.take)
    follower.start()
    assert not follower.ready.wait(1.0)
    create(bootstrap, topic)
    assert follower.ready.wait(180)
    assert table.values == {}
    follower.close()


def test_it_says_for_how_long_it_has_not_been_at_the_end(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic, handed, go_on = unique_name("accounts"), threading.Event(), threading.Event()

    def take(*_: object) -> None:
        handed.set()
        assert go_on.wait(180)

    follower = TopicFollower(bootstrap, topic, take)
    before_s = follower.behind_s()
    follower.start()
    assert follower.behind_s() > before_s >= 0, "no topic, no end of it"
    create(bootstrap, topic)
    assert follower.ready.wait(180)
    assert follower.behind_s() == 0.0
    publish(bootstrap, topic, {"k1": "x", "k2": "x"})
    assert handed.wait(180)
    stuck_s = follower.behind_s()
    assert follower.behind_s() >= stuck_s > 0, "it grows while a message is in hand"
    go_on.set()
    # At the end of the one's partition it may be before the other is there.
    wait_until(lambda: follower.metrics()["messages"] == 2 and follower.behind_s() == 0.0, "the end of both")
    follower.close()
    assert follower.behind_s() > 0, "who does not read does not know"


def test_a_message_that_cannot_be_used_does_not_stop_the_next(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic, table = unique_name("accounts"), Table()
    create(bootstrap, topic)

    def take(key: bytes, value: bytes, partition: int) -> None:
        if value == b"poison":
            raise ValueError("not a value")
        table.take(key, value, partition)

    publish(bootstrap, topic, {"a": "poison", "d": "good"})
    follower = TopicFollower(bootstrap, topic, take)
    follower.start()
    assert follower.ready.wait(180)
    assert table.values == {"d": "good"}
    assert follower.metrics()["failed"] == 1
    follower.close()


@pytest.mark.chaos
def test_a_broker_that_forgot_is_read_again_from_its_new_beginning(tmp_path: Path) -> None:
    broker = TansuBroker(TansuSettings(tmp_path / "broker.log", port=find_free_port()))
    broker.start()
    create(broker.bootstrap, "accounts")
    table = Table()
    publish(broker.bootstrap, "accounts", {f"k{number}": "old" for number in range(100)})
    follower = TopicFollower(broker.bootstrap, "accounts", table.take)
    follower.start()
    assert follower.ready.wait(180)
    for value in ("new", "newer"):
        broker.kill9()
        broker.start()
        create(broker.bootstrap, "accounts")
        # Far fewer than before: an old position would lie beyond the end.
        publish(broker.bootstrap, "accounts", {"k1": value})
        wait_until(lambda value=value: table.values["k1"] == value, "the value of the new log")  # type: ignore[misc]
    follower.close()
    broker.stop()


@pytest.mark.chaos
@pytest.mark.apache_kafka
def test_a_topic_that_is_made_anew_is_read_again(apache_kafka: SharedKafka, unique_name: Callable[[str], str]) -> None:
    topic, table = unique_name("accounts"), Table()
    create(apache_kafka.bootstrap, topic)
    publish(apache_kafka.bootstrap, topic, {f"k{number}": "old" for number in range(100)})
    follower = TopicFollower(apache_kafka.bootstrap, topic, table.take)
    follower.start()
    assert follower.ready.wait(180)
    admin = AdminClient({"bootstrap.servers": apache_kafka.bootstrap})
    admin.delete_topics([topic])[topic].result(60)
    wait_until(lambda: topic not in admin.list_topics(timeout=60).topics, "the topic gone")
    create(apache_kafka.bootstrap, topic)
    publish(apache_kafka.bootstrap, topic, {"k1": "new"})
    wait_until(lambda: table.values["k1"] == "new", "the value of the new topic")
    follower.close()
