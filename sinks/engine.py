"""One interface, three engines: chDB in this process, the process that owns chDB over loopback, a ClickHouse server.

Promise: the same SQL with the same parameters gives the same rows on each. An `insert` that raised may have happened, whole or
in part; every table's key and version make its repetition harmless, so the caller repeats it. Values are plain Python:
int, str, bytes (inserts only), Decimal, list, dict, None; money is Decimal(38, 12) in SQL and whole pico in inserts.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from enum import Enum, auto
from typing import Protocol

from sinks.parameters import Parameter

__all__ = [
    "PICO_LIMIT",
    "Columns",
    "Engine",
    "Kind",
    "Parameter",
    "Reader",
    "Rows",
    "Table",
    "decimal_to_pico",
    "pico_to_decimal",
    "row_count",
    "whole",
]

# Decimal(38, 12) holds 38 digits.
PICO_LIMIT = 10**38
_EXACT = Context(prec=60)


class Kind(Enum):
    """What a column holds, as Python gives it and ClickHouse keeps it."""

    TEXT = auto()  # str: String or LowCardinality(String)
    BYTES = auto()  # bytes: String
    UINT8 = auto()
    UINT32 = auto()
    UINT64 = auto()
    INT32 = auto()
    INT64 = auto()
    PICO = auto()  # int, 10^-12 currency units: Decimal(38, 12)
    MILLIS = auto()  # int, Unix milliseconds: DateTime64(3, 'UTC')
    SECONDS = auto()  # int, Unix seconds: DateTime('UTC')
    TEXTS = auto()  # list[str]: Array(String)
    UINT64S = auto()  # list[int]: Array(UInt64)
    INT64S = auto()  # list[int]: Array(Int64)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table that the writer fills, and what each of its columns takes. A test holds it equal to the schema."""

    name: str
    columns: Mapping[str, Kind]


Columns = Mapping[str, Sequence[object]]

# Of whole numbers: how an array.array keeps them, which is how engines take them fastest.
_TYPE_CODES = {
    Kind.UINT8: "B",
    Kind.UINT32: "I",
    Kind.UINT64: "Q",
    Kind.INT32: "i",
    Kind.INT64: "q",
    Kind.MILLIS: "q",
    Kind.SECONDS: "q",
}


def whole(kind: Kind) -> array[int]:
    """An empty column for whole numbers of `kind`."""
    return array(_TYPE_CODES[kind])


@dataclass(frozen=True, slots=True)
class Rows:
    """An answer: names, and rows in the order that the query states."""

    names: tuple[str, ...]
    rows: list[tuple[object, ...]]

    def dicts(self) -> list[dict[str, object]]:
        """Each row by name."""
        return [dict(zip(self.names, row, strict=True)) for row in self.rows]


class Reader(Protocol):
    """What can be asked."""

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        """The rows of one SELECT; `{name:Type}` in it takes `parameters[name]`.

        Bounded in time and rows. Raises EngineUnavailable when the engine is away or out of time, EngineError when it refused.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds; afterwards every call raises EngineError."""
        ...


class Engine(Reader, Protocol):
    """What can also be written to."""

    def execute(self, sql: str) -> None:
        """Run one statement that gives no rows. The caller sends only what may run twice."""
        ...

    def insert(self, table: Table, columns: Columns) -> int:
        """Insert rows, column by column, all of the table's columns; returns how many. Durable when it returns."""
        ...


def row_count(table: Table, columns: Columns) -> int:
    """How many rows `columns` hold. Raises ValueError unless they are exactly the table's and of one length."""
    if columns.keys() != table.columns.keys():
        odd = sorted(columns.keys() ^ table.columns.keys())
        raise ValueError(f"insert into {table.name}: columns {odd} are missing or unknown")
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"insert into {table.name}: columns of different lengths {sorted(lengths)}")
    return lengths.pop()


def pico_to_decimal(pico: int) -> Decimal:
    """`pico` in currency units, exactly."""
    if not -PICO_LIMIT < pico < PICO_LIMIT:
        raise ValueError(f"amount {pico} pico does not fit in Decimal(38, 12)")
    return Decimal(pico).scaleb(-12, _EXACT)


def decimal_to_pico(amount: Decimal) -> int:
    """Whole pico of an amount in currency units. Raises ValueError if there is a fraction left."""
    scaled = amount.scaleb(12, _EXACT)
    pico = int(scaled)
    if pico != scaled:
        raise ValueError(f"amount {amount} has more than twelve decimals")
    return pico
