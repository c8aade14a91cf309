"""ClickHouse down for minutes under load, then back: `python -m tests.chaos.outage --minutes 10 --rate 1000`.

Promise: the load goes on before, during and after. Once the server is back it prints how long the database took to have
everything of the ledger but its last two seconds, and how fast that was against the rate at which usage arrived; then it stops
the load and lets the judge compare every request, every row and every sum. It exits 1 if anything is lost, doubled or wrong,
or if catching up was slower than `RATIO_MIN` times the rate of arrival, hence took more than a fifth of the outage: of ten
minutes two. The sink may pause for 10 s between attempts, which counts: a short outage is mostly that pause.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import ClassVar, Final

from tests.chaos.faults import Fault
from tests.chaos.installation import KafkaInstallation
from tests.chaos.world import World

__all__ = ["RATIO_MIN", "ClickHouseOutage"]

RATIO_MIN: Final = 6.0
_RECENT_S: Final = 2.0
_LOOK_S: Final = 0.5
_CATCH_UP_TIMEOUT_S: Final = 600.0
_WARM_S: Final = 10.0

Positions = list[tuple[bytes, int]]


class ClickHouseOutage(Fault):
    """The server is killed and stays away."""

    name = "clickhouse-outage"
    checks = "I1, I3, I9"
    nightly = 1
    setup = KafkaInstallation
    hold_s = (0.0, 0.0)
    heal_timeout_s = 300.0
    minutes: ClassVar[float] = 10.0

    def inject(self) -> None:
        time.sleep(_WARM_S)
        self._began = time.monotonic()
        self._acknowledged = self.world.acknowledged()
        self._before = self.world.rows_stored()
        self.world.installation.parts["clickhouse"].kill9()
        time.sleep(self.minutes * 60)

    def heal(self) -> None:
        world = self.world
        self._down_s = time.monotonic() - self._began
        world.installation.parts["clickhouse"].start()
        back = time.monotonic()
        seen: deque[tuple[float, Positions]] = deque()

        def caught_up() -> bool:
            time.sleep(_LOOK_S)
            world.installation.restart_dead()
            if not world.look():
                return False
            now = time.monotonic()
            seen.append((now, [(chain.generation, chain.sequence) for chain in world.ledger.chains]))
            while len(seen) > 1 and seen[1][0] <= now - _RECENT_S:
                seen.popleft()
            if seen[0][0] > now - _RECENT_S:
                return False
            there = world.database.positions()
            return all(has[0] == due[0] and has[1] >= due[1] for has, due in zip(there, seen[0][1], strict=True))

        world.wait(caught_up, _CATCH_UP_TIMEOUT_S, "the database caught up with the ledger")
        self._caught_up_s = time.monotonic() - back
        self._stored = world.rows_stored() - self._before
        self._arrived = (world.acknowledged() - self._acknowledged) / (time.monotonic() - self._began)

    @property
    def _ratio(self) -> float:
        return self._stored / self._caught_up_s / self._arrived

    def evidence(self) -> str:
        return (
            f"ClickHouse down for {self._down_s:.0f} s, {self._arrived:.0f} events/s arrived all the while; caught up "
            f"{self._caught_up_s:.1f} s after it was back: {self._stored} events, {self._stored / self._caught_up_s:.0f}/s, "
            f"{self._ratio:.1f} times the arrival rate"
        )

    def violations(self) -> list[str]:
        # At that ratio, what arrived while it was down, and goes on arriving, is there after this part of the outage.
        patient_s = self._down_s / (RATIO_MIN - 1)
        found = []
        if self._ratio < RATIO_MIN:
            found.append(f"caught up at {self._ratio:.1f} times the arrival rate, under {RATIO_MIN:g}")
        if self._caught_up_s > patient_s:
            found.append(f"caught up after {self._caught_up_s:.1f} s, over {patient_s:.1f} s")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=1_000, help="events per second")
    parser.add_argument("--directory", type=Path, default=Path("build/chaos"), help="where the history of a bad run stays")
    given = parser.parse_args()
    ClickHouseOutage.minutes = given.minutes
    folder = Path(tempfile.mkdtemp(prefix="taximeter-outage-"))
    world = World(KafkaInstallation(folder), given.directory, tell=lambda text: print(text, flush=True))
    try:
        world.start()
        world.installation.load.events_per_s = given.rate
        [trial] = world.run([ClickHouseOutage], seed=1, number=0)
    finally:
        world.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(trial.evidence)
    print(
        f"{trial.attempts} attempts, {trial.ok} acknowledged, {trial.unknown} unknown; {trial.lost} lost, "
        f"{trial.doubled} doubled, {trial.wrong} wrong, {trial.unsettled} unsettled"
    )
    for finding in trial.findings[:20]:
        print(finding)
    print(trial.error, end="")
    return 0 if trial.good else 1


if __name__ == "__main__":
    sys.exit(main())
