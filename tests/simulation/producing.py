"""Those who send: producers with the real `Publisher` over a journal in memory, foreign senders, and who gives commands.

The publisher's own thread, its consumer of usage.progress and librdkafka are replaced by tasks on the simulated loop; what is
sent when, what goes back and what is freed is decided by the real code.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError

from billing import commands
from billing.identity import partition_of
from billing.v1.account_pb2 import Amount, Plan
from billing.v1.command_pb2 import Command, CreditGrant, Price, PriceBook, TenantUpsert
from billing.v1.usage_pb2 import (
    OPERATION_GENERATE,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageBatch,
    UsageEvent,
)
from producers.journal_store import Page
from producers.publisher import Publisher, PublisherSettings
from tests.simulation.broker import Client
from tests.simulation.loop import Process
from tests.simulation.workers import KEYS, TOPICS

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["Commander", "Producer", "foreign_sender"]

MODELS = ("small", "large", "unpriced")
_COMMIT_S = 0.004


def make_event(world: World, request_id: str) -> bytes:
    """A request that ended about now, by its server's clock, in some tenant's name."""
    choices = world.choices
    ended_ms = world.clock_ms() - choices.choice((0, 5, 2_000, 70_000))
    return UsageEvent(
        request_id=request_id,
        tenant_id=choices.choice(world.tenants),
        project_id="p",
        model=choices.choices(MODELS, (8, 4, 1))[0],
        operation=OPERATION_GENERATE,
        service_class=SERVICE_CLASS_STANDARD,
        outcome=choices.choices((OUTCOME_COMPLETED, OUTCOME_CANCELLED, OUTCOME_BACKEND_ERROR), (8, 1, 1))[0],
        started_ms=ended_ms - choices.randint(0, 3_000),
        ended_ms=ended_ms,
        uncached_input_tokens=choices.randint(0, 5_000),
        output_tokens=choices.randint(1, 800),
        cache_read_tokens=choices.choice((0, 0, 1_000)),
    ).SerializeToString()


def other_payload(raw: bytes) -> bytes:
    """The same request, told differently."""
    event = UsageEvent.FromString(raw)
    event.output_tokens += 1
    return event.SerializeToString()


class MemoryJournal:
    """A journal's contents, on a disk that outlives its producer; the interface that `Publisher` uses of `Journal`."""

    def __init__(self, world: World, producer_id: str) -> None:
        self.world = world
        self.producer_id = producer_id
        self.path = Path(f"/simulated/{producer_id}")
        self.settings = SimpleNamespace(partitions=world.partitions)
        self.events: list[list[bytes]] = [[] for _ in range(world.partitions)]
        self.freed = [0] * world.partitions

    def append(self, partition: int, raw: bytes) -> None:
        self.events[partition].append(raw)
        self.world.truth.durable.add(raw)

    def highest_sequence(self, partition: int) -> int:
        return len(self.events[partition])

    def freed_sequence(self, partition: int) -> int:
        return self.freed[partition]

    def read(self, partition: int, after_sequence: int, events_max: int, bytes_max: int) -> Page:
        start = max(after_sequence, self.freed[partition])
        return Page(start + 1, self.events[partition][start : start + events_max])

    def free(self, partition: int, covered_sequence: int) -> None:
        freed = self.freed[partition]
        if covered_sequence > freed:
            self.world.truth.on_free(partition, self.events[partition][freed:covered_sequence], self.producer_id)
            self.freed[partition] = covered_sequence

    def subscribe(self, event: threading.Event) -> None:
        """The simulated thread looks often enough."""

    def oldest_unacknowledged_ms(self, now_ms: int) -> int:
        return 0

    @property
    def is_free(self) -> bool:
        return all(freed == len(events) for freed, events in zip(self.freed, self.events, strict=True))


class NoFollower:
    """In place of `TopicFollower`, which is a thread; `Producer` follows instead."""

    def __init__(self, *_: object, **__: object) -> None:
        self.ready = threading.Event()


