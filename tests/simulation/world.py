"""One run: a ledger in a world that a seed makes and breaks, then heals; and what must hold in the end.

Phases: found the ledger; work under faults; heal (no new faults, everything runs, clocks right, logs restored); wait until
nothing is left to do, which must happen; judge. What is drawn from the seed: how many machines, producers and partitions, which
faults at which rates, each interleaving, each delay.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from billing import replay
from billing.chain import Chain
from billing.identity import partition_of
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.account_pb2 import AccountUpdate
from billing.v1.alert_pb2 import ALERT_RULE_MISSING_SEQUENCE, Alert
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.rejected_pb2 import RejectedInput
from billing.v1.usage_pb2 import UsageEvent
from sinks.tables import ACCOUNTS, ALERTS, LEDGER_RECORDS, SINK_POSITIONS, USAGE_EVENTS, USAGE_TOTALS
from stream_processors import topics
from stream_processors.errors import LocalStoreError
from stream_processors.settings import KafkaSettings, TopicSettings
from tests.simulation.broker import Broker, Client, Rates
from tests.simulation.disk import Disks, Snapshot
from tests.simulation.loop import Process, SimLoop, Violation
from tests.simulation.producing import Commander, Producer, foreign_sender
from tests.simulation.seams import BASE_MS, seams
from tests.simulation.sink import Database, Sink
from tests.simulation.truth import Truth, pico
from tests.simulation.workers import KEYS, TOPICS, Group, Worker, ledger_settings

__all__ = ["Report", "World", "run"]

DAY_MS = 86_400_000
_STEPS_MAX = 1_500_000
_HEAL_S_MAX = 400.0


@dataclass(frozen=True)
class Report:
    """What a run went through."""

    seed: int
    # Over everything that the ledger says: two runs of one seed and one commit are the same run.
    fingerprint: str
    faults: Counter[str]
    charged: int
    durable: int
    records: int
    ignored: int
    takeovers: int
    rebalances: int
    virtual_s: float
    steps: int


class Machine:
    """A disk, and the workers that run there one after the other."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.folder = world.folder / f"machine-{number}"
        self.incarnation = 0
        self.worker: Worker | None = None
        self.snapshots: list[tuple[int, Snapshot]] = []

    def start(self) -> None:
        self.incarnation += 1
        name = f"worker-{self.number}/{self.incarnation}"
        self.worker = Worker(self.world, name, self.folder, (self.world.ledger_group, self.world.publisher_group))
        self.worker.process.skew_ms = self.world.skews_ms.get(self.number, 0)
        self.worker.start()

    def store(self, partition: int) -> Path:
        return self.folder / f"partition-{partition}"

    def copy(self) -> None:
        """Keep a copy of one store, as it is at this moment: no process may be writing a batch, and none is."""
        partition = self.world.choices.randrange(self.world.partitions)
        self.snapshots.append((partition, self.world.disks.snapshot(self.store(partition))))

    def spoil(self) -> None:
        """Nothing runs here: what may have happened to the disk by the time that something does."""
        world, choices = self.world, self.world.choices
        draw = choices.random()
        partition = choices.randrange(world.partitions)
        if world.truth.cut or not world.is_faulty:
            return
        if draw < world.disk_fault_rate:
            world.note("disk lost")
            world.disks.lose(self.store(partition))
        elif draw < 2 * world.disk_fault_rate and self.snapshots:
            world.note("old copy of a disk")
            partition, snapshot = choices.choice(self.snapshots)
            world.disks.restore(self.store(partition), snapshot)
        elif draw < 3 * world.disk_fault_rate:
            world.note("power lost")
            for each in range(world.partitions):
                world.disks.cut_power(self.store(each), choices.randint(1, 12))


