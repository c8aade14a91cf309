"""kill -9 of the process that owns chDB, after any insert and in the middle of one: what is there in the end is exact."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.billing.ledgers import Ledger, batch, tenants_in, usage

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

TENANT = tenants_in(1)[0]
BATCHES, EVENTS = 20, 300
ROOT = Path(__file__).parents[2]


def records_file(path: Path) -> Path:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(TENANT)
    for number in range(BATCHES):
        ledger.usage(batch([usage(f"r{number}-{index}", TENANT) for index in range(EVENTS)], "p", 1, 1))
    path.write_bytes(b"".join(len(stored).to_bytes(4, "big") + stored for stored in ledger.stored))
    return path


def command(folder: Path, records: Path, crash: str) -> list[str]:
    return [sys.executable, "-m", "tests.sinks.sink_process", str(folder), str(records), crash]


def run(folder: Path, records: Path, crash: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, records, crash), capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


def finish(folder: Path, records: Path) -> dict[str, Any]:
    done = run(folder, records, "no")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check(answer: dict[str, Any]) -> None:
    assert answer["findings"] == []
    assert answer["events"] == answer["rows"] == BATCHES * EVENTS
    assert answer["cost"] == answer["spend"] == BATCHES * EVENTS * (100 * 10_000 + 10 * 40_000)


def test_kill9_after_each_kind_of_insert(tmp_path: Path) -> None:
    """A batch here is up to eight inserts, the position last; the next start goes on from what the crash left."""
    records = records_file(tmp_path / "records")
    landed = 0
    for inserts in (2, 4, 5, 7):
        crashed = run(tmp_path / "chdb", records, str(inserts))
        landed += crashed.returncode == -signal.SIGKILL
    assert landed == 4, "every crash must have happened in the middle of the work"
    check(finish(tmp_path / "chdb", records))


def test_kill9_at_random_moments(tmp_path: Path) -> None:
    records = records_file(tmp_path / "records")
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    landed = 0
    for _ in range(4):
        process = subprocess.Popen(
            command(tmp_path / "chdb", records, "wait"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        threading.Event().wait(moments.uniform(0.0, 0.25))
        process.kill()
        landed += process.stdout.read() == ""
        process.stdout.close()
        process.wait(60)
    assert landed, f"no kill landed before the end (seed {seed})"
    check(finish(tmp_path / "chdb", records))


def test_the_wrong_order_of_inserts_would_be_noticed(tmp_path: Path) -> None:
    """The negative control: with the position written first, a crash loses rows, and the audit says so."""
    records = records_file(tmp_path / "records")
    crashed = run(tmp_path / "chdb", records, "position-first:2")
    assert crashed.returncode == -signal.SIGKILL
    answer = finish(tmp_path / "chdb", records)
    assert answer["findings"]
