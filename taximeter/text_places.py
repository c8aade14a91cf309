"""Where in a TOML or JSON text a value stands, so that an error can name the line; neither parser of Python's tells.

Promise: of a text that its parser has taken, every key and every entry of a list has the line on which it begins, under its
path of names and of numbers from 1. It reads a text once, in order, and raises nothing: where it loses its way, lines are
missing, and the nearest one above still serves.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final

__all__ = ["Path", "TextPlaces"]

Path = tuple[str | int, ...]

_SPACE: Final = re.compile(r"(?:[\s,]|#[^\n]*)*")
_TEXT: Final = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL)
# A time may have a blank before its hour.
_BARE: Final = re.compile(r"[^\s,\]}#]+(?: \d\d:[^\s,\]}#]+)?")
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_DOT: Final = re.compile(r"[ \t]*\.[ \t]*")
_SEPARATOR: Final = re.compile(r"\s*[=:]\s*")
_DEPTH_MAX: Final = 100


class TextPlaces:
    """The lines of one text."""

    def __init__(self, text: str, *, toml: bool) -> None:
        self._text = text
        self._at = 0
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._lines: dict[Path, int] = {}
        # Of lists of tables: how many entries were begun.
        self._counts: dict[Path, int] = {}
        if toml:
            self._statements()
        else:
            self._value((), 0)

    def line(self, path: Path) -> int | None:
        """The line of what `path` names, else of the nearest thing around it that has one; None: of nothing."""
        return next((self._lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self._lines), None)

    def _note(self, path: Path) -> None:
        self._lines.setdefault(path, bisect_right(self._starts, self._at))

    def _skip(self) -> bool:
        """Go to what comes next; False: nothing does."""
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._at < len(self._text)

    def _statements(self) -> None:
        table: Path = ()
        while self._skip():
            if self._text[self._at] == "[":
                listed = self._text.startswith("[[", self._at)
                begin = self._at
                self._at += 2 if listed else 1
                names = self._names()
                table = self._resolved(names[:-1])
                if listed:
                    number = self._counts[table + names[-1:]] = self._counts.get(table + names[-1:], 0) + 1
                    table = (*table, *names[-1:], number)
                else:
                    table += names[-1:]
                self._at, after = begin, self._at
                self._note(table)
                self._at = after
            else:
                self._pair(table, 0)
            end = self._text.find("\n", self._at)
            self._at = len(self._text) if end < 0 else end

    def _resolved(self, names: Path) -> Path:
        """The path of a table whose lists stand at their last entry."""
        path: Path = ()
        for name in names:
            path = (*path, name)
            if path in self._counts:
                path = (*path, self._counts[path])
        return path

    def _names(self) -> Path:
        """A key of one or more names."""
        names: list[str | int] = []
        while True:
            self._skip()
            if match := _TEXT.match(self._text, self._at):
                names.append(match[0][1:-1])
            elif match := _NAME.match(self._text, self._at):
                names.append(match[0])
            else:
                # Not a key: go on behind it.
                self._at += 1
                return tuple(names) or ("",)
            self._at = match.end()
            if (dot := _DOT.match(self._text, self._at)) is None:
                return tuple(names)
            self._at = dot.end()

    def _pair(self, table: Path, depth: int) -> None:
        begin = self._at
        path = table + self._names()
        self._at, after = begin, self._at
        self._note(path)
        self._at = after
        if separator := _SEPARATOR.match(self._text, self._at):
            self._at = separator.end()
            self._value(path, depth + 1)

    def _value(self, path: Path, depth: int) -> None:
        if not self._skip():
            return
        opening = self._text[self._at]
        if opening in "[{" and depth < _DEPTH_MAX:
            self._at += 1
            number = 0
            while self._skip():
                if self._text[self._at] in "]}":
                    self._at += 1
                    return
                if opening == "{":
                    self._pair(path, depth)
                else:
                    number += 1
                    self._note((*path, number))
                    self._value((*path, number), depth + 1)
        elif match := _TEXT.match(self._text, self._at) or _BARE.match(self._text, self._at):
            self._at = match.end()
        else:
            self._at += 1
