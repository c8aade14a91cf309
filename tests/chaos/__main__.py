"""Trials of faults against real processes: `python -m tests.chaos --trials 5 --seed 1 --fault kill-sink-before-insert`.

Promise: for each fault it prints how many trials were made, how many hit the vulnerable window, and what was unknown, lost,
doubled and wrong; it exits 1 if anything was, if a trial could not be made, or if a fault never hit its window. Every trial is
a line in DIRECTORY/trials-SEED.jsonl when it ends: run again with the same seed, it goes on after the trials that are there.

A run is mostly waiting (for a session to end, for a process to start): `--side-by-side 2` has two processes at it, each with
the faults of other installations.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.campaign import Campaign, Plan, table
from tests.chaos.faults import all_faults


def main() -> int:
    known = all_faults()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, help="of each fault (default: 5)")
    parser.add_argument("--nightly", action="store_true", help="as many of each fault as the table asks for")
    parser.add_argument("--soak-hours", type=float, help="all faults in turn for so long")
    parser.add_argument("--fault", action="append", choices=sorted(known), help="this one alone; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=Path("build/chaos"))
    parser.add_argument("--renew-after", type=int, default=25, help="trials that one installation lives for")
    parser.add_argument("--side-by-side", type=int, default=1, help="processes, each with installations of its own")
    given = parser.parse_args()
    faults = [kind for name, kind in known.items() if not given.fault or name in given.fault]
    counts = {kind.name: kind.nightly if given.nightly else given.trials or 5 for kind in faults}
    plan = Plan(faults, counts, given.seed, given.soak_hours, given.renew_after)
    campaign = Campaign(plan, given.directory, tell=lambda text: print(text, flush=True))
    try:
        shares = plan.shares(given.side_by_side)
        if len(shares) > 1:
            _run_side_by_side(shares)
            campaign.load()
        else:
            campaign.run()
    except KeyboardInterrupt:
        print("interrupted; run it again with the same seed to go on", flush=True)
    print(table(plan, campaign.trials), flush=True)
    return 0 if campaign.passed() else 1


def _run_side_by_side(shares: Sequence[Sequence[str]]) -> None:
    """This command once for each share of the faults; they write into one list of trials, a run's lines at a time."""
    command = [sys.executable, "-m", "tests.chaos", *_without_faults(sys.argv[1:]), "--side-by-side", "1"]
    running = [subprocess.Popen([*command, *(f"--fault={name}" for name in share)]) for share in shares]
    for process in running:
        process.wait()


def _without_faults(arguments: Sequence[str]) -> list[str]:
    left, skips = [], False
    for argument in arguments:
        if not skips and not argument.startswith("--fault="):
            skips = argument == "--fault"
            left += [] if skips else [argument]
        else:
            skips = False
    return left


if __name__ == "__main__":
    sys.exit(main())
