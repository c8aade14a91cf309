"""One tenant's statement: what was used, at which price, what was granted, and what was left before and after.

Promise: every line is quantity times price, exactly (what lifts requests to their least price has an amount alone), and the
lines add up to what was charged; if they don't, no statement is made and the error says to run the audit. Where a price has
tiers or other terms, each request is rated again in the ledger's order, so a statement that begins within a month is exact
too. Usage counts by when it ended; credit, its expiry, corrections and what the close of a month added by when the ledger took
them. Of an invoice below zero there is no line: what it gives as credit, it adds to what was charged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from billing.invoices import AT_THE_CLOSE
from sinks.engine import Reader, decimal_to_pico
from sinks.errors import ParameterError, SinkError
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES
from sinks.price_books import number_of_operation, number_of_service_class, price_books
from sinks.queries import CHARGED, balances
from sinks.rated_usage import Offer, Payer, RatedLine, UsageKey, payers, rated_usage

__all__ = ["CorrectionLine", "CreditLine", "Statement", "StatementError", "StatementLine", "statement"]

# Of a tenant whose usage comes while it is read; each takes as long as to rate its usage.
_READINGS_MAX: Final = 10


class StatementError(SinkError):
    """The database's events, prices and amounts don't fit together."""


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One class of tokens, or one named unit, of one model at one price."""

    project_id: str
    model: str
    operation: str
    service_class: str
    # A column of tokens ("output_tokens"), or a unit's own name.
    quantity_of: str
    # Empty for a flat price: "free", "tier 2", "context over 200,000 tokens".
    terms: str
    quantity: int
    price_pico: int
    amount_pico: int
    price_version: int


@dataclass(frozen=True, slots=True)
class CreditLine:
    """One grant."""

    log_time_ms: int
    command_id: str
    issuer: str
    reason: str
    amount_pico: int


@dataclass(frozen=True, slots=True)
class CorrectionLine:
    """One adjustment: below zero gives back."""

    log_time_ms: int
    adjustment_id: str
    kind: str
    issuer: str
    reason: str
    amount_pico: int


@dataclass(frozen=True, slots=True)
class Statement:
    """What happened to one account in [start_ms, end_ms)."""

    tenant_id: str
    display_name: str
    currency: str
    start_ms: int
    end_ms: int
    opening_pico: int
    lines: tuple[StatementLine, ...]
    credits: tuple[CreditLine, ...]
    corrections: tuple[CorrectionLine, ...]
    # Credit that was left when it expired.
    expired_pico: int
    # Volume tiers, packages and commitments, as the invoices of months added them.
    at_close_pico: int
    events: int
    # At price 0: refused by a gateway, or nothing was delivered.
    free_events: int
    # No price book named their model: kept, not charged.
    unrated_events: int

    @property
    def charged_pico(self) -> int:
        return sum(line.amount_pico for line in self.lines)

    @property
    def credited_pico(self) -> int:
        return sum(line.amount_pico for line in self.credits)

    @property
    def corrected_pico(self) -> int:
        return sum(line.amount_pico for line in self.corrections)

    @property
    def closing_pico(self) -> int:
        gone_pico = self.expired_pico + self.charged_pico + self.at_close_pico + self.corrected_pico
        return self.opening_pico + self.credited_pico - gone_pico


