"""Cost and usage for other tools."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated

import typer

from sinks.focus import focus_rows
from sinks.focus_rows import COLUMNS
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError
from taximeter.files import new_file
from taximeter.times import now_ms, parse_time_ms

__all__ = ["export_focus"]

_DAY_MS = 86_400_000


@command
def export_focus(
    context: Context,
    output: Annotated[Path, typer.Option(help="The CSV file to write.")],
    start: Annotated[str, typer.Option("--from", help="The first day (UTC), like 2026-11-01.")],
    end: Annotated[str, typer.Option("--to", help="The day after the last (UTC).")],
    tenant: Annotated[str | None, typer.Option(help="One tenant; without: all.")] = None,
    provider: Annotated[str, typer.Option(help="Who provides and invoices, as the file names them.")] = "Taximeter",
    json: JsonOption = False,
) -> None:
    """Write cost and usage as FOCUS 1.2 (CSV): a row for each tenant, day and price, and what invoices add."""
    start_ms, end_ms = _day("--from", start), _day("--to", end)
    if end_ms <= start_ms:
        raise MisuseError(f"--to {end!r} is not after --from {start!r}: the days are from the first until before the last")
    rows = 0
    with open_reader(context.config()) as reader, new_file("--output", output) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\r\n")
        writer.writeheader()
        for row in focus_rows(reader, start_ms, end_ms, provider, tenant):
            writer.writerow(row)
            rows += 1
        text.flush()
        text.detach()
    if json:
        context.output.json({"file": str(output), "rows": rows})
    else:
        context.output.say(f"{output}: {rows:,} rows")


def _day(option: str, text: str) -> int:
    at_ms = parse_time_ms(option, text, now=now_ms())
    if at_ms % _DAY_MS:
        raise MisuseError(f"{option} {text!r} is within a day: name whole days (UTC), like 2026-11-01")
    return at_ms
