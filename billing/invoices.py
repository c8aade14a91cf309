"""What an invoice says: drawn from a tenant's lines, its credit and the command's terms. Pure: the same gives the same bytes.

An invoice takes the lines of its period and whatever came since for earlier periods, which are adjustments: usage that came
after that period's invoice, corrections, with the period in the line's name. What the close of the period adds (volume tiers,
packages, committed spend) are lines too, once a period: usage that comes after the close is charged as it came. Amounts are
exact; the net, each tax and what is due are rounded once each, to the currency's smallest unit, by the rule that the invoice
states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from billing import line_parts
from billing.amounts import PICO, from_amount, to_amount
from billing.limits import (
    INVOICE_BYTES_MAX,
    INVOICE_TEXT_CHARS_MAX,
    INVOICE_TEXTS_MAX,
    SCHEMA_VERSION,
    SERIES_PREFIX_CHARS_MAX,
    TAXES_MAX,
)
from billing.line_parts import PartKey, Sum
from billing.period_lines import OTHER_NAME, Line, LineKey
from billing.periods import Period
from billing.prices import PriceBooks
from billing.quantities import Counter
from billing.settlement import commitment, settlements
from billing.v1.account_pb2 import LedgerPosition
from billing.v1.command_pb2 import InvoiceFinalization
from billing.v1.invoice_pb2 import (
    ROUNDING_RULE_HALF_EVEN,
    ROUNDING_RULE_HALF_UP,
    CreditApplied,
    Invoice,
    InvoiceLine,
    RoundingRule,
    TaxLine,
)
from billing.v1.usage_pb2 import SERVICE_CLASS_TEST

__all__ = [
    "AT_THE_CLOSE",
    "COMMITMENT",
    "Closing",
    "Issue",
    "Payer",
    "closing",
    "draw",
    "is_adjustment",
    "net_pico",
    "terms_problem",
]

AT_THE_CLOSE = "at the close"
COMMITMENT = "commitment"
_DECIMALS_MAX = 12
_MILLIONTHS = 1_000_000
_TAX_MILLIONTHS_MAX = 10 * _MILLIONTHS
_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Payer(NamedTuple):
    """Who the invoice is for."""

    tenant_id: str
    display_name: str
    currency: str
    time_zone: str


class Issue(NamedTuple):
    """Where and when it is drawn. Number 0: a draft."""

    series: str
    number: int
    previous_hash: bytes
    log_time_ms: int
    generation: bytes
    sequence: int


class Closing(NamedTuple):
    """An amount that the close of a period adds to a line."""

    key: LineKey
    part: PartKey
    value: Sum


def terms_problem(said: InvoiceFinalization) -> str | None:
    """What is wrong with the terms of an invoice, for a person, or None."""
    prefix = said.series_prefix
    if len(prefix) > SERIES_PREFIX_CHARS_MAX or not _PREFIX.fullmatch(prefix):
        return f"series_prefix: {prefix[:32]!r}; write 1 to {SERIES_PREFIX_CHARS_MAX} letters and digits, such as INV"
    if said.rounding_rule not in (ROUNDING_RULE_HALF_UP, ROUNDING_RULE_HALF_EVEN):
        return f"rounding_rule: {said.rounding_rule} is not known here; say half up or half even"
    if said.currency_decimals > _DECIMALS_MAX:
        return f"currency_decimals: {said.currency_decimals}; a currency has at most {_DECIMALS_MAX}"
    if len(said.taxes) > TAXES_MAX:
        return f"taxes: {len(said.taxes)} entries; write at most {TAXES_MAX}"
    for place, tax in enumerate(said.taxes, 1):
        if not 0 < len(tax.name) <= INVOICE_TEXT_CHARS_MAX or tax.rate_millionths > _TAX_MILLIONTHS_MAX:
            return f"taxes[{place}]: {tax.name[:32]!r} at {tax.rate_millionths} millionths; give it a name, 190000 is 19 %"
    for name, texts in (("seller", said.seller), ("buyer", said.buyer), ("note", said.note.splitlines())):
        if len(texts) > INVOICE_TEXTS_MAX or any(len(text) > INVOICE_TEXT_CHARS_MAX for text in texts):
            return f"{name}: too long; write at most {INVOICE_TEXTS_MAX} lines of {INVOICE_TEXT_CHARS_MAX} characters"
    return None


def closing(
    books: PriceBooks,
    counters: Iterable[tuple[Counter, Mapping[str, int]]],
    payer: Payer,
    period: Period,
    lines: Iterable[Line],
) -> list[Closing]:
    """What the close of `period` adds to its `lines`, in a stated order."""
    own = [
        (counter, units)
        for counter, units in counters
        if (counter.tenant_id, counter.period.start_ms, counter.currency) == (payer.tenant_id, period.start_ms, payer.currency)
    ]
    found = []
    for each in settlements(books, own):
        book = books.version(each.currency, each.price_version)
        assert book is not None, each
        price = book.prices[each.price_line - 1]
        service_class = each.counted_class or price.service_class
        key = LineKey(
            payer.tenant_id, period, each.currency, "", price.model, price.operation, service_class, each.price_version
        )
        found.append(Closing(key, PartKey(each.quantity_of, AT_THE_CLOSE, 0), Sum(each.units, each.amount_pico)))
    spend_pico = sum(line.cost_pico for line in lines if line.key.period == period)
    spend_pico += sum(each.value.amount_pico for each in found)
    missing = commitment(books, payer.tenant_id, payer.currency, period, spend_pico)
    if missing is not None:
        key = LineKey(payer.tenant_id, period, payer.currency, "", "", 0, 0, missing.price_version)
        found.append(Closing(key, PartKey(COMMITMENT, AT_THE_CLOSE, 0), Sum(0, missing.amount_pico)))
    return found


def is_adjustment(key: LineKey, period: Period) -> bool:
    """Whether a line is no usage of `period` on its invoice."""
    return key.period != period or bool(key.adjustment_id)


def net_pico(lines: Iterable[Line]) -> int:
    """What an invoice of `lines` comes to, exactly."""
    return sum(line.cost_pico for line in lines)


def draw(
    said: InvoiceFinalization,
    payer: Payer,
    period: Period,
    lines: Sequence[Line],
    paid: Sequence[CreditApplied],
    issue: Issue,
) -> Invoice:
    """The invoice of `period` over `lines`, which hold everything that it is to take; `paid` of it by credit. What test keys
    used is free, and stands on none."""
    lines = [line for line in lines if line.key.service_class != SERVICE_CLASS_TEST]
    invoice = _draw_in_full(said, payer, period, lines, paid, issue)
    if invoice.ByteSize() > INVOICE_BYTES_MAX:
        # Nobody reads tens of thousands of lines: one for each price, whatever the project and model.
        lines = _summed(lines)
        invoice = _draw_in_full(said, payer, period, lines, paid, issue)
    if invoice.ByteSize() > INVOICE_BYTES_MAX:
        # It is adjustments that are so many.
        invoice = _draw_in_full(said, payer, period, _summed(lines, adjustments_of=period), paid, issue)
    return invoice


def _draw_in_full(
    said: InvoiceFinalization,
    payer: Payer,
    period: Period,
    lines: Sequence[Line],
    paid: Sequence[CreditApplied],
    issue: Issue,
) -> Invoice:
    smallest = PICO // 10**said.currency_decimals
    rule = said.rounding_rule
    usage = net_pico(line for line in lines if not is_adjustment(line.key, period))
    net_exact = net_pico(lines)
    net = _nearest(net_exact, smallest, rule) * smallest
    taxes = [
        TaxLine(
            rate=rate,
            base=to_amount(net),
            amount=to_amount(_nearest(net * rate.rate_millionths, smallest * _MILLIONTHS, rule) * smallest),
        )
        for rate in said.taxes
    ]
    taxes_pico = sum(from_amount(tax.amount) for tax in taxes)
    applied = sum(from_amount(credit.amount) for credit in paid)
    invoice = Invoice(
        schema_version=SCHEMA_VERSION,
        series=issue.series,
        number=issue.number,
        previous_hash=issue.previous_hash,
        tenant_id=payer.tenant_id,
        display_name=payer.display_name,
        currency=payer.currency,
        period_start_ms=period.start_ms,
        period_end_ms=period.end_ms,
        time_zone=payer.time_zone or "UTC",
        issued_ms=issue.log_time_ms,
        position=LedgerPosition(generation=issue.generation, sequence=issue.sequence),
        events=sum(line.events for line in lines),
        unrated_events=sum(line.unrated_events for line in lines),
        usage=to_amount(usage),
        adjustments=to_amount(net_exact - usage),
        net_exact=to_amount(net_exact),
        rounding_rule=rule,
        currency_decimals=said.currency_decimals,
        net=to_amount(net),
        taxes=taxes,
        total=to_amount(net + taxes_pico),
        credits=paid,
        due=to_amount(_nearest(net_exact - applied, smallest, rule) * smallest + taxes_pico),
        seller=said.seller,
        buyer=said.buyer,
        note=said.note,
    )
    for line in sorted(lines, key=lambda line: (is_adjustment(line.key, period), line.key)):
        key, adjustment = line.to_key(), is_adjustment(line.key, period)
        for part in sorted(line.parts):
            invoice.lines.append(
                InvoiceLine(
                    number=len(invoice.lines) + 1,
                    key=key,
                    adjustment=adjustment,
                    events=line.events,
                    part=line_parts.to_line_part(part, line.parts[part]),
                )
            )
    return invoice


def _summed(lines: Iterable[Line], adjustments_of: Period | None = None) -> list[Line]:
    """The same amounts and counts in few lines: projects and models are not told apart; adjustments, where `adjustments_of`
    says whose, neither.
    """
    sums: dict[LineKey, Line] = {}
    for line in lines:
        key = line.key._replace(project_id=OTHER_NAME, model=OTHER_NAME, operation=0, service_class=0)
        if adjustments_of and key.adjustment_id:
            key = key._replace(period=adjustments_of, price_version=0, adjustment_id=OTHER_NAME)
        into = sums.setdefault(key, Line(key, line.opened_generation, line.opened_sequence))
        into.events += line.events
        into.refused_events += line.refused_events
        into.unrated_events += line.unrated_events
        into.add_parts(line.parts)
    return list(sums.values())


def _nearest(numerator: int, denominator: int, rule: RoundingRule.ValueType) -> int:
    whole, rest = divmod(abs(numerator), denominator)
    if 2 * rest > denominator or (2 * rest == denominator and (rule == ROUNDING_RULE_HALF_UP or whole % 2 == 1)):
        whole += 1
    return whole if numerator >= 0 else -whole