def statement(reader: Reader, tenant_id: str, start_ms: int, end_ms: int) -> Statement | None:
    """The statement of a tenant for whole minutes [start_ms, end_ms), or None: nobody knows the tenant."""
    if start_ms % 60_000 or end_ms % 60_000 or not 0 <= start_ms < end_ms:
        raise ParameterError(f"start {start_ms} ms, end {end_ms} ms: give whole minutes, the end after the start")
    known = balances(reader, tenant_id)
    if not known:
        return None
    account = known[0]
    [payer] = payers(reader, tenant_id)
    lines, groups = _rated(reader, payer, start_ms, end_ms)
    credits_before = _credits(reader, tenant_id, account.currency, 0, start_ms)
    return Statement(
        tenant_id=tenant_id,
        display_name=account.display_name,
        currency=account.currency,
        start_ms=start_ms,
        end_ms=end_ms,
        opening_pico=sum(line.amount_pico for line in credits_before)
        - _cost_before(reader, tenant_id, account.currency, start_ms)
        - sum(line.amount_pico for line in _corrections(reader, tenant_id, account.currency, 0, start_ms))
        - _expired(reader, tenant_id, account.currency, start_ms)
        - _at_close(reader, tenant_id, account.currency, 0, start_ms),
        lines=lines,
        corrections=tuple(_corrections(reader, tenant_id, account.currency, start_ms, end_ms)),
        credits=tuple(_credits(reader, tenant_id, account.currency, start_ms, end_ms)),
        expired_pico=_expired(reader, tenant_id, account.currency, end_ms)
        - _expired(reader, tenant_id, account.currency, start_ms),
        at_close_pico=_at_close(reader, tenant_id, account.currency, start_ms, end_ms),
        events=sum(group.events + group.free_events for group in groups.values()),
        free_events=sum(group.free_events for group in groups.values()),
        unrated_events=sum(group.events for name, group in groups.items() if not name.price_version),
    )


def _rated(
    reader: Reader, payer: Payer, start_ms: int, end_ms: int
) -> tuple[tuple[StatementLine, ...], Mapping[_Name, _Group]]:
    """Lines and what they came to. Usage that comes between two questions makes them differ: they are asked again then."""
    groups = _groups(reader, payer.tenant_id, payer.currency, start_ms, end_ms)
    for _ in range(_READINGS_MAX):
        [rated] = rated_usage(reader, payer, [Offer(price_books(reader), as_charged=True)], start_ms, end_ms)
        try:
            return _lines(rated.lines, groups), groups
        except StatementError:
            before, groups = groups, _groups(reader, payer.tenant_id, payer.currency, start_ms, end_ms)
            if groups == before:
                raise
    raise StatementError(f"usage of {payer.tenant_id} comes faster than it can be read: give an end that has passed")


class _Name(NamedTuple):
    """What is charged together."""

    project_id: str
    model: str
    operation: int
    service_class: int
    price_version: int


class _Group(NamedTuple):
    """What the events of one name say that they came to."""

    events: int
    free_events: int
    cost_pico: int


def _groups(reader: Reader, tenant_id: str, currency: str, start_ms: int, end_ms: int) -> dict[_Name, _Group]:
    rows = reader.query(
        f"SELECT project_id, model, operation, service_class, price_version, countIf({CHARGED}), countIf(NOT ({CHARGED})), "  # noqa: S608 - names of ours
        "sum(cost) FROM usage_events FINAL WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND ended >= fromUnixTimestamp64Milli({start:Int64}) AND ended < fromUnixTimestamp64Milli({end:Int64}) "
        "GROUP BY project_id, model, operation, service_class, price_version",
        {"tenant": tenant_id, "currency": currency, "start": start_ms, "end": end_ms},
    ).rows
    return {
        _Name(
            str(row[0]),
            str(row[1]),
            number_of_operation(str(row[2])),
            number_of_service_class(str(row[3])),
            cast("int", row[4]),
        ): _Group(cast("int", row[5]), cast("int", row[6]), decimal_to_pico(row[7]))  # type: ignore[arg-type]  # a sum
        for row in rows
    }


def _lines(rated: Mapping[UsageKey, RatedLine], groups: Mapping[_Name, _Group]) -> tuple[StatementLine, ...]:
    """The lines of all periods together, if they say of each name what its events say."""
    found: dict[_Name, RatedLine] = {}
    for key in sorted(rated):
        found.setdefault(_Name(*key[1:]), RatedLine()).merge(rated[key])
    for name in sorted({*found, *groups}):
        line, group = found.get(name, RatedLine()), groups.get(name, _Group(0, 0, 0))
        if (line.events, line.cost_pico) != (group.events, group.cost_pico):
            raise StatementError(
                f"{name.model}, price version {name.price_version}: {line.events} requests cost {line.cost_pico} pico by the "
                f"price books, and {group.events} were charged {group.cost_pico} pico; run `taximeter audit`"
            )
    return tuple(
        StatementLine(
            name.project_id,
            name.model,
            OPERATIONS[name.operation],
            SERVICE_CLASSES[name.service_class],
            part.quantity_of,
            part.terms,
            units,
            part.unit_pico,
            amount_pico,
            name.price_version,
        )
        for name in sorted(found)
        for part, (units, amount_pico) in found[name].parts.items()
    )


