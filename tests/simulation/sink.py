"""The sink: the real `Follower`, columns and `Writer` over tables in memory that replace rows by key and version.

A sink dies between any two of its inserts, and in the middle of none: an insert is atomic, as one of ClickHouse's is. It goes
on from the position that the database holds, at the record with that hash (as `sinks.locate` does with Kafka).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from billing.chain import record_hash
from sinks.columns import Accepted
from sinks.engine import Columns, Parameter, Rows, Table, row_count
from sinks.follow import Follower
from sinks.tables import ACCOUNTS, ALERTS, LEDGER_RECORDS, SINK_POSITIONS, USAGE_EVENTS, USAGE_TOTALS
from sinks.writer import Position, Writer
from tests.simulation.loop import PROCESS, Process
from tests.simulation.workers import KEYS, TOPICS

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["Database", "Sink"]

# ORDER BY of each table that is looked at, as in the schema.
_KEYS = {
    USAGE_EVENTS: ("tenant_id", "request_id"),
    USAGE_TOTALS: (
        "tenant_id",
        "minute",
        "project_id",
        "model",
        "operation",
        "service_class",
        "ledger_partition",
        "generation",
        "opened_sequence",
        "price_version",
    ),
    ACCOUNTS: ("tenant_id",),
    ALERTS: ("tenant_id", "alert_id"),
    LEDGER_RECORDS: ("ledger_partition", "generation_ordinal", "sequence"),
    SINK_POSITIONS: ("ledger_partition",),
}

Row = dict[str, object]


class Database:
    """ReplacingMergeTree in memory; an `Engine` that answers for its positions, and knows no erasure. It outlives the sink."""

    def __init__(self) -> None:
        self.tables: dict[Table, dict[tuple[object, ...], Row]] = {table: {} for table in _KEYS}
        self.inserts = 0

    def insert(self, table: Table, columns: Columns) -> int:
        process = PROCESS.get()
        if process is not None and not process.write_to_disk():
            return 0
        self.inserts += 1
        names = _KEYS.get(table)
        if names is not None:
            rows = self.tables[table]
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                key = tuple(row[name] for name in names)
                before = rows.get(key)
                if before is None or _version(row) >= _version(before):
                    rows[key] = row
        return row_count(table, columns)

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        if "FROM erasures FINAL" in sql:
            return Rows(("tenant_id", "user_digest", "pseudonym", "key_ids"), [])
        assert "FROM sink_positions FINAL" in sql
        names = ("ledger_partition", "generation", "generation_ordinal", "sequence", "record_hash", "ledger_offset")
        rows = self.tables[SINK_POSITIONS].values()
        # The ordinal stands in the version, above the sequence.
        found = [tuple(_version(row) >> 40 if name == "generation_ordinal" else row[name] for name in names) for row in rows]
        return Rows(names, sorted(found, key=lambda row: str(row[0])))

    def execute(self, sql: str) -> None:
        raise AssertionError(sql)

    def close(self) -> None:
        """It is kept."""


def _version(row: Row) -> int:
    version = row.get("version", 0)
    assert isinstance(version, int)
    return version


class Sink:
    """One incarnation of the sink."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.process = Process(world.loop, f"sink/{number}")
        self.ignored = 0

    def start(self) -> None:
        writer = Writer(self.world.database, now_ms=lambda: 0)
        positions = writer.positions()
        for partition in range(self.world.partitions):
            self.process.start(self._follow(writer, partition, positions.get(partition)))

    async def _follow(self, writer: Writer, partition: int, position: Position | None) -> None:
        world = self.world
        follower = Follower(partition, position, KEYS.seal_key)
        log = world.broker.log(TOPICS.ledger, partition)
        read = 0
        while position is not None:
            # A log that was cut comes back.
            at = position.ledger_offset
            if at < len(log) and record_hash(log[at][1]) == position.record_hash:
                read = at + 1
                break
            await asyncio.sleep(0.5)
        while True:
            await world.broker.more_than(TOPICS.ledger, partition, read)
            await asyncio.sleep(world.choices.random() * 0.2)
            if partition in world.truth.cut:
                continue
            batch: list[Accepted] = []
            end = min(len(log), read + world.choices.randint(1, 60))
            for offset in range(read, end):
                accepted = follower.accept(log[offset][1], offset)
                if accepted is not None:
                    batch.append(accepted)
            read = end
            if world.choices.random() < 0.5:
                # Shown and not written yet: whatever happens now, the same records come again.
                writer.preview(batch)
                await asyncio.sleep(world.choices.random() * 0.2)
            prepared = writer.prepare(batch)
            await asyncio.sleep(0)
            writer.store(prepared)
