"""Three brokers, killed in turn under load: whoever records usage notices nothing.

Topics have three replicas and need two in sync. A dead broker is noticed after 3 s at the earliest, so a call that waited for
Kafka would take that long; `record` and the wait until an event is durable may take `BLOCKED_MS_MAX` at most, which is for the
disk and for a machine that has more to do than this.
"""

from __future__ import annotations

import time
from typing import ClassVar, Final

from tests.chaos.faults import Fault
from tests.chaos.installation import KafkaInstallation
from tests.services.kafka import KafkaCluster

__all__ = ["BLOCKED_MS_MAX", "ThreeBrokers"]

BLOCKED_MS_MAX: Final = 1_500.0
# Three brokers and what else there is share a machine: one needs 10 s and 90 s now and then.
_IN_SYNC_TIMEOUT_S: Final = 300.0


class ThreeBrokers(KafkaInstallation):
    """Apache Kafka on three nodes, each a controller too; min.insync.replicas=2."""

    name = "kafka-3"
    nodes: ClassVar[int] = 3
    heap_mb: ClassVar[int] = 256


class RollingBrokers(Fault):
    """One broker after the other is killed, for longer than it takes to be noticed, and comes back before the next one goes."""

    name = "rolling-brokers"
    checks = "I1-I3, I9"
    nightly = 10
    setup = ThreeBrokers

    @property
    def _cluster(self) -> KafkaCluster:
        installation = self.world.installation
        assert isinstance(installation, KafkaInstallation)
        return installation.kafka

    def inject(self) -> None:
        world, cluster = self.world, self._cluster
        self._await_sync()
        world.installation.load.marks()
        order = [node.node_id for node in cluster.nodes]
        self.draw.shuffle(order)
        self._turns: list[str] = []
        for node_id in order:
            part = world.installation.parts[f"kafka-{node_id}"]
            before, dead_s = world.acknowledged(), self.draw.uniform(3.5, 6.0)
            part.kill9()
            time.sleep(dead_s)
            acknowledged = world.acknowledged() - before
            part.start()
            in_sync_s = self._await_sync()
            if acknowledged:
                self._turns.append(
                    f"{node_id} dead {dead_s:.1f} s, {acknowledged} acknowledged, in sync after {in_sync_s:.1f} s"
                )

    def _await_sync(self) -> float:
        """Until every replica has everything; how long it took."""
        try:
            return self.world.wait(self._cluster.in_sync, _IN_SYNC_TIMEOUT_S, "all replicas in sync")
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {'; '.join(self._cluster.out_of_sync()[:8])}") from error

    def heal(self) -> None:
        self.world.installation.restart_dead()
        self._await_sync()
        marks = self.world.installation.load.marks()
        slowest = marks["slowest"] if marks is not None else {}
        assert isinstance(slowest, dict)
        self._slowest_ms = slowest

    def evidence(self) -> str:
        if len(self._turns) < len(self._cluster.nodes):
            return ""
        slowest = ", ".join(f"{name[:-3]} at most {took_ms:.1f} ms" for name, took_ms in sorted(self._slowest_ms.items()))
        return f"brokers {'; '.join(self._turns)}; {slowest}"

    def violations(self) -> list[str]:
        measured = self._slowest_ms.keys() == {"record_ms", "durable_ms"}
        found = [] if measured else [f"the producer did not say how long its calls took: {self._slowest_ms}"]
        return found + [
            f"{name[:-3]} took {took_ms:.1f} ms while a broker was dead, over {BLOCKED_MS_MAX:g}"
            for name, took_ms in self._slowest_ms.items()
            if took_ms > BLOCKED_MS_MAX
        ]
