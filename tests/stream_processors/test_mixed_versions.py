"""An upgrade while it runs: workers and sinks of the version before, beside those of this one, on one ledger.

What no test can show for a version to come is held by a rule instead: who would lose a part of what a newer version wrote does
not go on (`test_ledger_host.py`, `test_local_store.py`). Gateways of both versions: `tests/taximeter/test_up.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from billing.v1.account_pb2 import Progress
from taximeter.embedded.process import Child
from tests.services.kafka import SharedKafka
from tests.services.version_before import tree_before
from tests.stream_processors.harness import ROOT, Ledger, event, finish
from tests.stream_processors.worker_main import SEAL_KEY

pytestmark = pytest.mark.timeout(900)

SINK = "sink/clickhouse"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the version before."""
    return tree_before(tmp_path_factory.mktemp("before"))


def sink(ledger: Ledger, name: str, tree: Path) -> Child:
    arguments = [ledger.bootstrap, ledger.prefix, str(ledger.folder / "chdb"), SEAL_KEY.hex()]
    command = [sys.executable, "-m", "tests.sinks.loop_process", *arguments]
    child = Child(f"sink {name}", command, log_path=ledger.folder / f"sink-{name}.log", cwd=tree)
    child.start()
    ledger.workers.append(child)
    return child


def writers(ledger: Ledger) -> set[int]:
    """The processes that wrote the last record of each partition."""
    return {int(log.records[-1].writer.split("/")[-2]) for log in ledger.logs()}


def send(ledger: Ledger) -> None:
    ledger.send([event(f"tenant-{number}") for number in range(20)])
    ledger.wait_charged()


def is_taken(ledger: Ledger) -> bool:
    """Whether the sink has every charge that there is now."""
    marks = [Progress.FromString(value) for number in range(2) for value in ledger.read(ledger.names.progress, number)]
    reached = {mark.partition: mark.position.sequence for mark in marks if mark.reader == SINK}
    ends = [max(r.sequence for r in log.records if r.WhichOneof("source") == "usage") for log in ledger.logs()]
    return all(reached.get(number, -1) >= end for number, end in enumerate(ends))


@pytest.mark.apache_kafka
def test_a_rolling_upgrade_charges_everything_once(apache_kafka: SharedKafka, before: Path, tmp_path: Path) -> None:
    """Worker and sink of before; a worker of now beside it; then that alone, and the sink of now takes the database over.

    Two workers are for Apache Kafka: see `test_ledger_app.py`.
    """
    ledger = Ledger(apache_kafka.bootstrap, tmp_path)
    ledger.found()
    try:
        old = ledger.worker("before", tree=before)
        old_sink = sink(ledger, "before", before)
        send(ledger)
        now = ledger.worker("now")
        ledger.wait(lambda: writers(ledger) == {old.pid, now.pid}, "both versions, a partition each")
        send(ledger)
        ledger.wait(lambda: is_taken(ledger), "the sink of before, on records of both")
        old_sink.kill9()
        sink(ledger, "now", ROOT)
        finish(old)
        ledger.wait(lambda: writers(ledger) == {now.pid}, "this version, both partitions")
        send(ledger)
        ledger.assert_exact()
        ledger.wait(lambda: is_taken(ledger), "the sink of now, on the database of before")
        assert [child.name for child in ledger.workers if not child.alive] == ["worker before", "sink before"]
    finally:
        ledger.stop()
