"""A run: remembered dedupe keys in one sorted, immutable file, with a filter before it.

Promise: a run that `open_run` returns holds exactly the rows that were written, or it raises `DamagedRunError`; a file appears
under its name complete and synced, or not at all. A lookup takes many keys at once and costs a few nanoseconds for each that is
not here.

Why not RocksDB for these rows: putting a random key costs 1.4-2.5 µs through its memtable, or 1.0 µs as a sorted file with its
compaction (0.6 µs of it on the stream's own thread), and 45 bytes of disk. A run costs about 0.3 µs, nearly all of it on
another thread with Python's lock released, and 26 bytes. RocksDB keeps the rest (`local_store`), the list of runs among it.

A row is a key's 16 bytes as two numbers, the payload's fingerprint, and the day on which it is forgotten. Columns lie one after
the other, rows sorted by the first number. The filter sets five bits of one 64-bit word for each row; it is in memory only, and
is made again from the columns when a run is opened.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = [
    "BYTES_PER_ROW",
    "DamagedRunError",
    "Query",
    "Run",
    "merge_runs",
    "open_run",
    "rows_digest",
    "rows_from_entries",
    "sync_folder",
    "write_run",
]

U64 = npt.NDArray[np.uint64]
U16 = npt.NDArray[np.uint16]

BYTES_PER_ROW = 26
ENTRY_BYTES = 24

_MAGIC = b"taxiseen"
_HEADER = struct.Struct("<8sQHHII")  # magic, rows, first day, last day, CRC-32 of the columns, 0
_HEADER_BYTES = 64
_NUMBER = np.dtype("<u8")
_DAY = np.dtype("<u2")
_CANONICAL_ROW = np.dtype([("high", ">u8"), ("low", ">u8"), ("fingerprint", ">u8"), ("day", ">u2")])

_FILTER_BITS_PER_ROW = 20
_FILTER_PROBES = 5
_HALF = np.uint64(32)
_LOW_BITS = np.uint64(63)
_ONE = np.uint64(1)

# How many rows of all sources a merge holds in memory at once: 26 MB of them and as much again for the order.
_MERGE_ROWS = 1 << 20
_CHECKSUM_BYTES = 1 << 24


class DamagedRunError(RuntimeError):
    """A run's file is not what was written."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Some remembered keys, as columns of one length."""

    high: U64
    low: U64
    fingerprint: U64
    day: U16

    def __len__(self) -> int:
        return len(self.high)

    def merged(self) -> Rows:
        """Sorted, where they are sorted parts one after the other: a stable sort merges those."""
        return self.take(np.argsort(self.high, kind="stable"))

    def take(self, which: npt.NDArray[np.intp]) -> Rows:
        return Rows(self.high[which], self.low[which], self.fingerprint[which], self.day[which])

    def part(self, start: int, end: int) -> Rows:
        return Rows(self.high[start:end], self.low[start:end], self.fingerprint[start:end], self.day[start:end])

    def living(self, forgotten_through_day: int) -> Rows:
        alive = self.day > forgotten_through_day
        return self if alive.all() else self.take(np.flatnonzero(alive))

    def distinct(self) -> Rows:
        """Of rows that are the same next to each other, one."""
        columns = (self.high, self.low, self.fingerprint, self.day)
        differs = np.ones(len(self), dtype=bool)
        differs[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
        return self.take(np.flatnonzero(differs))


def concatenated(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.high for part in parts]),
        np.concatenate([part.low for part in parts]),
        np.concatenate([part.fingerprint for part in parts]),
        np.concatenate([part.day for part in parts]),
    )


