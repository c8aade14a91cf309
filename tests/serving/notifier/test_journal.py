"""The journal: cursor and deliveries are one, a delivery leaves once it was taken, dead letters are kept within their bound."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from serving.notifier.errors import NotifierError
from serving.notifier.journal import Journal, NewDelivery


def new(number: int, endpoint: str = "ops", dead: str = "") -> NewDelivery:
    return NewDelivery(endpoint, f"a{number}-r1", f"a{number}", b"{}", dead)


def test_what_was_taken_is_there_after_a_kill_with_its_cursor(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.sqlite"
    before = Journal(path, dead_max=9)
    begun_ms = before.begun_ms
    assert abs(begun_ms - time.time() * 1_000) < 60_000
    assert (before.cursor, before.waiting()) == ("", [])
    [first, other] = before.take("c1", [new(1), new(1, "log")])
    # Neither closed nor told: as a kill leaves it.
    after = Journal(path, dead_max=9)
    assert (after.cursor, after.begun_ms) == ("c1", begun_ms)
    assert after.waiting() == [(first, "ops", "a1"), (other, "log", "a1")]
    assert after.take("c2", [new(1)]) == [0], "it is there already"
    after.delivered(first)
    assert after.read(first) is None
    assert [row[0] for row in after.waiting()] == [other]
    before.close()
    after.close()


def test_nothing_is_written_of_an_alert_of_which_not_all_is(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.take("c1", [])
    monkeypatch.setattr(journal, "_trim", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        journal.take("c2", [new(1), new(2, dead="no room")])
    assert (journal.cursor, journal.waiting(), journal.dead()) == ("c1", [], [])


def test_dead_letters_are_listed_retried_and_dropped(journal: Journal) -> None:
    [number, other] = journal.take("c", [new(1), new(1, "log")])
    journal.failed(number, "HTTP 500")
    journal.failed(number, "HTTP 501")
    tried = journal.read(number)
    assert tried is not None
    assert (tried.attempts, tried.webhook_id) == (2, "a1-r1")
    assert tried.tried_ms > 0
    journal.bury(number, "given up")
    journal.bury(other, "given up too")
    assert [(each.endpoint, each.attempts, each.reason) for each in journal.dead()] == [
        ("ops", 2, "given up"),
        ("log", 0, "given up too"),
    ]
    assert journal.dead_counts() == {"ops": 1, "log": 1}
    assert journal.waiting() == []
    journal.mark_gone("ops", "https://gone")
    assert [each.endpoint for each in journal.retry("ops", ["a1-r1"])] == ["ops"]
    assert journal.gone() == {}
    again = journal.read(number)
    assert again is not None
    assert (again.attempts, again.tried_ms) == (0, 0)
    assert [each.endpoint for each in journal.drop()] == ["log"]
    assert journal.dead() == []
    assert journal.waiting() == [(number, "ops", "a1")]


def test_the_newest_dead_letters_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", dead_max=2)
    for number in range(5):
        journal.take(f"c{number}", [new(number, dead="no room"), new(number, "log")])
    assert [each.webhook_id for each in journal.dead()] == ["a3-r1", "a4-r1"]
    assert journal.dropped == 3
    assert len(journal.waiting()) == 5
    journal.close()


def test_one_notifier_holds_it_and_sees_what_others_write(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    held = Journal(path, dead_max=9).hold()
    with pytest.raises(NotifierError, match="another notifier runs on"):
        Journal(path, dead_max=9).hold()
    held.take("c", [new(1, dead="x")])
    assert not held.was_changed()
    beside = Journal(path, dead_max=9)
    beside.retry()
    assert held.was_changed()
    assert not held.was_changed()
    held.close()
    beside.hold().close()


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"no database, but something else " * 100)
    with pytest.raises(NotifierError, match=r"notifier\.journal_path .*journal\.sqlite cannot be used"):
        Journal(path, dead_max=9)
