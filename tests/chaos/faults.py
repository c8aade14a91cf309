"""What a fault is, and where each one is found by its name.

To add a fault, write a small class in a module of this folder and name that module in `MODULES`:

    class KillTheSink(Fault):
        name = "kill-sink"                  # FAULT=name
        checks = "I1, I3"                   # of reliability.md
        nightly = 20                        # trials
        setup = KafkaInstallation           # which installation it needs; your own subclass, if it needs another

        def inject(self) -> None: ...       # break something; the load runs on
        def heal(self) -> None: ...         # mend it; start again what is dead
        def evidence(self) -> str: ...      # what shows that the vulnerable window was hit; "" when it was not

A run makes one object of each fault in it, calls `inject` while the load runs, waits `hold_s`, calls `heal`, starts again what
is still dead, lets the load run on for a moment, stops it, and waits until the ledger and the database have caught up with all
that was acknowledged. Then the checker compares attempts, receipts, ledger and rows; `violations` may add what this fault must
show beyond that. An installation is started once and kept for many runs of all faults that name it: whatever `inject` did,
`heal` must undo.

A fault without evidence has missed its window: it is tried again with other choices, a few times (see `campaign`), and each try
is told.

Faults of different places (`place`) on one installation share runs: a sink dies, then a worker, then the producer, and one
load, one healing and one comparison serve them all. Each is a trial of its own, which is good only if the whole run was.

A fault draws every choice from `self.draw`, so a seed repeats it. It raises nothing for the product's failures: they are the
checker's to find. Whatever it raises is a failure of the harness, which is shown as one, never as a passed trial.
"""

from __future__ import annotations

import importlib
import random
from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tests.chaos.installation import Installation
    from tests.chaos.world import World

__all__ = ["MODULES", "PLACES", "Fault", "all_faults"]

# Whoever is later needs what comes before to have worked until then: no usage reaches a sink when no worker lives.
PLACES = ("input", "sink", "worker", "producer")

# Where faults are found, in the order of the table.
MODULES = (
    "tests.chaos.kills",
    "tests.chaos.zombies",
    "tests.chaos.more_kills",
    "tests.chaos.disks",
    "tests.chaos.connections",
    "tests.chaos.refusals",
    "tests.chaos.clocks",
    "tests.chaos.brokers",
)


class Fault(ABC):
    """One fault in one trial."""

    name: ClassVar[str]
    checks: ClassVar[str]
    nightly: ClassVar[int]
    setup: ClassVar[type[Installation]]
    # "events": usage through a meter and a publisher in a process of their own; "gateway": tritonclient through the gateway.
    loads: ClassVar[frozenset[str]] = frozenset({"events"})
    # What it breaks, of PLACES: a run has one fault of each place at most, and they are injected in that order. "": alone.
    place: ClassVar[str] = ""
    # The load runs on for so long, drawn between these, before it is healed.
    hold_s: ClassVar[tuple[float, float]] = (0.2, 1.0)
    # After healing, how long the ledger and the database may take to have everything, on a machine that does much else.
    heal_timeout_s: ClassVar[float] = 300.0

    def __init__(self, world: World, draw: random.Random) -> None:
        self.world = world
        self.draw = draw

    @abstractmethod
    def inject(self) -> None:
        """Break it."""

    @abstractmethod
    def heal(self) -> None:
        """Mend it. What died of it may be left to the run, which starts everything again once all faults are healed."""

    @abstractmethod
    def evidence(self) -> str:
        """Asked after the catching up: what shows that the vulnerable window was hit, or ""."""

    def refused(self) -> set[str]:
        """Asked before the checker: what was acknowledged, refused by the ledger, and told on usage.rejected."""
        return set()

    def violations(self) -> list[str]:
        """Asked after `evidence`: what must hold of this fault beyond what the checker sees."""
        return []


@cache
def all_faults() -> dict[str, type[Fault]]:
    """Every fault by its name, in the table's order."""
    found: dict[str, type[Fault]] = {}
    for module in MODULES:
        for value in vars(importlib.import_module(module)).values():
            if isinstance(value, type) and issubclass(value, Fault) and value.__module__ == module and "name" in vars(value):
                assert value.name not in found, f"two faults are called {value.name}"
                found[value.name] = value
    return found