def rows_from_entries(entries: Sequence[tuple[int, bytes]]) -> Rows:
    """The rows of a ledger's `RememberedKeys`, (day, entries of 24 bytes), sorted."""
    high, low, fingerprint = _numbers(b"".join(data for _, data in entries), 3)
    counts = [len(data) // ENTRY_BYTES for _, data in entries]
    days = np.repeat(np.array([day for day, _ in entries], dtype=_DAY), counts)
    return Rows(high, low, fingerprint, days).take(np.argsort(high))


def _numbers(data: bytes, columns: int) -> list[U64]:
    """The columns of rows of big-endian numbers."""
    table = np.frombuffer(data, dtype=_NUMBER).reshape(-1, columns)
    return [table[:, column].byteswap() for column in range(columns)]


class Query:
    """Keys that are looked for, prepared once for all runs."""

    __slots__ = ("half", "high", "low", "mask")

    def __init__(self, digests: Sequence[bytes]) -> None:
        self.high, self.low = _numbers(b"".join(digests), 2)
        self.half: U64 = self.high >> _HALF
        self.mask: U64 = _mask(self.low)

    def __len__(self) -> int:
        return len(self.high)


class Run:
    """One opened file. Immutable; the rows stay on disk (mapped), the filter in memory."""

    def __init__(self, path: Path, rows: Rows, words: U64) -> None:
        self.path = path
        self.rows = rows
        self.first_day = int(rows.day.min())
        self.last_day = int(rows.day.max())
        self._words = words
        self._words_count = np.uint64(len(words))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def filter_bytes(self) -> int:
        return int(self._words.nbytes)

    def find(self, query: Query, forgotten_through_day: int, found: list[bytes | None]) -> None:
        """Put the fingerprint of each key that is here, and not forgotten, into `found` at its index."""
        words = self._words[(query.half * self._words_count) >> _HALF]
        np.bitwise_and(words, query.mask, out=words)
        candidates = np.flatnonzero(words == query.mask)
        if len(candidates) == 0:
            return
        rows = self.rows
        high = query.high[candidates]
        # The first row with this number. Two keys that share their first 64 bits are next to each other: look on while they do.
        places = np.searchsorted(rows.high, high)
        for index, place in zip(candidates.tolist(), places.tolist(), strict=True):
            wanted_high = query.high[index]
            while place < len(rows) and rows.high[place] == wanted_high:
                if rows.low[place] == query.low[index]:
                    if rows.day[place] > forgotten_through_day:
                        found[index] = int(rows.fingerprint[place]).to_bytes(8, "big")
                    break
                place += 1


def write_run(path: Path, rows: Rows) -> Run:
    """Write sorted rows (at least one) under `path`, synced, and open them."""
    return _write(path, len(rows), lambda put: put(rows))


def open_run(path: Path) -> Run:
    """Map a run, check every byte of it, and make its filter."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError as error:
        raise DamagedRunError(f"{path} cannot be read ({error})") from error
    if len(header) != _HEADER_BYTES:
        raise DamagedRunError(f"{path} has {size} bytes, less than its header")
    magic, count, first_day, last_day, checksum, _ = _HEADER.unpack_from(header)
    if magic != _MAGIC or count == 0 or size != _HEADER_BYTES + count * BYTES_PER_ROW:
        raise DamagedRunError(f"{path} is not a run of {count} rows: {size} bytes")
    rows = _map(path, count)
    if _checksum(rows) != checksum:
        raise DamagedRunError(f"{path} does not have the checksum {checksum:08x} that it was written with")
    run = Run(path, rows, _make_filter(rows))
    if (run.first_day, run.last_day) != (first_day, last_day):
        raise DamagedRunError(f"{path} has days {run.first_day} to {run.last_day}, its header says {first_day} to {last_day}")
    return run


def merge_runs(path: Path, runs: Sequence[Run], forgotten_through_day: int, cancelled: Callable[[], bool]) -> Run | None:
    """One run of all living rows of `runs`, slice by slice of the key space; None when none lives.

    Raises CancelledError, and leaves no file, when `cancelled` says so between two slices.
    """
    total = sum(int(np.count_nonzero(run.rows.day > forgotten_through_day)) for run in runs)
    if total == 0:
        return None
    slices, bounds = _slices([run.rows for run in runs])

    def fill(put: Callable[[Rows], None]) -> None:
        for i in range(slices):
            if cancelled():
                raise CancelledError
            parts = [
                run.rows.part(bound[i], bound[i + 1]).living(forgotten_through_day)
                for run, bound in zip(runs, bounds, strict=True)
            ]
            put(concatenated(parts).merged())

    return _write(path, total, fill)


def rows_digest(sources: Sequence[Rows], forgotten_through_day: int) -> bytes:
    """`billing.state.SeenKeys.digest` of the living rows of all `sources`, each of them sorted; slice by slice."""
    slices, bounds = _slices(sources)
    running = hashlib.sha256()
    for i in range(slices):
        parts = [
            rows.part(bound[i], bound[i + 1]).living(forgotten_through_day) for rows, bound in zip(sources, bounds, strict=True)
        ]
        rows = concatenated(parts).merged()
        if np.any(rows.high[1:] == rows.high[:-1]):
            # Keys that are in two places, on their way from one to the other, or that share their first half.
            rows = rows.take(np.lexsort((rows.day, rows.fingerprint, rows.low, rows.high))).distinct()
        packed = np.empty(len(rows), dtype=_CANONICAL_ROW)
        packed["high"], packed["low"], packed["fingerprint"], packed["day"] = rows.high, rows.low, rows.fingerprint, rows.day
        running.update(packed.tobytes())
    return running.digest()


def _slices(sources: Sequence[Rows]) -> tuple[int, list[list[int]]]:
    """In how many slices of the key space to go through sorted rows, and where each source has its bounds."""
    count = max(1, -(-sum(len(rows) for rows in sources) // _MERGE_ROWS))
    edges = np.array([(i << 64) // count for i in range(1, count)], dtype=np.uint64)
    return count, [[0, *np.searchsorted(rows.high, edges).tolist(), len(rows)] for rows in sources]


def _write(path: Path, count: int, fill: Callable[[Callable[[Rows], None]], None]) -> Run:
    """Write what `fill` puts. A file that was not finished keeps its draft's name, and goes at the next start."""
    draft = path.with_suffix(".draft")
    written = 0
    # Written, not mapped: a full disk is then an error and not the end of the process, and a new page costs less.
    with draft.open("wb") as file:

        def put(rows: Rows) -> None:
            nonlocal written
            start = 0
            for column in (rows.high, rows.low, rows.fingerprint, rows.day):
                file.seek(_HEADER_BYTES + start * count + written * column.itemsize)
                file.write(column.data)
                start += column.itemsize
            written += len(rows)

        fill(put)
        if written != count:
            raise AssertionError(f"{path} was to get {count} rows and got {written}")
        file.flush()
        rows = _map(draft, count)
        file.seek(0)
        file.write(_HEADER.pack(_MAGIC, count, int(rows.day.min()), int(rows.day.max()), _checksum(rows), 0))
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync_folder(path.parent)
    return Run(path, rows, _make_filter(rows))


def _map(path: Path, count: int) -> Rows:
    def column(dtype: np.dtype[np.uint64] | np.dtype[np.uint16], offset: int) -> npt.NDArray[np.uint64]:
        return np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES + offset, shape=(count,))

    return Rows(
        np.asarray(column(_NUMBER, 0)),
        np.asarray(column(_NUMBER, 8 * count)),
        np.asarray(column(_NUMBER, 16 * count)),
        np.asarray(column(_DAY, 24 * count), dtype=np.uint16),
    )


