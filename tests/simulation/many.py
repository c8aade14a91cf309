"""Many seeds on all cores; what became of each is told by its `Report` or by what failed."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.simulation.loop import Violation
from tests.simulation.world import Report, run

__all__ = ["attempt", "attempt_all"]


def attempt(seed: int) -> Report | str:
    """A run's report, or what failed."""
    try:
        return run(seed)
    except Violation as violation:
        return str(violation)
    except Exception:  # noqa: BLE001  a run that breaks the simulator is a finding too
        return f"seed {seed}: {traceback.format_exc()}"


def attempt_all(seeds: Iterable[int], processes: int) -> Iterator[Report | str]:
    """In the seeds' order."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(attempt, seeds, chunksize=4)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