class World:
    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.choices = random.Random(seed)
        choices = self.choices
        self.folder = folder
        self.loop = SimLoop(choices, steps_max=_STEPS_MAX)
        self.partitions = choices.choice((1, 2, 2, 3))
        self.truth = Truth(self.loop, self.partitions)
        self.broker = Broker(self.loop, choices, self.truth.on_append)
        self.broker.time_ms_max = lambda: self.clock_ms() + TopicSettings(1).log_time_ahead_max_ms
        self.broker.reordered = frozenset({TOPICS.events})
        self.broker.stale_rate = choices.choice((0.0, 0.1, 0.5))
        self.disks = Disks(choices, self.truth.on_place)
        self.database = Database()
        self.faults: Counter[str] = Counter()
        self.takeovers = self.rebalances = 0
        self.is_faulty = True
        self.tenants = [f"tenant-{number}" for number in range(choices.randint(2, 5))] + ["stranger"]
        self.recorded: list[bytes] = []
        self.request_interval_s = choices.choice((0.05, 0.15, 0.4))
        self.repeat_rate = choices.choice((0.0, 0.1, 0.3))
        self.fault_s = choices.choice((8.0, 20.0, 40.0))
        self.fault_interval_s = choices.choice((0.3, 1.0, 3.0))
        self.disk_fault_rate = choices.choice((0.0, 0.1, 0.25))
        self.skews_ms: dict[int, int] = {}
        self.ledger_group = Group(self)
        self.publisher_group = Group(self)
        self.machines = [Machine(self, number) for number in range(choices.choice((1, 2, 2, 3)))]
        requests = choices.choice((20, 60, 150))
        self.producers = [Producer(self, number, requests) for number in range(choices.randint(1, 3))]
        self.commander = Commander(self)
        self.sinks = 0
        self.sink: Sink | None = None
        self.outside = Process(self.loop, "outside")
        self.client = Client(self.broker, self.outside)
        self.foreign: asyncio.Task[None] | None = None
        self.saved: dict[int, list[tuple[bytes, bytes]]] = {}
        # By partition, how many messages of the accounts' topic were looked at for ticks, and the highest sequence of one.
        self._ticks_read: dict[int, tuple[int, int]] = {}

    def home(self, tenant_id: str) -> int:
        return partition_of(tenant_id, self.partitions)

    def clock_ms(self) -> int:
        return BASE_MS + int(self.loop.time() * 1000)

    def note(self, fault: str) -> None:
        self.faults[fault] += 1

    # --- the run ---

    async def run(self) -> None:
        await self._found()
        for group in (self.ledger_group, self.publisher_group):
            self.outside.start(group.run())
        for machine in self.machines:
            machine.start()
        self.outside.start(self._keep_workers())
        self.outside.start(self.commander.run(self.client))
        self.foreign = self.outside.start(foreign_sender(self, self.client, 12))
        for producer in self.producers:
            producer.start()
        self._start_sink()
        await self._break_things()
        await self._heal()
        await self._settle()
        self._judge()

    async def _found(self) -> None:
        settings = topics.ApplySettings(
            KafkaSettings("simulated"), TopicSettings(self.partitions), ledger_settings(self.partitions), KEYS.seal_key
        )
        await topics._found(settings)

    def _start_sink(self) -> None:
        self.sinks += 1
        self.sink = Sink(self, self.sinks)
        self.sink.start()

    def on_worker_end(self, worker: Worker) -> None:
        self.note("worker ended")

    async def _keep_workers(self) -> None:
        """What supervises processes: a machine whose worker ended gets another, after what an operator must do first."""
        while True:
            await asyncio.sleep(0.2 + self.choices.random())
            for machine in self.machines:
                worker = machine.worker
                if worker is not None and not worker.process.alive and self.choices.random() < 0.6:
                    self._operate(machine, worker)
                    machine.spoil()
                    machine.start()

    def _operate(self, machine: Machine, worker: Worker) -> None:
        """What the refusal says to do, if that is so."""
        refusal = worker.refusal
        if refusal is None or self.truth.cut:
            return
        said = str(refusal)
        if not isinstance(refusal, LocalStoreError) and ("cannot be read" in said or self._is_restored(said)):
            return
        damaged: list[int] = []
        if not isinstance(refusal, LocalStoreError) and self.faults["log cut"]:
            # Its disk stands on what was written while the log was cut: the operator knows that the restored log is right.
            damaged = [p for p in range(self.partitions) if str(machine.store(p)) in said]
        if not damaged:
            self.loop.fail(f"{worker.process.name} refused to start and nothing is wrong: {said}")
        for partition in damaged:
            self.disks.lose(machine.store(partition))

    def _is_restored(self, said: str) -> bool:
        """Whether it missed what a reader had taken, or all of it, and the log was cut at some time: now it has it again."""
        missed = " has taken sequence " in said or "holds no founding record" in said
        return missed and self.faults["log cut"] > 0

    # --- faults ---

    async def _break_things(self) -> None:
        choices = self.choices
        faults: list[Callable[[], None]] = [
            self._kill_worker,
            self._kill_worker,
            self._pause_worker,
            self._pause_worker,
            self._rebalance,
            self._kill_producer,
            self._kill_sink,
            self._copy_disk,
            self._shift_clock,
            self._take_broker_down,
            self._spoil_messages,
            self._cut_log,
        ]
        # Each seed has its own mix: some faults only show when others do not come between.
        chosen = choices.sample(faults, choices.randint(2, len(faults)))
        end_s = self.loop.time() + self.fault_s
        while self.loop.time() < end_s:
            await asyncio.sleep(choices.expovariate(1 / self.fault_interval_s))
            choices.choice(chosen)()

    def _running(self) -> Worker | None:
        workers = [m.worker for m in self.machines if m.worker is not None and m.worker.process.alive]
        return self.choices.choice(workers) if workers else None

    def _kill_worker(self) -> None:
        worker = self._running()
        if worker is None:
            return
        if self.choices.random() < 0.3:
            self.note("worker killed at a disk write")
            worker.process.disk_fuse = self.choices.randint(0, 8)
        else:
            self.note("worker killed")
            worker.process.fuse = self.choices.randint(0, 120)

    def _pause_worker(self) -> None:
        worker = self._running()
        if worker is not None and not worker.process.paused:
            self.note("worker stopped for a while")
            worker.process.pause()
            self.loop.call_later(self.choices.uniform(0.5, 14), worker.process.resume, context=self.loop.outside)

    def _rebalance(self) -> None:
        self.note("rebalance")
        self.choices.choice((self.ledger_group, self.publisher_group)).disturb()

    def _kill_producer(self) -> None:
        self.note("producer killed")
        producer = self.choices.choice(self.producers)
        producer.process.kill()
        self.loop.call_later(self.choices.uniform(0, 3), self._revive, producer, context=self.loop.outside)

    def _revive(self, producer: Producer) -> None:
        if not producer.process.alive:
            producer.start()

    def _kill_sink(self) -> None:
        if self.sink is not None and self.sink.process.alive:
            self.note("sink killed at an insert")
            self.sink.process.disk_fuse = self.choices.randint(0, 12)
            self.sink.process.on_end.append(self._revive_sink)

    def _revive_sink(self) -> None:
        self.loop.call_later(self.choices.random(), self._start_sink, context=self.loop.outside)

    def _copy_disk(self) -> None:
        self.choices.choice(self.machines).copy()

    def _shift_clock(self) -> None:
        machine = self.choices.choice(self.machines)
        shift_ms = self.choices.choice((-DAY_MS, -300_000, -3_000, 3_000, 300_000, DAY_MS // 2))
        self.note("clock shifted")
        self.skews_ms[machine.number] = shift_ms
        if machine.worker is not None:
            machine.worker.process.skew_ms = shift_ms

    def _take_broker_down(self) -> None:
        self.note("broker down")
        self.broker.down_until_s = self.loop.time() + self.choices.uniform(0.2, 6)

    def _spoil_messages(self) -> None:
        self.note("messages spoilt for a while")
        choices = self.choices
        self.broker.rates = Rates(
            lost=choices.choice((0, 0.05)),
            unsure=choices.choice((0, 0.05)),
            twice=choices.choice((0, 0.05)),
            nameless=choices.choice((0, 0.05)),
            late=choices.choice((0, 0.02)),
            reorder=choices.choice((0, 0.3)),
            unreadable=choices.choice((0, 0.05)),
            delay_s=choices.choice((0.002, 0.02, 0.2)),
        )
        self.loop.call_later(choices.uniform(0.5, 6), self._mend_messages, context=self.loop.outside)

    def _mend_messages(self) -> None:
        self.broker.rates = Rates()

    def _cut_log(self) -> None:
        """Acknowledged records vanish from the log; a replica brings them back. Meanwhile nobody may go on."""
        partition = self.choices.randrange(self.partitions)
        log = self.broker.log(TOPICS.ledger, partition)
        if partition in self.truth.cut or len(log) < 3:
            return
        self.note("log cut")
        kept = self.choices.randint(0, len(log) - 1)
        self.saved[partition] = list(log)
        self.truth.cut[partition] = next(
            (s for s, offset in enumerate(self.truth.partitions[partition].offsets) if offset >= kept),
            self.truth.partitions[partition].sequence + 1,
        )
        del log[kept:]
        self.loop.call_later(self.choices.uniform(1, 8), self._restore_log, partition, context=self.loop.outside)

    def _restore_log(self, partition: int) -> None:
        if partition not in self.truth.cut:
            return
        # Whoever wrote to the cut log ends before the replica is put in its place.
        for machine in self.machines:
            if machine.worker is not None:
                machine.worker.process.kill()
        log = self.broker.log(TOPICS.ledger, partition)
        log[:] = self.saved.pop(partition)
        del self.truth.cut[partition]
        self.broker.wake(TOPICS.ledger, partition)

    # --- healing ---

    async def _heal(self) -> None:
        self.is_faulty = False
        self.broker.rates = Rates()
        self.broker.down_until_s = self.broker.stale_rate = 0.0
        for partition in list(self.truth.cut):
            self._restore_log(partition)
        self.skews_ms.clear()
        for machine in self.machines:
            if machine.worker is not None:
                machine.worker.process.resume()
                machine.worker.process.skew_ms = 0
                machine.worker.process.fuse = machine.worker.process.disk_fuse = None
        for producer in self.producers:
            self._revive(producer)
        assert self.sink is not None
        self.sink.process.disk_fuse = None
        if not self.sink.process.alive:
            await asyncio.sleep(1.5)
            if not self.sink.process.alive:
                self._start_sink()

    def _waits_for(self) -> str:
        """What is not done yet; nothing: the world has settled."""
        truth = self.truth
        if not self.commander.done or self.foreign is None or not self.foreign.done():
            return "commands and foreign usage are not all sent"
        for producer in self.producers:
            if producer.left > 0:
                return f"{producer.journal.producer_id} has {producer.left} requests to serve"
            if not producer.journal.is_free:
                journal = producer.journal
                return f"{journal.producer_id} has freed {journal.freed} of {list(map(len, journal.events))}"
        for partition, known in enumerate(truth.partitions):
            for topic in (TOPICS.events, TOPICS.commands):
                if known.inputs.get(topic, -1) + 1 != len(self.broker.log(topic, partition)):
                    return f"{topic}[{partition}] is not read to its end"
        return ""

    async def _settle(self) -> None:
        deadline_s = self.loop.time() + _HEAL_S_MAX
        while waits_for := self._waits_for():
            if self.loop.time() > deadline_s:
                self.loop.fail(f"after {_HEAL_S_MAX:g} s without faults: {waits_for}")
            await asyncio.sleep(0.5)
        # What the ledger said reaches those who follow it.
        while waits_for := self._readers_wait_for():
            if self.loop.time() > deadline_s:
                self.loop.fail(f"after {_HEAL_S_MAX:g} s without faults: {waits_for}")
            await asyncio.sleep(0.5)

    def _readers_wait_for(self) -> str:
        """Ticks never end, so being within the last seconds is being there."""
        for partition, known in enumerate(self.truth.partitions):
            row = self.database.tables[SINK_POSITIONS].get((partition,))
            if row is None or row["sequence"] != known.sequence or row["record_hash"] != known.hashes[-1].hex():
                return f"the sink stands at {row and row['sequence']} of {known.sequence} in partition {partition}"
            published = self._published(partition)
            if published < known.sequence:
                return f"the publisher stands at {published} of {known.sequence} in partition {partition}"
            hosts = [m.worker.ledger.hosts.get(partition) for m in self.machines if m.worker and m.worker.ledger]
            if not any(host is not None and host.state.sequence == known.sequence and not host.in_flight for host in hosts):
                return f"no host stands at {known.sequence} of partition {partition}"
            if any(producer.alerted_through for producer in known.state.producers.values()):
                return f"an alert about missing numbers in partition {partition} is not resolved"
        return ""

    def _published(self, partition: int) -> int:
        """The highest sequence of the ledger that a tick stands for; what was looked at before is not looked at again."""
        log = self.broker.log(TOPICS.accounts, partition)
        read, highest = self._ticks_read.get(partition, (0, -1))
        for key, value in log[read:]:
            if key == f"tick/{partition}".encode():
                highest = max(highest, AccountUpdate.FromString(value).tick.version.sequence)
        self._ticks_read[partition] = len(log), highest
        return highest

    # --- judgement ---

    def _judge(self) -> None:
        truth = self.truth
        for raw in sorted(truth.durable):
            event = UsageEvent.FromString(raw)
            if not truth.is_settled(truth.partitions[self.home(event.tenant_id)], raw) and not any(
                raw in known.rejected for known in truth.partitions
            ):
                self.loop.fail(f"{event.request_id} of {event.tenant_id} was durable, and the ledger does not have it")
        credit = {
            tenant_id: known.credit_pico[tenant_id]
            for known in truth.partitions
            for tenant_id in known.credit_pico
            if known.credit_pico[tenant_id]
        }
        if credit != self.commander.granted_pico:
            self.loop.fail(f"credit is {credit}; {self.commander.granted_pico} was granted")
        for known in truth.partitions:
            self._judge_sums(known.partition)
            self._judge_readers(known.partition)
            self._judge_published(known.partition)
            self._judge_sink(known.partition)
            self._judge_completeness(known.partition)

    def _judge_completeness(self, partition: int) -> None:
        """Every journal is free: no number is missing, and whatever an alert called missing was told to have come."""
        known = self.truth.partitions[partition]
        told: dict[str, str] = {}
        for _, value in self.broker.log(TOPICS.alerts, partition):
            alert = Alert.FromString(value)
            if alert.rule == ALERT_RULE_MISSING_SEQUENCE:
                told[alert.labels["producer_id"]] = alert.labels["state"]
        for producer_id, state in told.items():
            self.note(f"missing sequence told, then {state}")
            if state != "closed":
                self.loop.fail(f"partition {partition}: {producer_id} is told to be missing something, and everything is there")
        for producer in known.state.producers.values():
            if producer.missing():
                self.loop.fail(f"partition {partition}: {producer.producer_id} lacks {producer.missing()}; its journal is free")

    def _judge_sums(self, partition: int) -> None:
        known = self.truth.partitions[partition]
        charged = sum(charge.cost_pico for charge in known.charged.values())
        windows = sum(window.cost_pico for window in known.windows.values())
        accounts = sum(account.spend_pico for account in known.state.accounts.values())
        lines = sum(line.cost_pico for line in known.state.lines)
        lines += sum(window.cost_pico for window in known.state.windows.values())
        if not charged == windows == accounts == lines:
            self.loop.fail(
                f"partition {partition}: events cost {charged}, windows {windows}, accounts {accounts}, "
                f"periods' lines and open windows {lines}"
            )

    def _judge_readers(self, partition: int) -> None:
        """Whoever follows the log by the chain, from its beginning or from a store, comes to the writer's state."""
        known = self.truth.partitions[partition]
        follow, state = Chain(partition, KEYS.seal_key), LedgerState(MemorySeenKeys())
        for _, stored in self.broker.log(TOPICS.ledger, partition):
            record = follow.accept(stored)
            if record is not None:
                replay.apply(state, record, stored)
        self.truth.compare_state(state, "a replay from the beginning")
        if state.sequence != known.sequence:
            self.loop.fail(f"partition {partition}: a replay ends at {state.sequence}, the log at {known.sequence}")
        for machine in self.machines:
            if machine.worker is None or machine.worker.ledger is None or not machine.worker.process.alive:
                continue
            host = machine.worker.ledger.hosts.get(partition)
            if host is not None and host.owned and not host.in_flight:
                self.truth.compare_state(host.state, f"{machine.worker.process.name}")
                loaded = host.store.load()
                assert loaded is not None
                self.truth.compare_state(loaded, f"the store of {machine.worker.process.name}")
                self._judge_memory(partition, host.state)

    def _judge_memory(self, partition: int, state: LedgerState) -> None:
        """What is remembered is found."""
        known = self.truth.partitions[partition]
        keys = sorted({digest for day in _memory(known.state).days.values() for digest in day})
        if state.seen.find(keys) != known.state.seen.find(keys):
            self.loop.fail(f"partition {partition}: a host's dedupe memory is not what the log says")

    def _judge_published(self, partition: int) -> None:
        known = self.truth.partitions[partition]
        alerts: dict[tuple[str, int], bytes] = {}
        for _, value in self.broker.log(TOPICS.alerts, partition):
            alert = Alert.FromString(value)
            if alerts.setdefault((alert.alert_id, alert.revision), value) != value:
                self.loop.fail(f"alert {alert.alert_id} was published in two ways")
        if set(alerts) != known.told:
            self.loop.fail(f"partition {partition}: alerts {set(alerts) ^ known.told} are published or told alone")
        rejected = {
            f"{each.position.sequence}/{each.index}"
            for _, value in self.broker.log(TOPICS.rejected, partition)
            for each in [RejectedInput.FromString(value)]
        }
        if rejected != known.shown_rejections:
            self.loop.fail(
                f"partition {partition}: rejections {rejected ^ known.shown_rejections} are published or recorded alone"
            )
        latest: dict[str, tuple[int, int]] = {}
        for _, value in self.broker.log(TOPICS.accounts, partition):
            account = AccountUpdate.FromString(value).account
            if account.tenant_id and account.version.sequence >= latest.get(account.tenant_id, (-1, 0))[0]:
                latest[account.tenant_id] = (account.version.sequence, pico(account.spend))
        spends = {tenant_id: account.spend_pico for tenant_id, account in known.state.accounts.items()}
        if {tenant_id: spend for tenant_id, (_, spend) in latest.items()} != spends:
            self.loop.fail(f"partition {partition}: published accounts spend {latest}; the ledger says {spends}")

    def _judge_sink(self, partition: int) -> None:
        known, tables = self.truth.partitions[partition], self.database.tables

        def rows(table: object) -> list[dict[str, object]]:
            return [row for row in tables[table].values() if row["ledger_partition"] == partition]  # type: ignore[index]

        events = {(row["tenant_id"], row["request_id"]): row["cost"] for row in rows(USAGE_EVENTS)}
        if events != {identity: charge.cost_pico for identity, charge in known.charged.items()}:
            self.loop.fail(f"partition {partition}: the sink's events are not those that were charged")
        totals = sorted((str(row["tenant_id"]), row["events"], row["cost"]) for row in rows(USAGE_TOTALS))
        if sum(int(str(cost)) for _, _, cost in totals) != sum(each.cost_pico for each in known.charged.values()):
            self.loop.fail(f"partition {partition}: the sink's totals are not the sum of what was charged")
        if sum(int(str(count)) for _, count, _ in totals) != len(known.charged):
            self.loop.fail(f"partition {partition}: the sink's totals count other events than were charged")
        spends = {row["tenant_id"]: row["spend"] for row in rows(ACCOUNTS)}
        if spends != {tenant_id: account.spend_pico for tenant_id, account in known.state.accounts.items()}:
            self.loop.fail(f"partition {partition}: the sink's accounts are not the ledger's")
        if {row["alert_id"] for row in rows(ALERTS)} != known.alert_ids:
            self.loop.fail(f"partition {partition}: the sink's alerts are not the ledger's")
        if len(rows(LEDGER_RECORDS)) != known.sequence + 1:
            self.loop.fail(f"partition {partition}: the sink's archive has {len(rows(LEDGER_RECORDS))} records")

    def report(self) -> Report:
        fingerprint = hashlib.sha256()
        for partition in range(self.partitions):
            for _, stored in self.broker.log(TOPICS.ledger, partition):
                record = LedgerRecord.FromString(stored)
                # Maps are stored in an order that differs from process to process; hashes and seals differ with it.
                record.previous_hash = record.seal = b""
                fingerprint.update(record.SerializeToString(deterministic=True))
        return Report(
            self.seed,
            fingerprint.hexdigest()[:16],
            self.faults + Counter(self.broker.counts),
            sum(len(known.charged) for known in self.truth.partitions),
            len(self.truth.durable),
            sum(known.sequence + 1 for known in self.truth.partitions),
            self.truth.ignored,
            self.takeovers,
            self.rebalances,
            self.loop.time(),
            self.loop.steps,
        )


def _memory(state: LedgerState) -> MemorySeenKeys:
    assert isinstance(state.seen, MemorySeenKeys)
    return state.seen


def run(seed: int) -> Report:
    """One run. Raises Violation, which names the seed and how to see it again."""
    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    collecting = gc.isenabled()
    gc.disable()
    # What the run leaves is collected in the end, without a look at everything that was imported.
    gc.freeze()
    levels = logging.root.manager.disable
    if levels < logging.CRITICAL and not _is_told():
        logging.disable(logging.CRITICAL)
    world = World(seed, folder)
    try:
        with seams(world.loop, world.choices, world.disks, world.client):
            try:
                world.loop.run_until_complete(world.outside.start(world.run()))
                if world.loop.violation is not None:
                    raise world.loop.violation
                for error in world.loop.failures():
                    raise Violation(f"a task ended with {error!r}") from error
            except Violation as violation:
                raise Violation(f"seed {seed}, {violation} (again: python -m tests.simulation --seed {seed})") from violation
            finally:
                report = world.report()
                world.loop.dispose()
    finally:
        logging.disable(levels)
        shutil.rmtree(folder, ignore_errors=True)
        if collecting:
            gc.enable()
            gc.collect()
        gc.unfreeze()
    return report


def _is_told() -> bool:
    """Whether somebody wants to read what the parts log."""
    return logging.getLogger("tests.simulation").isEnabledFor(logging.DEBUG)
