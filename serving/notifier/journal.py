"""What is to be delivered, on disk: deliveries, dead letters, and how far the alert topic has been followed.

Promise: the cursor and the deliveries of the alerts before it are one transaction, so a kill between two of them loses nothing
and adds nothing. A delivery leaves when its receiver has taken it; a kill before that sends it again under the same webhook ID.
SQLite in WAL mode with synchronous=NORMAL: what a crash of the machine takes back, it takes back with its cursor, and the topic
has it.

One notifier at a time: it holds a lock beside the file. The command line works on dead letters in the same file meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from serving.notifier.errors import NotifierError

__all__ = ["DeadLetter", "Delivery", "Journal", "NewDelivery"]

_BUSY_TIMEOUT_S: Final = 10.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gone (endpoint TEXT PRIMARY KEY, url TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deliveries (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    endpoint TEXT NOT NULL,
    webhook_id TEXT NOT NULL,
    alert_id TEXT NOT NULL,
    body BLOB NOT NULL,
    taken_ms INTEGER NOT NULL,
    tried_ms INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    dead_ms INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    UNIQUE (endpoint, webhook_id)
);
CREATE INDEX IF NOT EXISTS deliveries_by_endpoint ON deliveries (endpoint, dead_ms > 0, number);
"""
_DEAD: Final = "SELECT endpoint, webhook_id, alert_id, taken_ms, attempts, dead_ms, reason FROM deliveries WHERE dead_ms > 0"


class NewDelivery(NamedTuple):
    """One alert for one endpoint."""

    endpoint: str
    webhook_id: str
    alert_id: str
    body: bytes
    # Why it is a dead letter from the beginning; empty: it is not.
    dead: str = ""


class Delivery(NamedTuple):
    """One that waits."""

    number: int
    webhook_id: str
    body: bytes
    # When it was first tried; 0: not yet.
    tried_ms: int
    attempts: int


class DeadLetter(NamedTuple):
    """One that was given up."""

    endpoint: str
    webhook_id: str
    alert_id: str
    taken_ms: int
    attempts: int
    dead_ms: int
    reason: str


