"""The journal against a model, over any order of calls, restarts, crashes and refusals of the disk.

The model is a list for each partition. After a crash, what was not confirmed may be there or not, group by group; what was
confirmed is there, in its order, under its number.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import apsw
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from producers.errors import JournalError
from producers.journal import Journal, JournalSettings
from producers.receipt import Receipt
from tests.producers.support import journaled, usage_event, wait_until

# Thousands of commits, each a wait for the disk.
pytestmark = pytest.mark.timeout(900)

PARTITIONS = 2
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
RECOVERED_MAX = 1_000
partitions = st.integers(0, PARTITIONS - 1)
recovered = st.sampled_from((0, 1, 2, RECOVERED_MAX))


class JournalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="journal-"))
        self.lives = 0
        self.number = 0
        self.durable: dict[int, list[str]] = {partition: [] for partition in range(PARTITIONS)}
        self.freed = dict.fromkeys(range(PARTITIONS), 0)
        # Slot of this life: partition and what it becomes.
        self.open: dict[int, tuple[int, str]] = {}
        # Of them, those of which nothing but an opening without usage was told.
        self.unsynced: set[int] = set()
        self.journal = self.begin()

    def begin(self) -> Journal:
        return Journal(self.folder / "journal", JournalSettings(PARTITIONS))

    def event(self) -> tuple[str, bytes]:
        self.number += 1
        event = usage_event(self.number)
        return event.request_id, event.SerializeToString()

    @rule(partition=partitions, count=st.integers(1, 30))
    def append(self, partition: int, count: int) -> None:
        names, receipts = [], []
        for _ in range(count):
            name, event = self.event()
            names.append(name)
            receipts.append(self.journal.append(partition, event))
        for receipt in receipts:
            receipt.durable()
        self.durable[partition] += names

    @rule(partition=partitions, has_usage=st.booleans())
    def open_request(self, partition: int, has_usage: bool) -> None:
        name, event = self.event()
        slot, receipt = self.journal.open(partition, event, has_usage=has_usage)
        receipt.durable()
        self.open[slot] = (partition, name)
        if not has_usage:
            self.unsynced.add(slot)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), times=st.integers(1, 5))
    def update_request(self, data: st.DataObject, times: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open)))
        partition, _ = self.open[slot]
        events = [self.event() for _ in range(times)]
        for receipt in [self.journal.update(slot, partition, event) for _, event in events]:
            receipt.durable()
        self.open[slot] = (partition, events[-1][0])
        self.unsynced.discard(slot)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_request(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open)))
        partition, _ = self.open.pop(slot)
        self.unsynced.discard(slot)
        name, event = self.event()
        self.journal.close_request(slot, partition, event).durable()
        self.durable[partition].append(name)

    @rule(partition=partitions, has_usage=st.booleans())
    def open_and_close_at_once(self, partition: int, has_usage: bool) -> None:
        name, event = self.event()
        slot, _ = self.journal.open(partition, event, has_usage=has_usage)
        self.journal.update(slot, partition, event)
        self.journal.close_request(slot, partition, event).durable()
        self.durable[partition].append(name)

    @rule(partition=partitions, part=st.floats(0, 1))
    def free(self, partition: int, part: float) -> None:
        highest = len(self.durable[partition])
        covered = int(part * highest)
        self.journal.free(partition, covered)
        # Whole segments go: up to `covered`, and no further.
        self.append(partition, 1)
        wait_until(lambda: not self.journal._to_free, "freed")
        freed = self.journal.freed_sequence(partition)
        assert self.freed[partition] <= freed <= max(covered, self.freed[partition])
        self.freed[partition] = freed

    @rule(partition=partitions)
    def the_disk_refuses(self, partition: int) -> None:
        before = self.journal.metrics()["journal_bytes"]
        # A table that is away is a write that fails after others of its transaction have succeeded.
        surgeon = apsw.Connection(str(self.folder / "journal"))
        surgeon.set_busy_timeout(600_000)
        surgeon.execute("ALTER TABLE open_requests RENAME TO away")
        name, event = self.event()
        appended = self.journal.append(partition, event)
        slot, opened = self.journal.open(partition, event)
        assert _is_refused(opened)
        surgeon.execute("ALTER TABLE away RENAME TO open_requests")
        surgeon.close()
        # The writer may have taken the event alone, before the request came: then it is durable.
        if _is_refused(appended):
            assert self.journal.metrics()["journal_bytes"] == before
        else:
            self.durable[partition].append(name)
        assert slot not in self.open

    @rule(partition=partitions)
    def the_disk_refuses_an_end(self, partition: int) -> None:
        surgeon = apsw.Connection(str(self.folder / "journal"))
        surgeon.set_busy_timeout(600_000)
        surgeon.execute("ALTER TABLE segments RENAME TO away")
        name, event = self.event()
        slot, opened = self.journal.open(partition, event, has_usage=False)
        opened.durable()
        assert _is_refused(self.journal.close_request(slot, partition, self.event()[1]))
        surgeon.execute("ALTER TABLE away RENAME TO segments")
        surgeon.close()
        self.open[slot] = (partition, name)
        self.unsynced.add(slot)

    @rule()
    def restart(self) -> None:
        self.journal.close()
        self.recover()

    @rule(lost_power=st.booleans(), ended=recovered)
    def crash(self, lost_power: bool, ended: int) -> None:
        """The files as kill -9 leaves them: the log not moved into the file, the lock gone with its process. Or in another boot
        of the machine, for which whatever stands in unsynced memory does not count."""
        self.live_on(self.as_killed())
        if lost_power:
            openings = self.folder / "journal.open"
            openings.write_bytes(openings.read_bytes().replace(BOOT_ID, BOOT_ID[::-1], 1))
            for slot in self.unsynced:
                del self.open[slot]
            self.unsynced.clear()
        self.recover(ended)

    @rule(partition=partitions, has_usage=st.lists(st.booleans(), min_size=1, max_size=4), ended=recovered)
    def crash_before_a_commit(self, partition: int, has_usage: list[bool], ended: int) -> None:
        """A kill between what is noted of a request's end and the transaction that ends it, and another one in the recovery."""
        for each in has_usage:
            self.open_request(partition, each)
        commit, copies = self.journal._store.commit, list[Path]()

        def copy_first(*arguments: Any, **named: Any) -> None:
            copies.append(self.as_killed())
            commit(*arguments, **named)

        with mock.patch.object(self.journal._store, "commit", copy_first):
            self.journal.close_request(max(self.open), partition, self.event()[1]).durable()
        (copy,) = copies
        self.live_on(copy)
        self.recover(ended)
        self.live_on(self.as_killed())
        self.recover()

    def as_killed(self) -> Path:
        self.lives += 1
        copy = self.folder.with_name(f"{self.folder.name}-{self.lives}")
        shutil.copytree(self.folder, copy)
        return copy

    def live_on(self, copy: Path) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)
        self.folder = copy

    def recover(self, ended: int = RECOVERED_MAX) -> None:
        """Begin anew and end so many of those that were left open; the others stay as they are, for the next kill."""
        self.journal = self.begin()
        left = self.journal.left_open()
        assert {row.slot: row.partition for row in left} == {slot: partition for slot, (partition, _) in self.open.items()}
        for row in left[:ended]:
            partition, name = self.open.pop(row.slot)
            self.unsynced.discard(row.slot)
            self.journal.close_request(row.slot, row.partition, row.event).durable()
            self.durable[partition].append(name)
        assert [row.slot for row in self.journal.left_open()] == sorted(self.open)

    @invariant()
    def holds_what_was_confirmed_under_its_number(self) -> None:
        held = journaled(self.journal)
        for partition, names in self.durable.items():
            assert self.journal.highest_sequence(partition) == len(names)
            expected = {number: name for number, name in enumerate(names, start=1) if number > self.freed[partition]}
            assert {number: event.request_id for number, event in held.get(partition, {}).items()} == expected
        assert self.journal.metrics()["open_requests"] == len(self.open)
        assert self.journal.metrics()["pending_bytes"] == 0

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)


def _is_refused(receipt: Receipt) -> bool:
    try:
        receipt.durable()
    except JournalError:
        return True
    return False


JournalMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "25")), stateful_step_count=25, deadline=None
)
TestJournalModel = JournalMachine.TestCase
