"""Keys and accounts over a real broker: a change is effective in a running gateway, and nothing is before it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_aio
from confluent_kafka import Producer
from tritonclient.utils import InferenceServerException

from billing.identity import partition_of
from billing.v1.account_pb2 import ACCOUNT_STATUS_SUSPENDED, LedgerPosition
from billing.v1.usage_pb2 import OUTCOME_COMPLETED, UsageBatch, UsageEvent
from producers.errors import TopicUnread
from producers.publisher import PublisherSettings
from serving.gateway import DirectorySettings, GatewayServer, GatewaySettings, LimitSettings, run_gateway
from serving.gateway.directory import Directory
from serving.gateway.settings import AdmissionSettings, LeaseSettings
from taximeter.embedded.broker import TansuBroker
from taximeter.failures import explain
from tests.services.brokers import consumer_of, create_topic, read_to_end
from tests.serving.gateway_support import (
    HEADERS,
    PARTITIONS,
    PEPPER,
    account,
    api_key,
    gateway_settings,
    known_directory,
    profiles,
    put_account,
    put_key,
    running,
    trace_inputs,
)


class Topics:
    """Writes keys and accounts as the ledger's publisher does."""

    def __init__(self, bootstrap: str, unique_name: Callable[[str], str]) -> None:
        self.keys, self.accounts = unique_name("keys"), unique_name("accounts")
        for name in (self.keys, self.accounts):
            create_topic(bootstrap, name, PARTITIONS)
        self._producer = Producer({"bootstrap.servers": bootstrap})

    def send(self, topic: str, key: str, value: Any) -> None:
        self._producer.produce(topic, key=key.encode(), value=value.SerializeToString(), partition=0)
        assert self._producer.flush(120) == 0


@pytest.fixture
def topics(tansu: TansuBroker, unique_name: Callable[[str], str]) -> Topics:
    return Topics(tansu.bootstrap, unique_name)


@pytest.fixture
def settings(tmp_path: Path, back_end: str, tansu: TansuBroker, topics: Topics) -> GatewaySettings:
    directory = DirectorySettings(tansu.bootstrap, PEPPER, PARTITIONS, topics.accounts, topics.keys, ready_timeout_s=180)
    return gateway_settings(tmp_path, back_end, directory=directory, tokenizers={}, models=trace_models())


def trace_models() -> dict[str, Any]:
    return {name: profile for name, profile in profiles().items() if name.startswith("trace")}


@pytest.fixture
async def client(settings: GatewaySettings, topics: Topics) -> AsyncIterator[Any]:
    topics.send(topics.keys, "key-a", api_key())
    topics.send(topics.accounts, "tenant-a", account())
    server = GatewayServer(settings)
    try:
        await server.start()
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as made:
            yield made
    finally:
        await server.stop()


async def infer(client: Any) -> None:
    await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)


async def refused(client: Any, status: str) -> None:
    """Infer until it is refused so; a change must be effective within two seconds, and a busy machine has some more."""
    async with asyncio.timeout(120):
        while True:
            try:
                await infer(client)
            except InferenceServerException as error:
                if status in str(error.status()):
                    return
            await asyncio.sleep(0.02)


async def test_what_was_there_at_the_start_is_known_and_changes_follow(client: Any, topics: Topics) -> None:
    await infer(client)
    topics.send(topics.accounts, "tenant-a", account(sequence=2, balance_pico=0))
    await refused(client, "RESOURCE_EXHAUSTED")
    topics.send(topics.accounts, "tenant-a", account(sequence=3, status=ACCOUNT_STATUS_SUSPENDED))
    await refused(client, "PERMISSION_DENIED")


async def test_a_gateway_that_fails_open_serves_without_leases_while_kafka_is_away(tmp_path: Path, back_end: str) -> None:
    directory = known_directory()
    silent = Directory(PARTITIONS)
    put_key(silent, api_key())
    put_account(silent, account(log_time_ms=1))
    settings = gateway_settings(
        tmp_path,
        back_end,
        tokenizers={},
        models=trace_models(),
        leases=LeaseSettings(bootstrap="127.0.0.1:1", key=b"k" * 32, wait_ms=50),
        admission=AdmissionSettings(fail_open=True, state_age_max_ms=24 * 3_600_000),
    )
    # What the ledger said last is too old to say anything: the setting lets requests through.
    async with running(settings, silent) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        await infer(client)
        assert server.metrics()["admitted_without_money"] == 1
    # It speaks, and there is no lease: nothing goes through on the setting alone.
    async with running(settings, directory) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InferenceServerException, match="not enough"):
            await infer(client)


async def test_a_revoked_key_stops_working(client: Any, topics: Topics) -> None:
    await infer(client)
    topics.send(topics.keys, "key-a", api_key(revoked=True, version=LedgerPosition(generation=b"g", sequence=2)))
    await refused(client, "UNAUTHENTICATED")


async def test_the_command_lines_entry_serves_publishes_and_stops(
    settings: GatewaySettings, topics: Topics, tansu: TansuBroker, unique_name: Callable[[str], str]
) -> None:
    events_topic, progress_topic = unique_name("events"), unique_name("progress")
    for name in (events_topic, progress_topic):
        create_topic(tansu.bootstrap, name, PARTITIONS)
    topics.send(topics.keys, "key-a", api_key())
    topics.send(topics.accounts, "tenant-a", account())
    publisher = PublisherSettings(
        tansu.bootstrap, PARTITIONS, topic=events_topic, progress_topic=progress_topic, linger_ms=1, progress_wait_s=0.1
    )
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    # A stop waits so long for the broker, which a busy machine keeps waiting itself.
    patient = replace(settings, publisher=publisher, limits=LimitSettings(durable_timeout_s=120))
    serving = asyncio.create_task(run_gateway(patient, ready=ready.set_result, stop=stop))
    async with asyncio.timeout(250):
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{await ready}") as client:
            await infer(client)
        stop.set()
        await serving

    def published() -> list[UsageEvent]:
        consumer = consumer_of(tansu.bootstrap)
        try:
            messages, _ = read_to_end(consumer, events_topic, partition_of("tenant-a", PARTITIONS), 0)
        finally:
            consumer.close()
        batches = [UsageBatch.FromString(message.value() or b"") for message in messages]
        return [event for batch in batches for event in batch.events]

    (event,) = {event.request_id: event for event in await asyncio.to_thread(published)}.values()
    assert (event.tenant_id, event.outcome, event.output_tokens) == ("tenant-a", OUTCOME_COMPLETED, 1)


async def test_until_keys_are_read_a_gateway_is_unavailable(tmp_path: Path, back_end: str) -> None:
    directory = DirectorySettings("127.0.0.1:1", PEPPER, PARTITIONS, ready_timeout_s=0.5)
    server = GatewayServer(gateway_settings(tmp_path, back_end, directory=directory, tokenizers={}, models=trace_models()))
    try:
        with pytest.raises(TopicUnread, match="could not be read from") as unread:
            await server.start()
        assert explain(unread.value) == str(unread.value), "`taximeter gateway` tells it in a sentence"
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*keys are still being read"):
                await infer(client)
    finally:
        await server.stop()
