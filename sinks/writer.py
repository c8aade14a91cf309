"""Writes accepted ledger records to the tables, and then, last, how far it has come.

`store` does, in this order:
 1. every table of the batch, one insert each. A crash here leaves rows of records beyond the position: the same records come
    again and their rows replace themselves, by key and version.
 2. the positions, one row a partition. A crash here repeats the batch; a crash after it has written everything.
A batch that erases a user is written without that user, and all later ones are; `erasing_due` then says that what was written
before needs `erasing.erase_pending`.
So a position never stands for rows that are not there, and nothing is ever there twice for a reader that reads by key.

`preview` writes the accounts of records that a later `store` brings, once more, with everything else: balances are fresh though
batches are large. It may fail, come late or be left out, for `store` counts on none of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from billing.key_ring import Keys
from sinks.columns import Accepted, build_accounts, build_columns
from sinks.engine import Columns, Engine, Table
from sinks.erasures import Erased
from sinks.tables import ACCOUNTS, SINK_POSITIONS

__all__ = ["Position", "Prepared", "Writer"]


@dataclass(frozen=True, slots=True)
class Position:
    """How far a database is in one partition of the ledger."""

    partition: int
    generation: bytes
    generation_ordinal: int
    sequence: int
    record_hash: bytes
    ledger_offset: int
    # Of the record there: everything up to then is in the database; 0: it was read from there, which does not say.
    log_time_ms: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"generation {self.generation.hex()[:12]}, sequence {self.sequence}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch as columns, and the last record of each partition in it."""

    inserts: list[tuple[Table, Columns]]
    ends: dict[int, Accepted]
    records: int
    # It brings the erasure of a user.
    erases: bool = False


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class Writer:
    """Writes to `engine`. One at a time writes to a database; two would do no harm, only the same work twice."""

    def __init__(
        self,
        engine: Engine,
        *,
        usage_topic: str = "usage.events",
        seal_keys: Keys | None = None,
        now_ms: Callable[[], int] = _now_ms,
    ) -> None:
        self._engine = engine
        self._erased = Erased(seal_keys)
        # An erasure may not be over; whoever sees to it says so here before it begins.
        self.erasing_due = False
        self._usage_topic = usage_topic
        self._now_ms = now_ms

    def positions(self) -> dict[int, Position]:
        """How far the database is, by partition, and begin there. In SQL that every ClickHouse understands."""
        self.erasing_due |= self._erased.load(self._engine)
        rows = self._engine.query(
            "SELECT ledger_partition, generation, generation_ordinal, sequence, record_hash, ledger_offset "
            "FROM sink_positions FINAL ORDER BY ledger_partition"
        ).rows
        found = {}
        for partition, generation, ordinal, sequence, record_hash, offset in rows:
            assert isinstance(partition, int)
            assert isinstance(ordinal, int)
            assert isinstance(sequence, int)
            assert isinstance(offset, int)
            found[partition] = Position(
                partition, bytes.fromhex(str(generation)), ordinal, sequence, bytes.fromhex(str(record_hash)), offset
            )
        return found

    def preview(self, batch: Sequence[Accepted]) -> None:
        """Write the accounts as `batch` leaves them, ahead of its `store`. Raises EngineError; then it need not be repeated."""
        self._engine.insert(ACCOUNTS, build_accounts(batch))

    def prepare(self, batch: Sequence[Accepted]) -> Prepared:
        """The columns of `batch`, which holds each partition's records in order. No I/O: may run beside a `store`. Batches are
        prepared in the order in which they are stored."""
        batch, erases = self._erased.take(batch)
        ends = {accepted.record.partition: accepted for accepted in batch}
        return Prepared(build_columns(batch, self._usage_topic), ends, len(batch), erases)

    def store(self, prepared: Prepared) -> dict[int, Position]:
        """Write what was prepared; returns the new positions. Raises EngineError; then repeat it, or stop."""
        if not prepared.ends:
            return {}
        for table, columns in prepared.inserts:
            self._engine.insert(table, columns)
        written_ms = self._now_ms()
        ends = list(prepared.ends.values())
        self._engine.insert(
            SINK_POSITIONS,
            {
                "ledger_partition": list(prepared.ends),
                "generation": [end.record.generation.hex() for end in ends],
                "generation_ordinal": [end.generation_ordinal for end in ends],
                "sequence": [end.record.sequence for end in ends],
                "record_hash": [end.record_hash.hex() for end in ends],
                "ledger_offset": [end.ledger_offset for end in ends],
                "log_time": [end.record.log_time_ms for end in ends],
                "written": [written_ms] * len(ends),
                "version": [end.version for end in ends],
            },
        )
        self.erasing_due |= prepared.erases
        return {partition: _position(end) for partition, end in prepared.ends.items()}

    def write(self, batch: Sequence[Accepted]) -> dict[int, Position]:
        """Prepare and store."""
        return self.store(self.prepare(batch))


def _position(end: Accepted) -> Position:
    record = end.record
    return Position(
        record.partition,
        record.generation,
        end.generation_ordinal,
        record.sequence,
        end.record_hash,
        end.ledger_offset,
        record.log_time_ms,
    )
