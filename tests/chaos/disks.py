"""Full disks: under the producer's journal, under the workers' local stores, under ClickHouse. Each a small tmpfs.

What is refused must be told (a refusal of the producer, a worker that ends and says why, a sink that waits), nothing that was
acknowledged may be lost, and with space everything goes on: by itself, or started again by whoever supervises it.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import ClassVar, Final

from tests.chaos.faults import Fault
from tests.chaos.history import Outcome
from tests.chaos.installation import KafkaInstallation
from tests.services.disk import Filler, small_disk

__all__ = ["SmallDiskInstallation"]

_NOTICED_TIMEOUT_S: Final = 90.0
_MANY_PER_S: Final = 1_000
# What is looked for in what a part says, of the second kind of full, which a file system tells in its own words.
_FULL: Final = ("No space left on device", "disk is full", "not enough space", "Cannot reserve")


class SmallDiskInstallation(KafkaInstallation):
    """The producer's journal, the local stores and ClickHouse are on small disks of their own."""

    name = "small-disks"
    sizes_mib: ClassVar[dict[str, int]] = {"producer": 40, "state": 120, "clickhouse": 300}

    def __init__(self, folder: Path) -> None:
        self._mounts = contextlib.ExitStack()
        self.fillers = {}
        for name, mib in self.sizes_mib.items():
            self.fillers[name] = Filler(self._mounts.enter_context(small_disk(folder / name, mib)))
        super().__init__(folder)

    def close(self) -> None:
        super().close()
        self._mounts.close()


class _DiskFull(Fault):
    """Somebody else's data takes all the room, for a while."""

    checks = "I1, I3, I10"
    nightly = 10
    setup = SmallDiskInstallation
    hold_s = (0.5, 4.0)
    disk: ClassVar[str]
    # Whose words tell that it was noticed.
    parts: ClassVar[tuple[str, ...]]

    @property
    def _filler(self) -> Filler:
        installation = self.world.installation
        assert isinstance(installation, SmallDiskInstallation)
        return installation.fillers[self.disk]

    def _said(self) -> str:
        """What the parts have written into their logs since the disk filled up."""
        said = ""
        for name, start in self._starts.items():
            with self.world.installation.parts[name].child.log_path.open("rb") as log:
                log.seek(start)
                said += log.read().decode(errors="replace")
        return said

    def inject(self) -> None:
        parts = self.world.installation.parts
        self._starts = {name: parts[name].child.log_path.stat().st_size for name in self.parts}
        time.sleep(self.draw.uniform(0.0, 0.5))
        # Some room may be left, that is used up in the middle of something.
        self._filler.fill(self.draw.choice([0, 0, 1 << 16, 1 << 20]))
        self._filled_at = time.monotonic()
        self.world.wait(self._refuses_more, _NOTICED_TIMEOUT_S, f"a word about the full disk from {', '.join(self.parts)}")

    def _refuses_more(self) -> bool:
        self._filler.fill()
        return self.noticed()

    def noticed(self) -> bool:
        said = self._said()
        return any(words in said for words in _FULL)

    def heal(self) -> None:
        self._filler.give_back()

    def evidence(self) -> str:
        said = self._said()
        return next((line[:160] for line in said.splitlines() if any(words in line for words in _FULL)), "")


class DiskFullJournal(_DiskFull):
    """The producer says that it does not take the request: never that it did and did not."""

    name = "disk-full-journal"
    disk = "producer"
    place = "producer"
    parts = ("producer",)

    def inject(self) -> None:
        # A journal whose events are in the ledger takes its own room again, and would never meet the full disk.
        installation = self.world.installation
        self._usual_per_s, installation.load.events_per_s = installation.load.events_per_s, _MANY_PER_S
        self._paused = [part for name, part in installation.parts.items() if name.startswith("worker-") and part.alive]
        for part in self._paused:
            part.pause()
        super().inject()

    def heal(self) -> None:
        super().heal()
        self.world.installation.load.events_per_s = self._usual_per_s
        for part in self._paused:
            part.resume()

    def _refused(self) -> list[str]:
        assert self.world.history is not None
        return [receipt.reason for receipt in list(self.world.history.receipts) if receipt.outcome is not Outcome.OK]

    def noticed(self) -> bool:
        return any("the disk is full" in reason for reason in self._refused())

    def evidence(self) -> str:
        refused = self._refused()
        return f"{len(refused)} requests refused, for instance: {refused[0][:120]}" if refused else ""


class DiskFullLocalStore(_DiskFull):
    """A worker's disk: it stops with the reason, is started again, and replays when there is room."""

    name = "disk-full-local-store"
    disk = "state"
    place = "worker"
    parts = ("worker-1", "worker-2")


class DiskFullClickHouse(_DiskFull):
    """The sink waits and says why; it does not end."""

    name = "disk-full-clickhouse"
    disk = "clickhouse"
    place = "sink"
    parts = ("sink",)

    def inject(self) -> None:
        self._sink = self.world.installation.parts["sink"].child.pid
        super().inject()

    def violations(self) -> list[str]:
        ended = self.world.installation.parts["sink"].child.pid != self._sink
        return ["the sink ended on a full disk, and had to be started again"] if ended else []
