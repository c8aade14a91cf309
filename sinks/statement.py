"""One tenant's statement: what was used, at which price, what was granted, and what was left before and after.

Promise: every line is quantity times price, exactly, and the lines add up to what was charged; if they don't, no statement is
made and the error says to run the audit. Usage counts by when it ended, credit by when the ledger took it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from billing.price_checks import PRICE_FIELDS
from billing.prices import PriceBooks
from billing.v1.command_pb2 import Price, PriceBook
from billing.v1.usage_pb2 import Operation, ServiceClass
from sinks.engine import Reader, decimal_to_pico
from sinks.errors import ParameterError, SinkError
from sinks.queries import CHARGED, balances
from sinks.tables import TOKEN_COLUMNS

__all__ = ["CreditLine", "Statement", "StatementError", "StatementLine", "price_books", "statement"]


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
    def closing_pico(self) -> int:
        return self.opening_pico + self.credited_pico - self.charged_pico


def statement(reader: Reader, tenant_id: str, start_ms: int, end_ms: int) -> Statement | None:
    """The statement of a tenant for whole minutes [start_ms, end_ms), or None: nobody knows the tenant."""
    if start_ms % 60_000 or end_ms % 60_000 or not 0 <= start_ms < end_ms:
        raise ParameterError(f"start {start_ms} ms, end {end_ms} ms: give whole minutes, the end after the start")
    known = balances(reader, tenant_id)
    if not known:
        return None
    account = known[0]
    books = price_books(reader)
    lines: list[StatementLine] = []
    events = free_events = unrated_events = 0
    for group in _groups(reader, tenant_id, account.currency, start_ms, end_ms):
        events += group.events
        if not group.charged:
            free_events += group.events
        elif not group.price_version:
            unrated_events += group.events
        lines += _lines(group, books, account.currency, tenant_id)
    credits_before = _credits(reader, tenant_id, account.currency, 0, start_ms)
    return Statement(
        tenant_id=tenant_id,
        display_name=account.display_name,
        currency=account.currency,
        start_ms=start_ms,
        end_ms=end_ms,
        opening_pico=sum(line.amount_pico for line in credits_before)
        - _cost_before(reader, tenant_id, account.currency, start_ms),
        lines=tuple(lines),
        credits=tuple(_credits(reader, tenant_id, account.currency, start_ms, end_ms)),
        events=events,
        free_events=free_events,
        unrated_events=unrated_events,
    )


def price_books(reader: Reader) -> PriceBooks:
    """Every version that took effect, as the ledger rates by."""
    rows = reader.query(
        "SELECT currency, book_version, toUnixTimestamp64Milli(effective) AS effective_ms, model, operation, service_class, "
        "uncached_input_price, output_price, cache_read_price, cache_write_price, reasoning_price, image_input_price, "
        "audio_input_price, audio_output_price, unit_names, unit_prices_pico FROM price_books FINAL "
        "ORDER BY currency, book_version, model, operation, service_class"
    ).rows
    books: dict[tuple[str, int], PriceBook] = {}
    for row in rows:
        currency, version, effective_ms = str(row[0]), cast("int", row[1]), cast("int", row[2])
        book = books.setdefault((currency, version), PriceBook(version=version, currency=currency, effective_ms=effective_ms))
        book.prices.append(
            Price(
                model=str(row[3]),
                operation=_number(Operation.items(), "OPERATION_", str(row[4])),
                service_class=_number(ServiceClass.items(), "SERVICE_CLASS_", str(row[5])),
                unit_pico=dict(zip(cast("list[str]", row[14]), cast("list[int]", row[15]), strict=True)),
                **{field: decimal_to_pico(row[6 + index]) for index, field in enumerate(PRICE_FIELDS)},  # type: ignore[arg-type]
            )
        )
    return PriceBooks(books.values())


def _number(items: Sequence[tuple[str, int]], prefix: str, name: str) -> int:
    """The enum's number for a column's text."""
    if name.startswith("unknown_"):
        return int(name.removeprefix("unknown_"))
    return dict(items)[f"{prefix}{name.upper()}"]


@dataclass(frozen=True, slots=True)
class _Group:
    project_id: str
    model: str
    operation: str
    service_class: str
    charged: bool
    price_version: int
    events: int
    # One event's time, under the version that rated them all.
    ended_ms: int
    quantities: dict[str, int]
    cost_pico: int


def _groups(reader: Reader, tenant_id: str, currency: str, start_ms: int, end_ms: int) -> list[_Group]:
    sums = ", ".join(f"sum({name})" for name in TOKEN_COLUMNS)
    rows = reader.query(
        f"SELECT project_id, model, operation, service_class, {CHARGED} AS charged, price_version, count(), "  # noqa: S608 - names of ours
        f"toUnixTimestamp64Milli(min(ended)), {sums}, sumMap(unit_names, unit_quantities), sum(cost) FROM usage_events FINAL "
        "WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND ended >= fromUnixTimestamp64Milli({start:Int64}) AND ended < fromUnixTimestamp64Milli({end:Int64}) "
        "GROUP BY project_id, model, operation, service_class, charged, price_version "
        "ORDER BY project_id, model, operation, service_class, charged, price_version",
        {"tenant": tenant_id, "currency": currency, "start": start_ms, "end": end_ms},
    ).rows
    groups = []
    for row in rows:
        quantities = dict(zip(TOKEN_COLUMNS, cast("tuple[int, ...]", row[8:16]), strict=True))
        names, units = cast("tuple[list[str], list[int]]", row[16])
        quantities |= dict(zip(names, units, strict=True))
        groups.append(
            _Group(
                project_id=str(row[0]),
                model=str(row[1]),
                operation=str(row[2]),
                service_class=str(row[3]),
                charged=bool(row[4]),
                price_version=cast("int", row[5]),
                events=cast("int", row[6]),
                ended_ms=cast("int", row[7]),
                quantities=quantities,
                cost_pico=decimal_to_pico(row[17]),  # type: ignore[arg-type]  # a sum of decimals
            )
        )
    return groups


def _lines(group: _Group, books: PriceBooks, currency: str, tenant_id: str) -> list[StatementLine]:
    prices: dict[str, int] = {}
    if group.charged and group.price_version:
        operation = _number(Operation.items(), "OPERATION_", group.operation)
        service_class = _number(ServiceClass.items(), "SERVICE_CLASS_", group.service_class)
        rate = books.rate(currency, group.ended_ms, group.model, operation, service_class, tenant_id)
        if rate is None or rate.version != group.price_version:
            raise StatementError(
                f"price version {group.price_version} of {group.model} ({currency}) is not known here; run `taximeter audit`"
            )
        prices = {**dict(zip(TOKEN_COLUMNS, rate.token_pico, strict=True)), **rate.unit_pico}
    lines = [
        StatementLine(
            group.project_id,
            group.model,
            group.operation,
            group.service_class,
            name,
            quantity,
            prices.get(name, 0),
            quantity * prices.get(name, 0),
            group.price_version,
        )
        for name, quantity in group.quantities.items()
        if quantity and group.charged
    ]
    amount = sum(line.amount_pico for line in lines)
    if amount != group.cost_pico:
        raise StatementError(
            f"{group.model}, price version {group.price_version}: the lines add up to {amount} pico, and "
            f"{group.cost_pico} were charged; run `taximeter audit`"
        )
    return lines


def _credits(reader: Reader, tenant_id: str, currency: str, start_ms: int, end_ms: int) -> list[CreditLine]:
    rows = reader.query(
        "SELECT toUnixTimestamp64Milli(log_time), command_id, issuer, reason, amount FROM commands FINAL "
        "WHERE action = 'credit_grant' AND applied = 1 AND tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND log_time >= fromUnixTimestamp64Milli({start:Int64}) AND log_time < fromUnixTimestamp64Milli({end:Int64}) "
        "ORDER BY log_time, ledger_partition, version",
        {"tenant": tenant_id, "currency": currency, "start": start_ms, "end": end_ms},
    ).rows
    return [
        CreditLine(cast("int", row[0]), str(row[1]), str(row[2]), str(row[3]), decimal_to_pico(row[4]))  # type: ignore[arg-type]
        for row in rows
    ]


def _cost_before(reader: Reader, tenant_id: str, currency: str, end_ms: int) -> int:
    [[cost]] = reader.query(
        "SELECT sum(cost) FROM usage_totals FINAL WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND minute < toDateTime({end:Int64}, 'UTC')",
        {"tenant": tenant_id, "currency": currency, "end": min(end_ms // 1000, 2**32 - 1)},
    ).rows
    return decimal_to_pico(cost)  # type: ignore[arg-type]  # a sum of decimals
