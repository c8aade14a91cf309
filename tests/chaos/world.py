"""One run: an installation under load, one fault or several in it, healing, and what the judge says.

Promise: `World.run` returns a `Trial` of each fault whatever the product did. A harness that failed (a part that did not start,
a fault that raised) is told in `error`, and counts as a failed trial. A run's history stays on disk when it was not good.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Final

from billing.identity import partition_of
from sinks.engine import Reader
from sinks.errors import EngineUnavailable, SinkError
from tests.chaos.checker import Verdict, check
from tests.chaos.faults import Fault
from tests.chaos.gateway_load import GatewayLoad
from tests.chaos.history import History, Outcome
from tests.chaos.installation import PARTITIONS, PRICES_PICO, Installation
from tests.chaos.load import EventLoad
from tests.chaos.reading import DatabaseReader, LedgerReader, NotReadableError, Seen, TopicReader

__all__ = ["Trial", "World", "run_name"]

_LOOK_S: Final = 0.1
# Shorter than the way of an event to the ledger.
_MOMENT_S: Final = 0.001
# Of a machine that has more to do than this.
_START_TIMEOUT_S: Final = 180.0
_TENANTS: Final = 8
# Acknowledged before a fault is injected, so that there is something to lose.
_WARM_EVENTS: Final = 60


@dataclass
class Trial:
    """What came of one."""

    fault: str
    seed: int
    number: int
    # Trials of one run share it, and with it everything below but `evidence` and what the fault itself found.
    run: str = ""
    seconds: float = 0.0
    healed_in_s: float = 0.0
    attempts: int = 0
    ok: int = 0
    failed: int = 0
    unknown: int = 0
    unknown_charged: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    unsettled: int = 0
    # Parts that ended after the healing, by themselves, and were started again.
    restarted: list[str] = field(default_factory=list)
    evidence: str = ""
    findings: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def good(self) -> bool:
        return not (self.findings or self.error)

    @property
    def counts(self) -> bool:
        """Whether it was made and hit its window, or found something."""
        return bool(self.evidence or self.findings)

    def line(self) -> str:
        return json.dumps(asdict(self))


def run_name(kinds: Sequence[type[Fault]], number: int, again: int = 0) -> str:
    """Of the run with these faults; `again`: of its next tries."""
    return f"{kinds[0].name}-{number}" + (f"-again-{again}" if again else "")


class World:
    """What a fault sees: the running installation, the load on it, and what its ledger says."""

    def __init__(self, installation: Installation, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        self.installation = installation
        self.folder = folder
        self.tell = tell
        self.history: History | None = None
        # The ledger's records of this trial, by partition; complete once everything has healed.
        self.records: list[Seen] = []
        # Of other topics, by whatever name a fault gives: they keep their places from trial to trial.
        self.readers: dict[str, TopicReader] = {}
        self._reader: Reader | None = None
        self._loads: dict[str, EventLoad | GatewayLoad] = {}
        self.tenants = _spread(_TENANTS)

    # --- what faults use ---

    def acknowledged(self) -> int:
        """Requests of this trial that were told ok by now."""
        assert self.history is not None
        return sum(receipt.outcome is Outcome.OK for receipt in list(self.history.receipts))

    def unknown(self) -> int:
        """Requests of this trial whose outcome is unknown by now."""
        assert self.history is not None
        return sum(receipt.outcome is Outcome.UNKNOWN for receipt in self.history.outcomes().values())

    def in_between(self, at_ms: int, margin_ms: int = 0) -> int:
        """Asked after the catching up: how many requests were acknowledged before that moment, and are in a ledger record whose
        log time is after it, by more than the margin. All clocks here are this machine's."""
        assert self.history is not None
        return sum(
            receipt.outcome is Outcome.OK
            and receipt.at_ms <= at_ms
            and self.ledger.charged_ms.get(receipt.request_id, 0) > at_ms + margin_ms
            for receipt in self.history.receipts
        )

    def await_acknowledgement(self) -> None:
        """Return as soon as usage has been acknowledged from now on: it is still on its way to the ledger."""
        load = next(iter(self._loads.values()))
        before, deadline = load.acknowledged, time.monotonic() + _START_TIMEOUT_S
        while load.acknowledged == before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing was acknowledged within {_START_TIMEOUT_S:g} s")
            time.sleep(_MOMENT_S)

    def database_behind(self) -> bool:
        """Whether the ledger, read now, has records that the database does not show yet."""
        self.wait(self.look, _START_TIMEOUT_S, "a look at the ledger")
        return not self._caught_up()

    def query(self, sql: str) -> list[list[object]]:
        """Rows of the database."""
        assert self._reader is not None
        return [list(row) for row in self._reader.query(sql).rows]

    def rows_stored(self) -> int:
        """How many events the database has, of all trials."""
        [[count]] = self.query("SELECT count() FROM usage_events FINAL")
        return int(str(count))

    def look(self) -> bool:
        """Read the ledger to its end; False when it cannot be read just now."""
        try:
            self.ledger.look()
        except (NotReadableError, EngineUnavailable):
            return False
        return True

    def wait(self, holds: Callable[[], object], timeout_s: float, what: str) -> float:
        """Wait for what another process does; how long it took. Raises TimeoutError."""
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
            time.sleep(0.02)
        return time.monotonic() - began

    # --- the run ---

    def start(self) -> None:
        """Start the installation; return when its ledger takes and prices usage, and the database shows it."""
        self.installation.start()
        self._reader = self.installation.reader()
        archive = self._reader if self.installation.forgets else None
        self.ledger = LedgerReader(self.installation.config, archive)
        self.database = DatabaseReader(self._reader, self.installation.config.ledger.partitions)
        partitions = self.installation.config.ledger.partitions
        self.wait(lambda: self.look() and self.ledger.commands["applied"] >= partitions, _START_TIMEOUT_S, "the price book")
        self.installation.admit(list(self.tenants))
        self.wait(lambda: self.look() and self._caught_up(), _START_TIMEOUT_S, "the sink")
        self._forget_before()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self.installation.close()

    def run(self, kinds: Sequence[type[Fault]], seed: int, number: int, again: int = 0) -> list[Trial]:
        """One run with these faults, whatever happens in it: a trial of each. `again`: how many tries there were before."""
        name = run_name(kinds, number, again)
        trials = [Trial(kind.name, seed, number, name) for kind in kinds]
        shared = trials[0]
        began = time.monotonic()
        history = self.history = History(self.folder / f"{name}.jsonl")
        evidence: list[str] = []
        own: list[list[str]] = []
        try:
            for fault in self._run(shared, kinds, history, f"/{again}" if again else ""):
                evidence.append(fault.evidence())
                own.append(fault.violations())
        except Exception:  # noqa: BLE001  a failure of the harness is a failed trial, told as what it is
            shared.error = traceback.format_exc(limit=6)
            with contextlib.suppress(Exception):
                self._end()
        shared.seconds = round(time.monotonic() - began, 2)
        history.close()
        told = zip_longest(trials, evidence, own)
        found = [
            replace(shared, fault=trial.fault, evidence=shown or "", findings=shared.findings + (findings or []))
            for trial, shown, findings in told
        ]
        if all(trial.good for trial in found):
            history.path.unlink()
        return found

    def _run(self, trial: Trial, kinds: Sequence[type[Fault]], history: History, again: str) -> list[Fault]:
        faults = [kind(self, random.Random(f"{trial.seed}/{kind.name}/{trial.number}{again}")) for kind in kinds]
        load = self._begin(kinds, history, f"{trial.run}-", random.Random(f"{trial.seed}/{trial.run}/load"))
        self.wait(lambda: load.acknowledged >= _WARM_EVENTS, _START_TIMEOUT_S, "usage before the fault")
        begun: list[Fault] = []
        try:
            for fault in faults:
                begun.append(fault)
                fault.inject()
            time.sleep(max(fault.draw.uniform(*fault.hold_s) for fault in faults))
        finally:
            for fault in begun:
                fault.heal()
            self.installation.restart_dead()
        acknowledged = load.acknowledged
        self.wait(
            lambda: self._supervised(trial) and load.acknowledged > acknowledged + _WARM_EVENTS // 2,
            _START_TIMEOUT_S,
            "usage after healing",
        )
        healing = time.monotonic()
        self._end()
        settled = self._settle(trial, history, max(kind.heal_timeout_s for kind in kinds))
        trial.healed_in_s = round(time.monotonic() - healing, 2)
        self.records = self.ledger.take()
        charges = [charge for seen in self.records for charge in seen.charges]
        totals, accounts = self.database.gains()
        verdict = check(
            list(history.attempts.values()),
            history.receipts,
            charges,
            self.database.rows(),
            totals,
            accounts,
            settled,
            refused=set().union(*(fault.refused() for fault in faults)),
        )
        _fill(trial, verdict)
        return faults

    def _begin(
        self, kinds: Sequence[type[Fault]], history: History, prefix: str, draw: random.Random
    ) -> EventLoad | GatewayLoad:
        """Start the faults' loads; the one that says when there was enough of it."""
        wanted = frozenset().union(*(kind.loads for kind in kinds))
        gateway_load = self.installation.gateway_load
        self._loads = {"events": self.installation.load} if "events" in wanted else {}
        if "gateway" in wanted:
            assert gateway_load is not None, f"{self.installation.name} has no gateway"
            self._loads["gateway"] = gateway_load
        for name, load in self._loads.items():
            load.begin(history, f"{prefix}{name[0]}", self.tenants, PRICES_PICO, draw)
        return next(iter(self._loads.values()))

    def _end(self) -> None:
        for load in self._loads.values():
            load.end()

    def _supervised(self, trial: Trial) -> bool:
        """What a supervisor does all the time: start again what ended."""
        trial.restarted += self.installation.restart_dead()
        return True

    def _settle(self, trial: Trial, history: History, timeout_s: float) -> set[str]:
        """Wait until everything that any journal holds is in ledger and database; then an unknown outcome is known.

        On a timeout it goes on: what is missing then is lost, and the checker says so.
        """
        deadline = time.monotonic() + timeout_s
        marks: dict[str, dict[str, object]] = {}
        while time.monotonic() < deadline and self._supervised(trial):
            for name, load in self._loads.items():
                if name not in marks and (mark := load.marks()) is not None:
                    marks[name] = mark
            there = len(marks) == len(self._loads) and self.look()
            if there and all(map(self._covers, marks.values())) and self._caught_up():
                return set(history.attempts)
            time.sleep(_LOOK_S)
        self.tell(f"not caught up after {timeout_s:g} s: marks {marks}, ledger {self.ledger.covered}")
        return set()

    def _covers(self, marks: dict[str, object]) -> bool:
        if "requests" in marks:
            requests = marks["requests"]
            assert isinstance(requests, list)
            return all(name in self.ledger.charged for name in requests)
        covered = self.ledger.covered.get(str(marks["producer_id"]), [])
        highest = marks["highest"]
        assert isinstance(highest, list)
        return len(covered) == len(highest) and all(has >= asked for has, asked in zip(covered, highest, strict=True))

    def _caught_up(self) -> bool:
        """Whether the database has everything that the last look at the ledger saw."""
        wanted = [(chain.generation, chain.sequence) for chain in self.ledger.chains]
        try:
            there = self.database.positions()
        except (SinkError, OSError):
            return False
        return all(
            generation == position[0] and position[1] >= sequence
            for (generation, sequence), position in zip(wanted, there, strict=True)
        )

    def _forget_before(self) -> None:
        """What was there before the first trial is nobody's."""
        self.ledger.take()
        self.database.rows()
        self.database.gains()


def _fill(trial: Trial, verdict: Verdict) -> None:
    for name in ("attempts", "ok", "failed", "unknown", "unknown_charged"):
        setattr(trial, name, getattr(verdict, name))
    for name in ("lost", "doubled", "wrong", "unsettled"):
        setattr(trial, name, len(getattr(verdict, name)))
    trial.findings = verdict.findings()


def _spread(count: int) -> Sequence[str]:
    """Tenants, the same number in each partition."""
    found: dict[int, list[str]] = {}
    number = 0
    while sum(map(len, found.values())) < count:
        name = f"tenant-{number}"
        home = found.setdefault(partition_of(name, PARTITIONS), [])
        if len(home) < count // PARTITIONS:
            home.append(name)
        number += 1
    return [name for home in found.values() for name in home]
