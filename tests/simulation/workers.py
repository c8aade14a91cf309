"""Worker processes: the real hosts and publishers, driven as Faust drives them, in groups that rebalance.

Of `LedgerApp` and `PublisherApp` everything runs as it is but what belongs to Faust: membership of the group, the streams, and
the clock. A revocation is told, may be late or never heard (a stopped process), and the group goes on without who does not
answer; whoever wakes up after that is a zombie until it hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from faust.types import TP

from billing.chain import record_hash
from billing.founding import LedgerSettings
from billing.step import CommandInput, LedgerKeys, UsageInput
from billing.v1.account_pb2 import Progress
from stream_processors.errors import LocalStoreError, RefusedToStart
from stream_processors.faust_apps import Failure
from stream_processors.ledger_app import LedgerApp
from stream_processors.ledger_host import HostSettings
from stream_processors.publisher_app import PublisherApp
from stream_processors.reader_marks import PUBLISHER, last_marks
from stream_processors.settings import KafkaSettings, TopicNames, WorkerSettings
from stream_processors.tally import Tally
from tests.simulation.broker import Broker, Client
from tests.simulation.loop import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["KEYS", "TOPICS", "Group", "Worker", "ledger_settings"]

KEYS = LedgerKeys(b"s" * 32, b"c" * 32)
TOPICS = TopicNames()
_SESSION_S = 4.0
_REBALANCE_TIMEOUT_S = 6.0


def ledger_settings(partitions: int) -> LedgerSettings:
    return LedgerSettings(
        partitions=partitions,
        dedupe_key=b"k" * 32,
        window_lateness_ms=20_000,
        alert_cooldown_ms=5_000,
        # Short, so that faults do raise it and healing resolves it.
        missing_grace_ms=6_000,
        silence_ms=30_000,
    )


class _Stream:
    """What an agent reads: one partition of a topic from a position on, until the assignment ends."""

    def __init__(self, broker: Broker, topic: str, partition: int, position: int) -> None:
        self._broker, self._topic, self._partition, self._position = broker, topic, partition, position
        self.closed = False
        # A consumer's buffer may still hold a message from before the rebalance, further on.
        self._stale = 0
        if broker.choices.random() < broker.stale_rate:
            broker.count(f"stale {topic}")
            self._stale = broker.choices.randint(1, 3)

    def noack(self) -> _Stream:
        return self

    def events(self) -> _Stream:
        return self

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        broker, choices = self._broker, self._broker.choices
        await broker.more_than(self._topic, self._partition, self._position)
        if choices.random() < 0.3:
            await asyncio.sleep(choices.random() * broker.rates.delay_s)
        log = broker.log(self._topic, self._partition)
        if self.closed or self._position >= len(log):
            raise StopAsyncIteration
        offset, self._stale = min(self._position + self._stale, len(log) - 1), 0
        if offset == self._position:
            self._position += 1
        key, value = log[offset]
        message = SimpleNamespace(topic=self._topic, partition=self._partition, offset=offset, key=key, value=value)
        return SimpleNamespace(message=message, ack=lambda: None)


class _Member:
    """An app of a worker in a group: what Faust would do around it."""

    app: Any

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._assigned: set[TP] = set()
        self._streams: list[_Stream] = []
        self.app = SimpleNamespace(consumer=SimpleNamespace(assignment=lambda: sorted(self._assigned)))

    def _forget_streams(self) -> None:
        for stream in self._streams:
            stream.closed = True
        self._streams.clear()

    def _stream(self, tp: TP, position: int) -> _Stream:
        stream = _Stream(self._worker.world.broker, tp.topic, tp.partition, position)
        self._streams.append(stream)
        return stream


class SimLedgerApp(_Member, LedgerApp):
    def __init__(self, worker: Worker, settings: WorkerSettings, failure: Failure) -> None:
        _Member.__init__(self, worker)
        self.settings = settings
        self.failure = failure
        self.hosts = {}
        self.tally = Tally()
        self.on_recorded = lambda _: None
        self.reader = worker.client  # type: ignore[assignment]
        self.writer = worker.client  # type: ignore[assignment]
        self._host_settings = HostSettings(
            TOPICS.events,
            TOPICS.ledger,
            worker.world.partitions,
            KEYS,
            worker.process.name,
            worker.world.choices.choice((1, 2, 8)),
        )
        self._inputs = {TOPICS.events: UsageInput, TOPICS.commands: CommandInput}
        self._tasks = []
        self._snapshotters = {}

    async def revoke(self) -> None:
        await self._on_revoked(None)
        self._forget_streams()

    async def assign(self, partitions: set[int]) -> None:
        self._assigned = {TP(topic, partition) for topic in self._inputs for partition in partitions}
        await self._on_rebalanced(None)
        for tp, position in sorted(self._positions().items()):
            self._worker.spawn(self._run_agent(self._inputs[tp.topic], self._stream(tp, position)))

    async def _take_over(self, partition: int) -> None:
        world = self._worker.world
        folder = self.settings.state_folder / f"partition-{partition}"
        cut_at = world.truth.cut.get(partition)
        stands = world.disks.place(folder)
        published = (await last_marks(self.reader, TOPICS.progress, partition)).get(PUBLISHER, Progress())
        is_behind = not stands.position.generation or stands.position.sequence < (cut_at or 0)
        if cut_at is not None and is_behind and published.position.sequence < cut_at:
            # Nobody can know: not its disk, and no reader.
            raise RefusedToStart(f"partition {partition}: the log is being restored: cannot be read")
        await super()._take_over(partition)
        host = self.hosts[partition]
        log = world.broker.log(TOPICS.ledger, partition)
        # A duplicate that came late may have brought its record back.
        if cut_at is not None and cut_at == world.truth.cut.get(partition):
            for place, whose in ((host.store.place, "its store"), (published, "the publisher")):
                if place.ledger_offset >= len(log) or record_hash(log[place.ledger_offset][1]) != place.record_hash:
                    world.loop.fail(f"{host.where}: took over a log that does not have what {whose} has")
        world.truth.compare_state(host.state, f"{self._worker.process.name}, after its takeover")
        world.takeovers += 1

    async def _run_agent(self, kind: Any, stream: _Stream) -> None:
        try:
            await self._agent(kind, stream)
        except Exception as error:  # noqa: BLE001  Faust's supervisor ends the app
            self.failure.set(error)


class SimPublisherApp(_Member, PublisherApp):
    def __init__(self, worker: Worker, settings: WorkerSettings, failure: Failure) -> None:
        _Member.__init__(self, worker)
        self.settings = settings
        self.failure = failure
        self.published_records = 0
        self.published = {}
        self._seal_key = KEYS.seal_key
        self._gate = None
        self._reader = worker.client  # type: ignore[assignment]
        self._writer = worker.client  # type: ignore[assignment]
        self._chains = {}
        self._places = {}
        self._doubted_s = {}
        self._resume = {}
        self._batches = {}
        self._flushing = {}
        self._task = None

    async def revoke(self) -> None:
        try:
            await self._on_revoked(None)
        except Exception as error:  # noqa: BLE001  Faust would crash the app
            self.failure.set(error)
        self._forget_streams()

    async def assign(self, partitions: set[int]) -> None:
        self._assigned = {TP(TOPICS.ledger, partition) for partition in partitions}
        await self._on_rebalanced(None)
        for tp, position in sorted(self._positions().items()):
            self._worker.spawn(self._run_agent(self._stream(tp, position)))

    async def _take(self, partition: int, offset: int, stored: bytes, event: Any) -> None:
        await super()._take(partition, offset, stored, event)
        world, chain = self._worker.world, self._chains.get(partition)
        if chain is None or partition in world.truth.cut:
            return
        due = bisect_right(world.truth.partitions[partition].offsets, offset) - 1
        if self._resume[partition] == offset + 1 and chain.sequence != due:
            world.loop.fail(
                f"the publisher took offset {offset} of partition {partition} and stands at {chain.sequence}, not {due}"
            )

    async def _run_agent(self, stream: _Stream) -> None:
        # `_agent` has told the failure.
        with contextlib.suppress(Exception):
            await self._agent(stream)


class Worker:
    """One incarnation of a worker on a machine (a disk). It ends with its failure; the machine starts the next one."""

    def __init__(self, world: World, name: str, folder: Path, groups: tuple[Group, Group]) -> None:
        self.world = world
        self.process = Process(world.loop, name)
        self.client = Client(world.broker, self.process)
        self.folder = folder
        self._groups = groups
        self.failure: Failure | None = None
        self.ledger: SimLedgerApp | None = None
        self.publisher: SimPublisherApp | None = None
        self.process.on_end.append(partial(world.on_worker_end, self))

    def spawn(self, main: Any) -> None:
        self.process.start(main)

    def start(self) -> None:
        self.spawn(self._main())

    async def _main(self) -> None:
        settings = WorkerSettings(
            KafkaSettings("simulated"),
            self.folder,
            KEYS,
            tick_interval_s=1.0,
            session_timeout_s=_SESSION_S,
            heartbeat_interval_s=1.0,
            drain_timeout_s=3.0,
        )
        failure = self.failure = Failure()
        self.ledger = SimLedgerApp(self, settings, failure)
        self.publisher = SimPublisherApp(self, settings, failure)
        for group, app in zip(self._groups, (self.ledger, self.publisher), strict=True):
            self.spawn(self._take_part(group, app))
        self.spawn(self.ledger._tick())
        self.spawn(self.publisher._flush_often())
        await failure.wait()
        if self.world.choices.random() < 0.5:
            # As `run_worker` does: the publisher first, then what the hosts have in flight.
            if failure.reason is None:
                await self.publisher._settle()
            await self.ledger._release_all()
        self.process.kill()

    async def _take_part(self, group: Group, app: Any) -> None:
        inbox = group.join(self)
        while True:
            await inbox.arrived.wait()
            inbox.arrived.clear()
            while inbox.messages:
                what, generation, partitions = inbox.messages.popleft()
                if what == "assign":
                    if generation == group.generation:
                        await app.assign(partitions)
                    continue
                if what == "gone":
                    # The member's next heartbeat tells it.
                    await asyncio.sleep(self.world.choices.random())
                await app.revoke()
                group.joined(self, generation)

    @property
    def refusal(self) -> BaseException | None:
        """Why it ended, if it refused to start."""
        reason = self.failure.reason if self.failure is not None else None
        return reason if isinstance(reason, RefusedToStart | LocalStoreError) else None


@dataclass
class _Inbox:
    messages: deque[tuple[str, int, set[int]]]
    arrived: asyncio.Event


class Group:
    """A consumer group of Kafka, with its coordinator."""

    def __init__(self, world: World) -> None:
        self.generation = 0
        self._world = world
        self._members: dict[Worker, _Inbox] = {}
        # Members that did not answer in time: they are out, and hear of it when they can.
        self._out: dict[Worker, bool] = {}
        self._silent_since: dict[Worker, float] = {}
        self._answered: set[Worker] = set()
        self._is_due = False
        self._changed = asyncio.Event()

    def join(self, worker: Worker) -> _Inbox:
        inbox = self._members[worker] = _Inbox(deque(), asyncio.Event())
        self.disturb()
        return inbox

    def joined(self, worker: Worker, generation: int) -> None:
        """The member has let go of everything and wants to go on."""
        if self._out.pop(worker, None) is not None:
            self.disturb()
        elif generation == self.generation:
            self._answered.add(worker)
        self._changed.set()

    def disturb(self) -> None:
        """Ask for a rebalance."""
        self._is_due = True
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._wait()
            self._expire()
            if self._is_due:
                self._is_due = False
                await self._rebalance()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await self._changed.wait()
        self._changed.clear()

    def _expire(self) -> None:
        now = self._world.loop.time()
        for worker in list(self._members):
            if worker.process.alive and not worker.process.paused:
                self._silent_since.pop(worker, None)
                if self._out.get(worker) is False:
                    self._out[worker] = True
                    self._send(worker, "gone", set())
            elif now - self._silent_since.setdefault(worker, now) >= _SESSION_S:
                if not worker.process.alive:
                    del self._members[worker]
                    self._out.pop(worker, None)
                    self._is_due = True
                elif worker not in self._out:
                    self._out[worker] = False
                    self._is_due = True

    def _send(self, worker: Worker, what: str, partitions: set[int]) -> None:
        inbox = self._members[worker]
        inbox.messages.append((what, self.generation, partitions))
        inbox.arrived.set()

    async def _rebalance(self) -> None:
        world = self._world
        self.generation += 1
        self._answered.clear()
        present = [worker for worker in self._members if worker.process.alive and worker not in self._out]
        for worker in present:
            self._send(worker, "revoke", set())
        deadline_s = world.loop.time() + _REBALANCE_TIMEOUT_S
        while world.loop.time() < deadline_s and any(w.process.alive and w not in self._answered for w in present):
            await self._wait()
        members = [worker for worker in present if worker in self._answered and worker.process.alive]
        for worker in present:
            if worker.process.alive and worker not in self._answered:
                self._out[worker] = False
        if not members:
            return
        world.choices.shuffle(members)
        world.rebalances += 1
        for number, worker in enumerate(members):
            self._send(worker, "assign", set(range(world.partitions)[number :: len(members)]))
