"""What commands print: tables for people on standard output, one JSON document for programs, notes on standard error.

Promise: with `--json`, standard output holds JSON and nothing else, whatever happens. Amounts in JSON are decimal
strings, never floats.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

__all__ = ["Advance", "Output"]

_PIPED_COLUMNS: Final = 160


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, steps: int = 1) -> None: ...


class Output:
    """Where a command's words go. What draws them is loaded with the first to a person: a part of an installation says none."""

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        # A pipe has no width: tables then get one that holds them, instead of a terminal's eighty columns.
        return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_COLUMNS)

    @cached_property
    def notes(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False)

    def json(self, value: Any) -> None:
        """One JSON document."""
        sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()

    def json_line(self, value: Any) -> None:
        """One line of JSON, for what goes on and on."""
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
        sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str = "") -> None:
        """A table; a column whose name ends in a space is for figures and stands to the right."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        if not rows and empty:
            self.console.print(empty)
            return
        table = Table(title=title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD, show_header=any(columns))
        for column in columns:
            name = column.rstrip()
            table.add_column(name, justify="right" if column.endswith(" ") else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_text(cell) for cell in row))
        self.console.print(table)

    def pairs(self, title: str, values: Mapping[str, object]) -> None:
        """Names and values, one a line."""
        self.table(title, ("", ""), [(name, value) for name, value in values.items()])

    def say(self, text: str) -> None:
        """A line for a person."""
        self.console.print(text, soft_wrap=True, markup=False)

    def note(self, text: str) -> None:
        """A line that is not the result: on standard error."""
        self.notes.print(text, soft_wrap=True, markup=False)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """A progress bar on standard error; silent where that is no terminal."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.notes,
            transient=True,
            disable=not self.notes.is_terminal,
        ) as bar:
            task = bar.add_task(description, total=total)

            def advance(steps: int = 1) -> None:
                bar.advance(task, steps)

            yield advance


def _text(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell)
