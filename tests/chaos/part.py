"""One part of the product, started as its own command starts it, that kills or stops itself at a named point when told to.

`python -m tests.chaos.part --trigger FILE --marks FILE -- worker --config ...` wraps functions around the product's own and
then runs the command line. Nothing of it is a switch in the product. While FILE is there (JSON: `point`, `after`, `action`) the
process counts how often it comes to that point with usage in its hands; at the next one after so many it takes FILE away,
writes what it was about to do into the marks, synced, and sends itself SIGKILL or SIGSTOP.

    worker   before-produce       the step is done, its record is not sent
             after-produce        Kafka has the record, the host has not heard of it
             before-local-write   acknowledged and compared, not in the local store
             before-offset        in the local store, its input not acknowledged to Faust
    sink     before-insert        a batch with usage is ready, nothing of it inserted
             between-inserts      some tables of it are inserted, others are not
             before-position      every table is inserted, the position is not
             after-position       the position is inserted, nobody was told
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sinks.migrate
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import RawUsageBatch
from sinks.engine import Columns, Engine, Table
from sinks.tables import SINK_POSITIONS, USAGE_EVENTS
from sinks.writer import Position, Prepared, Writer
from stream_processors.kafka_ports import KafkaLogWriter
from stream_processors.local_store import Acknowledged, LocalStore
from taximeter.cli import main

__all__ = ["SINK_POINTS", "WORKER_POINTS"]

WORKER_POINTS: Final = ("before-produce", "after-produce", "before-local-write", "before-offset")
SINK_POINTS: Final = ("before-insert", "between-inserts", "before-position", "after-position")


@dataclass
class Points:
    """The points of this process."""

    trigger: Path
    marks: Path
    passed: int = 0

    def reached(self, point: str, about: Callable[[], dict[str, object] | None]) -> None:
        """`about` says what is at stake here; None: nothing is, and this passing does not count."""
        try:
            wanted = json.loads(self.trigger.read_text())
        except FileNotFoundError:
            return
        if wanted["point"] != point or (stake := about()) is None:
            return
        self.passed += 1
        if self.passed <= wanted["after"]:
            return
        self.passed = 0
        try:
            self.trigger.unlink()
        except FileNotFoundError:
            # It was told to forget it.
            return
        with self.marks.open("a") as file:
            file.write(json.dumps({"point": point, "pid": os.getpid(), **stake}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGSTOP if wanted["action"] == "stop" else signal.SIGKILL)


def _usage_in(record: LedgerRecord) -> int:
    if record.WhichOneof("source") != "usage":
        return 0
    return len(RawUsageBatch.FromString(record.usage.batch).events) - len(record.usage.dropped)


def _stake(records: Sequence[LedgerRecord]) -> dict[str, object] | None:
    events = sum(map(_usage_in, records))
    if not events:
        return None
    last = records[-1]
    return {"events": events, "partition": last.partition, "sequence": last.sequence, "writer": last.writer}


def wrap_worker(points: Points) -> None:
    """Around the worker's way to the log and to its local store."""
    write, apply = KafkaLogWriter.write, LocalStore.apply

    @functools.wraps(write)
    def writing(
        self: KafkaLogWriter,
        topic: str,
        partition: int,
        value: bytes | None,
        on_done: Callable[[int, str], None],
        *rest: Any,
        **more: Any,
    ) -> None:
        if value is None or not topic.endswith("usage.ledger"):
            write(self, topic, partition, value, on_done, *rest, **more)
            return
        stored = value

        def stake() -> dict[str, object] | None:
            return _stake([LedgerRecord.FromString(stored)])

        def done(offset: int, problem: str) -> None:
            if not problem:
                points.reached("after-produce", stake)
            on_done(offset, problem)

        points.reached("before-produce", stake)
        write(self, topic, partition, value, done, *rest, **more)

    @functools.wraps(apply)
    def applying(self: LocalStore, records: Sequence[Acknowledged]) -> None:
        def stake() -> dict[str, object] | None:
            return _stake([each.record for each in records])

        points.reached("before-local-write", stake)
        apply(self, records)
        points.reached("before-offset", stake)

    KafkaLogWriter.write = writing  # type: ignore[method-assign]
    LocalStore.apply = applying  # type: ignore[method-assign]


def wrap_sink(points: Points, engine: type[Engine]) -> None:
    """Around the sink's batches and each insert of them."""
    store, insert = Writer.store, engine.insert
    batch = threading.local()

    @functools.wraps(store)
    def storing(self: Writer, prepared: Prepared) -> dict[int, Position]:
        batch.tables = [table.name for table, _ in prepared.inserts]
        batch.done = []
        return store(self, prepared)

    @functools.wraps(insert)
    def inserting(self: Engine, table: Table, columns: Columns) -> int:
        def stake() -> dict[str, object] | None:
            if USAGE_EVENTS.name not in batch.tables:
                return None
            return {"inserted": list(batch.done), "of": [*batch.tables, SINK_POSITIONS.name]}

        is_position = table is SINK_POSITIONS
        if not batch.done:
            points.reached("before-insert", stake)
        elif is_position:
            points.reached("before-position", stake)
        else:
            points.reached("between-inserts", stake)
        rows = insert(self, table, columns)
        batch.done.append(table.name)
        if is_position:
            points.reached("after-position", stake)
        return rows

    Writer.store = storing  # type: ignore[method-assign]
    engine.insert = inserting  # type: ignore[method-assign]


def _run(arguments: Any) -> None:
    points = Points(arguments.trigger, arguments.marks)
    command = [word for word in arguments.command if word != "--"]
    if command[0] == "worker":
        wrap_worker(points)
    elif command[0] == "sink":
        from sinks.engines.server import ServerEngine

        wrap_sink(points, ServerEngine)
        # The fixture has made the tables as the old server can have them: see tests/sinks/old_server.py.
        sinks.migrate.pending = lambda *_: []
    sys.argv = ["taximeter", *command]
    main()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trigger", type=Path, required=True)
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    _run(parser.parse_args())