def _checksum(rows: Rows) -> int:
    checksum = 0
    for column in (rows.high, rows.low, rows.fingerprint, rows.day):
        data = column.view(np.uint8).data
        for start in range(0, len(data), _CHECKSUM_BYTES):
            checksum = zlib.crc32(data[start : start + _CHECKSUM_BYTES], checksum)
    return checksum


def _mask(low: U64) -> U64:
    mask = _ONE << (low & _LOW_BITS)
    for i in range(1, _FILTER_PROBES):
        mask |= _ONE << ((low >> np.uint64(6 * i)) & _LOW_BITS)
    return mask


def _make_filter(rows: Rows) -> U64:
    count = max(1, len(rows) * _FILTER_BITS_PER_ROW // 64)
    words = np.zeros(count, dtype=np.uint64)
    for start in range(0, len(rows), _MERGE_ROWS):
        part = rows.part(start, start + _MERGE_ROWS)
        # Rows are sorted by the number that also picks the word, so a word's rows are neighbours.
        places = ((part.high >> _HALF) * np.uint64(count)) >> _HALF
        firsts = np.flatnonzero(np.concatenate(([True], places[1:] != places[:-1])))
        words[places[firsts]] |= np.bitwise_or.reduceat(_mask(part.low), firsts)
    return words


def sync_folder(folder: Path) -> None:
    """Make the names in it outlive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
