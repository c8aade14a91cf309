"""The place of a run: whole on disk, or none, and none costs duplicates only."""

from __future__ import annotations

from pathlib import Path

from taximeter.feeding import read_place, write_place


def test_a_place_is_what_was_written_last(tmp_path: Path) -> None:
    path = tmp_path / "place.json"
    assert read_place(path) == 0
    for events in (1_000, 2_000):
        write_place(path, events)
        assert read_place(path) == events
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_a_power_loss_left_empty_or_torn_is_none(tmp_path: Path) -> None:
    path = tmp_path / "place.json"
    for left in ("", '{"events": 10'):
        path.write_text(left)
        assert read_place(path) == 0
