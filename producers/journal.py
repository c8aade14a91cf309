"""The journal: usage on this machine's disk until the ledger has it.

Promise: what `append`, `update` and `close_request` hand back a receipt for is on disk when the receipt says so, it keeps its
place in the numbering of its partition over every restart, and it leaves the disk only by `free`. What `open` takes is there
for the next process, however this one ends; only a machine that loses its power may lose it, where it says of no usage (see
`producers.openings`). What does not fit is refused with `JournalFull` before anything of it is kept.

The callers only put bytes into the pending group. One thread swaps that group for an empty one, numbers its events, commits
it, settles its receipt, and takes the next: while the disk works on one group, the next one gathers. Numbers are given at the
commit, so a group that failed leaves no gap. What comes from an event loop is committed when the loop has done what it has
before it: one commit, and one wake, for all that it records in that time. Whoever blocks a thread for a receipt waits for
no loop.

A journal belongs to one process: it holds a lock on the file beside it, which the kernel lets go when the process ends,
however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from billing.limits import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, ID_CHARS_MAX
from billing.v1.usage_pb2 import RawUsageBatch
from producers.errors import (
    JournalClosed,
    JournalError,
    JournalFull,
    JournalLocked,
    JournalMismatch,
    JournalWriteFailed,
)
from producers.journal_group import Busy, Group, gather_s
from producers.journal_store import EVENT_ENVELOPE_BYTES, JournalStore, OpenRow, Page, SegmentRow
from producers.openings import Openings
from producers.receipt import SETTLED, Receipt

__all__ = ["EVENT_BYTES_MAX", "Journal", "JournalSettings", "Page"]

# A batch's own fields: producer ID, sequences, version.
BATCH_ENVELOPE_BYTES = 4 * ID_CHARS_MAX + 64
# Of one event: it must fit into a batch alone.
EVENT_BYTES_MAX = BATCH_BYTES_MAX - BATCH_ENVELOPE_BYTES - EVENT_ENVELOPE_BYTES
# What an open request counts for in journal_bytes: room for the event that it becomes, so that closing it is never refused.
OPEN_REQUEST_BYTES = 1_024
_FREE_RETRY_S = 1.0
_UNTOLD_S = 0.5


@dataclass(frozen=True)
class JournalSettings:
    """Bounds and identity. `producer_id` empty: one is made, which begins with the prefix, and kept in the journal."""

    partitions: int
    producer_id: str = ""
    producer_id_prefix: str = ""
    journal_bytes_max: int = 1 << 30
    # Of events that wait in memory for the disk.
    pending_bytes_max: int = 64 << 20

    def __post_init__(self) -> None:
        for name in ("partitions", "journal_bytes_max", "pending_bytes_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: set it to 1 or more")
        if len(self.producer_id_prefix) > ID_CHARS_MAX // 2:
            raise ValueError(f"producer_id_prefix: {len(self.producer_id_prefix)} characters; set at most {ID_CHARS_MAX // 2}")
        if len(self.producer_id) > ID_CHARS_MAX:
            raise ValueError(f"producer_id: {len(self.producer_id)} characters; set at most {ID_CHARS_MAX}")


class Journal:
    """One open journal. Every method may be called from any thread."""

    def __init__(self, path: Path, settings: JournalSettings) -> None:
        """Open or begin the journal at `path`. Raises any `JournalError` but `JournalClosed`."""
        self.path = path
        self.settings = settings
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_descriptor = _lock(path)
        try:
            self._store = JournalStore(path)
            try:
                highest = self._store.highest_sequences()
                self._openings = self._map_openings()
                rows = self._store.open_rows()
                self._rows = {row.slot for row in rows}
                # Of a request that is in both, the row is what came later.
                latest = {row.slot: row for row in chain(self._openings.left(highest), rows)}
                self._left_open = sorted(latest.values())
                self.producer_id = self._identify(numbered=bool(highest or self._left_open))
                # Who holds something under this producer's ID holds it under its start: see `billing.leases`.
                self.starts = int(self._store.mark("starts") or 0) + 1
                self._store.set_mark("starts", str(self.starts))
                self._highest = [highest.get(partition, 0) for partition in range(settings.partitions)]
                freed = self._store.freed_sequences()
                self._freed = [freed.get(partition, 0) for partition in range(settings.partitions)]
                self._event_bytes = self._store.event_bytes()
            except BaseException:
                self._store.close()
                raise
        except BaseException:
            os.close(self._lock_descriptor)
            raise
        self._open = {row.slot for row in self._left_open}
        self._next_slot = max(self._open, default=0) + 1
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._group = Group(self._hurry)
        self._pending_bytes = 0
        self._to_free: dict[int, int] = {}
        self._free_not_before = 0.0
        # Of the last commit: when it began, of how many requests it was, and how much of the processor it took.
        self._committed_at = 0.0
        self._commit_requests = 0
        self._commit_busy_s = 0.0
        self._busy = Busy()
        self._closing = False
        self._writer_error: BaseException | None = None
        self._subscribers: list[threading.Event] = []
        self._recorded = self._durable = self._failed = self._refused = self._commits = 0
        self._writer = threading.Thread(target=self._write, name="journal-writer", daemon=True)
        self._writer.start()

    # What callers do.

    def append(self, partition: int, event: bytes) -> Receipt:
        """Take a serialized event. Raises `JournalFull` or `JournalClosed`; after that the receipt tells."""
        with self._lock:
            self._admit(len(event) + EVENT_ENVELOPE_BYTES)
            group = self._group
            self._add_event(group, partition, event)
            self._wake(group)
        return group.receipt

    def open(self, partition: int, event: bytes, *, has_usage: bool = True) -> tuple[int, Receipt]:
        """Take a request that begins: `event` is what it becomes if this process dies. Returns its slot.

        Without usage it need not outlive the machine: it is there at once, where there is a place for it. Raises `JournalFull`
        also where the disk has no reserve with which the request could be closed.
        """
        with self._lock:
            self._admit(OPEN_REQUEST_BYTES)
            if not self._store.has_reserve:
                self._refused += 1
                raise JournalFull(
                    f"journal_path={self.path}: the disk is full, or nearly: there is no room to close another request with; "
                    f"free space on it"
                )
            slot = self._next_slot
            self._next_slot += 1
            self._open.add(slot)
            if not has_usage and self._openings.put(slot, partition, event):
                return slot, SETTLED
            group = self._group
            group.opened[slot] = (partition, event)
            group.started.add(slot)
            self._wake(group)
        return slot, group.receipt

    def update(self, slot: int, partition: int, event: bytes) -> Receipt:
        """Replace what the open request becomes if this process dies; the last of a group is the one that is written."""
        with self._lock:
            self._refuse_if_closed()
            group = self._group
            group.opened[slot] = (partition, event)
            self._wake(group)
        return group.receipt

    def close_request(self, slot: int, partition: int, event: bytes) -> Receipt:
        """Turn the open request into `event`, in one transaction. Never refused for want of room: `open` saw to it."""
        with self._lock:
            self._refuse_if_closed()
            group = self._group
            group.opened.pop(slot, None)
            group.closed[slot] = (partition, len(group.events[partition]))
            self._add_event(group, partition, event)
            self._wake(group)
        return group.receipt

    def left_open(self) -> Sequence[OpenRow]:
        """The requests that an earlier process left open and that `close_request` has not moved since."""
        with self._lock:
            self._left_open = [row for row in self._left_open if row.slot in self._open]
            return self._left_open

    # What the publisher does.

    def highest_sequence(self, partition: int) -> int:
        """The highest number assigned in this partition, on disk; 0 where nothing ever was."""
        return self._highest[partition]

    def freed_sequence(self, partition: int) -> int:
        """Up to here, the events have been let go."""
        return self._freed[partition]

    def read(self, partition: int, after_sequence: int, events_max: int, bytes_max: int) -> Page:
        """Durable events in their order: see `JournalStore.read`."""
        return self._store.read(partition, after_sequence, events_max, bytes_max)

    def free(self, partition: int, covered_sequence: int) -> None:
        """The ledger has everything up to and including this: let go of it, soon."""
        with self._lock:
            if covered_sequence > max(self._to_free.get(partition, 0), self._freed[partition]):
                self._to_free[partition] = covered_sequence
                self._work.notify()

    def subscribe(self, event: threading.Event) -> None:
        """Set `event` after each commit."""
        with self._lock:
            self._subscribers = [*self._subscribers, event]

    def oldest_unacknowledged_ms(self, now_ms: int) -> int:
        """The age of the oldest event that the journal still holds; 0 when it holds none."""
        committed = (self._store.oldest_committed_ms(partition) for partition in range(self.settings.partitions))
        return max((now_ms - at for at in committed if at is not None), default=0)

    def metrics(self) -> dict[str, int]:
        """Counts since this process opened the journal, and how much it holds now."""
        with self._lock:
            return {
                "recorded": self._recorded,
                "durable": self._durable,
                "refused": self._refused,
                "failed": self._failed,
                "commits": self._commits,
                "open_requests": len(self._open),
                "journal_bytes": self._journal_bytes(),
                "journal_bytes_max": self.settings.journal_bytes_max,
                "pending_bytes": self._pending_bytes,
            }

    def close(self, timeout_s: float = 30.0) -> None:
        """Commit what is pending, close the file, let go of the lock. Raises `JournalError` if the disk takes too long."""
        with self._lock:
            self._closing = True
            self._work.notify()
        self._writer.join(timeout_s)
        if self._writer.is_alive():
            raise JournalError(
                f"timeout_s={timeout_s:g}: the disk under {self.path} has not taken the last events in time; "
                f"receipts that are not settled are not durable"
            )

    # Inside.

    def _journal_bytes(self) -> int:
        return self._event_bytes + len(self._open) * OPEN_REQUEST_BYTES

    def _refuse_if_closed(self) -> None:
        if self._closing or self._writer_error is not None:
            cause = f" after {self._writer_error!r}" if self._writer_error is not None else ""
            raise JournalClosed(f"journal_path={self.path}: the journal is closed{cause}; open it anew")

    def _admit(self, size: int) -> None:
        self._refuse_if_closed()
        if self._journal_bytes() + size > self.settings.journal_bytes_max:
            self._refused += 1
            raise JournalFull(
                f"journal_bytes_max={self.settings.journal_bytes_max}: the journal {self.path} holds {self._journal_bytes()} "
                f"bytes that the ledger has not acknowledged; see to it that Kafka and the ledger take usage, or set it higher"
            )
        if self._pending_bytes + size > self.settings.pending_bytes_max:
            self._refused += 1
            raise JournalFull(
                f"pending_bytes_max={self.settings.pending_bytes_max}: {self._pending_bytes} bytes wait in memory for the disk "
                f"under {self.path}; record more slowly, or use a faster disk"
            )

    def _add_event(self, group: Group, partition: int, event: bytes) -> None:
        size = len(event) + EVENT_ENVELOPE_BYTES
        group.events[partition].append(event)
        group.count += 1
        group.event_bytes += size
        self._event_bytes += size
        self._pending_bytes += size
        self._recorded += 1

    def _wake(self, group: Group) -> None:
        """Something is in the group: tell the writer, in an event loop once that has done what it has before it."""
        if group.woken:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            group.woken = True
            self._work.notify()
            return
        if group.woken_by is not loop:
            group.woken_by = loop
            loop.call_soon(self._look, group, loop)

    def _look(self, group: Group, loop: asyncio.AbstractEventLoop) -> None:
        """In the loop that filled the group, after all that was ready with it: tell the writer, now or when others have had
        time to join."""
        pause_s = self._gather_s(time.monotonic())
        if pause_s:
            loop.call_later(pause_s, self._hurry, group)
        else:
            self._hurry(group)

    def _gather_s(self, now: float) -> float:
        if not self._busy.now:
            return 0.0
        return gather_s(self._commit_requests, self._commit_busy_s, now - self._committed_at)

    def _hurry(self, group: Group) -> None:
        if group.woken:
            return
        with self._lock:
            group.woken = True
            self._work.notify()

    def _map_openings(self) -> Openings:
        noted = self._store.mark("openings")
        openings = Openings(self.path.with_name(self.path.name + ".open"), noted)
        if openings.token is not None and openings.token != noted:
            self._store.set_mark("openings", openings.token)
        return openings

    def _identify(self, *, numbered: bool) -> str:
        """Check the journal against the settings, or note them in a new one; returns the producer ID."""
        store, settings = self._store, self.settings
        noted_partitions = store.mark("partitions")
        if numbered and noted_partitions != str(settings.partitions):
            raise JournalMismatch(
                f"partitions={settings.partitions}: the journal {self.path} numbers its events for {noted_partitions}; "
                f"set it back, or begin a new journal once this one has been published"
            )
        noted_id = store.mark("producer_id")
        producer_id = settings.producer_id or noted_id or settings.producer_id_prefix + secrets.token_hex(16)
        if numbered and noted_id != producer_id:
            raise JournalMismatch(
                f"producer_id={producer_id}: the journal {self.path} numbers its events as {noted_id}; "
                f"set it back, or begin a new journal once this one has been published"
            )
        if noted_partitions != str(settings.partitions):
            store.set_mark("partitions", str(settings.partitions))
        if noted_id != producer_id:
            store.set_mark("producer_id", producer_id)
        return producer_id

    # The writer's thread.

    def _write(self) -> None:
        taken: Group | None = None
        try:
            while (taken := self._take()) is not None:
                if not taken.is_empty:
                    self._commit(taken)
                    taken = None
                self._free_some()
                if not self._store.has_reserve:
                    self._store.set_aside()
        except BaseException as error:
            # A fault of ours, not of the disk: whoever waits must hear of it, and nobody may record into the void.
            with self._lock:
                self._writer_error = error
                pending, self._group = self._group, Group()
            for lost in (taken, pending):
                if lost is not None and not lost.is_empty:
                    lost.receipt.settle(JournalWriteFailed(f"journal_path={self.path}: its writer ended on {error!r}"))
            raise
        finally:
            self._store.close()
            self._openings.close()
            os.close(self._lock_descriptor)

    def _take(self) -> Group | None:
        """Wait for work; None when the journal is closing and nothing is left."""
        with self._lock:
            while not (self._group.woken or self._closing):
                if not self._store.has_reserve:
                    # Nothing may come that would wake us: whoever would open a request is refused.
                    self._work.wait(_FREE_RETRY_S)
                    break
                if not self._to_free:
                    if self._has_waited_untold():
                        break
                elif (pause_s := self._free_not_before - time.monotonic()) > 0:
                    self._work.wait(pause_s)
                else:
                    break
            if self._closing and self._group.is_empty:
                return None
            # Where an event loop told of it, it has waited for others.
            if not (self._closing or self._group.is_empty or self._group.woken_by) and (
                pause_s := self._gather_s(time.monotonic())
            ):
                self._work.wait(pause_s)
            group, self._group = self._group, Group(self._hurry)
            return group

    def _has_waited_untold(self) -> bool:
        """Wait for a while; whether a group has stood there all the time. An event loop that ended or stands still tells nobody
        of what it recorded."""
        group, was_empty = self._group, self._group.is_empty
        return not (self._work.wait(_UNTOLD_S) or was_empty) and self._group is group

    def _commit(self, group: Group) -> None:
        self._committed_at, began_s = time.monotonic(), time.thread_time()
        self._busy.look(self._committed_at, time.process_time())
        highest, segments = self._number(group)
        opened = [OpenRow(slot, partition, event) for slot, (partition, event) in group.opened.items()] if group.opened else ()
        # Many a request ends without ever having had a row.
        closed = [slot for slot in group.closed if slot in self._rows or slot in group.opened]
        owed = not (group.started.issuperset(group.closed) and group.started.issuperset(group.opened))
        with self._lock:
            for slot, (partition, place) in group.closed.items():
                self._openings.note_end(slot, partition, self._highest[partition] + 1 + place)
        error: JournalError | None = None
        try:
            self._store.commit(segments, opened, closed, owed=owed)
        except JournalError as refusal:
            error = refusal
        with self._lock:
            self._pending_bytes -= group.event_bytes
            if error is None:
                self._commits += 1
                self._durable += group.count
                self._event_bytes += sum(len(segment.events) for segment in segments) - group.event_bytes
                self._open.difference_update(group.closed)
                self._rows.update(group.opened)
                self._rows.difference_update(closed)
                for slot in chain(group.opened, group.closed):
                    self._openings.clear(slot)
                for partition, sequence in highest.items():
                    self._highest[partition] = sequence
            else:
                self._failed += group.count
                self._event_bytes -= group.event_bytes
                self._open.difference_update(group.started)
                for slot, (partition, _) in group.closed.items():
                    self._openings.note_end(slot, partition, 0)
        group.receipt.settle(error)
        self._commit_requests = len(group.opened) + len(group.closed)
        self._commit_busy_s = time.thread_time() - began_s
        if error is None:
            for event in self._subscribers:
                event.set()

    def _number(self, group: Group) -> tuple[dict[int, int], list[SegmentRow]]:
        """The group's events as segments, none larger than a batch may be, numbered on from the last that is durable."""
        committed_ms = time.time_ns() // 1_000_000
        highest: dict[int, int] = {}
        segments: list[SegmentRow] = []
        for partition, events in group.events.items():
            sequence = self._highest[partition]
            for part in _cut(events):
                blob = RawUsageBatch(events=part).SerializeToString()
                segments.append(SegmentRow(partition, sequence + 1, sequence + len(part), committed_ms, blob))
                sequence += len(part)
            highest[partition] = sequence
        return highest, segments

    def _free_some(self) -> None:
        """One page of what may go, so that a commit never waits for more. Where the disk refuses, it is tried again."""
        with self._lock:
            if not self._to_free or time.monotonic() < self._free_not_before:
                return
            partition, covered_sequence = next(iter(self._to_free.items()))
        try:
            page = self._store.free(partition, covered_sequence)
        except JournalError:
            self._free_not_before = time.monotonic() + _FREE_RETRY_S
            return
        with self._lock:
            self._event_bytes -= page.event_bytes
            self._freed[partition] = max(self._freed[partition], page.last_sequence)
            if page.is_last and self._to_free[partition] == covered_sequence:
                del self._to_free[partition]


def _cut(events: list[bytes]) -> list[list[bytes]]:
    """Consecutive parts, each within a batch's bounds."""
    size_max = BATCH_BYTES_MAX - BATCH_ENVELOPE_BYTES
    if len(events) <= BATCH_EVENTS_MAX and sum(map(len, events)) + EVENT_ENVELOPE_BYTES * len(events) <= size_max:
        return [events]
    parts: list[list[bytes]] = [[]]
    size = 0
    for event in events:
        size += len(event) + EVENT_ENVELOPE_BYTES
        if parts[-1] and (len(parts[-1]) == BATCH_EVENTS_MAX or size > size_max):
            parts.append([])
            size = len(event) + EVENT_ENVELOPE_BYTES
        parts[-1].append(event)
    return parts


def _lock(path: Path) -> int:
    """Take the journal for this process; the descriptor holds it. The lock's file stays: only the kernel's lock counts."""
    lock_path = path.with_name(path.name + ".lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise JournalLocked(
            f"journal_path={path}: process {holder} has this journal open; stop it, or give this process a path of its own"
        ) from None
    # For whoever finds it locked; on a full disk they are told less.
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, str(os.getpid()).encode().ljust(32), 0)
    return descriptor
