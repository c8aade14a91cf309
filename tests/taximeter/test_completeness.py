"""Loss and silence as an operator meets them: a real `up`, real journals, one of which lost rows."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from billing.v1.usage_pb2 import UsageEvent
from producers.meter import UsageMeter
from producers.publisher import Publisher
from sinks.completeness import completeness
from taximeter import health
from taximeter.compose import meter_settings, open_reader, publisher_settings
from taximeter.config import load
from taximeter.times import now_ms
from tests.producers.support import journaled, usage_event
from tests.taximeter.support import ROOT, Up, environment, until

if TYPE_CHECKING:
    from pathlib import Path

    from sinks.completeness import CompletenessReport
    from taximeter.config import Config

pytestmark = pytest.mark.timeout(900)

GRACE_S, SILENCE_S = 1, 4
# A producer that dies after its heartbeat, as under kill -9.
_KILLED = """
import sys, time
from pathlib import Path
from producers.meter import UsageMeter
from producers.publisher import Publisher
from taximeter.compose import meter_settings, publisher_settings
from taximeter.config import load
config = load(Path(sys.argv[1]), ())
meter = UsageMeter(meter_settings(config, Path(sys.argv[2])))
Publisher(meter.journal, publisher_settings(config)).start()
print(meter.journal.producer_id, flush=True)
time.sleep(600)
"""


def event(number: int) -> UsageEvent:
    made = usage_event(number, tenant_id="acme")
    made.started_ms, made.ended_ms = now_ms() - 500, now_ms()
    return made


def lose(config: Config, folder: Path) -> tuple[str, int, dict[int, str]]:
    """Usage that was numbered and leaves the journal unsent: its producer, its partition, and the request of each number."""
    folder.mkdir()
    meter = UsageMeter(meter_settings(config, folder / "usage.journal"))
    for number in range(12):
        # Each is a commit, and a row, of its own.
        meter.record(event(number)).durable(10)
    producer_id = meter.journal.producer_id
    [(partition, held)] = journaled(meter.journal).items()
    meter.close()
    with sqlite3.connect(folder / "usage.journal") as journal:
        gone = journal.execute("DELETE FROM segments WHERE first_sequence BETWEEN 5 AND 7").rowcount
    assert gone == 3
    meter = UsageMeter(meter_settings(config, folder / "usage.journal"))
    publisher = Publisher(meter.journal, publisher_settings(config))
    publisher.start()
    publisher.close()
    meter.close()
    return producer_id, partition, {sequence: one.request_id for sequence, one in held.items()}


def audited(up: Up, expected: int = 0) -> Any:
    return up.json("audit", "--completeness", expected=expected)


def seen(config: Config) -> CompletenessReport:
    with open_reader(config) as reader:
        return completeness(reader)


def test_a_loss_is_named_with_its_neighbours_and_silence_is_told_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    flags = (f"ledger.missing_grace_seconds={GRACE_S}", f"ledger.producer_silence_seconds={SILENCE_S}")
    with Up(tmp_path / "data", *flags) as up:
        running = up.data_dir.running()
        assert running is not None
        config = load(running.config_path, ())
        with subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(running.config_path), str(tmp_path / "killed.journal")],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as killed:
            assert killed.stdout is not None
            silent_id = killed.stdout.readline().strip()
            # Its heartbeat is in the ledger.
            until(lambda: seen(config).producers == 1, what="the heartbeat")
            os.kill(killed.pid, signal.SIGKILL)
        until(lambda: seen(config).silent, what="the silence")
        report = audited(up)
        assert report["missing"] == []
        assert [producer["producer_id"] for producer in report["silent"]] == [silent_id]
        assert f"start {silent_id}" in report["silent"][0]["do"]

        lost_id, partition, requests = lose(config, tmp_path / "lost")
        until(lambda: seen(config).incomplete, what="the loss")

        def raised() -> list[dict[str, Any]]:
            return [alert for alert in up.json("alerts") if alert["rule"] == "missing_sequence"]

        # The ledger looks every few seconds of its own time.
        until(raised, what="the alert")
        [alert] = raised()
        assert (alert["labels"]["producer_id"], alert["figures"]["partition"]) == (lost_id, partition)
        assert "numbers 5-7" in alert["summary"]
        assert "taximeter audit --completeness" in alert["summary"]

        report = audited(up, expected=1)
        [hole] = report["missing"]
        assert (hole["producer_id"], hole["partition"], hole["first"], hole["last"]) == (lost_id, partition, 5, 7)
        assert (hole["before"]["sequence"], hole["before"]["request_id"]) == (4, requests[4])
        assert (hole["after"]["sequence"], hole["after"]["request_id"]) == (8, requests[8])
        assert hole["before"]["arrived"] <= hole["since"] <= hole["after"]["arrived"]
        assert [producer["producer_id"] for producer in report["silent"]] == [silent_id]
        said = up.run("audit", "--completeness", expected=1)
        assert "5-7" in said
        assert requests[4] in said
        assert f"start {lost_id} on its journal" in said
        check = health._producers(config)
        assert (check.state, check.detail) == (health.State.ILL, f"{lost_id} partition {partition}: 3 missing")
        assert "taximeter audit --completeness" in check.mend
