"""Exact memory of what was charged, larger than RAM: `billing.state.SeenKeys` on sorted runs.

Promise: `find` answers exactly, for every key that was remembered and has not expired; nothing reaches disk before the record
that it belongs to was acknowledged. Costs are measured in benchmarks/seen_store.py: about 1 µs a key for all of it,
26 bytes of disk and 2.5 bytes of RAM a key, beside a fixed part of about 50 MB at most.

A key's way:

1. `remember` (at the step, before the record is written) puts it in `recent`, a dictionary.
2. `acknowledged` (after the record is in the log and in the local store, which holds the record's keys as one blob) counts it.
3. When `recent` is full it is frozen; once all of it is acknowledged, another thread writes it as a run (`seen_runs`).
4. `finished` gives the change of the list of runs; the local store writes it, with the deletion of the blobs, in one batch;
   `adopt` then lets the frozen dictionary go. A crash before: the file is an orphan, removed at the next start, and the blobs
   are loaded again. A crash after: the blobs are gone and the run is listed.
5. Eight runs of one size are merged into one, on a thread too, the same way. A run is dropped when its last day has expired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stream_processors.seen_runs import (
    ENTRY_BYTES,
    DamagedRunError,
    Query,
    Run,
    merge_runs,
    open_run,
    rows_digest,
    rows_from_entries,
    write_run,
)

__all__ = ["DamagedRunError", "RunsChange", "SeenStore"]

RECENT_KEYS_MAX = 131_072
RUNS_PER_LEVEL = 8
# A run of the last level is never merged again: 131,072 * 8^3 = 67 million keys, 1.7 GB.
LEVELS = 4

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class RunsChange:
    """What the local store must note in one batch: these runs stand for those, and for all blobs through that sequence."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    # Blobs of this sequence and before are in a run now; None: no blob is.
    blobs_through_sequence: int | None


@dataclass(slots=True)
class _Work:
    """What another thread is doing."""

    future: Future[Run | None]
    sources: tuple[Run, ...]
    level: int
    blobs_through_sequence: int | None

    @property
    def done(self) -> bool:
        """Whether it is over and was not cancelled. What it raised, a full disk say, its result raises again."""
        return self.future.done() and not isinstance(self.future.exception(), CancelledError)


