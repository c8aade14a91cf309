"""On Apache Kafka: a broker's disk loses the end of the ledger. Nobody goes on as if it had not been there."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from billing.v1.account_pb2 import Progress
from taximeter.embedded.process import Child
from tests.services.kafka import KafkaCluster
from tests.stream_processors.harness import ROOT, Ledger, event
from tests.stream_processors.worker_main import REFUSED, SEAL_KEY

pytestmark = [pytest.mark.timeout(900), pytest.mark.apache_kafka]

READERS = ("publisher", "sink/clickhouse")


def cut(folder: Path, offset: int) -> None:
    """Leave of a partition's log, whose broker was killed, the batches before `offset`: Kafka mends the rest when it starts."""
    [segment] = folder.glob("*.log")
    content = segment.read_bytes()
    size = 0
    while size < len(content):
        base, length = struct.unpack_from(">qi", content, size)
        if base >= offset:
            break
        size += 12 + length
    assert size < len(content), "nothing to cut"
    with segment.open("r+b") as file:
        file.truncate(size)


def refusal(ledger: Ledger, child: Child) -> str:
    ledger.wait(lambda: not child.alive, f"the refusal of {child.name}")
    assert child.exit_code == REFUSED, child.log_tail()
    return child.log_tail()


def is_taken_by_all(ledger: Ledger) -> bool:
    """Whether every reader says that it has passed all that there is."""
    marks = [Progress.FromString(value) for value in ledger.read(ledger.names.progress, 0)]
    passed = {mark.reader: mark.ledger_offset for mark in marks}
    return all(passed.get(reader, -1) == end(ledger) - 1 for reader in READERS)


def end(ledger: Ledger) -> int:
    return len(ledger.read(ledger.names.ledger, 0))


def test_a_ledger_that_lost_its_end_is_refused_by_a_worker_behind_it_and_by_readers_beyond(
    tmp_path: Path, apache_kafka_libs: Path
) -> None:
    cluster = KafkaCluster(tmp_path / "kafka", apache_kafka_libs, settings={"group.min.session.timeout.ms": "1000"})
    cluster.start()
    ledger = Ledger(cluster.bootstrap, tmp_path, partitions=1, quick_sessions=True)
    arguments = [ledger.bootstrap, ledger.prefix, str(tmp_path / "chdb"), SEAL_KEY.hex()]
    sink = Child(
        "sink", [sys.executable, "-m", "tests.sinks.loop_process", *arguments], log_path=tmp_path / "sink.log", cwd=ROOT
    )
    try:
        ledger.found()
        sink.start()
        # However long it is paused with a message on its way, that is not why it ends.
        publisher = ledger.worker("publisher", ledger=False, delivery_timeout_ms=900_000)
        worker = ledger.worker("one", publish=False)
        ledger.send([event(f"tenant-{number}") for number in range(20)])
        ledger.wait_charged()
        kept = end(ledger)
        for _ in range(4):
            ledger.send([event(f"tenant-{number}") for number in range(20)])
        ledger.wait_charged()
        worker.kill9()
        ledger.wait(lambda: is_taken_by_all(ledger), "both readers")
        # They are away for so long, and never hear of an end that is before theirs.
        publisher.pause()
        sink.pause()
        beyond = end(ledger)
        [node] = cluster.nodes
        node.process.kill9()
        cut(cluster.folder / "node-1" / "logs" / f"{ledger.names.ledger}-0", kept)
        cluster.start()
        assert end(ledger) == kept

        said = refusal(ledger, ledger.worker("new", publish=False))
        assert " has taken sequence " in said
        assert "acknowledged usage is missing. Restore the topic from its replicas or a backup" in said

        # A worker of a version that does not ask grows a fork, longer than what was cut.
        ledger.worker("old", publish=False, asks_readers=False)
        ledger.wait(lambda: end(ledger) > beyond + 2, "a fork")
        publisher.resume()
        said = refusal(ledger, publisher)
        assert "the reader publisher has taken sequence" in said
        assert "does not have that record" in said
        sink.resume()
        said = refusal(ledger, sink)
        assert "the log holds another record at generation" in said
        assert "keep the one that the ledger workers follow" in said
    finally:
        ledger.stop()
        sink.kill9()
        cluster.close()
