"""The Azure trace as real requests through the gateway, with kill -9 of the gateway in the middle.

Each request that was answered is billed once, with the counts that its back end reported; each that was cut off is
billed for what had been delivered, and its row is sent again. So the completed requests are the trace, to the token.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from taximeter.traces import Trace, read_trace
from tests.taximeter.support import Up, azure_trace, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

SEED: Final = 20_231_116
KILLS: Final = 2
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


def test_a_killed_gateway_bills_every_request_of_the_trace_once(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    trace: Trace = read_trace(azure_trace())
    with Up(tmp_path / "data", LINGER, gateway=True) as up:
        arguments = ("--tenants", "5", "--through", "gateway", "--concurrency", CONCURRENCY, "--start", "2h")
        replay = up.start("replay", azure_trace(), *arguments)
        attempts = tmp_path / "data" / "replays"
        until(lambda: list(attempts.glob("*/attempts.jsonl")), what="the first request")
        for _ in range(KILLS):
            time.sleep(draw.uniform(3.0, 8.0))
            assert replay.poll() is None, "the replay was over before the kill"
            up.kill9("gateway")
        assert replay.wait(600) == 0, (tmp_path / "data" / "started.log").read_text()
        expected = len(trace.rows), trace.context_tokens, trace.generated_tokens
        until(lambda: completed(up, 5) == expected, what=f"{expected} completed")
        assert up.json("audit")["findings"] == []