class Journal:
    """One open file; its methods may be called from any thread."""

    def __init__(self, path: Path, *, dead_max: int) -> None:
        """Open it, or make it. Raises NotifierError."""
        self._dead_max = dead_max
        self._lock = threading.Lock()
        self._held: int | None = None
        # Dead letters that were dropped because there were too many.
        self.dropped = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._path = path
            self._file = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            # A new file is on disk before anything is taken: when it began decides which alerts are old.
            for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"):
                self._file.execute(statement)
            self._file.executescript(_SCHEMA)
            self._file.execute("INSERT OR IGNORE INTO marks VALUES ('begun_ms', ?)", (str(_now_ms()),))
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._version = self._data_version()
        except (OSError, sqlite3.Error) as error:
            raise NotifierError(f"notifier.journal_path {path} cannot be used ({error}): name a file that can be") from error

    def hold(self) -> Self:
        """Be the one notifier on this file. Raises NotifierError where there is one."""
        self._held = os.open(self._path.with_name(self._path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise NotifierError(
                f"another notifier runs on {self._path}: stop it, or set another notifier.journal_path"
            ) from None
        return self

    def close(self) -> None:
        with self._lock:
            self._file.close()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    @property
    def begun_ms(self) -> int:
        """When the file was made: what was told before is not delivered."""
        return int(self._mark("begun_ms"))

    @property
    def cursor(self) -> str:
        """Behind the last alert that was taken."""
        return self._mark("cursor")

    def take(self, cursor: str, new: Sequence[NewDelivery]) -> list[int]:
        """Write an alert's deliveries and the cursor behind it; their numbers, 0 for one that is there or is dead."""
        now_ms = _now_ms()
        with self._transaction():
            numbers = [self._insert(each, now_ms) for each in new]
            self._file.execute("INSERT OR REPLACE INTO marks VALUES ('cursor', ?)", (cursor,))
            for endpoint in {each.endpoint for each in new if each.dead}:
                self._trim(endpoint)
        return numbers

    def waiting(self) -> list[tuple[int, str, str]]:
        """Number, endpoint and alert of each that waits, in order."""
        return self._rows("SELECT number, endpoint, alert_id FROM deliveries WHERE dead_ms = 0 ORDER BY number")

    def read(self, number: int) -> Delivery | None:
        """One that waits; None: it does no more."""
        sql = "SELECT number, webhook_id, body, tried_ms, attempts FROM deliveries WHERE number = ? AND dead_ms = 0"
        found = self._rows(sql, (number,))
        return Delivery(*found[0]) if found else None

    def delivered(self, number: int) -> None:
        """Its receiver has taken it."""
        with self._transaction():
            self._file.execute("DELETE FROM deliveries WHERE number = ?", (number,))

    def failed(self, number: int, reason: str) -> None:
        """An attempt did not succeed."""
        with self._transaction():
            self._file.execute(
                "UPDATE deliveries SET attempts = attempts + 1, reason = ?, tried_ms = iif(tried_ms = 0, ?, tried_ms) "
                "WHERE number = ?",
                (reason, _now_ms(), number),
            )

    def bury(self, number: int, reason: str) -> None:
        """It is a dead letter."""
        with self._transaction():
            self._file.execute("UPDATE deliveries SET dead_ms = ?, reason = ? WHERE number = ?", (_now_ms(), reason, number))
            for (endpoint,) in self._file.execute("SELECT endpoint FROM deliveries WHERE number = ?", (number,)).fetchall():
                self._trim(endpoint)

    def mark_gone(self, endpoint: str, url: str) -> None:
        """The receiver at this address wants nothing more."""
        with self._transaction():
            self._file.execute("INSERT OR REPLACE INTO gone VALUES (?, ?)", (endpoint, url))

    def gone(self) -> dict[str, str]:
        """Endpoints that want nothing more, with the address that said so."""
        return dict(self._rows("SELECT endpoint, url FROM gone"))

    def was_changed(self) -> bool:
        """Whether somebody else has written to the file since the last time."""
        with self._lock:
            before, self._version = self._version, self._data_version()
            return before != self._version

    def dead(self, endpoint: str = "", webhook_ids: Sequence[str] = ()) -> list[DeadLetter]:
        """Dead letters, oldest first; of one endpoint, or of these IDs."""
        condition, parameters = _choice(endpoint, webhook_ids)
        return [DeadLetter(*row) for row in self._rows(f"{_DEAD}{condition} ORDER BY number", parameters)]

    def dead_counts(self) -> dict[str, int]:
        """By endpoint."""
        return dict(self._rows("SELECT endpoint, count(*) FROM deliveries WHERE dead_ms > 0 GROUP BY endpoint"))

    def retrying_counts(self) -> dict[str, int]:
        """By endpoint, how many wait for another attempt."""
        sql = "SELECT endpoint, count(*) FROM deliveries WHERE dead_ms = 0 AND attempts > 0 GROUP BY endpoint"
        return dict(self._rows(sql))

    def oldest_ms(self) -> dict[str, int]:
        """By endpoint, when the oldest that waits was taken."""
        return dict(self._rows("SELECT endpoint, min(taken_ms) FROM deliveries WHERE dead_ms = 0 GROUP BY endpoint"))

    def retry(self, endpoint: str = "", webhook_ids: Sequence[str] = ()) -> list[DeadLetter]:
        """Let them wait again, with a whole horizon before them; an endpoint that was gone is asked again."""
        chosen = self.dead(endpoint, webhook_ids)
        condition, parameters = _choice(endpoint, webhook_ids)
        with self._transaction():
            self._file.execute(
                f"UPDATE deliveries SET dead_ms = 0, attempts = 0, tried_ms = 0 WHERE dead_ms > 0{condition}",  # noqa: S608
                parameters,
            )
            for name in {each.endpoint for each in chosen}:
                self._file.execute("DELETE FROM gone WHERE endpoint = ?", (name,))
        return chosen

    def drop(self, endpoint: str = "", webhook_ids: Sequence[str] = ()) -> list[DeadLetter]:
        """Forget them."""
        chosen = self.dead(endpoint, webhook_ids)
        condition, parameters = _choice(endpoint, webhook_ids)
        with self._transaction():
            self._file.execute(f"DELETE FROM deliveries WHERE dead_ms > 0{condition}", parameters)  # noqa: S608
        return chosen

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _insert(self, new: NewDelivery, now_ms: int) -> int:
        done = self._file.execute(
            "INSERT OR IGNORE INTO deliveries (endpoint, webhook_id, alert_id, body, taken_ms, dead_ms, reason) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (new.endpoint, new.webhook_id, new.alert_id, new.body, now_ms, now_ms if new.dead else 0, new.dead),
        )
        return (done.lastrowid or 0) if done.rowcount == 1 and not new.dead else 0

    def _trim(self, endpoint: str) -> None:
        done = self._file.execute(
            "DELETE FROM deliveries WHERE number IN (SELECT number FROM deliveries WHERE endpoint = ? AND dead_ms > 0 "
            "ORDER BY number DESC LIMIT -1 OFFSET ?)",
            (endpoint, self._dead_max),
        )
        self.dropped += done.rowcount

    def _mark(self, name: str) -> str:
        found = self._rows("SELECT value FROM marks WHERE name = ?", (name,))
        return str(found[0][0]) if found else ""

    def _data_version(self) -> int:
        return int(self._file.execute("PRAGMA data_version").fetchone()[0])

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._file.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
            self._file.execute("COMMIT")


def _choice(endpoint: str, webhook_ids: Sequence[str]) -> tuple[str, list[str]]:
    condition, parameters = "", []
    if endpoint:
        condition, parameters = " AND endpoint = ?", [endpoint]
    if webhook_ids:
        condition += f" AND webhook_id IN ({', '.join('?' * len(webhook_ids))})"
        parameters += webhook_ids
    return condition, parameters


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
