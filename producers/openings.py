"""Openings beside the journal: what a request that has only begun becomes if its process dies, in memory that outlives it.

Promise: what `put` has taken is there for the next process on this machine, however this one ends, until `clear`. The file is
mapped, and what is written to a mapped page is the kernel's at once: no call of the system, no wait, and no row that must be
written and taken away again for a request that is over in a moment.

A machine that loses its power may lose it, in any order. So the file names the boot in which it was written, and another boot
reads nothing of it; where a system has no name for its boots, nothing is taken here. That is why an opening that already says
what was used is not put here: what is billed is on the disk before anything that it pays for leaves.

Whether the end of a request was committed, the journal's numbering tells: before a commit each request that it ends has the
number of its last event noted beside it, and the number is either taken after a crash, or it is not.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from producers.journal_store import OpenRow

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CELLS", "CELL_BYTES", "Openings"]

CELL_BYTES: Final = 1_024
CELLS: Final = 1_024
_FILE_BYTES: Final = CELL_BYTES * (1 + CELLS)
# With less than this left of the disk, openings go the way on which a full disk shows: this file has had its room. Looked at
# again after so long: a disk fills up no faster than that, and whoever was taken a moment too late has the journal's reserve.
_FREE_BYTES_MIN: Final = 16 << 20
_ROOM_KNOWN_S: Final = 0.01
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
# Of what follows its checksum: length of the event, slot, partition.
_CELL: Final = struct.Struct("<IIqi")
# A checksum of its own, the partition and the number of the event that ends the request.
_END: Final = struct.Struct("<Iiq")
_END_AT: Final = _CELL.size
_EVENT_AT: Final = _END_AT + _END.size
_NO_END: Final = bytes(_END.size)
_EMPTY: Final = bytes(4)


class Openings:
    """One mapped file; with no file (`capacity` 0) it takes nothing. Callers see to it that one thread at a time is in here."""

    def __init__(self, path: Path, token: str | None) -> None:
        """`token`: what the journal has noted of its file; another file than that one is begun anew, and `token` with it."""
        self._cells: dict[int, int] = {}
        self._map: mmap.mmap | None = None
        self._folder = path.parent
        self._has_room_until = 0.0
        self.token = token
        boot_id = _boot_id()
        if boot_id is None:
            self._free: list[int] = []
            return
        self._map = _map(path)
        self._free = [] if self._map is None else list(range(CELLS, 0, -1))
        if self._map is not None and (token is None or self._map[:CELL_BYTES] != _header(token, boot_id)):
            self.token = token = secrets.token_hex(16)
            self._map[:] = bytes(_FILE_BYTES)
            self._map[:CELL_BYTES] = _header(token, boot_id)

    @property
    def capacity(self) -> int:
        """How many more it takes."""
        return len(self._free)

    def left(self, highest: Mapping[int, int]) -> list[OpenRow]:
        """What an earlier process left open; `highest`: the last number of each partition. Called before anything is put."""
        rows: list[OpenRow] = []
        for cell in list(self._free):
            row = self._read(cell, highest)
            if row is not None:
                rows.append(row)
                self._cells[row.slot] = cell
                self._free.remove(cell)
                # The number that was noted was never taken, and the next event may be another's.
                self.note_end(row.slot, 0, 0)
        return rows

    def _read(self, cell: int, highest: Mapping[int, int]) -> OpenRow | None:
        assert self._map is not None, "cells are a file's"
        data = self._map[cell * CELL_BYTES : (cell + 1) * CELL_BYTES]
        checksum, length, slot, partition = _CELL.unpack_from(data)
        event = data[_EVENT_AT : _EVENT_AT + length]
        if checksum == 0 or len(event) != length or checksum != _checksum(slot, partition, event):
            return None
        end_checksum, end_partition, sequence = _END.unpack_from(data, _END_AT)
        is_noted = sequence > 0 and end_checksum == zlib.crc32(_END.pack(0, end_partition, sequence))
        if is_noted and sequence <= highest.get(end_partition, 0):
            return None
        return OpenRow(slot, partition, event)

    def put(self, slot: int, partition: int, event: bytes) -> bool:
        """Take it; False: there is no place, or it is too large, or the disk is nearly full."""
        if not self._free or len(event) > CELL_BYTES - _EVENT_AT:
            return False
        now = time.monotonic()
        if now >= self._has_room_until:
            if not _has_room(self._folder):
                return False
            self._has_room_until = now + _ROOM_KNOWN_S
        assert self._map is not None, "cells are a file's"
        cell = self._free.pop()
        head = _CELL.pack(_checksum(slot, partition, event), len(event), slot, partition)
        at = cell * CELL_BYTES
        self._map[at : at + _EVENT_AT + len(event)] = head + _NO_END + event
        self._cells[slot] = cell
        return True

    def note_end(self, slot: int, partition: int, sequence: int) -> None:
        """It ends with the event of this number, if that comes to be; 0: it did not."""
        cell = self._cells.get(slot)
        if cell is not None and self._map is not None:
            at = cell * CELL_BYTES + _END_AT
            end = _END.pack(zlib.crc32(_END.pack(0, partition, sequence)), partition, sequence)
            self._map[at : at + _END.size] = end

    def clear(self, slot: int) -> None:
        """The journal has its end, or a later word of it."""
        cell = self._cells.pop(slot, None)
        if cell is not None and self._map is not None:
            at = cell * CELL_BYTES
            self._map[at : at + 4] = _EMPTY
            self._free.append(cell)

    def close(self) -> None:
        """Let go of the file; it keeps what it holds."""
        if self._map is not None:
            self._map.close()


def _boot_id() -> str | None:
    try:
        return _BOOT_ID.read_text().strip() or None
    except OSError:
        return None


def _header(token: str, boot_id: str) -> bytes:
    return f"openings 1\n{token}\n{boot_id}\n".encode().ljust(CELL_BYTES, b"\0")


def _checksum(slot: int, partition: int, event: bytes) -> int:
    # Never 0, which is an empty cell.
    return zlib.crc32(event, zlib.crc32(_CELL.pack(0, len(event), slot, partition))) or 1


def _map(path: Path) -> mmap.mmap | None:
    """The file in memory; None: there is none now. Openings then go to the journal's own file, as all else does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size != _FILE_BYTES and not _fill(path, descriptor):
            path.unlink(missing_ok=True)
            return None
        return mmap.mmap(descriptor, _FILE_BYTES)
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _has_room(folder: Path) -> bool:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize >= _FREE_BYTES_MIN


def _fill(path: Path, descriptor: int) -> bool:
    """Write all of it once, so that no page can want for room later; whether there is room."""
    if not _has_room(path.parent):
        return False
    try:
        os.ftruncate(descriptor, 0)
        return os.write(descriptor, bytes(_FILE_BYTES)) == _FILE_BYTES
    except OSError:
        return False
