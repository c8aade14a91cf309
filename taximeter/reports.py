"""What the database says, as tables for people and as values for programs. Amounts are decimal texts, never floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from billing.amounts import format_pico
from taximeter.times import show_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sinks.corrections import Draft
    from sinks.queries import AlertRow, Balance, Quantities, UsageRow
    from sinks.rerating import Difference
    from sinks.statement import Statement
    from taximeter.output import Output

__all__ = [
    "alert_values",
    "balance_values",
    "difference_values",
    "draft_values",
    "print_alerts",
    "print_balances",
    "print_differences",
    "print_drafts",
    "print_statement",
    "print_usage",
    "statement_values",
    "usage_values",
]

_PER_UNITS: Final = 1_000_000


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


def print_statement(output: Output, statement: Statement) -> None:
    """Each line as quantity times price, and the way from the opening to the closing balance."""
    currency = statement.currency
    output.table(
        f"Statement of {statement.display_name or statement.tenant_id}",
        ("project", "model", "operation", "class", "what", "terms", "quantity ", "per million ", "amount "),
        [
            (
                line.project_id,
                line.model,
                line.operation,
                line.service_class,
                line.quantity_of.replace("_", " "),
                line.terms,
                line.quantity,
                format_pico(line.price_pico * _PER_UNITS, currency),
                format_pico(line.amount_pico, currency),
            )
            for line in statement.lines
        ],
        empty="No charges in this period.",
    )
    output.table(
        "",
        ("granted", "why", "by", "amount "),
        [
            (show_time(line.log_time_ms), line.reason, line.issuer, format_pico(line.amount_pico, currency))
            for line in statement.credits
        ],
        empty="No credit in this period.",
    )
    if statement.corrections:
        output.table(
            "",
            ("corrected", "what", "why", "by", "amount "),
            [
                (show_time(line.log_time_ms), line.kind, line.reason, line.issuer, format_pico(line.amount_pico, currency))
                for line in statement.corrections
            ],
        )
    output.say(
        f"opening {format_pico(statement.opening_pico, currency)}"
        f" + granted {format_pico(statement.credited_pico, currency)}"
        f" - expired {format_pico(statement.expired_pico, currency)}"
        f" - charged {format_pico(statement.charged_pico, currency)}"
        f" - at the close {format_pico(statement.at_close_pico, currency)}"
        f" - corrected {format_pico(statement.corrected_pico, currency)}"
        f" = closing {format_pico(statement.closing_pico, currency)}"
        f"; {statement.events:,} requests, {statement.free_events:,} free, {statement.unrated_events:,} without a price"
    )


def print_differences(output: Output, title: str, rows: Sequence[Difference], *, empty: str) -> None:
    """What another price book makes of a period, by tenant, with the sums below."""
    cells: list[tuple[object, ...]] = [_difference_cells(row.payer.tenant_id, row.payer.currency, [row]) for row in rows]
    if rows:
        # A book has one currency.
        cells.append(_difference_cells("sum", rows[0].payer.currency, rows))
    columns = ("tenant", "requests ", "without a price ", "cost ", "would cost ", "difference ", "% ")
    output.table(title, columns, cells, empty=empty)


def _difference_cells(name: str, currency: str, rows: Sequence[Difference]) -> tuple[object, ...]:
    before, after = sum(row.before_pico for row in rows), sum(row.after_pico for row in rows)
    return (
        name,
        sum(row.events for row in rows),
        f"{sum(row.unrated_events_before for row in rows):,} → {sum(row.unrated_events_after for row in rows):,}",
        format_pico(before, currency),
        format_pico(after, currency),
        format_pico(after - before, currency),
        _per_cent(before, after),
    )


def _per_cent(before: int, after: int) -> str:
    """How much more, in per cent with one decimal, rounded down: for people."""
    if not before:
        return "-"
    tenths = (after - before) * 1_000 // before
    return f"{'-' if tenths < 0 else '+'}{abs(tenths) // 10}.{abs(tenths) % 10}"


def difference_values(row: Difference) -> dict[str, object]:
    """A tenant's period under another price book, for programs."""
    return {
        "tenant_id": row.payer.tenant_id,
        "currency": row.payer.currency,
        "start": show_time(row.period.start_ms),
        "end": show_time(row.period.end_ms),
        "requests": row.events,
        "unrated_requests_before": row.unrated_events_before,
        "unrated_requests_after": row.unrated_events_after,
        "before": _decimal(row.before_pico),
        "after": _decimal(row.after_pico),
        "difference": _decimal(row.difference_pico),
    }


