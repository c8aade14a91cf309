"""Texts of which many are alike, as a column: each distinct one once, and for each row which one it is.

It reads as the sequence of texts that it stands for. An engine that knows it takes the two parts as they are.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

__all__ = ["Coded"]


class _Codes(dict[str, int]):
    def __missing__(self, text: str) -> int:
        self[text] = code = len(self)
        return code


class Coded(Sequence[str]):
    """Grows at its end; otherwise like a list of texts."""

    def __init__(self) -> None:
        self._codes = _Codes()
        self.codes = array("i")

    @property
    def names(self) -> list[str]:
        """The distinct texts; a code is an index here."""
        return list(self._codes)

    def extend(self, texts: Iterable[str]) -> None:
        """Add one text after the other."""
        self.codes.extend(map(self._codes.__getitem__, texts))

    def repeat(self, text: str, count: int) -> None:
        """Add one text `count` times."""
        self.codes += array("i", [self._codes[text]]) * count

    def __len__(self) -> int:
        return len(self.codes)

    def __iter__(self) -> Iterator[str]:
        return map(self.names.__getitem__, self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        names = self.names
        if isinstance(index, slice):
            return [names[code] for code in self.codes[index]]
        return names[self.codes[index]]
