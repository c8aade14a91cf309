"""Many trials: which come when, on which installation, and the table of what came of them.

Promise: faults take turns, so that each meets what the others left, and those of different places share runs; an installation
serves `renew_after` runs and is then made anew, and at once after a run that was not good. The order and every choice follow
from the seed. A trial that missed its window, or could not be made, is made again with other choices, `TRIES_MAX` times in all;
each of them is counted and printed.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from tests.chaos.faults import PLACES, Fault
from tests.chaos.installation import Installation
from tests.chaos.world import Trial, World, run_name

__all__ = ["TRIES_MAX", "Campaign", "Plan", "table"]

TRIES_MAX = 4
_COLUMNS = ("asked", "trials", "windows hit", "attempts", "unknown", "lost", "doubled", "wrong", "failed runs")


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    faults: Sequence[type[Fault]]
    counts: Mapping[str, int]
    seed: int
    soak_hours: float | None = None
    renew_after: int = 25

    def turns(self) -> Iterator[tuple[list[type[Fault]], int]]:
        """The faults of each run, in rounds, shuffled, installations one after the other within a round of each."""
        number = 0
        until_s = None if self.soak_hours is None else time.monotonic() + self.soak_hours * 3_600
        setups = list(dict.fromkeys(kind.setup for kind in self.faults))
        while until_s is not None or number < max(self.counts.values()):
            # Blocks of rounds on one installation, so that it is not stopped and started for each fault.
            block = range(number, number + 4)
            for setup in setups:
                for each in block:
                    turn = [
                        kind
                        for kind in self.faults
                        if kind.setup is setup and (until_s is not None or each < self.counts[kind.name])
                    ]
                    random.Random(f"{self.seed}/{setup.name}/{each}").shuffle(turn)
                    for kinds in _together(turn):
                        if until_s is not None and time.monotonic() > until_s:
                            return
                        yield kinds, each
            number += len(block)

    def shares(self, count: int) -> list[list[str]]:
        """The faults' names in so many parts of about as many runs, those of one installation together if that is no more."""
        setups = list(dict.fromkeys(kind.setup for kind in self.faults))
        own = [[kind for kind in self.faults if kind.setup is setup] for setup in setups]
        fair = sum(map(self._runs, own)) / count
        together: list[list[type[Fault]]] = []
        for kinds in own:
            pieces = max(1, round(self._runs(kinds) / fair))
            # Those of one place cannot share runs: each piece has some of every place.
            dealt = sorted(kinds, key=lambda kind: (kind.place, -self.counts[kind.name]))
            together += filter(None, (dealt[piece::pieces] for piece in range(pieces)))
        shares: list[list[str]] = [[] for _ in range(min(count, len(together)))]
        taken = [0] * len(shares)
        for kinds in sorted(together, key=self._runs, reverse=True):
            least = taken.index(min(taken))
            taken[least] += self._runs(kinds)
            shares[least] += [kind.name for kind in kinds]
        return shares

    def _runs(self, kinds: Sequence[type[Fault]]) -> int:
        # A soak has no end to count to.
        return len(list(replace(self, faults=kinds, soak_hours=None).turns()))


