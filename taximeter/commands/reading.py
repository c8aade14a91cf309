"""What the database says: balances, usage, statements, alerts. Each answer says how fresh it is where that matters."""

import time
from typing import Annotated, Final

import typer

from billing.amounts import format_pico
from sinks import queries
from sinks.engine import Reader
from sinks.queries import AlertRow, Balance, Quantities, UsageRow
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import TaximeterError
from taximeter.times import MINUTE_MS, now_ms, parse_time_ms, show_time

__all__ = ["alerts", "balance", "statement", "usage"]

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
        print_balances(context, rows)


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
        rows = queries.usage(reader, tenant, names, start_ms, end_ms)
    if json:
        context.output.json([usage_values(names, row) for row in rows])
    else:
        print_usage(context, "", names, rows)


@command
def statement(
    context: Context, tenant: TenantArgument, start: StartOption = None, end: EndOption = None, json: JsonOption = False
) -> None:
    """Show one tenant's usage line by line, what it cost, and the balance."""
    start_ms, end_ms = _period(start, end)
    with open_reader(context.config()) as reader:
        found = queries.balances(reader, tenant)
        if not found:
            raise TaximeterError(f"tenant {tenant!r} is not known: see `taximeter balance` for those that are")
        rows = queries.usage(reader, tenant, STATEMENT_BY, start_ms, end_ms)
    if json:
        lines = [usage_values(list(STATEMENT_BY), row) for row in rows]
        context.output.json({"tenant_id": tenant, "lines": lines, "account": balance_values(found[0])})
    else:
        print_statement(context, found[0], rows)


@command
def alerts(
    context: Context,
    tenant: OptionalTenant = None,
    since: Annotated[str, typer.Option(help="From then, or for so long: 1h, 7d.")] = "7d",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, and print each new alert as it comes.")] = False,
    json: JsonOption = False,
) -> None:
    """Show alerts, oldest first."""
    since_ms = parse_time_ms("--since", since, now=now_ms())
    with open_reader(context.config()) as reader:
        rows = queries.alerts(reader, tenant, since_ms)
        if not follow:
            if json:
                context.output.json([alert_values(row) for row in rows])
            else:
                print_alerts(context, rows)
            return
        _follow(context, reader, tenant, since_ms, rows, json=json)


def _follow(context: Context, reader: Reader, tenant: str | None, since_ms: int, rows: list[AlertRow], *, json: bool) -> None:
    after: dict[int, int] = {}
    while True:
        for row in rows:
            if json:
                context.output.json_line(alert_values(row))
            else:
                context.output.say(f"{show_time(row.raised_ms)} {row.severity} {row.rule} {row.tenant_id}: {row.summary}")
            after[row.partition] = max(after.get(row.partition, 0), row.version)
        time.sleep(_FOLLOW_INTERVAL_S)
        rows = queries.alerts(reader, tenant, since_ms, after)


STATEMENT_BY: Final = ("day", "project", "model", "operation", "class")


def print_balances(context: Context, rows: list[Balance]) -> None:
    """The accounts as a table."""
    context.output.table(
        "Balances",
        ("tenant", "status", "credit ", "spend ", "balance ", "requests ", "duplicates ", "as of"),
        [
            (
                row.tenant_id,
                row.status,
                format_pico(row.credit_pico, row.currency),
                format_pico(row.spend_pico, row.currency),
                format_pico(row.balance_pico, row.currency),
                row.events,
                row.duplicates,
                show_time(row.log_time_ms),
            )
            for row in rows
        ],
        empty="No tenants yet: create one with `taximeter tenant create NAME`.",
    )


def print_usage(context: Context, title: str, names: list[str], rows: list[UsageRow]) -> None:
    """Usage as a table, with the sum below."""
    cells: list[tuple[object, ...]] = [
        (
            *row.group,
            row.events,
            row.quantities.input_tokens,
            row.quantities.all_output_tokens,
            _others(row.quantities),
            format_pico(row.cost_pico, row.currency),
        )
        for row in rows
    ]
    for currency in sorted({row.currency for row in rows}):
        mine = [row for row in rows if row.currency == currency]
        cells.append(
            (
                *("sum", *[""] * len(names))[: len(names)],
                sum(row.events for row in mine),
                sum(row.quantities.input_tokens for row in mine),
                sum(row.quantities.all_output_tokens for row in mine),
                "",
                format_pico(sum(row.cost_pico for row in mine), currency),
            )
        )
    columns = (*names, "requests ", "input tokens ", "output tokens ", "other units", "cost ")
    context.output.table(title, columns, cells, empty="No usage in this period.")


