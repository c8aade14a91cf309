"""A coded column is the texts that it stands for, and keeps each of them once."""

from __future__ import annotations

from sinks.coded import Coded


def test_it_reads_as_its_texts() -> None:
    column = Coded()
    column.extend(["b", "a", "b"])
    column.repeat("", 2)
    column.repeat("a", 1)
    texts = ["b", "a", "b", "", "", "a"]
    assert list(column) == texts
    assert len(column) == 6
    assert [column[index] for index in range(6)] == texts
    assert column[1:4] == texts[1:4]
    assert column.names == ["b", "a", ""]
    assert list(column.codes) == [0, 1, 0, 2, 2, 1]


def test_nothing_is_nothing() -> None:
    column = Coded()
    column.repeat("a", 0)
    assert list(column) == []
