"""kill -9: the ledger worker and the sink at each of their points and at random, the producer, the broker, ClickHouse."""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar, Final

from tests.chaos.faults import Fault
from tests.chaos.history import Outcome
from tests.chaos.installation import KafkaInstallation, Part
from tests.chaos.part import SINK_POINTS, WORKER_POINTS

_ARMED_TIMEOUT_S: Final = 120.0
# What a paused producer had answered is heard within so long, on a disk that has more to sync than ours.
_ANSWER_S: Final = 0.25
_PAUSES_MAX: Final = 50


class _Kafka(Fault):
    """On Apache Kafka and a ClickHouse server."""

    setup = KafkaInstallation

    def part(self, name: str) -> Part:
        return self.world.installation.parts[name]

    def heal(self) -> None:
        self.world.installation.restart_dead()


class _AtAPoint(_Kafka):
    """A part kills itself at a named point, with usage in its hands."""

    point: ClassVar[str]
    nightly = 20
    checks = "I1-I3"

    def victims(self) -> list[str]:
        raise NotImplementedError

    def inject(self) -> None:
        installation = self.world.installation
        self._before = {name: len(installation.parts[name].marks()) for name in self.victims()}
        after = self.draw.randrange(8)
        for name in self.victims():
            installation.parts[name].arm(self.point, after=after)
        # Workers share the partitions: whichever comes to the point first. The other is told to forget it.
        self.world.wait(
            lambda: any(not installation.parts[name].alive for name in self.victims()),
            _ARMED_TIMEOUT_S,
            f"a passing of {self.point}",
        )
        for name in self.victims():
            if installation.parts[name].alive:
                installation.parts[name].disarm()

    def evidence(self) -> str:
        for name, before in self._before.items():
            if marks := self.world.installation.parts[name].marks()[before:]:
                return f"{name}: {marks[0]}"
        return ""


class _Worker(_AtAPoint):
    place = "worker"

    def victims(self) -> list[str]:
        return [name for name in self.world.installation.parts if name.startswith("worker-")]


class _Sink(_AtAPoint):
    place = "sink"

    def victims(self) -> list[str]:
        return ["sink"]


class KillWorkerBeforeProduce(_Worker):
    name = "kill-worker-before-produce"
    point = WORKER_POINTS[0]


class KillWorkerAfterProduce(_Worker):
    name = "kill-worker-after-produce"
    point = WORKER_POINTS[1]


class KillWorkerBeforeLocalWrite(_Worker):
    name = "kill-worker-before-local-write"
    point = WORKER_POINTS[2]


class KillWorkerBeforeOffset(_Worker):
    name = "kill-worker-before-offset"
    point = WORKER_POINTS[3]


class KillSinkBeforeInsert(_Sink):
    name = "kill-sink-before-insert"
    point = SINK_POINTS[0]


class KillSinkBetweenInserts(_Sink):
    name = "kill-sink-between-inserts"
    point = SINK_POINTS[1]


class KillSinkBeforePosition(_Sink):
    name = "kill-sink-before-position"
    point = SINK_POINTS[2]


class KillSinkAfterPosition(_Sink):
    name = "kill-sink-after-position"
    point = SINK_POINTS[3]


class _AtRandom(_Kafka):
    """A part is killed from outside, at a moment that the seed draws."""

    nightly = 20
    checks = "I1-I3"

    def victim(self) -> str:
        raise NotImplementedError

    def inject(self) -> None:
        time.sleep(self.draw.uniform(0.0, 0.6))
        self._name = self.victim()
        self.await_window()
        self._killed_ms = time.time_ns() // 1_000_000
        self.part(self._name).kill9()

    def await_window(self) -> None:
        """Wait for the moment, where a drawn one alone would seldom be it."""