def print_statement(context: Context, account: Balance, rows: list[UsageRow]) -> None:
    """One tenant's lines, their sum, and the account."""
    print_usage(context, f"Statement of {account.display_name or account.tenant_id}", list(STATEMENT_BY), rows)
    context.output.say(
        f"granted {format_pico(account.credit_pico, account.currency)}"
        f" - spent {format_pico(account.spend_pico, account.currency)}"
        f" = balance {format_pico(account.balance_pico, account.currency)}"
        f" (as of {show_time(account.log_time_ms)})"
    )


def print_alerts(context: Context, rows: list[AlertRow]) -> None:
    """Alerts as a table."""
    context.output.table(
        "Alerts",
        ("raised", "severity", "rule", "tenant", "what"),
        [(show_time(row.raised_ms), row.severity, row.rule, row.tenant_id, row.summary) for row in rows],
        empty="No alerts.",
    )


def balance_values(row: Balance) -> dict[str, object]:
    """An account for programs."""
    return {
        "tenant_id": row.tenant_id,
        "display_name": row.display_name,
        "status": row.status,
        "currency": row.currency,
        "credit": _decimal(row.credit_pico),
        "spend": _decimal(row.spend_pico),
        "balance": _decimal(row.balance_pico),
        "requests": row.events,
        "duplicates": row.duplicates,
        "conflicts": row.conflicts,
        "unrated_requests": row.unrated_events,
        "plan_id": row.plan_id,
        "billing_mode": row.billing_mode,
        "as_of": show_time(row.log_time_ms),
    }


def usage_values(names: list[str], row: UsageRow) -> dict[str, object]:
    """A line of usage for programs."""
    quantities = row.quantities
    return {
        **dict(zip(names, row.group, strict=True)),
        "requests": row.events,
        "refused_requests": row.refused_events,
        "unrated_requests": row.unrated_events,
        "uncached_input_tokens": quantities.uncached_input_tokens,
        "cache_read_tokens": quantities.cache_read_tokens,
        "cache_write_tokens": quantities.cache_write_tokens,
        "image_input_tokens": quantities.image_input_tokens,
        "audio_input_tokens": quantities.audio_input_tokens,
        "output_tokens": quantities.output_tokens,
        "reasoning_tokens": quantities.reasoning_tokens,
        "audio_output_tokens": quantities.audio_output_tokens,
        "units": dict(quantities.units),
        "cost": _decimal(row.cost_pico),
        "currency": row.currency,
    }


def alert_values(row: AlertRow) -> dict[str, object]:
    """An alert for programs."""
    return {
        "alert_id": row.alert_id,
        "raised": show_time(row.raised_ms),
        "severity": row.severity,
        "rule": row.rule,
        "tenant_id": row.tenant_id,
        "summary": row.summary,
        "request_ids": list(row.request_ids),
        "figures": dict(row.figures),
        "labels": dict(row.labels),
    }


def _others(quantities: Quantities) -> str:
    return ", ".join(f"{quantity:,} {unit}" for unit, quantity in sorted(quantities.units.items()))


def _decimal(pico: int) -> str:
    return format_pico(pico).replace(",", "")


def _period(start: str | None, end: str | None) -> tuple[int, int]:
    """Whole minutes: totals are kept by the minute, so an end within one takes all of it."""
    now = now_ms()
    start_ms = 0 if start is None else parse_time_ms("--start", start, now=now) // MINUTE_MS * MINUTE_MS
    # Usage may be a little in the future of this clock.
    end_ms = now + 24 * 60 * MINUTE_MS if end is None else parse_time_ms("--end", end, now=now)
    return start_ms, -(-end_ms // MINUTE_MS) * MINUTE_MS
