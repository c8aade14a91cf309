"""The Azure trace as real requests through the gateway, with kill -9 of the gateway in the middle.

Each request that was answered is billed once, with the counts that its back end reported; each that was cut off is
billed for what had been delivered, and its row is sent again. So the completed requests are the trace, to the token.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any, Final

import pytest

from taximeter.traces import Trace, read_trace
from tests.taximeter.support import Up, azure_trace, until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

SEED: Final = 20_231_116
# Of the trace's rows, how many are answered when the gateway is killed: drawn between these.
KILLED_AT: Final = ((0.05, 0.3), (0.35, 0.6))
# One that was over before its kill, because this process was stopped meanwhile, is followed by another.
REPLAYS_MAX: Final = 3
# No answer waits for Kafka, so batches may be larger: what a ledger record costs dominates where each holds a few events. And
# more is left in the journal of a gateway that is killed, as more is cut off where more is asked at once.
LINGER: Final = "producer.linger_ms=5000"
CONCURRENCY: Final = "128"


def completed(up: Up, tenants: int) -> tuple[int, int, int]:
    found = [0, 0, 0]
    for number in range(tenants):
        rows: list[dict[str, Any]] = up.json("usage", f"trace-tenant-{number:04d}", "--by", "outcome")
        for row in rows:
            if row["outcome"] == "completed":
                found[0] += row["requests"]
                found[1] += row["uncached_input_tokens"]
                found[2] += row["output_tokens"]
    return found[0], found[1], found[2]


def answered(up: Up) -> int:
    """Rows of the replay that runs."""
    found = 0
    for path in (up.data_dir.path / "replays").glob("*/attempts.jsonl"):
        # It takes the file away when it is over.
        with contextlib.suppress(FileNotFoundError):
            found += path.read_text().count('"answered"')
    return found


def started(up: Up, number: int) -> subprocess.Popen[bytes]:
    """The trace at another time: other requests."""
    arguments = ("--tenants", "5", "--through", "gateway", "--concurrency", CONCURRENCY, "--start", f"{2 + number}h")
    return up.start("replay", azure_trace(), *arguments)


def test_a_killed_gateway_bills_every_request_of_the_trace_once(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    trace: Trace = read_trace(azure_trace())
    with Up(tmp_path / "data", LINGER, gateway=True) as up:
        replays = [started(up, 0)]
        for least, most in KILLED_AT:
            rows = int(draw.uniform(least, most) * len(trace.rows))
            while True:
                until(lambda rows=rows: answered(up) >= rows or replays[-1].poll() is not None, what=f"{rows} answers")  # type: ignore[misc]
                if replays[-1].poll() is None:
                    break
                assert replays[-1].returncode == 0, (tmp_path / "data" / "started.log").read_text()
                assert len(replays) < REPLAYS_MAX, "the replays were over before the kill"
                replays.append(started(up, len(replays)))
            up.kill9("gateway")
        assert replays[-1].wait(600) == 0, (tmp_path / "data" / "started.log").read_text()
        expected = tuple(len(replays) * sum_ for sum_ in (len(trace.rows), trace.context_tokens, trace.generated_tokens))
        until(lambda: completed(up, 5) == expected, what=f"{expected} completed")
        assert up.json("audit")["findings"] == []
