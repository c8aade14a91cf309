"""What the database says, as tables for people and as values for programs. Amounts are decimal texts, never floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from billing.amounts import format_pico
from taximeter.times import show_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinks.queries import AlertRow, Balance, Quantities, UsageRow
    from taximeter.output import Output

__all__ = [
    "STATEMENT_BY",
    "alert_values",
    "balance_values",
    "print_alerts",
    "print_balances",
    "print_statement",
    "print_usage",
    "usage_values",
]

STATEMENT_BY: Final = ("day", "project", "model", "operation", "class")


def print_balances(output: Output, rows: Sequence[Balance]) -> None:
    """The accounts as a table."""
    output.table(
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


def print_usage(output: Output, title: str, names: Sequence[str], rows: Sequence[UsageRow]) -> None:
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
    output.table(title, columns, cells, empty="No usage in this period.")


def print_statement(output: Output, account: Balance, names: Sequence[str], rows: Sequence[UsageRow]) -> None:
    """One tenant's lines, their sum, and the account."""
    print_usage(output, f"Statement of {account.display_name or account.tenant_id}", names, rows)
    output.say(
        f"granted {format_pico(account.credit_pico, account.currency)}"
        f" - spent {format_pico(account.spend_pico, account.currency)}"
        f" = balance {format_pico(account.balance_pico, account.currency)}"
        f" (as of {show_time(account.log_time_ms)})"
    )


def print_alerts(output: Output, rows: Sequence[AlertRow]) -> None:
    """Alerts as a table."""
    output.table(
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


def usage_values(names: Sequence[str], row: UsageRow) -> dict[str, object]:
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
