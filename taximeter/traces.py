"""A trace of requests in the columns of the Azure LLM inference traces, as usage events.

Promise: the same file, start, tenants and model give the same events, to the byte: a second replay is all duplicates.
The file's digest, the start and the row's number make the request ID; a digest of the row's number picks the tenant.
Times keep their distances and are moved so that the first row happens at the start. The trace says nothing about how
long a request took, so it ends when it starts.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from billing.limits import QUANTITY_MAX
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_CHAT,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageEvent,
)
from taximeter.errors import InputFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["COLUMNS", "Trace", "TraceRow", "read_trace", "tenant_names"]

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
ROWS_MAX: Final = 5_000_000
_DIGEST_CHARS: Final = 16
_COUNT_CHARS_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of the trace; `after_ms` counts from the first row."""

    number: int
    after_ms: int
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace, in memory: five million rows at most."""

    digest: str
    rows: tuple[TraceRow, ...]

    @property
    def context_tokens(self) -> int:
        return sum(row.context_tokens for row in self.rows)

    @property
    def generated_tokens(self) -> int:
        return sum(row.generated_tokens for row in self.rows)

    @property
    def duration_ms(self) -> int:
        return max((row.after_ms for row in self.rows), default=0)

    def request_id(self, row: TraceRow, start_ms: int) -> str:
        return f"trace-{self.digest}-{start_ms}-{row.number}"

    def tenant(self, row: TraceRow, tenants: int) -> str:
        draw = hashlib.blake2b(f"{self.digest}/{row.number}".encode(), digest_size=8).digest()
        return tenant_name(int.from_bytes(draw, "big") % tenants)

    def events(self, *, tenants: int, start_ms: int, model: str, skip: int = 0) -> Iterator[UsageEvent]:
        """The events of all rows but the first `skip`."""
        for row in self.rows[skip:]:
            at_ms = start_ms + row.after_ms
            yield UsageEvent(
                request_id=self.request_id(row, start_ms),
                tenant_id=self.tenant(row, tenants),
                project_id="trace",
                model=model,
                operation=OPERATION_CHAT,
                service_class=SERVICE_CLASS_STANDARD,
                outcome=OUTCOME_COMPLETED,
                count_source=COUNT_SOURCE_BACKEND,
                started_ms=at_ms,
                ended_ms=at_ms,
                uncached_input_tokens=row.context_tokens,
                output_tokens=row.generated_tokens,
                context_tokens=row.context_tokens,
                server_id="replay",
            )


def tenant_name(number: int) -> str:
    return f"trace-tenant-{number:04d}"


def tenant_names(tenants: int) -> list[str]:
    """Everybody over whom a trace is spread."""
    return [tenant_name(number) for number in range(tenants)]


def read_trace(path: Path) -> Trace:
    """The trace; InputFileError names the line, the field, the value and the mend."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGEST_CHARS]
        with path.open(newline="", encoding="utf-8-sig") as file:
            return Trace(digest, tuple(_rows(path, file)))
    except OSError as error:
        raise InputFileError(f"trace {path} cannot be read ({error.strerror}): correct the path") from None
    except csv.Error as error:
        raise InputFileError(f"trace {path} is not CSV ({error}): hand over a CSV file with {','.join(COLUMNS)}") from None
    except UnicodeDecodeError:
        raise InputFileError(f"trace {path} is not UTF-8 text: hand over a CSV file with {','.join(COLUMNS)}") from None


def _rows(path: Path, file: Iterator[str]) -> Iterator[TraceRow]:
    reader = csv.reader(file)
    header = tuple(next(reader, ()))
    if header != COLUMNS:
        raise InputFileError(f"trace {path}, line 1: columns are {','.join(header)!r}: they must be {','.join(COLUMNS)}")
    first_ms: int | None = None
    for number, cells in enumerate(reader):
        where = f"trace {path}, line {reader.line_num}"
        if number >= ROWS_MAX:
            raise InputFileError(f"{where}: over {ROWS_MAX} rows: split the file")
        if len(cells) != len(COLUMNS):
            raise InputFileError(f"{where}: has {len(cells)} columns: write {len(COLUMNS)}, {','.join(COLUMNS)}")
        at_ms = _time_ms(where, cells[0])
        first_ms = at_ms if first_ms is None else first_ms
        if at_ms < first_ms:
            raise InputFileError(f"{where}: TIMESTAMP {cells[0]!r} is before the first row's: sort the file by time")
        yield TraceRow(number, at_ms - first_ms, _count(where, 1, cells[1]), _count(where, 2, cells[2]))


def _time_ms(where: str, text: str) -> int:
    # The traces write seven decimals; Python's parser knows six.
    head, _, decimals = text.partition(".")
    try:
        moment = datetime.strptime(head, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
        microseconds = int(decimals[:6].ljust(6, "0")) if decimals else 0
    except ValueError:
        raise InputFileError(f"{where}: TIMESTAMP {text!r} is no time: write it like 2023-11-16 18:15:46.6805900") from None
    return int(moment.timestamp()) * 1_000 + microseconds // 1_000


def _count(where: str, column: int, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _COUNT_CHARS_MAX) or int(text) > QUANTITY_MAX:
        raise InputFileError(
            f"{where}: {COLUMNS[column]} {text[:_COUNT_CHARS_MAX]!r} is no count: write a whole number up to {QUANTITY_MAX}"
        )
    return int(text)
