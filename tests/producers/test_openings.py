"""Openings beside the journal: there after a kill at any moment, gone with the machine, never open when they have ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from producers import openings
from producers.journal import Journal, JournalSettings
from producers.journal_store import OpenRow
from producers.openings import CELL_BYTES, CELLS, Openings
from tests.producers.support import usage_event, wait_until

EVENT = usage_event(1).SerializeToString()
LATER = usage_event(2).SerializeToString()


def open_journal(folder: Path) -> Journal:
    return Journal(folder / "journal", JournalSettings(partitions=2))


def killed(folder: Path, name: str) -> Path:
    """The journal's files as a kill would leave them now."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    return copy


def left_open(folder: Path) -> list[OpenRow]:
    journal = open_journal(folder)
    left = list(journal.left_open())
    journal.close()
    return left


def killed_before_the_commit(folder: Path, journal: Journal, slot: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """End the request; the files as a kill would have left them before the transaction that ends it."""
    copies: list[Path] = []
    commit = journal._store.commit

    def copy_first(*arguments: object, **named: object) -> None:
        copies.append(killed(folder, "killed"))
        commit(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(journal._store, "commit", copy_first)
    journal.close_request(slot, 0, LATER).durable()
    (copy,) = copies
    return copy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "live"
    made.mkdir()
    return made


def test_an_opening_without_usage_is_there_at_once_and_after_a_kill(folder: Path) -> None:
    journal = open_journal(folder)
    slot, receipt = journal.open(1, EVENT, has_usage=False)
    assert receipt.is_durable
    assert journal.metrics()["commits"] == 0, "nobody waits for the disk"
    assert left_open(killed(folder, "killed")) == [OpenRow(slot, 1, EVENT)]
    journal.close_request(slot, 1, LATER).durable()
    assert left_open(killed(folder, "ended")) == []
    journal.close()


def test_a_kill_between_a_commit_and_its_confirmation_ends_the_request_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(folder)
    monkeypatch.setattr(Openings, "clear", lambda *_: None)
    ended, updated, open_still = (journal.open(1, EVENT, has_usage=False)[0] for _ in range(3))
    journal.update(updated, 1, LATER).durable()
    journal.close_request(ended, 1, LATER).durable()
    copy = killed(folder, "killed")
    monkeypatch.undo()
    assert left_open(copy) == [OpenRow(updated, 1, LATER), OpenRow(open_still, 1, EVENT)]
    journal.close()


def test_a_kill_before_a_commit_leaves_the_request_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(folder)
    slot, _ = journal.open(0, EVENT, has_usage=False)
    copy = killed_before_the_commit(folder, journal, slot, monkeypatch)
    assert left_open(copy) == [OpenRow(slot, 0, EVENT)]
    journal.close()


def test_a_kill_in_the_recovery_after_a_kill_before_a_commit_ends_nothing_unsaid(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(folder)
    first, second = (journal.open(0, EVENT, has_usage=False)[0] for _ in range(2))
    copy = killed_before_the_commit(folder, journal, second, monkeypatch)
    journal.close()
    # The number that would have ended the second request goes to another event, and that process is killed too.
    recovering = open_journal(copy)
    recovering.close_request(first, 0, LATER).durable()
    assert recovering.highest_sequence(0) == 1
    assert left_open(killed(copy, "again")) == [OpenRow(second, 0, EVENT)]
    recovering.close()


def test_what_is_recovered_is_ended_for_good(folder: Path) -> None:
    journal = open_journal(folder)
    journal.open(0, EVENT, has_usage=False)
    copy = killed(folder, "killed")
    journal.close()
    journal = open_journal(copy)
    (row,) = journal.left_open()
    journal.close_request(row.slot, row.partition, row.event).durable()
    assert left_open(killed(copy, "again")) == []
    journal.close()
    assert left_open(copy) == []


def test_another_boot_and_another_journal_read_nothing_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = open_journal(folder)
    journal.open(0, EVENT, has_usage=False)
    other = killed(folder, "other")
    copy = killed(folder, "rebooted")
    journal.close()
    for path in other.glob("journal*"):
        if path.suffix != ".open":
            path.unlink()
    assert left_open(other) == []
    boot = copy.parent / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(openings, "_BOOT_ID", boot)
    assert left_open(copy) == []


def test_a_torn_opening_was_never_confirmed(tmp_path: Path) -> None:
    made = Openings(tmp_path / "open", None)
    assert made.put(7, 1, EVENT)
    assert made.put(8, 1, EVENT)
    made.close()
    data = bytearray((tmp_path / "open").read_bytes())
    data[CELL_BYTES + 60] ^= 1
    (tmp_path / "open").write_bytes(data)
    assert Openings(tmp_path / "open", made.token).left({}) == [OpenRow(8, 1, EVENT)]


def test_a_disk_that_fills_up_takes_no_more_openings_in_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Openings(tmp_path / "open", None)
    assert made.put(1, 0, EVENT)
    monkeypatch.setattr(openings, "_FREE_BYTES_MIN", 1 << 60)
    wait_until(lambda: not made.put(2, 0, EVENT), "seen to be full")
    made.close()


@pytest.mark.parametrize("reason", ["no boot", "no room", "too large", "all taken"])
def test_where_there_is_no_place_the_disk_has_the_opening(folder: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    event = EVENT
    if reason == "no boot":
        monkeypatch.setattr(openings, "_BOOT_ID", folder / "nowhere")
    elif reason == "no room":
        monkeypatch.setattr(openings, "_FREE_BYTES_MIN", 1 << 60)
    elif reason == "too large":
        event = EVENT * 20
    journal = open_journal(folder)
    if reason == "all taken":
        slots = [journal.open(0, EVENT, has_usage=False)[0] for _ in range(CELLS)]
        assert len(slots) == CELLS
    slot, receipt = journal.open(1, event, has_usage=False)
    receipt.durable()
    assert journal.metrics()["commits"] == 1
    assert OpenRow(slot, 1, event) in left_open(killed(folder, "killed"))
    journal.close()