class KillWorker(_AtRandom):
    name = "kill-worker"
    place = "worker"

    def victim(self) -> str:
        """One that owns a partition: the last to have written there."""
        self.world.wait(self.world.look, _ARMED_TIMEOUT_S, "a look at the ledger")
        writers = {int(seen.written[-1][1].split("/")[1]) for seen in self.world.ledger.seen if seen.written}
        parts = self.world.installation.parts
        return self.draw.choice(
            [name for name in sorted(parts) if name.startswith("worker-") and parts[name].child.pid in writers]
        )

    def await_window(self) -> None:
        self.world.await_acknowledgement()

    def evidence(self) -> str:
        # So long after it only because another worker had to take over first.
        waited = self.world.in_between(self._killed_ms, margin_ms=1_000)
        return f"{self._name} dead, {waited} acknowledged, and in the ledger after a takeover" if waited else ""


class KillProducer(_AtRandom):
    name = "kill-producer"
    place = "producer"

    def victim(self) -> str:
        return "producer"

    def await_window(self) -> None:
        # Asked, and no answer: in memory, in the journal or on its way to Kafka. Paused meanwhile, it cannot answer after all.
        load, producer = self.world.installation.load, self.part("producer")
        for _ in range(_PAUSES_MAX):
            self.world.wait(lambda: load.outstanding, _ARMED_TIMEOUT_S, "a request without an answer")
            producer.pause()
            asked = load.outstanding
            time.sleep(_ANSWER_S)
            if asked & load.outstanding:
                return
            producer.resume()

    def evidence(self) -> str:
        assert self.world.history is not None
        cut = sum(receipt.outcome is Outcome.UNKNOWN for receipt in self.world.history.receipts)
        return f"{cut} requests had no answer" if cut else ""


class KillSink(_AtRandom):
    name = "kill-sink"
    place = "sink"

    def victim(self) -> str:
        return "sink"

    def inject(self) -> None:
        super().inject()
        self._behind = self.world.database_behind()

    def evidence(self) -> str:
        return "the ledger was ahead of the database" if self._behind else ""


class _Service(_Kafka):
    """Something that the product stands on is killed, and comes back with what it had on disk."""

    nightly = 10
    checks = "I1, I3, I9"
    service: ClassVar[str]
    hold_s = (0.2, 2.0)

    def inject(self) -> None:
        time.sleep(self.draw.uniform(0.0, 0.6))
        self.part(self.service).kill9()
        self._before = self.world.acknowledged()

    def heal(self) -> None:
        self._during = self.world.acknowledged() - self._before
        super().heal()

    def evidence(self) -> str:
        return f"{self._during} acknowledged while {self.service} was dead" if self._during else ""


class KillKafka(_Service):
    name = "kill-kafka"
    place = "worker"
    service = "kafka"


class KillClickHouse(_Service):
    name = "kill-clickhouse"
    place = "sink"
    service = "clickhouse"


class KillClickHouseBetweenInserts(_Service):
    """The server dies when some tables of a batch are inserted and others are not; the sink lives."""

    name = "kill-clickhouse-between-inserts"
    place = "sink"
    service = "clickhouse"

    def inject(self) -> None:
        sink = self.part("sink")
        before = len(sink.marks())
        sink.arm("between-inserts", after=self.draw.randrange(6), action="stop")
        self.world.wait(lambda: sink.stopped_by_itself, _ARMED_TIMEOUT_S, "a stop between inserts")
        self.part(self.service).kill9()
        self._before = self.world.acknowledged()
        self._mark = sink.marks()[before]
        sink.resume()

    def evidence(self) -> str:
        return f"the server died between inserts: {self._mark}"


class KillEverything(_Kafka):
    """Broker, database, workers, sink and producer, in any order, within a moment."""

    name = "kill-everything"
    checks = "I1-I4, I9"
    nightly = 10

    def inject(self) -> None:
        names = list(self.world.installation.parts)
        self.draw.shuffle(names)
        time.sleep(self.draw.uniform(0.0, 0.6))
        self.world.await_acknowledgement()
        self._killed_ms = time.time_ns() // 1_000_000
        for name in names:
            # Not waited for: the last one would live on until the largest had given its memory back.
            os.killpg(self.part(name).child.pid, signal.SIGKILL)
        for name in names:
            self.part(name).kill9()

    def evidence(self) -> str:
        # So long after it only because everything had to be started again first.
        between, unknown = self.world.in_between(self._killed_ms, margin_ms=1_000), self.world.unknown()
        return f"{between} acknowledged and not in the ledger, {unknown} unknown" if between else ""