def _credits(reader: Reader, tenant_id: str, currency: str, start_ms: int, end_ms: int) -> list[CreditLine]:
    # A command that granted something has nothing more to say: one with an outcome names a grant that there was before.
    rows = reader.query(
        "SELECT toUnixTimestamp64Milli(log_time), command_id, issuer, reason, amount FROM commands FINAL "
        "WHERE action = 'credit_grant' AND applied = 1 AND outcome = '' AND tenant_id = {tenant:String} "
        "AND currency = {currency:String} AND log_time >= fromUnixTimestamp64Milli({start:Int64}) "
        "AND log_time < fromUnixTimestamp64Milli({end:Int64}) "
        "ORDER BY log_time, ledger_partition, version",
        {"tenant": tenant_id, "currency": currency, "start": start_ms, "end": end_ms},
    ).rows
    return [
        CreditLine(cast("int", row[0]), str(row[1]), str(row[2]), str(row[3]), decimal_to_pico(row[4]))  # type: ignore[arg-type]
        for row in rows
    ]


def _expired(reader: Reader, tenant_id: str, currency: str, before_ms: int) -> int:
    """What had expired of all grants before then."""
    [[amount]] = reader.query(
        "SELECT sum(last) FROM (SELECT argMax(expired, (at, version)) AS last FROM credit_grants FINAL "
        "WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND at < fromUnixTimestamp64Milli({before:Int64}) GROUP BY grant_id)",
        {"tenant": tenant_id, "currency": currency, "before": before_ms},
    ).rows
    return decimal_to_pico(amount)  # type: ignore[arg-type]  # a sum of decimals


def _at_close(reader: Reader, tenant_id: str, currency: str, start_ms: int, end_ms: int) -> int:
    """What the closes of months added that were invoiced then."""
    [[amount]] = reader.query(
        "SELECT sum(amount) FROM invoice_lines FINAL WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND terms = {terms:String} AND (series, number) IN (SELECT series, number FROM invoices FINAL "
        "WHERE tenant_id = {tenant:String} AND issued >= fromUnixTimestamp64Milli({start:Int64}) "
        "AND issued < fromUnixTimestamp64Milli({end:Int64}))",
        {"tenant": tenant_id, "currency": currency, "terms": AT_THE_CLOSE, "start": start_ms, "end": end_ms},
    ).rows
    return decimal_to_pico(amount)  # type: ignore[arg-type]  # a sum of decimals


def _corrections(reader: Reader, tenant_id: str, currency: str, start_ms: int, end_ms: int) -> list[CorrectionLine]:
    rows = reader.query(
        "SELECT toUnixTimestamp64Milli(any(log_time)) AS applied_ms, adjustment_id, any(kind), any(issuer), any(reason), "
        "sum(amount) FROM adjustments FINAL WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND log_time >= fromUnixTimestamp64Milli({start:Int64}) AND log_time < fromUnixTimestamp64Milli({end:Int64}) "
        "GROUP BY adjustment_id ORDER BY applied_ms, adjustment_id",
        {"tenant": tenant_id, "currency": currency, "start": start_ms, "end": end_ms},
    ).rows
    return [
        CorrectionLine(
            cast("int", row[0]),
            str(row[1]),
            str(row[2]),
            str(row[3]),
            str(row[4]),
            decimal_to_pico(row[5]),  # type: ignore[arg-type]  # a sum of decimals
        )
        for row in rows
    ]


def _cost_before(reader: Reader, tenant_id: str, currency: str, end_ms: int) -> int:
    [[cost]] = reader.query(
        "SELECT sum(cost) FROM usage_totals FINAL WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND minute < toDateTime({end:Int64}, 'UTC')",
        {"tenant": tenant_id, "currency": currency, "end": min(end_ms // 1000, 2**32 - 1)},
    ).rows
    return decimal_to_pico(cost)  # type: ignore[arg-type]  # a sum of decimals
