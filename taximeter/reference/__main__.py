"""Writes the pages, or says which are not what the code makes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from taximeter.reference.commands import commands_page
from taximeter.reference.metrics import metrics_page
from taximeter.reference.protocols import protocols_page
from taximeter.reference.schema import schema_page
from taximeter.reference.settings import settings_page

ROOT = Path(__file__).parents[2]
PAGES: Final[dict[str, Callable[[], str]]] = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "metrics.md": metrics_page,
    "sql.md": lambda: schema_page(ROOT / "sinks" / "schema"),
    "protocols.md": lambda: protocols_page(ROOT / "proto"),
}


def main(
    folder: Annotated[Path, typer.Argument(help="Where the pages are.")],
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 where a page is not current.")] = False,
) -> None:
    """Write the reference, or hold it against the code."""
    stale = []
    for name, make in PAGES.items():
        path, text = folder / name, f"<!-- Made from the code by `make docs`; changes here are lost. -->\n\n{make()}\n"
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    if check and stale:
        sys.stderr.write(f"{folder}: {', '.join(stale)} are not what the code makes: run 'make docs' and commit the result\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
