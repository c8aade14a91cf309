"""What the database says: balances, usage, statements. Each answer says how fresh it is where that matters."""

from typing import Annotated, Final

import typer

from sinks import queries
from sinks.statement import statement as make_statement
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import TaximeterError
from taximeter.reports import (
    balance_values,
    print_balances,
    print_statement,
    print_usage,
    statement_values,
    usage_values,
)
from taximeter.times import MINUTE_MS, now_ms, parse_time_ms

__all__ = ["OptionalTenant", "balance", "statement", "usage"]

_FOLLOW_INTERVAL_S: Final = 0.5
TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]
OptionalTenant = Annotated[str | None, typer.Argument(help="One tenant; without: all.")]
StartOption = Annotated[str | None, typer.Option(help="From then: 2026-01-31, 2026-01-31T12:00Z, or 7d for so long ago.")]
EndOption = Annotated[str | None, typer.Option(help="Until then (exclusive); without: now.")]


@command
def balance(context: Context, tenant: OptionalTenant = None, json: JsonOption = False) -> None:
    """Show what each tenant was granted, spent, and has left."""
    with open_reader(context.config()) as reader:
        rows = queries.balances(reader, tenant)
    if tenant is not None and not rows:
        raise TaximeterError(f"tenant {tenant!r} is not known: create it with `taximeter tenant create {tenant}`")
    if json:
        context.output.json([balance_values(row) for row in rows])
    else:
        print_balances(context.output, rows)


@command
def usage(
    context: Context,
    tenant: OptionalTenant = None,
    by: Annotated[
        str, typer.Option(help=f"What to group by, comma-separated: {', '.join(queries.USAGE_BY)}.")
    ] = "tenant,model",
    start: StartOption = None,
    end: EndOption = None,
    json: JsonOption = False,
) -> None:
    """Show tokens and cost, grouped."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    start_ms, end_ms = _period(start, end)
    with open_reader(context.config()) as reader:
        rows = queries.all_usage(reader, tenant, names, start_ms, end_ms)
    if json:
        context.output.json([usage_values(names, row) for row in rows])
    else:
        print_usage(context.output, "", names, rows)


@command
def statement(
    context: Context, tenant: TenantArgument, start: StartOption = None, end: EndOption = None, json: JsonOption = False
) -> None:
    """Show one tenant's charges line by line, as quantity times price, and the balance before and after."""
    start_ms, end_ms = _period(start, end)
    with open_reader(context.config()) as reader:
        found = make_statement(reader, tenant, start_ms, end_ms)
    if found is None:
        raise TaximeterError(f"tenant {tenant!r} is not known: see `taximeter balance` for those that are")
    if json:
        context.output.json(statement_values(found))
    else:
        print_statement(context.output, found)


def _period(start: str | None, end: str | None) -> tuple[int, int]:
    """Whole minutes: totals are kept by the minute, so an end within one takes all of it."""
    now = now_ms()
    start_ms = 0 if start is None else parse_time_ms("--start", start, now=now) // MINUTE_MS * MINUTE_MS
    # Usage may be a little in the future of this clock.
    end_ms = now + 24 * 60 * MINUTE_MS if end is None else parse_time_ms("--end", end, now=now)
    return start_ms, -(-end_ms // MINUTE_MS) * MINUTE_MS
