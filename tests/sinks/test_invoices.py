"""Lines and invoices in ClickHouse: what the ledger states, audited to the byte, and every change to them named."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from unittest import mock

import pytest

from billing import invoice_step, replay
from billing.amounts import PICO, to_amount
from billing.founding import found_again
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_VOLUME,
    CreditGrant,
    InvoiceFinalization,
    Price,
    PriceBook,
    Schedule,
    TenantUpsert,
    Tier,
)
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_EVEN, Invoice, TaxRate
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.recompute import Recomputed
from tests.billing.ledgers import KEYS, PRICES, Ledger, batch, tenants_in, usage

ONE, TWO = tenants_in(1)[:2]
NOVEMBER, DECEMBER, DAY_MS = 1_761_955_200_000, 1_764_547_200_000, 86_400_000
JANUARY = DECEMBER + 31 * DAY_MS


def invoiced_ledger() -> Ledger:
    """Two currencies, prices with terms, a draft, invoices with late usage on the second, and windows that are open."""
    ledger = Ledger()
    tiers = [Tier(up_to_units=30, unit_pico=9_000_000), Tier(unit_pico=5_000_000)]
    volume = Price(model="volume", schedules=[Schedule(quantity="output_tokens", mode=SCHEDULE_MODE_VOLUME, tiers=tiers)])
    ledger.price([volume, *PRICES])
    ledger.command(price_book=PriceBook(version=1, currency="JPY", prices=[Price(model="*", output_pico=2 * 10**10)]))
    ledger.tenant(ONE)
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=TWO, currency="JPY", display_name="Two KK"))
    ledger.command(credit_grant=CreditGrant(tenant_id=ONE, amount=to_amount(PICO), currency="USD"))
    for month, start_ms in enumerate((NOVEMBER, DECEMBER)):
        for day in range(0, 28, 9):
            at_ms = start_ms + day * DAY_MS
            events = [
                usage(f"{month}-{day}-{tenant_id}-{model}", tenant_id, model=model, started_ms=at_ms, ended_ms=at_ms)
                for tenant_id in (ONE, TWO)
                for model in ("volume", "smollm2", "unpriced")
            ]
            ledger.usage(batch(events), at_ms)
        late = usage(f"late-{month}", ONE, started_ms=DECEMBER - DAY_MS, ended_ms=DECEMBER - DAY_MS)
        ledger.usage(batch([late]), start_ms + 32 * DAY_MS)
        draw(ledger, start_ms + 32 * DAY_MS, ONE, start_ms, draft=True)
        draw(ledger, start_ms + 32 * DAY_MS, ONE, start_ms)
        if month:
            draw(ledger, start_ms + 33 * DAY_MS, TWO, NOVEMBER, currency_decimals=0)
    return ledger


def draw(ledger: Ledger, at_ms: int, tenant_id: str, start_ms: int, **fields: Any) -> None:
    values: dict[str, Any] = {
        "series_prefix": "INV",
        "rounding_rule": ROUNDING_RULE_HALF_EVEN,
        "currency_decimals": 2,
        "taxes": [TaxRate(name="VAT", rate_millionths=190_000)],
    }
    said = InvoiceFinalization(tenant_id=tenant_id, period_start_ms=start_ms, **(values | fields))
    record = ledger.command(log_time_ms=at_ms, invoice_finalization=said).record
    assert record.command.applied, record.command.refusal


def test_the_audit_draws_every_invoice_again(engine: ChdbEngine) -> None:
    ledger = invoiced_ledger()
    feed(engine, ledger.stored, KEYS.seal_key)
    report = audit(engine, KEYS.seal_key)
    assert report.findings == []
    assert report.invoices == 3
    final = [Invoice.FromString(r.command.invoice) for r in ledger.records() if r.invoice_series]
    rows = engine.query("SELECT series, number, net, due, invoice_hash FROM tenant_invoices ORDER BY number").rows
    assert [(row[0], row[1]) for row in rows] == [(each.series, each.number) for each in final]
    # 2.4 yen.
    assert rows[2][2] == Decimal(2)
    # A line of nothing but unpriced usage is taken too.
    [[waiting]] = engine.query(f"SELECT sum(unrated_events) FROM uninvoiced_lines WHERE tenant_id = '{ONE}'").rows
    assert waiting == 0
    [[waiting]] = engine.query(f"SELECT sum(amount) FROM uninvoiced_lines WHERE tenant_id = '{TWO}'").rows
    assert waiting == Decimal("2.4")
    [[adjusted]] = engine.query("SELECT sum(amount) FROM invoice_lines FINAL WHERE adjustment AND number = 2").rows
    assert adjusted == Decimal("0.0000014")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("ALTER TABLE period_lines UPDATE amount = amount * 2 WHERE quantity_of = 'output_tokens'", "line_differs"),
        ("ALTER TABLE period_lines UPDATE amount = amount * 2 WHERE quantity_of = 'output_tokens'", "bill_differs"),
        (f"ALTER TABLE invoiced_lines DELETE WHERE tenant_id = '{ONE}'", "bill_differs"),
        ("ALTER TABLE invoices DELETE WHERE number = 2", "invoice_differs"),
        ("ALTER TABLE invoices UPDATE invoice = concat(invoice, '0') WHERE number = 2", "invoice_differs"),
        ("ALTER TABLE invoices UPDATE net_exact = net_exact + 1 WHERE number = 2", "bill_differs"),
        ("ALTER TABLE invoice_lines DELETE WHERE line_number = 1", "invoice_lines_differ"),
    ],
)
def test_each_change_is_named(engine: ChdbEngine, change: str, kind: str) -> None:
    feed(engine, invoiced_ledger().stored, KEYS.seal_key)
    engine.execute(f"{change} SETTINGS mutations_sync = 2")
    kinds = {finding.kind for finding in audit(engine, KEYS.seal_key).findings}
    assert kind in kinds, kinds


def test_an_invoice_that_does_not_follow_from_its_lines_is_named() -> None:
    """A step that draws otherwise, in its figures or in what it takes."""

    def dearer(*arguments: Any) -> Invoice:
        drawn = draw_true(*arguments)
        drawn.note = "changed"
        return drawn

    draw_true = invoice_step.draw  # type: ignore[attr-defined]
    with mock.patch.object(invoice_step, "draw", dearer):
        ledger = invoiced_ledger()
    recomputed = Recomputed(1)
    for record in ledger.records():
        recomputed.take(record)
    # Two drafts and two finals, and a third that names the hash of a changed one.
    assert [finding.kind for finding in recomputed.findings] == ["invoice_differs"] * 5


def test_a_ledger_that_was_founded_again_in_another_month_is_right() -> None:
    """Its founding record states what there was; the month ends with the record behind it."""
    ledger = invoiced_ledger()
    months_later = ledger.state.log_time_ms + 100 * DAY_MS
    record, stored = found_again(ledger.state, b"h" * 16, months_later, KEYS.seal_key, "test")
    replay.apply(ledger.state, record, stored)
    ledger.stored.append(stored)
    ledger.tick(months_later + 1)
    assert ledger.records()[-1].credits
    recomputed = Recomputed(1)
    for each in ledger.records():
        recomputed.take(each)
    assert recomputed.findings == []
