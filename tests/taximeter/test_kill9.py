"""The Azure trace through a real installation, with kill -9 of the replaying producer, the ledger worker and the sink.

Every trial replays the trace at another start, so its events are its own, and looks at that day alone: the counts
must be the file's, to the token. A trial whose kill did not land in the middle does not count as one.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import pytest

from taximeter.traces import Trace, read_trace
from tests.taximeter.support import Up, azure_trace, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

SEED: Final = 20_231_116
TENANTS: Final = 50
# The whole trace in about six seconds, so that there is a middle to hit.
SPEED: Final = 600
# In about twenty-four, where the kill waits for the first of it to be seen, which takes a loaded machine a while.
SLOW_SPEED: Final = 150
TRIALS: Final = ("producer", "worker", "sink", "worker", "producer")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(azure_trace())


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up(tmp_path_factory.mktemp("kill9")) as running:
        yield running


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


@pytest.mark.parametrize("trial", range(len(TRIALS)))
def test_a_kill_in_the_middle_changes_nothing(up: Up, trace: Trace, trial: int) -> None:
    target = TRIALS[trial]
    draw = random.Random(SEED + trial)
    start = day(2 + trial)
    arguments: list[str | Path] = [
        "replay",
        azure_trace(),
        "--tenants",
        str(TENANTS),
        "--start",
        start.isoformat(),
        "--speed",
        str(SPEED),
    ]
    replay = up.start(*arguments)
    began_at = up.data_dir.path / "replays"
    until(lambda: list(began_at.glob(f"*-{int(start.timestamp()) * 1_000}-*/journal.sqlite")), what="the replay's start")
    time.sleep(draw.uniform(1.0, 4.0))
    assert replay.poll() is None, "the replay was over before the kill"
    if target == "producer":
        os.killpg(replay.pid, signal.SIGKILL)
        replay.wait()
        up.run(*arguments[:-2])
    else:
        up.kill9(target)
        assert replay.wait(300) == 0
    until(lambda: counted(up, start) == expected(trace), what=f"the trace's sums after killing the {target}")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the parts with their supervisor")
@pytest.mark.parametrize("trial", range(2))
def test_a_kill_of_everything_at_once_changes_nothing(up: Up, trace: Trace, trial: int) -> None:
    draw = random.Random(SEED + 100 + trial)
    start = day(10 + trial)
    arguments: list[str | Path] = ["replay", azure_trace(), "--tenants", str(TENANTS), "--start", start.isoformat()]
    before = {row["tenant_id"]: row["spend"] for row in up.json("balance")}
    replay = up.start(*arguments, "--speed", str(SLOW_SPEED))
    until(lambda: counted(up, start)[0] > 0, what="the first of the trace")
    time.sleep(draw.uniform(0.5, 2.0))
    assert replay.poll() is None, "the replay was over before the kill"
    os.killpg(replay.pid, signal.SIGKILL)
    replay.wait()
    up.kill9_all()
    up.revive()
    landed = counted(up, start)[0]
    assert 0 < landed < len(trace.rows), "the kill did not land in the middle"
    assert {row["tenant_id"] for row in up.json("balance")} >= set(before)
    up.run(*arguments)
    until(lambda: counted(up, start) == expected(trace), what="the trace's sums after killing everything")


def test_the_same_start_again_is_all_duplicates(up: Up, trace: Trace) -> None:
    start = day(20)
    arguments: list[str | Path] = ["replay", azure_trace(), "--tenants", str(TENANTS), "--start", start.isoformat()]
    up.run(*arguments)
    until(lambda: counted(up, start) == expected(trace), what="the trace's sums")
    before = duplicates(up)
    up.run(*arguments)
    until(lambda: duplicates(up) - before == len(trace.rows), what="as many duplicates as requests")
    assert counted(up, start) == expected(trace)


def test_the_books_agree_after_all_of_that(up: Up) -> None:
    assert up.json("audit")["findings"] == []
