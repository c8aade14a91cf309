"""What can go wrong in a sink, as one tree.

SinkError
├── EngineError            the engine refused: the statement, the schema or the data is wrong; trying again changes nothing
│   └── EngineUnavailable  the engine is away, overloaded or out of time: the same statement may work later
├── ParameterError         a query's parameters do not fit its text
├── SchemaError            the database's schema is not the one that this version knows
├── AnchorError            the file of anchors cannot be read or written, or is not as it was written
└── LedgerError            the ledger cannot be followed from where this sink stands
    ├── LedgerGap          records between this sink's position and the log are missing from the log
    └── LedgerUnavailable  Kafka is away or slow; the same may work later
"""

from __future__ import annotations

# What every system says of a full disk, ClickHouse whatever its version and its own code for it.
DISK_FULL = "No space left on device"

__all__ = [
    "DISK_FULL",
    "AnchorError",
    "EngineError",
    "EngineUnavailable",
    "LedgerError",
    "LedgerGap",
    "LedgerUnavailable",
    "ParameterError",
    "SchemaError",
    "SinkError",
]


class SinkError(Exception):
    """Anything that a sink raises on purpose; its text says what to do."""


class EngineError(SinkError):
    """The engine refused a statement or its data; repeating it changes nothing."""


class EngineUnavailable(EngineError):
    """The engine is away, overloaded or did not answer in time. An insert may have happened: repeat it, it is idempotent."""


class ParameterError(SinkError, ValueError):
    """A value does not fit the type that the query declares for it, or a name is missing or unknown."""


class SchemaError(SinkError):
    """The database was made by another version, or a migration file was edited after it was applied."""


class AnchorError(SinkError):
    """The file of anchors is not as it was written, or cannot be read or written; the text names the line."""


class LedgerError(SinkError):
    """The ledger cannot be followed from where this sink stands; the text names both places and the mend."""


class LedgerGap(LedgerError):
    """The log carries on from a position that this sink has not reached; `feed` can hand it the records in between."""

    def __init__(self, message: str, *, partition: int, position: str, needed: str) -> None:
        super().__init__(message)
        self.partition = partition
        self.position = position
        self.needed = needed


class LedgerUnavailable(LedgerError):
    """Kafka does not answer in time; the sink waits and tries again."""
