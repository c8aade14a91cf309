"""Alerts are followed: each once and in order, from where somebody stopped, whatever is written twice or read again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka.admin import NewTopic

from billing.v1.account_pb2 import LedgerPosition
from billing.v1.alert_pb2 import Alert
from producers.alerts import AlertCursor, AlertFollower
from tests.producers.support import create_topics, ordered_producer, wait_until


def alert(sequence: int, index: int = 0, generation: bytes = b"g", told_ms: int = 0) -> Alert:
    position = LedgerPosition(generation=generation, sequence=sequence)
    return Alert(
        alert_id=f"{generation.decode()}-{sequence}-{index}", position=position, index=index, told_ms=told_ms or sequence
    )


def test_a_cursor_knows_what_lies_behind_it_by_record_and_place() -> None:
    cursor = AlertCursor()
    assert cursor.is_new(alert(5, 1), 0)
    cursor.move(alert(5, 1), 0)
    again = AlertCursor(str(cursor))
    assert not again.is_new(alert(5, 1), 0)
    assert not again.is_new(alert(5, 0), 0)
    assert not again.is_new(alert(4, 9), 0)
    assert again.is_new(alert(5, 2), 0)
    assert again.is_new(alert(6, 0), 0)
    assert again.is_new(alert(1, 0), 1), "another partition"


def test_a_ledger_that_was_founded_again_comes_after_the_one_before() -> None:
    cursor = AlertCursor()
    cursor.move(alert(500, told_ms=10_000), 0)
    assert cursor.is_new(alert(1, generation=b"h", told_ms=10_001), 0)
    cursor.move(alert(1, generation=b"h", told_ms=10_001), 0)
    assert not cursor.is_new(alert(500, told_ms=10_000), 0), "read again from the beginning"
    assert cursor.is_new(alert(2, generation=b"h", told_ms=10_001), 0)


@pytest.mark.parametrize("text", ["x", "e30x", "W10=", "eyIwIjpbMV19"])
def test_a_cursor_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cursor: "):
        AlertCursor(text)


def test_who_keeps_the_cursor_misses_nothing_and_sees_nothing_twice(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("alerts")
    create_topics(bootstrap, NewTopic(topic, 2, 1))

    def publish(*sequences: int) -> None:
        producer = ordered_producer(bootstrap)
        for sequence in sequences:
            producer.produce(topic, key=b"t", value=alert(sequence).SerializeToString(), partition=sequence % 2)
        assert producer.flush(60) == 0

    seen: list[int] = []
    kept = ""

    def follow(until: int, fail_at: int = 0) -> AlertFollower:
        def take(told: Alert, behind: str) -> None:
            nonlocal kept
            if told.position.sequence == fail_at:
                raise RuntimeError("it is not dealt with")
            seen.append(told.position.sequence)
            kept = behind

        follower = AlertFollower(bootstrap, take, topic=topic, after=kept)
        follower.start()
        wait_until(lambda: len(seen) == until or follower.failed.is_set(), "the alerts")
        follower.close()
        return follower

    # The publisher was killed, and began again before what it had written.
    publish(1, 2, 3, 4, 1, 2, 3, 4, 5, 6)
    assert not follow(6).failed.is_set()
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    publish(7, 9, 11)
    assert follow(9, fail_at=9).failed.is_set()
    assert seen[6:] == [7]
    follow(9)
    assert seen[6:] == [7, 9, 11]
