"""How long a worker lets the broker keep a fetch: short while there are messages, longer where nothing comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import aiokafka
from aiokafka import TopicPartition

from stream_processors import faust_apps
from tests.services.brokers import create_topic, produce


async def test_a_fetch_waits_longer_where_nothing_comes_and_no_longer_once_something_does(
    bootstrap: str, unique_name: Callable[[str], str]
) -> None:
    place = TopicPartition(unique_name("fetched"), 0)
    create_topic(bootstrap, place.topic, 1)
    produce(bootstrap, place.topic, place.partition, [b"first"])
    consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign([place])
        # The thread that it would run on, without its thread.
        thread = object.__new__(faust_apps._QuickThread)
        thread.consumer = SimpleNamespace(flow_active=True)  # type: ignore[assignment]

        async def read_until(wait_ms: int, values: int) -> None:
            found = 0
            async with asyncio.timeout(120):
                while found < values or consumer._fetcher._fetch_max_wait_ms != wait_ms:
                    records = await thread._fetch_records(consumer, {place}, timeout=0.05)
                    found += sum(map(len, records.values()))
            assert found == values

        await read_until(faust_apps._FETCH_WAIT_MS, 1)
        await read_until(faust_apps._FETCH_WAIT_IDLE_MS, 0)
        produce(bootstrap, place.topic, place.partition, [b"second"])
        await read_until(faust_apps._FETCH_WAIT_MS, 1)
        await read_until(faust_apps._FETCH_WAIT_IDLE_MS, 0)
    finally:
        await consumer.stop()
