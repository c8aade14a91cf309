"""From random usage under random books to invoices: lines times prices are what the requests cost, to the last pico.

The requests go through the ledger's step in random order and batches, windows are let go on the way, some requests are voided
again. What fractions say of the stream as a whole is then what lines and open windows hold, and what the invoices come to.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from billing.amounts import from_amount, to_amount
from billing.founding import LedgerSettings
from billing.line_parts import PartKey, Sum, from_units, to_line_parts
from billing.periods import month_of, period_at, period_start_ms
from billing.release import window_parts
from billing.v1.command_pb2 import ADJUSTMENT_KIND_VOID, Adjustment, InvoiceFinalization, TenantUpsert
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP, Invoice, PeriodLine, PeriodLineKey
from billing.v1.usage_pb2 import OUTCOME_REJECTED
from tests.billing.ledgers import Ledger, batch
from tests.billing.test_rating_property import APRIL, CURRENCIES, ZONES, books, own_total, usage_events

if TYPE_CHECKING:
    import random
    from fractions import Fraction

    from billing.v1.command_pb2 import PriceBook
    from billing.v1.usage_pb2 import UsageEvent

LOG_MS = APRIL + 24 * 3_600_000
LATER_MS = LOG_MS + 60 * 86_400_000


def ledger_of(dollars: PriceBook, yuan: PriceBook) -> Ledger:
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    for book in (dollars, yuan):
        ledger.command(LOG_MS, price_book=book)
    for tenant_id, calendar in ZONES.items():
        ledger.command(
            LOG_MS, tenant_upsert=TenantUpsert(tenant_id=tenant_id, currency=CURRENCIES[tenant_id], calendar=calendar)
        )
    return ledger


def charged(ledger: Ledger, stream: list[UsageEvent], chance: random.Random) -> dict[str, int]:
    """What the records say that each request cost, by its ID, whatever batches they come in."""
    costs: dict[str, int] = {}
    log_time_ms, begin = LOG_MS, 0
    while begin < len(stream):
        end = begin + chance.randint(1, 9)
        usage = ledger.usage(batch(stream[begin:end]), log_time_ms).record.usage
        assert not usage.dropped, usage.dropped
        high = usage.cost_pico_high or [0] * len(usage.cost_pico_low)
        for event, above, below in zip(stream[begin:end], high, usage.cost_pico_low, strict=True):
            costs[event.request_id] = above << 64 | below
        begin = end
        if chance.random() < 0.3:
            # Windows are let go; what comes after opens others.
            log_time_ms += 1_000_000
            ledger.tick(log_time_ms)
    return costs


def voided(ledger: Ledger, event: UsageEvent, cost: int) -> None:
    tenant_id, adjustment_id = event.tenant_id, f"void-{event.request_id}"
    period = period_at(ZONES[tenant_id], event.ended_ms)
    key = PeriodLineKey(
        tenant_id=tenant_id,
        period_start_ms=period.start_ms,
        period_end_ms=period.end_ms,
        currency=CURRENCIES[tenant_id],
        model=event.model,
        adjustment_id=adjustment_id,
    )
    line = PeriodLine(key=key, parts=to_line_parts({PartKey("request", "", 0): Sum(-1, -cost)}), cost=to_amount(-cost))
    said = Adjustment(
        tenant_id=tenant_id,
        kind=ADJUSTMENT_KIND_VOID,
        currency=CURRENCIES[tenant_id],
        lines=[line],
        corrected_request_ids=[event.request_id],
    )
    applied = ledger.command(
        ledger.state.log_time_ms, command_id=adjustment_id, adjustment=said, issuer="a", reason="b"
    ).record.command
    assert applied.applied, applied.refusal


def in_lines(ledger: Ledger, tenant_id: str) -> int:
    """What a tenant's lines and open windows hold; on the way each part multiplies."""
    parts = [line.parts for line in ledger.state.lines.of(tenant_id)]
    parts += [window_parts(ledger.state, window) for key, window in ledger.state.windows.items() if key.tenant_id == tenant_id]
    for found in parts:
        for key, value in found.items():
            assert not key.unit_pico or key.unit_pico * value.units == value.amount_pico, (key, value)
    return sum(value.amount_pico for found in parts for value in found.values())


def invoiced(ledger: Ledger, tenant_id: str) -> int:
    """What the invoices of March and April come to, exactly, each the sum of its lines."""
    total = 0
    for month in (month_of(APRIL) - 1, month_of(APRIL)):
        said = InvoiceFinalization(
            tenant_id=tenant_id,
            period_start_ms=period_start_ms(ZONES[tenant_id], month),
            series_prefix="INV",
            rounding_rule=ROUNDING_RULE_HALF_UP,
            currency_decimals=2,
        )
        applied = ledger.command(LATER_MS, invoice_finalization=said).record.command
        assert applied.applied, applied.refusal
        invoice = Invoice.FromString(applied.invoice)
        for line in invoice.lines:
            part = line.part
            assert not part.unit_pico or part.unit_pico * from_units(part.units) == from_amount(part.amount)
        assert sum(from_amount(line.part.amount) for line in invoice.lines) == from_amount(invoice.net_exact)
        total += from_amount(invoice.net_exact)
    return total


@settings(max_examples=10, deadline=None)
@given(books("USD"), books("CNY"), st.lists(usage_events(), max_size=20), st.randoms(use_true_random=False))
def test_lines_times_prices_are_what_the_requests_cost_and_invoices_what_the_close_says(
    dollars: PriceBook, yuan: PriceBook, stream: list[UsageEvent], chance: random.Random
) -> None:
    for number, event in enumerate(stream):
        event.request_id, event.started_ms = f"r{number}", event.ended_ms
    chance.shuffle(stream)
    ledger = ledger_of(dollars, yuan)
    costs = charged(ledger, stream, chance)
    offered = {"USD": dollars, "CNY": yuan}
    expected: dict[str, Fraction] = own_total(offered, stream, closed=False)
    final = own_total(offered, stream, closed=True)
    given_back: defaultdict[str, int] = defaultdict(int)
    for event in stream:
        if event.outcome != OUTCOME_REJECTED and chance.random() < 0.2:
            voided(ledger, event, costs[event.request_id])
            given_back[event.tenant_id] += costs[event.request_id]
    for tenant_id in ZONES:
        by_requests = sum(costs[event.request_id] for event in stream if event.tenant_id == tenant_id)
        assert by_requests == expected.get(tenant_id, 0)
        spend = ledger.state.accounts[tenant_id].spend_pico
        assert in_lines(ledger, tenant_id) == spend == by_requests - given_back[tenant_id]
        assert invoiced(ledger, tenant_id) == final.get(tenant_id, 0) - given_back[tenant_id]
        assert in_lines(ledger, tenant_id) == 0
    assert ledger.replayed().digest() == ledger.state.digest()
