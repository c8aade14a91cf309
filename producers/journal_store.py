"""The journal's file: SQLite in WAL mode with synchronous=FULL, one connection that writes and one that reads.

Promise: when `commit` returns, what it was given survives a crash of the process and of the machine, all of it or (when it
raises) none of it. A torn last write is found by SQLite's checksums on the next start, and only what had never been confirmed
goes with it.

Events of one commit and one partition stand in one row, a segment: the bytes are those of `RawUsageBatch.events` on the wire.
So a commit is a handful of statements whatever the number of events. That matters twice: a row less is a row faster, and each
statement gives up the interpreter's lock and has to win it back from callers that are busy.

All writes and all checkpoints go through the writing connection, from one thread.

What a commit costs is the wait for the disk. So it is `apsw`'s SQLite, which calls fdatasync where Python's own calls fsync,
and the log, once it is in use, is written to its full length: a sync of bytes that overwrite others has nothing of the file
system's own to write down with them. (docs/performance.md has what both are worth.) The two SQLites are two libraries that
know nothing of each other's locks: no process may open a journal with the other one while it has it open.

Freeing needs room as well, for the log of what is deleted, and so does what is owed: the end of a request that was taken. So a
few megabytes are set aside in a file of their own, and given up when the disk is full and something is to be freed, or owed.
Until they can be set aside again, no request is opened, and the journal uses the pages that it has and does not grow for
anything else: a full disk never keeps itself full.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import apsw

from billing.v1.usage_pb2 import RawUsageBatch
from producers.errors import JournalError, JournalFull, JournalUnreadable, JournalWriteFailed

__all__ = ["EVENT_ENVELOPE_BYTES", "FreedPage", "JournalStore", "OpenRow", "Page", "SegmentRow"]

SCHEMA_VERSION = 1
# What an event of under 2 MB costs beside its own bytes where it stands in a batch: a tag and its length.
EVENT_ENVELOPE_BYTES = 4
# Rows in one statement: a bound on the statements that there are, so that SQLite keeps all of them compiled: to compile one
# costs more than to run it.
_ROWS_MAX = 32
_STATEMENTS_KEPT = 4 * _ROWS_MAX
_FREED_ROWS_MAX = 1_000
_CHECKPOINT_PAGES = 1_000
# A page in the log has a header; a checkpoint comes behind the commit that goes over the bound.
_LOG_BYTES = 32 + (_CHECKPOINT_PAGES + 64) * (4_096 + 24)
# A journal that is only looked into needs none of it, and a small disk has better use for it.
_COMMITS_BEFORE_LOG = 32
_LOG_FREE_BYTES_MIN = 16 * _LOG_BYTES
_BUSY_TIMEOUT_MS = 10_000
# As large as the log may grow before a checkpoint, with pages of 4 KiB, and then some.
_RESERVE_BYTES = 5 << 20
# Opening the file makes its log and the log's index.
_OPENING_BYTES = 1 << 20
_PAGES_MAX = 0xFFFFFFFE
# The second: no room for the log's index.
_FULL = frozenset({apsw.SQLITE_FULL, apsw.SQLITE_IOERR_SHMSIZE})
_Statement = tuple[str, tuple[Any, ...]]
_SCHEMA = """
CREATE TABLE marks (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE segments (
    partition INTEGER NOT NULL,
    first_sequence INTEGER NOT NULL,
    last_sequence INTEGER NOT NULL,
    committed_ms INTEGER NOT NULL,
    events BLOB NOT NULL,
    PRIMARY KEY (partition, first_sequence)
) WITHOUT ROWID;
CREATE TABLE freed (partition INTEGER PRIMARY KEY, sequence INTEGER NOT NULL);
CREATE TABLE open_requests (slot INTEGER PRIMARY KEY, partition INTEGER NOT NULL, event BLOB NOT NULL);
"""
# From the segment that holds the number on: freed ones are gone, so it may be none and the next one the first.
_READ = """
SELECT first_sequence, events FROM segments WHERE partition = ? AND last_sequence > ? AND first_sequence >=
    (SELECT COALESCE(MAX(first_sequence), 0) FROM segments WHERE partition = ? AND first_sequence <= ?)
ORDER BY first_sequence
"""


class SegmentRow(NamedTuple):
    partition: int
    first_sequence: int
    last_sequence: int
    committed_ms: int
    events: bytes


class OpenRow(NamedTuple):
    """A request that is open, and the event that it becomes if this process dies now."""

    slot: int
    partition: int
    event: bytes


class Page(NamedTuple):
    """Consecutive events of one partition."""

    first_sequence: int
    events: Sequence[bytes]


class FreedPage(NamedTuple):
    """What one step of freeing let go, and whether there is more."""

    event_bytes: int
    last_sequence: int
    is_last: bool


class JournalStore:
    """One open file. `commit`, `free` and `set_mark` belong to one thread at a time; the reads may come from any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader_lock = threading.Lock()
        self._reserve_path = path.with_name(path.name + ".reserve")
        self.has_reserve = False
        if shutil.disk_usage(path.parent).free < _OPENING_BYTES:
            self._reserve_path.unlink(missing_ok=True)
        try:
            self._writer = self._connect()
            try:
                self._prepare()
                self._reader = self._connect()
                self._reader.pragma("query_only", "ON")
            except BaseException:
                self._writer.close()
                raise
        except apsw.Error as error:
            raise self._translate(error, JournalUnreadable) from error
        if not self.set_aside():
            self._stop_growing()
        self._commits = 0

    def _connect(self) -> apsw.Connection:
        connection = apsw.Connection(str(self.path), statementcachesize=_STATEMENTS_KEPT)
        connection.set_busy_timeout(_BUSY_TIMEOUT_MS)
        connection.pragma("journal_mode", "WAL")
        connection.pragma("synchronous", "FULL")
        # Some builds overwrite what is deleted: freeing would cost as much as writing, and need as much room on a full disk.
        connection.pragma("secure_delete", "OFF")
        # macOS: without it, fsync leaves the data in the drive's cache.
        connection.pragma("fullfsync", "ON")
        connection.wal_autocheckpoint(_CHECKPOINT_PAGES)
        return connection

    def _prepare(self) -> None:
        version = self._writer.pragma("user_version")
        if version == 0:
            self._writer.execute(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            raise JournalUnreadable(
                f"journal_path={self.path}: its format is {version}, this version writes {SCHEMA_VERSION}; "
                f"let the version that wrote it publish what it holds, then begin a new one"
            )

    def commit(
        self, segments: Sequence[SegmentRow], opened: Sequence[OpenRow], closed: Sequence[int], *, owed: bool = False
    ) -> None:
        """Make all of it durable, or none: then it raises `JournalFull` or `JournalWriteFailed`.

        `owed`: some of it is of requests that were taken before. On a full disk it gets the reserve.
        """
        statements = [*_inserts("INSERT INTO segments VALUES ", 5, segments)]
        if opened:
            statements += _inserts("INSERT OR REPLACE INTO open_requests VALUES ", 3, opened)
        if closed:
            statements += _deletes(closed)
        try:
            self._transaction(statements)
        except JournalFull:
            if not owed:
                # Someone may have made room since the journal stopped growing: then the next commit has it.
                self.set_aside()
                raise
            self._give_up_reserve()
            self._grow()
            try:
                self._transaction(statements)
            finally:
                self._stop_growing()
        self._commits += 1
        if self._commits == _COMMITS_BEFORE_LOG:
            self._lengthen_log()

    def _lengthen_log(self) -> None:
        """Write the log's file to its full length, behind all that it holds: zeros, which are no page of it."""
        path = self.path.with_name(self.path.name + "-wal")
        with contextlib.suppress(OSError), path.open("r+b", buffering=0) as log:
            missing = _LOG_BYTES - os.fstat(log.fileno()).st_size
            if missing > 0 and shutil.disk_usage(path.parent).free >= _LOG_FREE_BYTES_MIN:
                log.seek(0, os.SEEK_END)
                log.write(bytes(missing))

    def free(self, partition: int, covered_sequence: int) -> FreedPage:
        """Let go of segments whose last sequence is covered, a page of them; remember how far the numbering has gone."""
        try:
            page = self._free(partition, covered_sequence)
        except JournalFull:
            self._give_up_reserve()
            self._stop_growing()
            # What the log holds moves into the file, and the log begins again in the room that it has.
            self._checkpoint()
            return self._free(partition, covered_sequence)
        if page.is_last:
            self.set_aside()
        return page

    def _free(self, partition: int, covered_sequence: int) -> FreedPage:
        try:
            ((count, last, event_bytes),) = self._rows(
                self._writer,
                "SELECT COUNT(*), MAX(last_sequence), COALESCE(SUM(LENGTH(events)), 0) FROM (SELECT last_sequence, events "
                "FROM segments WHERE partition = ? AND last_sequence <= ? ORDER BY first_sequence LIMIT ?)",
                (partition, covered_sequence, _FREED_ROWS_MAX),
            )
        except apsw.Error as error:
            raise self._translate(error, JournalWriteFailed) from error
        if count == 0:
            return FreedPage(0, 0, is_last=True)
        self._transaction(
            [
                ("DELETE FROM segments WHERE partition = ? AND first_sequence <= ?", (partition, last)),
                ("INSERT OR REPLACE INTO freed VALUES (?, ?)", (partition, last)),
            ]
        )
        return FreedPage(event_bytes, last, is_last=count < _FREED_ROWS_MAX)

    def _checkpoint(self) -> None:
        try:
            self._writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            raise self._translate(error, JournalWriteFailed) from error

    def set_aside(self) -> bool:
        """Set room aside, if there is as much again for events; whether it is."""
        try:
            if self._reserve_path.exists() and self._reserve_path.stat().st_size == _RESERVE_BYTES:
                self.has_reserve = True
                return True
            if shutil.disk_usage(self._reserve_path.parent).free < 2 * _RESERVE_BYTES:
                return False
            self._reserve_path.write_bytes(bytes(_RESERVE_BYTES))
            self._grow()
        except (OSError, JournalError):
            with contextlib.suppress(OSError):
                self._give_up_reserve()
            return False
        self.has_reserve = True
        return True

    def _give_up_reserve(self) -> None:
        self.has_reserve = False
        self._reserve_path.unlink(missing_ok=True)

    def _grow(self) -> None:
        self._set_pages_max(_PAGES_MAX)

    def _stop_growing(self) -> None:
        self._set_pages_max(None)

    def _set_pages_max(self, pages: int | None) -> None:
        """None: as many as there are."""
        try:
            self._writer.pragma("max_page_count", self._writer.pragma("page_count") if pages is None else pages)
        except apsw.Error as error:
            raise self._translate(error, JournalWriteFailed) from error

    def set_mark(self, name: str, value: str) -> None:
        self._transaction([("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))])

    def mark(self, name: str) -> str | None:
        rows = self._read("SELECT value FROM marks WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else None

    def highest_sequences(self) -> dict[int, int]:
        """The highest number ever assigned, of each partition that has one."""
        rows = self._read(
            "SELECT partition, MAX(sequence) FROM (SELECT partition, sequence FROM freed "
            "UNION ALL SELECT partition, MAX(last_sequence) FROM segments GROUP BY partition) GROUP BY partition"
        )
        return {int(partition): int(sequence) for partition, sequence in rows}

    def freed_sequences(self) -> dict[int, int]:
        return {int(partition): int(sequence) for partition, sequence in self._read("SELECT * FROM freed")}

    def event_bytes(self) -> int:
        ((total,),) = self._read("SELECT COALESCE(SUM(LENGTH(events)), 0) FROM segments")
        return int(total)

    def open_rows(self) -> list[OpenRow]:
        return [OpenRow(*row) for row in self._read("SELECT slot, partition, event FROM open_requests ORDER BY slot")]

    def oldest_committed_ms(self, partition: int) -> int | None:
        rows = self._read("SELECT committed_ms FROM segments WHERE partition = ? ORDER BY first_sequence LIMIT 1", (partition,))
        return int(rows[0][0]) if rows else None

    def read(self, partition: int, after_sequence: int, events_max: int, bytes_max: int) -> Page:
        """The events that follow `after_sequence`, at most so many and (unless one alone is larger) so large."""
        try:
            with self._reader_lock:
                cursor = self._reader.execute(_READ, (partition, after_sequence, partition, after_sequence + 1))
                with contextlib.closing(cursor):
                    return _page(cursor, after_sequence + 1, events_max, bytes_max)
        except apsw.Error as error:
            raise self._translate(error, JournalUnreadable) from error

    def close(self) -> None:
        """Close the file. The last connection moves the log into it."""
        with self._reader_lock:
            self._reader.close()
        self._writer.close()

    def _read(self, sql: str, parameters: tuple[object, ...] = ()) -> list[Any]:
        try:
            with self._reader_lock:
                return self._rows(self._reader, sql, parameters)
        except apsw.Error as error:
            raise self._translate(error, JournalUnreadable) from error

    @staticmethod
    def _rows(connection: apsw.Connection, sql: str, parameters: tuple[object, ...]) -> list[Any]:
        return connection.execute(sql, parameters).fetchall()

    def _transaction(self, statements: Sequence[_Statement]) -> None:
        try:
            if len(statements) == 1:
                # Its own transaction: two statements fewer.
                self._writer.execute(*statements[0])
                return
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                for sql, parameters in statements:
                    self._writer.execute(sql, parameters)
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
        except apsw.Error as error:
            raise self._translate(error, JournalWriteFailed) from error

    def _translate(self, error: apsw.Error, kind: type[JournalError]) -> JournalError:
        code = getattr(error, "extendedresult", getattr(error, "result", 0))
        if code in _FULL:
            return JournalFull(
                f"journal_path={self.path}: the disk is full, or nearly ({error}); free space on it, then record again"
            )
        name = apsw.mapping_extended_result_codes.get(code) or apsw.mapping_result_codes.get(code) or type(error).__name__
        return kind(f"journal_path={self.path}: {name}: {error}; look at the disk and the file's permissions")


def _inserts(sql: str, columns: int, rows: Sequence[tuple[Any, ...]]) -> Iterator[_Statement]:
    row = f"({','.join('?' * columns)})"
    for start in range(0, len(rows), _ROWS_MAX):
        part = rows[start : start + _ROWS_MAX]
        yield sql + ",".join([row] * len(part)), tuple(chain.from_iterable(part))


def _deletes(slots: Sequence[int]) -> Iterator[_Statement]:
    for start in range(0, len(slots), _ROWS_MAX):
        part = slots[start : start + _ROWS_MAX]
        yield f"DELETE FROM open_requests WHERE slot IN ({','.join('?' * len(part))})", tuple(part)  # noqa: S608


def _page(rows: Iterable[tuple[int, bytes]], first_sequence: int, events_max: int, bytes_max: int) -> Page:
    events: list[bytes] = []
    size = 0
    for segment_first, blob in rows:
        if not events:
            first_sequence = max(first_sequence, segment_first)
        elif segment_first != first_sequence + len(events):
            # Rows are missing: what follows keeps its own numbers, so that the ledger sees the hole.
            break
        skipped = first_sequence - segment_first if not events else 0
        for event in RawUsageBatch.FromString(blob).events[skipped:]:
            size += len(event) + EVENT_ENVELOPE_BYTES
            if events and (len(events) == events_max or size > bytes_max):
                return Page(first_sequence, events)
            events.append(event)
    return Page(first_sequence, events)
