"""Usage from a file into the ledger, through a journal of its own, so that a kill in the middle costs nothing.

Promise: after `run` has returned, the ledger has every event. A run that was killed leaves its journal and its place
behind; the same call again goes on from there. What the place did not know yet is recorded a second time and is a
duplicate in the ledger, which charges nothing. A run that has ended removes its place, so that the next one sends
everything again. Its place counts what the file gives, what it leaves out too, so that it is the same whatever is left out.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from producers.errors import JournalFull
from producers.meter import MeterSettings, Receipt, UsageMeter
from producers.publisher import Publisher, PublisherSettings
from taximeter.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from billing.v1.usage_pb2 import UsageEvent

__all__ = ["Fed", "Feed", "read_place", "write_place"]

_PLACE_EVERY: Final = 1_000
_FULL_PAUSE_S: Final = 0.05
_LOOK_S: Final = 0.02


def write_place(path: Path, events: int) -> None:
    """Put the place on disk, whole: a power loss leaves the one before or this one."""
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        json.dump({"events": events}, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def read_place(path: Path) -> int:
    """The place that was written last. 0 where there is none or it can't be read: from there everything is recorded again,
    and what the ledger has is a duplicate."""
    try:
        return int(json.loads(path.read_text())["events"])
    except (FileNotFoundError, ValueError):
        return 0


@dataclass(frozen=True, slots=True)
class Fed:
    """What a run did."""

    recorded: int
    skipped: int
    left_out: int
    recorded_s: float
    covered_s: float


class Feed:
    """One file's way into the ledger; `folder` is its own."""

    def __init__(self, folder: Path, meter: MeterSettings, publisher: PublisherSettings) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._place_path = folder / "place.json"
        self._meter = UsageMeter(meter)
        self._publisher = Publisher(self._meter.journal, publisher)
        self._timeout_s = 30.0
        self._publisher.start()

    def place(self) -> int:
        """How many events of the file are known to be durable from a run that was cut off."""
        return read_place(self._place_path)

    def run(
        self,
        events: Callable[[int], Iterable[UsageEvent | None]],
        *,
        due_s: Callable[[UsageEvent], float] | None,
        stalled_s: float,
        on_recorded: Callable[[int], None] = lambda _: None,
        on_covered: Callable[[int], None] = lambda _: None,
    ) -> Fed:
        """Record `events(skip)`, each when it is due, and wait until the ledger has them all. None is left out.

        NotReadyError when the ledger has taken nothing for `stalled_s`: the journal keeps everything for the next call.
        """
        skipped = self.place()
        began_s = time.monotonic()
        taken = left_out = 0
        receipt: Receipt | None = None
        for event in events(skipped):
            taken += 1
            if event is None:
                left_out += 1
            else:
                if due_s is not None and (pause_s := began_s + due_s(event) - time.monotonic()) > 0:
                    time.sleep(pause_s)
                receipt = self._record(event, stalled_s)
            if taken % _PLACE_EVERY == 0:
                self._note(receipt, skipped + taken)
                on_recorded(_PLACE_EVERY)
        self._note(receipt, skipped + taken)
        on_recorded(taken % _PLACE_EVERY)
        recorded_s = time.monotonic() - began_s
        self._await_covered(stalled_s, on_covered)
        self._place_path.unlink(missing_ok=True)
        return Fed(taken - left_out, skipped, left_out, recorded_s, time.monotonic() - began_s)

    def sync(self, stalled_s: float, on_covered: Callable[[int], None] = lambda _: None) -> tuple[int, int]:
        """Bill what a killed process left open, and wait until the ledger has all that the journal holds. Returns how many
        requests were left open, and how many events the ledger has taken."""
        recovered = self._meter.recover(self._timeout_s)
        waiting = self._publisher.metrics()["uncovered"]
        self._await_covered(stalled_s, on_covered)
        return recovered, waiting

    def oldest_ms(self) -> int:
        """The age of the oldest event that the ledger has not."""
        return self._meter.metrics()["oldest_unacknowledged_ms"]

    def close(self) -> None:
        """Let go of the journal; what the ledger does not have stays in it."""
        self._publisher.close(self._timeout_s)
        self._meter.close(self._timeout_s)

    def _record(self, event: UsageEvent, stalled_s: float) -> Receipt:
        deadline_s = time.monotonic() + stalled_s
        while True:
            try:
                return self._meter.record(event)
            except JournalFull:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(_FULL_PAUSE_S)

    def _note(self, receipt: Receipt | None, events: int) -> None:
        """`receipt`: of the last event that was recorded, if one was."""
        if receipt is None:
            return
        receipt.durable(self._timeout_s)
        write_place(self._place_path, events)

    def _await_covered(self, stalled_s: float, on_covered: Callable[[int], None]) -> None:
        last = self._publisher.metrics()["uncovered"]
        moved_s = time.monotonic()
        while last:
            time.sleep(_LOOK_S)
            left = self._publisher.metrics()["uncovered"]
            if left < last:
                on_covered(last - left)
                last, moved_s = left, time.monotonic()
            elif time.monotonic() - moved_s > stalled_s:
                raise NotReadyError(
                    f"the ledger has taken nothing for {stalled_s:g} s and {left:,} events wait in the journal: "
                    "see `taximeter doctor`, then run the same command again; it goes on from here"
                )
