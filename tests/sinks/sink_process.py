"""A sink in a process of its own that a test kills: feeds a file of records to chDB, then prints what the audit says.

Arguments: a folder, a file of length-prefixed records, and a crash: "no"; "wait" (prints a line, is killed from outside);
N: kill -9 right after the N-th insert; "position-first:N" breaks the order of inserts on purpose, to show that a test would
notice.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

from sinks import queries
from sinks.audit import audit
from sinks.columns import Accepted
from sinks.engine import Columns, Table
from sinks.engines.chdb import ChdbEngine
from sinks.follow import Follower
from sinks.migrate import migrate
from sinks.tables import SINK_POSITIONS
from sinks.writer import Writer
from tests.billing.ledgers import KEYS

RECORDS_PER_BATCH = 4


class Crashing:
    """The engine, in a process that dies after a number of inserts."""

    def __init__(self, engine: ChdbEngine, inserts: int, *, position_first: bool) -> None:
        self.engine = engine
        self.left = inserts
        self.position_first = position_first
        self.held: list[tuple[Table, Columns]] = []
        self.query = engine.query
        self.execute = engine.execute
        self.close = engine.close

    def insert(self, table: Table, columns: Columns) -> int:
        if not self.position_first:
            return self._insert(table, columns)
        self.held.append((table, columns))
        if table is SINK_POSITIONS:
            for held in reversed(self.held):
                self._insert(*held)
            self.held = []
        return 0

    def _insert(self, table: Table, columns: Columns) -> int:
        rows = self.engine.insert(table, columns)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows


def read_records(path: Path) -> list[bytes]:
    content = path.read_bytes()
    records, place = [], 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        records.append(content[place + 4 : place + 4 + size])
        place += 4 + size
    return records


def main(folder: str, records: str, crash: str) -> None:
    engine = ChdbEngine(Path(folder))
    migrate(engine)
    mode, _, number = crash.rpartition(":")
    crashing = Crashing(engine, int(number) if number.isdecimal() else -1, position_first=mode == "position-first")
    writer = Writer(crashing)
    follower = Follower(1, writer.positions().get(1), KEYS.seal_key)
    if crash == "wait":
        print("ready", flush=True)
    accepted = (follower.accept(stored) for stored in read_records(Path(records)))
    batch: list[Accepted]
    todo = (entry for entry in accepted if entry is not None)
    while batch := list(itertools.islice(todo, RECORDS_PER_BATCH)):
        writer.write(batch)
    report = audit(engine, KEYS.seal_key)
    totals = queries.totals(engine)
    print(
        json.dumps(
            {
                "findings": [finding.kind for finding in report.findings],
                "events": totals.events,
                "rows": queries.usage(engine, by=("tenant",))[0].events,
                "cost": totals.cost_pico["USD"],
                "spend": totals.spend_pico["USD"],
                "records": report.records,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
