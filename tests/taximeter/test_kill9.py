"""The Azure trace through a real installation, with kill -9 of the replaying producer, the ledger worker and the sink.

Every trial replays the trace at another start, so its events are its own, and looks at that day alone: the counts
must be the file's, to the token. A trial whose kill did not land in the middle does not count as one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest

from taximeter.traces import Trace, read_trace
from tests.taximeter.support import Up, azure_trace, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

SEED: Final = 20_231_116
TENANTS: Final = 50
# The whole trace in about six seconds, so that there is a middle to hit.
SPEED: Final = 600
# In about twenty-four, where the kill waits for the first of it to be seen, which takes a loaded machine a while.
SLOW_SPEED: Final = 150
# Batches, and so ledger records, as a loaded installation has them: with the default each would hold a dozen events.
LINGER: Final = "producer.linger_ms=250"
TRIALS: Final = ("producer", "worker", "sink", "worker", "producer")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(azure_trace())


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("kill9"), LINGER) as running:
        yield running


# A kill that met a replay that was over, on a machine that was busy elsewhere, is made again with another.
ATTEMPTS_MAX: Final = 3
# Once: each trial has a day of its own, over midnight too.
TODAY: Final = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def day(days_ago: int) -> datetime:
    return TODAY - timedelta(days=days_ago)


def counted(up: Up, start: datetime) -> tuple[int, int, int]:
    end = start + timedelta(days=1)
    rows: list[dict[str, Any]] = up.json("usage", "--by", "model", "--start", start.isoformat(), "--end", end.isoformat())
    return (
        sum(row["requests"] for row in rows),
        sum(row["uncached_input_tokens"] for row in rows),
        sum(row["output_tokens"] for row in rows),
    )


def expected(trace: Trace) -> tuple[int, int, int]:
    return len(trace.rows), trace.context_tokens, trace.generated_tokens


def duplicates(up: Up) -> int:
    return sum(row["duplicates"] for row in up.json("balance"))


def replay_from(start: datetime) -> list[str | Path]:
    return ["replay", azure_trace(), "--tenants", str(TENANTS), "--start", start.isoformat()]


def begun(up: Up, draw: random.Random, trial: int) -> tuple[datetime, subprocess.Popen[bytes]]:
    """A replay in its middle, and the day that is its own."""
    for attempt in range(ATTEMPTS_MAX):
        start = day(1 + len(TRIALS) * attempt + trial)
        journal = f"*-{int(start.timestamp()) * 1_000}-*/journal.sqlite"
        replay = up.start(*replay_from(start), "--speed", str(SPEED))
        until(partial(seen, up, journal), what="the replay's start")
        # It takes six seconds from here; a test that is stopped meanwhile is still in time.
        time.sleep(draw.uniform(0.5, 3.0))
        if replay.poll() is None:
            return start, replay
        assert replay.returncode == 0, "it failed by itself"
    raise AssertionError(f"{ATTEMPTS_MAX} replays were over before the kill")


def seen(up: Up, pattern: str) -> bool:
    return any((up.data_dir.path / "replays").glob(pattern))


@pytest.mark.parametrize("trial", range(len(TRIALS)))
def test_a_kill_in_the_middle_changes_nothing(up: Up, trace: Trace, trial: int) -> None:
    target = TRIALS[trial]
    draw = random.Random(SEED + trial)
    start, replay = begun(up, draw, trial)
    if target == "producer":
        os.killpg(replay.pid, signal.SIGKILL)
        replay.wait()
        up.run(*replay_from(start))
    else:
        up.kill9(target)
        assert replay.wait(800) == 0
    until(lambda: counted(up, start) == expected(trace), what=f"the trace's sums after killing the {target}")


def some(up: Up, start: datetime) -> bool:
    return counted(up, start)[0] > 0


def complete(up: Up, trace: Trace, start: datetime) -> bool:
    return counted(up, start) == expected(trace)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the parts with their supervisor")
@pytest.mark.parametrize("trial", range(2))
def test_a_kill_of_everything_at_once_changes_nothing(up: Up, trace: Trace, trial: int) -> None:
    draw = random.Random(SEED + 100 + trial)
    # Behind the days of the trials above.
    starts = [day(16 + 2 * attempt + trial) for attempt in range(ATTEMPTS_MAX)]
    for start in starts:
        before = {row["tenant_id"]: row["spend"] for row in up.json("balance")}
        replay = up.start(*replay_from(start), "--speed", str(SLOW_SPEED))
        until(partial(some, up, start), what="the first of the trace")
        time.sleep(draw.uniform(0.5, 2.0))
        os.killpg(replay.pid, signal.SIGKILL)
        replay.wait()
        up.kill9_all()
        up.revive()
        landed = counted(up, start)[0]
        assert {row["tenant_id"] for row in up.json("balance")} >= set(before)
        if 0 < landed < len(trace.rows):
            up.run(*replay_from(start))
            until(partial(complete, up, trace, start), what="the trace's sums after killing everything")
            return
    raise AssertionError(f"{ATTEMPTS_MAX} kills did not land in the middle")


def test_the_same_start_again_is_all_duplicates(up: Up, trace: Trace) -> None:
    start = day(30)
    up.run(*replay_from(start))
    until(lambda: counted(up, start) == expected(trace), what="the trace's sums")
    before = duplicates(up)
    up.run(*replay_from(start))
    until(lambda: duplicates(up) - before == len(trace.rows), what="as many duplicates as requests")
    assert counted(up, start) == expected(trace)


def test_the_books_agree_after_all_of_that(up: Up) -> None:
    assert up.json("audit")["findings"] == []