def print_drafts(output: Output, drafts: Sequence[Draft]) -> None:
    """What corrections change, by tenant and line, with each tenant's difference."""
    rows: list[tuple[object, ...]] = []
    for draft in drafts:
        currency = draft.payer.currency
        for key in sorted(draft.lines):
            for part, (units, amount_pico) in sorted(draft.lines[key].items()):
                if not (units or amount_pico):
                    continue
                rows.append(
                    (
                        draft.payer.tenant_id,
                        show_time(key.period.start_ms),
                        key.project_id,
                        key.model,
                        part.quantity_of.replace("_", " "),
                        part.terms,
                        units,
                        format_pico(part.unit_pico * _PER_UNITS, currency),
                        format_pico(amount_pico, currency),
                    )
                )
        rows.append((draft.payer.tenant_id, "", "", "", "difference", "", "", "", format_pico(draft.difference_pico, currency)))
    columns = ("tenant", "period", "project", "model", "what", "terms", "units ", "per million ", "amount ")
    output.table("Corrections", columns, rows, empty="Nothing differs.")


def draft_values(draft: Draft) -> dict[str, object]:
    """A correction of one tenant, for programs."""
    return {
        "tenant_id": draft.payer.tenant_id,
        "currency": draft.payer.currency,
        "difference": _decimal(draft.difference_pico),
        "request_ids": list(draft.request_ids),
        "notes": list(draft.notes),
        "lines": [
            {
                "period": show_time(key.period.start_ms),
                "project_id": key.project_id,
                "model": key.model,
                "price_version": key.price_version,
                "what": part.quantity_of,
                "terms": part.terms,
                "units": units,
                "unit_price": _decimal(part.unit_pico),
                "amount": _decimal(amount_pico),
            }
            for key in sorted(draft.lines)
            for part, (units, amount_pico) in sorted(draft.lines[key].items())
            if units or amount_pico
        ],
    }


def print_alerts(output: Output, rows: Sequence[AlertRow]) -> None:
    """Alerts as a table."""
    output.table(
        "Alerts",
        ("raised", "state", "severity", "rule", "tenant", "what", "alert"),
        [
            (show_time(row.raised_ms), row.state, row.severity, row.rule, row.tenant_id, row.summary, row.alert_id)
            for row in rows
        ],
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


def statement_values(statement: Statement) -> dict[str, object]:
    """A statement for programs."""
    return {
        "tenant_id": statement.tenant_id,
        "display_name": statement.display_name,
        "currency": statement.currency,
        "start": show_time(statement.start_ms),
        "end": show_time(statement.end_ms),
        "opening": _decimal(statement.opening_pico),
        "credited": _decimal(statement.credited_pico),
        "expired": _decimal(statement.expired_pico),
        "charged": _decimal(statement.charged_pico),
        "at_close": _decimal(statement.at_close_pico),
        "corrected": _decimal(statement.corrected_pico),
        "closing": _decimal(statement.closing_pico),
        "requests": statement.events,
        "free_requests": statement.free_events,
        "unrated_requests": statement.unrated_events,
        "lines": [
            {
                "project_id": line.project_id,
                "model": line.model,
                "operation": line.operation,
                "service_class": line.service_class,
                "what": line.quantity_of,
                "terms": line.terms,
                "quantity": line.quantity,
                "unit_price": _decimal(line.price_pico),
                "amount": _decimal(line.amount_pico),
                "price_version": line.price_version,
            }
            for line in statement.lines
        ],
        "corrections": [
            {
                "time": show_time(line.log_time_ms),
                "adjustment_id": line.adjustment_id,
                "kind": line.kind,
                "issuer": line.issuer,
                "reason": line.reason,
                "amount": _decimal(line.amount_pico),
            }
            for line in statement.corrections
        ],
        "credits": [
            {
                "time": show_time(line.log_time_ms),
                "command_id": line.command_id,
                "issuer": line.issuer,
                "reason": line.reason,
                "amount": _decimal(line.amount_pico),
            }
            for line in statement.credits
        ],
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
        "subject": row.subject,
        "state": row.state,
        "updated": show_time(row.updated_ms),
        "acknowledged_by": row.acknowledged_by,
        "note": row.note,
        "action": row.action,
    }


def _others(quantities: Quantities) -> str:
    return ", ".join(f"{quantity:,} {unit}" for unit, quantity in sorted(quantities.units.items()))


def _decimal(pico: int) -> str:
    return format_pico(pico).replace(",", "")
