"""Tables and texts as Markdown has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["cell", "code", "table"]


def cell(text: str) -> str:
    """What stands in a table: one line, without bars of its own."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    """As it is typed; nothing where there is nothing."""
    return f"`{cell(text)}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of what `cell` or `code` has made."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
