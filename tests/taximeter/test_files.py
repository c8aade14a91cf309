"""Files that commands write are whole, or what was there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from taximeter.errors import MisuseError
from taximeter.files import new_file, write_whole


def test_a_file_is_written_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write_whole("--output", path, b"first")
    write_whole("--output", path, b"second")
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(b"before")

    def fail() -> None:
        with new_file("--output", path) as file:
            file.write(b"half")
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        fail()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"--output .*absent/x cannot be written: No such file or directory"):
        write_whole("--output", tmp_path / "absent" / "x", b"")