class _Producing:
    """What `Publisher` uses of librdkafka's producer."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._client = Client(world.broker, process)
        self._outstanding: dict[int, Callable[[KafkaError | None, Any], None]] = {}
        self._number = 0

    def produce(self, topic: str, *, value: bytes, partition: int, on_delivery: Callable[..., None]) -> None:
        if len(self._outstanding) > 20:
            raise BufferError("the queue is full")
        self._number += 1
        self._outstanding[self._number] = on_delivery
        self._client.write(topic, partition, value, partial(self._delivered, self._number))

    def _delivered(self, number: int, offset: int, problem: str) -> None:
        on_delivery = self._outstanding.pop(number, None)
        if on_delivery is not None:
            error = KafkaError(KafkaError._MSG_TIMED_OUT, problem) if problem else None
            on_delivery(error, SimpleNamespace(offset=lambda: None if offset < 0 else offset))

    def purge(self) -> None:
        outstanding, self._outstanding = self._outstanding, {}
        for on_delivery in outstanding.values():
            on_delivery(KafkaError(KafkaError._PURGE_INFLIGHT), SimpleNamespace(offset=lambda: None))

    def poll(self, timeout_s: float) -> int:
        return 0


class Producer:
    """A server that meters: it records, it publishes, it dies and comes back on the same journal."""

    def __init__(self, world: World, number: int, requests: int) -> None:
        self.world = world
        self.journal = MemoryJournal(world, f"producer-{number}")
        self.incarnation = 0
        self.left = requests
        self.process = Process(world.loop, "")

    def start(self) -> None:
        self.incarnation += 1
        self.process = Process(self.world.loop, f"{self.journal.producer_id}/{self.incarnation}")
        settings = PublisherSettings(
            "simulated",
            self.world.partitions,
            linger_ms=20,
            batch_events=self.world.choices.choice((1, 3, 10)),
            resend_after_s=2.0,
            heartbeat_s=3.0,
            progress_wait_s=1.0,
        )
        publisher = Publisher(self.journal, settings)  # type: ignore[arg-type]
        self.process.start(self._serve())
        self.process.start(self._publish(publisher))
        for partition in range(self.world.partitions):
            self.process.start(self._follow(publisher, partition))

    async def _serve(self) -> None:
        """Requests, each attempted, then durable in its group, and rarely recorded twice or told in two ways."""
        world, choices = self.world, self.world.choices
        while self.left > 0:
            await asyncio.sleep(choices.expovariate(1 / world.request_interval_s))
            group = []
            for _ in range(choices.choice((1, 1, 2, 8))):
                self.left -= 1
                raw = make_event(world, f"{self.process.name}/{self.left}")
                if world.recorded and choices.random() < world.repeat_rate:
                    raw = choices.choice(world.recorded)
                    if choices.random() < 0.3:
                        raw = other_payload(raw)
                world.truth.attempt(raw)
                group.append(raw)
            await asyncio.sleep(choices.random() * _COMMIT_S)
            for raw in group:
                tenant_id = UsageEvent.FromString(raw).tenant_id
                self.journal.append(partition_of(tenant_id, world.partitions), raw)
                world.recorded.append(raw)

    async def _publish(self, publisher: Publisher) -> None:
        world = self.world
        producing = _Producing(world, self.process)
        await asyncio.sleep(world.choices.random())
        while True:
            publisher._take_progress()
            now_s = world.loop.time()
            for delivery in publisher._deliveries:
                publisher._serve(producing, delivery, now_s)  # type: ignore[arg-type]
            if publisher._needs_producer:
                publisher._discard(producing)  # type: ignore[arg-type]
                publisher._needs_producer = False
                await asyncio.sleep(0.3)
                producing = _Producing(world, self.process)
            await asyncio.sleep(0.02 + world.choices.random() * 0.05)

    async def _follow(self, publisher: Publisher, partition: int) -> None:
        broker, read = self.world.broker, 0
        while True:
            await broker.more_than(TOPICS.progress, partition, read)
            await asyncio.sleep(self.world.choices.random() * 0.05)
            log = broker.log(TOPICS.progress, partition)
            for key, value in log[read:]:
                publisher._on_progress(key, value, partition)
            read = len(log)


async def send(client: Client, topic: str, partition: int, value: bytes) -> str:
    """Send once; what went wrong, or nothing."""
    told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    client.write(topic, partition, value, lambda _, problem: None if told.done() else told.set_result(problem))
    return await told


async def send_until_acknowledged(client: Client, topic: str, partition: int, value: bytes) -> None:
    while await send(client, topic, partition, value):  # noqa: ASYNC110
        await asyncio.sleep(0.2)


async def foreign_sender(world: World, client: Client, requests: int) -> None:
    """Usage from one who has no journal, does not number, picks any partition, and sometimes sends nonsense."""
    choices = world.choices
    for number in range(requests):
        await asyncio.sleep(choices.expovariate(1 / (4 * world.request_interval_s)))
        partition = choices.randrange(world.partitions)
        if choices.random() < 0.15:
            await send_until_acknowledged(client, TOPICS.events, partition, _nonsense(world))
            continue
        raws = [make_event(world, f"foreign/{number}/{i}") for i in range(choices.choice((1, 3)))]
        if choices.random() < 0.15:
            bad = UsageEvent.FromString(raws[0])
            bad.model = ""
            raws.append(bad.SerializeToString())
        for raw in raws:
            world.truth.attempt(raw)
        batch = UsageBatch(schema_version=1, events=map(UsageEvent.FromString, raws)).SerializeToString()
        await send_until_acknowledged(client, TOPICS.events, partition, batch)
        world.truth.durable.update(raws)


def _nonsense(world: World) -> bytes:
    choices: Sequence[bytes] = (
        b"",
        b"\xff" * 9,
        UsageBatch(schema_version=99).SerializeToString(),
        UsageBatch(schema_version=1, events=[UsageEvent()]).SerializeToString(),
    )
    value = world.choices.choice(choices)
    world.truth.attempt(b"")
    return value


class Commander:
    """Prices, tenants and credit, each said until it is acknowledged, some said again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.done = False
        self.granted_pico: dict[str, int] = {}

    async def run(self, client: Client) -> None:
        world, choices = self.world, self.world.choices
        for version in (1, 2):
            # The second takes effect in the middle of the run, within a minute that has usage.
            effective_ms = 0 if version == 1 else world.clock_ms() + 10_000
            prices = [
                Price(
                    model=model, uncached_input_pico=10**4 * factor * version, output_pico=4 * 10**4 * factor, cache_read_pico=7
                )
                for factor, model in enumerate(("small", "large"), start=1)
            ]
            book = PriceBook(version=version, currency="USD", effective_ms=effective_ms, prices=prices)
            for partition in range(world.partitions):
                await self._say(client, partition, Command(command_id=f"book-{version}", price_book=book))
            if version == 1:
                for tenant_id in world.tenants[:-1]:
                    upsert = TenantUpsert(tenant_id=tenant_id, currency="USD", plan=Plan(plan_id="p", duplicate_flood_events=3))
                    await self._say(client, world.home(tenant_id), Command(command_id=f"t-{tenant_id}", tenant_upsert=upsert))
        for number in range(12):
            await asyncio.sleep(choices.random() * 2)
            tenant_id = choices.choice(world.tenants[:-1])
            grant = CreditGrant(tenant_id=tenant_id, amount=Amount(low=10**12 + number), currency="USD")
            self.granted_pico[tenant_id] = self.granted_pico.get(tenant_id, 0) + 10**12 + number
            await self._say(client, world.home(tenant_id), Command(command_id=f"grant-{number}", credit_grant=grant))
        self.done = True

    async def _say(self, client: Client, partition: int, command: Command) -> None:
        choices = self.world.choices
        command.schema_version = 1
        command.issued_ms = self.world.clock_ms()
        value = commands.sign(command, KEYS.command_key)
        if choices.random() < 0.1:
            forged = commands.sign(command, b"x" * 32)
            await send_until_acknowledged(client, TOPICS.commands, partition, forged)
        for _ in range(choices.choice((1, 1, 2, 3))):
            await send_until_acknowledged(client, TOPICS.commands, partition, value)