@dataclass
class Campaign:
    """Runs a plan. Histories of bad trials and the list of all of them are in `directory`."""

    plan: Plan
    directory: Path
    tell: Callable[[str], None]
    trials: list[Trial] = field(default_factory=list)
    _world: World | None = None
    _served: int = 0

    @property
    def path(self) -> Path:
        return self.directory / f"trials-{self.plan.seed}.jsonl"

    def run(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.load()
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for kinds, number in self.plan.turns():
                while left := self.due(kinds, number):
                    self._one(left, number)

    def load(self) -> None:
        """The trials that were made so far."""
        if self.path.exists():
            self.trials = [Trial(**json.loads(line)) for line in self.path.read_text().splitlines() if line.endswith("}")]

    def passed(self) -> bool:
        """Whether every trial was good, and every fault hit its window at least once."""
        hit = {trial.fault for trial in self.trials if trial.evidence}
        return all(trial.good for trial in self.trials) and all(
            kind.name in hit for kind in self.plan.faults if any(trial.fault == kind.name for trial in self.trials)
        )

    def due(self, kinds: Sequence[type[Fault]], number: int) -> list[type[Fault]]:
        """Those of them whose trial of that number is still to be made, or to be made again."""
        tries = {kind: self._tries(kind, number) for kind in kinds}
        return [kind for kind, made in tries.items() if len(made) < TRIES_MAX and not any(trial.counts for trial in made)]

    def _tries(self, kind: type[Fault], number: int) -> list[Trial]:
        return [trial for trial in self.trials if (trial.fault, trial.number) == (kind.name, number)]

    def _one(self, kinds: list[type[Fault]], number: int) -> None:
        # A try of its own: other choices, and requests whose IDs the ledger does not know.
        again = len(self._tries(kinds[0], number))
        try:
            world = self._world_for(kinds[0].setup)
        except Exception:  # noqa: BLE001  a failure of the harness is told as one
            error = traceback.format_exc(limit=6)
            run = run_name(kinds, number, again)
            trials = [Trial(kind.name, self.plan.seed, number, run, error=error) for kind in kinds]
            self._close(keep=True)
        else:
            trials = world.run(kinds, self.plan.seed, number, again)
        self._served += 1
        with self.path.open("a") as file:
            file.write("".join(trial.line() + "\n" for trial in trials))
        for trial in trials:
            self.trials.append(trial)
            self._say(trial)
        if not all(trial.good for trial in trials):
            self._close(keep=True)

    def _world_for(self, setup: type[Installation]) -> World:
        if self._world is not None and (type(self._world.installation) is not setup or self._served >= self.plan.renew_after):
            self._close()
        if self._world is None:
            folder = Path(tempfile.mkdtemp(prefix="taximeter-chaos-"))
            self._served = 0
            self._world = World(setup(folder), self.directory, self.tell)
            began = time.monotonic()
            self._world.start()
            self.tell(f"installation {setup.name} ready in {time.monotonic() - began:.1f} s")
        return self._world

    def _close(self, *, keep: bool = False) -> None:
        world, self._world = self._world, None
        if world is None:
            return
        world.close()
        folder = world.installation.folder
        for log in (path for path in folder.rglob("*.log") if keep and not path.stem.isdigit()):
            # What its parts said, for whoever looks for the cause.
            kept = self.directory / f"logs-{folder.name}" / log.relative_to(folder)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, kept)
        shutil.rmtree(folder, ignore_errors=True)

    def _say(self, trial: Trial) -> None:
        state = "good" if trial.good else "BAD"
        self.tell(
            f"{len(self.trials):4d} {trial.fault}/{trial.number}: {state} in {trial.seconds:.1f} s, {trial.attempts} attempts, "
            f"{trial.unknown} unknown ({trial.unknown_charged} charged), caught up in {trial.healed_in_s:.1f} s; "
            f"{trial.evidence or 'window not hit'}{f'; started again: {trial.restarted}' if trial.restarted else ''}"
        )
        for finding in trial.findings[:10]:
            self.tell(f"       {finding}")
        if trial.error:
            self.tell(trial.error)
        if len(self.trials) % 25 == 0:
            self.tell(table(self.plan, self.trials))


def _together(kinds: Sequence[type[Fault]]) -> Iterator[list[type[Fault]]]:
    """One of each place in a run, as long as there are some; whoever breaks everything is alone."""
    places = [[kind for kind in kinds if kind.place == place] for place in PLACES]
    yield from ([kind for kind in run if kind is not None] for run in zip_longest(*places))
    yield from ([kind] for kind in kinds if not kind.place)


def table(plan: Plan, trials: Sequence[Trial]) -> str:
    """As it stands in docs/guarantees.md."""
    rows = [["fault", "checks", *_COLUMNS]]
    rows += [
        [kind.name, kind.checks, *_figures(plan, [kind], [trial for trial in trials if trial.fault == kind.name])]
        for kind in plan.faults
    ]
    rows.append(["all", "", *_figures(plan, plan.faults, trials)])
    rows.insert(1, ["---"] * len(rows[0]))
    runs = len({(trial.run, trial.number) for trial in trials})
    return f"seed {plan.seed}, {runs} runs\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(plan: Plan, kinds: Sequence[type[Fault]], trials: Sequence[Trial]) -> list[str]:
    """What a run's trials share counts once."""
    runs = list({(trial.run, trial.number): trial for trial in trials}.values())
    figures = [
        "" if plan.soak_hours is not None else sum(plan.counts[kind.name] for kind in kinds),
        len(trials),
        sum(bool(trial.evidence) for trial in trials),
        sum(run.attempts for run in runs),
        sum(run.unknown for run in runs),
        sum(run.lost for run in runs),
        sum(run.doubled for run in runs),
        sum(run.wrong + run.unsettled for run in runs),
        sum(bool(trial.error) or (bool(trial.findings) and not _counted(trial)) for trial in trials),
    ]
    return list(map(str, figures))


def _counted(trial: Trial) -> bool:
    """Whether its findings stand in the table's other columns."""
    return bool(trial.lost or trial.doubled or trial.wrong or trial.unsettled)
