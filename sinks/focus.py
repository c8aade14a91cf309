"""Cost and usage in FOCUS 1.2, read from the database: rows by tenant, day and price, then what invoices add to them.

Promise: the rows of requests add up to what the ledger charged for them, exactly; the rows that name an invoice add up to its
total less the promotional credit on it (other credit settles an invoice and is no charge). They are made one tenant and one
period after the other, and memory holds one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from billing.amounts import from_amount
from billing.line_parts import PartKey
from billing.periods import Period, period_at
from billing.prices import PriceBooks
from billing.v1.invoice_pb2 import CREDIT_KIND_PROMOTIONAL
from billing.validation import TOKEN_FIELDS
from sinks.charged_usage import DAY_MS, ChargeKey, UsageName, charged_usage, periods_between
from sinks.engine import Reader, decimal_to_pico
from sinks.focus_rows import Billed, Payee, other_row, usage_row
from sinks.invoices import IssuedInvoice, invoices_of, is_of_requests
from sinks.price_books import price_books
from sinks.queries import balances
from sinks.rated_usage import Payer, payers

__all__ = ["focus_rows", "invoice_rows", "usage_bounds"]

_CLASSES = frozenset(TOKEN_FIELDS)


def focus_rows(
    reader: Reader, start_ms: int, end_ms: int, provider: str, tenant_id: str | None = None
) -> Iterator[Mapping[str, str]]:
    """The rows whose charge period begins in [start_ms, end_ms), which are whole UTC days. Raises ChargeDiffers."""
    books = price_books(reader)
    names = {balance.tenant_id: balance.display_name for balance in balances(reader, tenant_id)}
    for payer in payers(reader, tenant_id):
        payee = Payee(provider, payer.tenant_id, names.get(payer.tenant_id, ""), payer.currency)
        issued = invoices_of(reader, payer.tenant_id)
        first_ms, last_ms = usage_bounds(reader, payer, start_ms, end_ms)
        for period in periods_between(payer, first_ms, last_ms):
            yield from _usage_rows(reader, payer, payee, books, issued, period, first_ms, last_ms)
        for entry in issued:
            yield from invoice_rows(payee, entry, start_ms, end_ms)
        yield from _waiting_rows(reader, payer, payee, issued, start_ms, end_ms)


def usage_bounds(reader: Reader, payer: Payer, start_ms: int, end_ms: int) -> tuple[int, int]:
    """The part of [start_ms, end_ms) in which the tenant has usage; where there is none, nothing."""
    [[first, last, windows]] = reader.query(
        "SELECT toInt64(toUnixTimestamp(min(minute))), toInt64(toUnixTimestamp(max(minute))), count() FROM usage_totals "
        "WHERE tenant_id = {tenant:String} AND minute >= toDateTime({start:Int64}, 'UTC') "
        "AND minute < toDateTime({end:Int64}, 'UTC')",
        {"tenant": payer.tenant_id, "start": start_ms // 1_000, "end": end_ms // 1_000},
    ).rows
    assert isinstance(first, int)
    assert isinstance(last, int)
    return (first * 1_000, last * 1_000 + 60_000) if windows else (start_ms, start_ms)


def _usage_rows(
    reader: Reader,
    payer: Payer,
    payee: Payee,
    books: PriceBooks,
    issued: Sequence[IssuedInvoice],
    period: Period,
    start_ms: int,
    end_ms: int,
) -> Iterator[Mapping[str, str]]:
    takers = _takers(issued, period)
    charges = charged_usage(reader, payer, books, period, start_ms, end_ms, [entry.version for entry in takers])
    for key in sorted(charges):
        billed = _billed(payer, period, key, takers)
        line = charges[key]
        for part, (units, amount_pico) in sorted(line.parts.items()):
            if not part.unit_pico and not part.terms and part.quantity_of not in _CLASSES:
                continue  # producers name units as they like; what no book prices is no SKU
            list_pico = _list_pico(books, payer, key.name, part)
            yield usage_row(payee, billed, key.name, line.events, part, units, amount_pico, list_pico)


def _billed(payer: Payer, period: Period, key: ChargeKey, takers: Sequence[IssuedInvoice]) -> Billed:
    start_ms, end_ms = max(key.day_ms, period.start_ms), min(key.day_ms + DAY_MS, period.end_ms)
    if key.cut < len(takers):
        taker = takers[key.cut]
        billing_period, number = Period(taker.invoice.period_start_ms, taker.invoice.period_end_ms), taker.number
    else:
        billing_period, number = _next_period(payer, period, takers), ""
    return Billed(start_ms, end_ms, billing_period, number, correction=billing_period.start_ms > period.start_ms)


def _waiting_rows(
    reader: Reader, payer: Payer, payee: Payee, issued: Sequence[IssuedInvoice], start_ms: int, end_ms: int
) -> Iterator[Mapping[str, str]]:
    """Corrections that no invoice has taken yet."""
    rows = reader.query(
        "SELECT toUnixTimestamp64Milli(period_start), toUnixTimestamp64Milli(period_end), project_id, model, adjustment_id, "
        "quantity_of, terms, amount FROM uninvoiced_lines WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND adjustment_id != '' AND quantity_of != '' AND period_start >= fromUnixTimestamp64Milli({start:Int64}) "
        "AND period_start < fromUnixTimestamp64Milli({end:Int64}) "
        "ORDER BY period_start, adjustment_id, project_id, model, line_id, quantity_of, terms, unit_price",
        {"tenant": payer.tenant_id, "currency": payer.currency, "start": start_ms, "end": end_ms},
    ).rows
    for first, last, project_id, model, adjustment_id, quantity_of, terms, amount in rows:
        assert isinstance(first, int)
        assert isinstance(last, int)
        assert isinstance(amount, Decimal)
        period = Period(first, last)
        billing_period = _next_period(payer, period, _takers(issued, period))
        billed = Billed(*period, billing_period, correction=billing_period.start_ms > period.start_ms)
        what = _description(str(quantity_of), str(terms), str(model), str(adjustment_id))
        yield other_row(payee, billed, "Adjustment", what, decimal_to_pico(amount), str(project_id))


def _description(quantity_of: str, terms: str, model: str, adjustment_id: str) -> str:
    said = " ".join(text for text in (quantity_of.replace("_", " "), terms, model) if text).capitalize()
    return f"{said}, correction {adjustment_id}" if adjustment_id else said


def _takers(issued: Sequence[IssuedInvoice], period: Period) -> list[IssuedInvoice]:
    """The invoices that could take what is of `period`: the first that was drawn after it came."""
    return [entry for entry in issued if entry.invoice.period_end_ms >= period.end_ms]


def _next_period(payer: Payer, period: Period, takers: Sequence[IssuedInvoice]) -> Period:
    """Whose invoice will take what none has."""
    return period_at(payer.calendar, takers[-1].invoice.period_end_ms) if takers else period


def _list_pico(books: PriceBooks, payer: Payer, name: UsageName, part: PartKey) -> int:
    """What a unit costs those who have no price of their own; where that has terms of its own, the charged price."""
    if part.terms:
        return part.unit_pico
    book = books.version(payer.currency, name.price_version)
    assert book is not None, name
    rate = books.rate(payer.currency, book.effective_ms, name.model, name.operation, name.service_class, "")
    if rate is None or rate.terms is not None:
        return part.unit_pico
    prices = {**rate.unit_pico, **dict(zip(TOKEN_FIELDS, rate.token_pico, strict=True))}
    return prices.get(part.quantity_of, part.unit_pico)


def invoice_rows(payee: Payee, entry: IssuedInvoice, start_ms: int, end_ms: int) -> Iterator[Mapping[str, str]]:
    """What stands on an invoice beside the usage that requests were charged for."""
    invoice = entry.invoice
    own = Period(invoice.period_start_ms, invoice.period_end_ms)
    for line in invoice.lines:
        period = Period(line.key.period_start_ms, line.key.period_end_ms)
        if not is_of_requests(line) and start_ms <= period.start_ms < end_ms:
            billed = Billed(*period, own, entry.number, correction=period.start_ms < own.start_ms)
            what = _description(line.part.quantity_of, line.part.terms, line.key.model, line.key.adjustment_id)
            yield other_row(payee, billed, "Adjustment", what, from_amount(line.part.amount), line.key.project_id)
    if not start_ms <= own.start_ms < end_ms:
        return
    billed = Billed(*own, own, entry.number)
    if rounding_pico := from_amount(invoice.net) - from_amount(invoice.net_exact):
        yield other_row(payee, billed, "Adjustment", f"Rounding of the net of {entry.number}", rounding_pico)
    for credit in invoice.credits:
        # All others were paid, here or where the tenant came from, or stood as charges below zero on an earlier invoice.
        if credit.kind == CREDIT_KIND_PROMOTIONAL:
            what = f"Promotional credit {credit.grant_id}"
            yield other_row(payee, billed, "Credit", what, -from_amount(credit.amount))
    for tax in invoice.taxes:
        yield other_row(payee, billed, "Tax", tax.rate.name, from_amount(tax.amount))
