"""A shifted clock: seen by Python and by librdkafka, changed while a process runs, and no wait is longer for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.clock import ShiftedClock

DAY_S = 86_400.0
# Says what its clocks show, then again for each line that it is sent. The producer's wait is one in C.
SCRIPT = """
import json, sys, threading, time
from confluent_kafka import Producer
for _ in sys.stdin:
    began, wall_began = time.monotonic(), time.time()
    producer = Producer({"bootstrap.servers": "127.0.0.1:1", "message.timeout.ms": 300, "log_level": 0})
    producer.produce("nowhere", b"")
    left = producer.flush(100)
    threading.Event().wait(0.1)
    took, wall_took = time.monotonic() - began, time.time() - wall_began
    print(json.dumps([time.time(), took, wall_took, left]), flush=True)
"""


@pytest.mark.parametrize("shift_s", [DAY_S, -DAY_S])
def test_a_process_has_another_time_and_waits_as_long_as_it_should(tmp_path: Path, shift_s: float) -> None:
    clock = ShiftedClock(tmp_path, shift_s)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **clock.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for expected_s in (shift_s, 0.0):
            clock.shift(expected_s)
            process.stdin.write("\n")
            process.stdin.flush()
            shown_s, took_s, wall_took_s, left = json.loads(process.stdout.readline())
            # A busy machine may stop a process between two looks at a clock; a shift that is seen is of a day.
            assert shown_s - time.time() == pytest.approx(expected_s, abs=120.0)
            assert wall_took_s == pytest.approx(took_s, abs=30.0)
            assert left == 0, "the message timed out by its own clock"
            assert 0.3 < took_s < 90.0
        process.stdin.close()
        assert process.wait(60) == 0
