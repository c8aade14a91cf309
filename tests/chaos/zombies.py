"""Workers that are paused beyond their session and wake up, and groups that never come to rest."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import ClassVar, Final

from tests.chaos.faults import Fault
from tests.chaos.installation import KafkaInstallation, Part

_ARMED_TIMEOUT_S: Final = 120.0
_TAKEOVER_TIMEOUT_S: Final = 120.0
_AWAKE_S: Final = 1.0


class _Zombie(Fault):
    """A worker stops itself at a point, another takes its partition over and writes, the first wakes up and goes on."""

    setup = KafkaInstallation
    place = "worker"
    checks = "I1-I3, I5"
    nightly = 10
    hold_s = (_AWAKE_S, 2 * _AWAKE_S)
    points: ClassVar[tuple[str, ...]]

    def inject(self) -> None:
        installation = self.world.installation
        workers = {name: part for name, part in installation.parts.items() if name.startswith("worker-")}
        before = {name: len(part.marks()) for name, part in workers.items()}
        # The one that reaches the point first; with no partition assigned, one never does.
        self._zombie = self._stopped(workers)
        [self._mark] = self._zombie.marks()[before[next(name for name, part in workers.items() if part is self._zombie)] :]
        self._partition, self._sequence = int(str(self._mark["partition"])), int(str(self._mark["sequence"]))
        self._taken_over_s = self.world.wait(self._another_has_written, _TAKEOVER_TIMEOUT_S, "a takeover by another worker")
        self._zombie.resume()

    def _stopped(self, workers: dict[str, Part]) -> Part:
        point = self.draw.choice(self.points)
        name = self.draw.choice(sorted(workers))
        order = [name, *(other for other in sorted(workers) if other != name)]
        for each in order * 2:
            part = workers[each]
            part.arm(point, after=self.draw.randrange(6), action="stop")
            try:
                self.world.wait(lambda part=part: part.stopped_by_itself, _ARMED_TIMEOUT_S / 4, f"a stop at {point}")  # type: ignore[misc]
            except TimeoutError:
                if part.disarm():
                    continue
                self.world.wait(lambda part=part: part.stopped_by_itself, _ARMED_TIMEOUT_S, f"a stop at {point}")  # type: ignore[misc]
            return part
        raise TimeoutError(f"no worker came to {point}")

    def _another_has_written(self) -> bool:
        self.world.look()
        return any(
            sequence > self._sequence and writer != self._mark["writer"]
            for sequence, writer in self.world.ledger.seen[self._partition].written
        )

    def heal(self) -> None:
        if hasattr(self, "_zombie"):
            self._zombie.resume()
        self.world.installation.restart_dead()

    def evidence(self) -> str:
        return (
            f"{self._mark['writer']} stopped at {self._mark['point']} of {self._partition}/{self._sequence}, taken over after "
            f"{self._taken_over_s:.1f} s; {len(self._stale())} of its records written after that, all ignored"
        )

    def _stale(self) -> list[int]:
        """Sequences that the zombie wrote and no reader accepts."""
        return [
            sequence
            for sequence, writer in self.world.records[self._partition].ignored
            if writer == self._mark["writer"] and sequence >= self._sequence
        ]


class ZombieWrites(_Zombie):
    """It had its record in its hands: when it wakes up it writes it, and no reader may accept it."""

    name = "zombie-writes"
    points = ("before-produce",)

    def evidence(self) -> str:
        return super().evidence() if self._stale() else ""

    def violations(self) -> list[str]:
        written = self.world.records[self._partition].written
        own = [sequence for sequence, writer in written if writer == self._mark["writer"] and sequence == self._sequence]
        return [f"the zombie's record of sequence {sequence} was accepted" for sequence in own]


class ZombieWakes(_Zombie):
    """It had written, and had not yet drawn the consequences."""

    name = "zombie-wakes"
    points = ("after-produce", "before-local-write", "before-offset")


class RebalanceStorm(Fault):
    """Workers come and go, some politely, some not."""

    name = "rebalance-storm"
    place = "worker"
    setup = KafkaInstallation
    checks = "I1-I3, I5, I9"
    nightly = 10
    hold_s = (0.5, 1.5)
    rounds: ClassVar[int] = 5

    def inject(self) -> None:
        installation = self.world.installation
        assert isinstance(installation, KafkaInstallation)
        self._guest = installation.worker("worker-guest")
        for _ in range(self.rounds):
            part = self.draw.choice([self._guest, *self._residents()])
            if not part.alive:
                part.launch()
            elif self.draw.random() < 0.5:
                part.stop()
            else:
                part.kill9()
            time.sleep(self.draw.uniform(0.2, 1.5))

    def _residents(self) -> list[Part]:
        return [part for name, part in self.world.installation.parts.items() if name.startswith("worker-")]

    def heal(self) -> None:
        self._guest.stop()
        self.world.installation.restart_dead()

    def evidence(self) -> str:
        """How often a partition's records had another writer than the one before."""
        changes = 0
        for seen in self.world.records:
            writers = [writer for _, writer in seen.written]
            changes += sum(a != b for a, b in pairwise(writers))
        return f"partitions changed hands {changes} times" if changes else ""