class SeenStore:
    """One partition's memory. All calls come from one thread; it has two more of its own."""

    def __init__(self, folder: Path, run_names: Iterable[str], forgotten_through_day: int) -> None:
        """Open the listed runs; whatever else lies in the folder was never listed and is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._forgotten_through_day = forgotten_through_day
        self._acknowledged_forgotten_day = forgotten_through_day
        listed = set(run_names)
        for path in folder.iterdir():
            if path.name not in listed:
                path.unlink()
        self._runs: list[tuple[int, Run]] = [(_level_of(name), open_run(folder / name)) for name in sorted(listed)]
        self._next_number = 1 + max((_number_of(name) for name in listed), default=0)
        self._recent: dict[bytes, bytes] = {}
        # By the day on which they expire, so that expiry finds them: the lists that `remember` was given.
        self._recent_days: dict[int, list[Sequence[bytes]]] = {}
        self._frozen: dict[bytes, bytes] = {}
        self._frozen_days: dict[int, list[Sequence[bytes]]] = {}
        self._remembered_keys = 0
        self._acknowledged_keys = 0
        # The count of remembered keys at which `recent` was frozen: when as many are acknowledged, all of it is.
        self._frozen_at_keys: int | None = None
        self._pending: list[tuple[int, bytes]] = []
        self._last_sequence = -1
        self._rotation: _Work | None = None
        self._merge: _Work | None = None
        self._closing = False
        # Two: a long merge must not hold up what empties the dictionaries.
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="seen-runs")

    # --- SeenKeys ---

    def find(self, digests: Sequence[bytes]) -> list[bytes | None]:
        """For each digest the fingerprint that it was remembered with, or None."""
        found: list[bytes | None] = [None] * len(digests)
        for keys in (self._frozen, self._recent):
            # Nearly always there is none: asking for all at once costs half of looking each one up.
            if not keys.keys().isdisjoint(digests):
                found = [keys.get(digest, known) for digest, known in zip(digests, found, strict=True)]
        if self._runs and digests:
            query = Query(digests)
            for _, run in self._runs:
                run.find(query, self._forgotten_through_day, found)
        return found

    def remember(self, expires_day: int, digests: Sequence[bytes], fingerprints: Sequence[bytes]) -> None:
        """Remember these until `expires_day` is over. Stays in memory until the record is acknowledged."""
        self._remembered_keys += len(digests)
        if expires_day <= self._forgotten_through_day:
            return
        self._recent.update(zip(digests, fingerprints, strict=True))
        self._recent_days.setdefault(expires_day, []).append(digests)

    def expire(self, through_day: int) -> None:
        """Let go of what expires on `through_day` or before. Files go when the record that says so is acknowledged."""
        if through_day <= self._forgotten_through_day:
            return
        self._forgotten_through_day = through_day
        for keys, days in ((self._recent, self._recent_days), (self._frozen, self._frozen_days)):
            for day in [day for day in days if day <= through_day]:
                for digests in days.pop(day):
                    for digest in digests:
                        keys.pop(digest, None)

    def digest(self) -> bytes:
        """SHA-256 over what is remembered, whatever it is kept in."""
        entries = [
            (day, b"".join([digest + keys[digest] for digest in digests if digest in keys]))
            for keys, days in ((self._recent, self._recent_days), (self._frozen, self._frozen_days))
            for day, lists in days.items()
            for digests in lists
        ]
        sources = [rows_from_entries(entries), *(run.rows for _, run in self._runs)]
        return rows_digest(sources, self._forgotten_through_day)

    # --- behind the acknowledgement ---

    def acknowledged(self, sequence: int, entries: Sequence[tuple[int, bytes]], forgotten_through_day: int) -> None:
        """The record `sequence` is in the log, its keys (day, 24 bytes each) are a blob in the local store."""
        self._last_sequence = sequence
        self._acknowledged_forgotten_day = max(self._acknowledged_forgotten_day, forgotten_through_day)
        for day, data in entries:
            self._acknowledged_keys += len(data) // ENTRY_BYTES
            self._pending.append((day, data))
        if self._frozen_at_keys is None and len(self._recent) >= RECENT_KEYS_MAX:
            self._frozen, self._recent = self._recent, {}
            self._frozen_days, self._recent_days = self._recent_days, {}
            self._frozen_at_keys = self._remembered_keys
        self._start_work()

    def restore(self, sequence: int, entries: Sequence[tuple[int, bytes]]) -> None:
        """Take a blob from the local store back, at start."""
        for day, data in entries:
            cut = range(0, len(data), ENTRY_BYTES)
            self.remember(
                day,
                [data[i : i + _DIGEST_BYTES] for i in cut],
                [data[i + _DIGEST_BYTES : i + ENTRY_BYTES] for i in cut],
            )
        self.acknowledged(sequence, entries, self._forgotten_through_day)

    def finished(self) -> RunsChange | None:
        """A change of the list of runs that is ready to be noted, or None. Note it, then `adopt`."""
        done = [work for work in (self._rotation, self._merge) if work is not None and work.done]
        # What is being merged stays until that is over.
        busy = set(self._merge.sources) if self._merge is not None and self._merge not in done else set()
        removed = {run.name for work in done for run in work.sources}
        removed |= {run.name for _, run in self._runs if run.last_day <= self._acknowledged_forgotten_day and run not in busy}
        if not done and not removed:
            return None
        made = [run.name for work in done if (run := work.future.result()) is not None]
        through = self._rotation.blobs_through_sequence if self._rotation in done and self._rotation is not None else None
        return RunsChange(tuple(made), tuple(sorted(removed)), through)

    def adopt(self, change: RunsChange) -> None:
        """The change is in the local store: act on it."""
        added = set(change.added)
        for work in (self._rotation, self._merge):
            if work is not None and work.done and (made := work.future.result()) and made.name in added:
                self._runs.append((work.level, made))
        gone = set(change.removed)
        self._runs = [(level, run) for level, run in self._runs if run.name not in gone]
        for name in gone:
            # The rows stay readable where they are still mapped.
            (self._folder / name).unlink(missing_ok=True)
        if change.blobs_through_sequence is not None:
            self._frozen, self._frozen_days, self._frozen_at_keys = {}, {}, None
            self._rotation = None
        if self._merge is not None and all(run.name in gone for run in self._merge.sources):
            self._merge = None
        self._start_work()

    def settle(self) -> None:
        """Wait until the other thread has nothing to do; for tests and measurements."""
        for work in (self._rotation, self._merge):
            if work is not None:
                work.future.exception()

    def close(self) -> None:
        """Stop the other threads. What they had not finished is begun anew at the next start."""
        self._closing = True
        self._threads.shutdown(wait=True)

    @property
    def writing(self) -> bool:
        """Whether keys are on their way into a run."""
        return self._rotation is not None

    @property
    def keys_on_disk(self) -> int:
        return sum(len(run.rows) for _, run in self._runs)

    @property
    def filter_bytes(self) -> int:
        """RAM that grows with the number of keys."""
        return sum(run.filter_bytes for _, run in self._runs)

    @property
    def recent_keys(self) -> int:
        """Keys in dictionaries: bounded by twice RECENT_KEYS_MAX and what is in flight."""
        return len(self._recent) + len(self._frozen)

    def _start_work(self) -> None:
        if self._closing:
            return
        forgotten = self._acknowledged_forgotten_day
        if self._rotation is None and self._frozen_at_keys is not None and self._acknowledged_keys >= self._frozen_at_keys:
            # Whatever else is pending goes along: it is then both in `recent` and in the run, which is harmless.
            entries, self._pending = self._pending, []
            path = self._next_path(0)
            self._rotation = _Work(self._threads.submit(_write, path, entries, forgotten), (), 0, self._last_sequence)
        if self._merge is None:
            for level in range(LEVELS - 1):
                sources = tuple(run for of_level, run in self._runs if of_level == level)[:RUNS_PER_LEVEL]
                if len(sources) == RUNS_PER_LEVEL:
                    path = self._next_path(level + 1)
                    future = self._threads.submit(merge_runs, path, sources, forgotten, self._is_closing)
                    self._merge = _Work(future, sources, level + 1, None)
                    break

    def _next_path(self, level: int) -> Path:
        path = self._folder / f"{level}-{self._next_number:012d}.run"
        self._next_number += 1
        return path

    def _is_closing(self) -> bool:
        return self._closing


def _write(path: Path, entries: Sequence[tuple[int, bytes]], forgotten_through_day: int) -> Run | None:
    rows = rows_from_entries(entries).living(forgotten_through_day)
    return write_run(path, rows) if len(rows) else None


def _level_of(name: str) -> int:
    return int(name.partition("-")[0])


def _number_of(name: str) -> int:
    return int(name.partition("-")[2].removesuffix(".run"))
