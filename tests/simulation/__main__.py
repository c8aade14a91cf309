"""`python -m tests.simulation`: run seeds, say what they went through, end with 1 if one fails.

--seed 123              one run, told in full
--seeds 500 --from 0    many, on all cores
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter

from tests.simulation.many import attempt, attempt_all

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--go-on", action="store_true", help="past failing seeds")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stdout)
        logging.getLogger("tests.simulation").setLevel(logging.DEBUG)
        outcome = attempt(arguments.seed)
        print(outcome)
        return int(isinstance(outcome, str))
    began = time.monotonic()
    faults: Counter[str] = Counter()
    seeds = charged = failed = 0
    for outcome in attempt_all(range(arguments.first, arguments.first + arguments.seeds), arguments.processes):
        seeds += 1
        if isinstance(outcome, str):
            failed += 1
            print(outcome, flush=True)
            if not arguments.go_on:
                break
        else:
            faults += outcome.faults
            charged += outcome.charged
    minutes = (time.monotonic() - began) / 60
    for fault, count in sorted(faults.items()):
        print(f"{count:>8}  {fault}")
    print(f"{seeds} seeds, {failed} failed, {charged} events charged, {seeds / minutes:.0f} seeds a minute")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
