"""Reading a log: what comes is the same whichever consumer a call gets, and none is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

import pytest

from stream_processors.errors import RefusedToStart
from stream_processors.kafka_ports import KafkaLogReader
from stream_processors.settings import KafkaSettings
from tests.services.brokers import create_topic, produce
from tests.taximeter.support import until

DEADLINE_S = 120.0


async def values_of(reader: KafkaLogReader, topic: str, partition: int) -> list[bytes]:
    start, end = await reader.bounds(topic, partition)
    return [value async for chunk in reader.read(topic, partition, start, end) for _, value in chunk]


async def test_calls_share_a_consumer_one_after_the_other(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("read")
    create_topic(bootstrap, topic, 2)
    produce(bootstrap, topic, 0, [b"a", b"b"])
    produce(bootstrap, topic, 1, [b"c"])
    # However slow this machine is, none grows old between two calls.
    reader = KafkaLogReader(KafkaSettings(bootstrap), idle_s=3600)
    assert await reader.bounds(topic, 0) == (0, 2)
    ((_, consumer),) = reader._idle
    # It holds what the call before it was given: another place, and other values.
    assert await values_of(reader, topic, 1) == [b"c"]
    assert await values_of(reader, topic, 0) == [b"a", b"b"]
    assert [idle for _, idle in reader._idle] == [consumer]
    together = await asyncio.gather(*(values_of(reader, topic, partition) for partition in (0, 1, 0, 1)))
    assert together == [[b"a", b"b"], [b"c"]] * 2
    while reader._idle:
        reader._idle.pop()[1].close()


async def test_one_that_nobody_takes_is_closed(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("read")
    create_topic(bootstrap, topic)
    reader = KafkaLogReader(KafkaSettings(bootstrap), idle_s=0.1)
    for _ in range(2):
        assert await reader.bounds(topic, 0) == (0, 0)
        await asyncio.to_thread(until, lambda: not reader._idle and not reader._closing.locked())


async def test_a_consumer_that_failed_serves_no_other_call(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    reader = KafkaLogReader(KafkaSettings(bootstrap))
    with pytest.raises(RefusedToStart, match="cannot be read"):
        await reader.bounds(unique_name("unknown"), 0)
    assert not reader._idle


async def test_who_follows_hears_what_was_there_and_what_comes(bootstrap: str, unique_name: Callable[[str], str]) -> None:
    topic = unique_name("followed")
    create_topic(bootstrap, topic, 2)
    produce(bootstrap, topic, 0, [b"a"])
    async with asyncio.timeout(DEADLINE_S), aclosing(KafkaLogReader(KafkaSettings(bootstrap)).follow(topic, 2, 0.1)) as heard:
        assert await anext(heard) == (0, b"a")
        produce(bootstrap, topic, 1, [b"b"])
        assert await anext(heard) == (1, b"b")
