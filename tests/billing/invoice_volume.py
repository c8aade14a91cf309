"""Invoices as the real step draws them: two tenants, currencies and calendars, late usage, credit, taxes, the close."""

from __future__ import annotations

from billing.amounts import PICO, to_amount
from billing.line_parts import PartKey, Sum, to_line_parts
from billing.periods import Period
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_CREDIT_NOTE,
    ADJUSTMENT_KIND_VOID,
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_VOLUME,
    Adjustment,
    ContextBand,
    CreditGrant,
    InvoiceFinalization,
    Price,
    PriceBook,
    Schedule,
    TenantUpsert,
    Tier,
    UnitPrice,
)
from billing.v1.invoice_pb2 import (
    CREDIT_KIND_PAID,
    CREDIT_KIND_PROMOTIONAL,
    ROUNDING_RULE_HALF_EVEN,
    ROUNDING_RULE_HALF_UP,
    Invoice,
    PeriodLine,
    PeriodLineKey,
    TaxRate,
)
from billing.v1.usage_pb2 import OUTCOME_REJECTED, SERVICE_CLASS_BATCH, UnitQuantity, UsageEvent
from tests.billing.ledgers import NOW_MS, PLAN, Ledger, batch, tenants_in, usage

DOLLARS, YUAN, FOREIGN = tenants_in(1)
DAY_MS = 86_400_000
# Of the month in which NOW_MS lies: November 2025, in UTC and in Shanghai.
NOVEMBER_MS, DECEMBER_MS, JANUARY_MS = 1_761_955_200_000, 1_764_547_200_000, 1_767_225_600_000
EIGHT_HOURS_MS = 8 * 3_600_000
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[1], offset_minutes=[480])
DOLLAR_PRICES = [
    Price(model="smollm2", uncached_input_pico=10_000, output_pico=40_000, cache_read_pico=1_001),
    Price(model="flat", uncached_input_pico=270_000, cache_read_pico=27_000, output_pico=1_100_000),
]
YUAN_PRICES = [
    # 0.02 yuan per thousand tokens; output is free at first, then cheaper from the second hundred on; long context costs more.
    Price(
        model="qwen-*",
        uncached_input_pico=20_000_000,
        schedules=[
            Schedule(
                quantity="output_tokens",
                mode=SCHEDULE_MODE_GRADUATED,
                free_units=50,
                tiers=[Tier(up_to_units=100, unit_pico=60_000_000), Tier(unit_pico=30_000_001)],
            )
        ],
        context_bands=[
            ContextBand(above_tokens=1_000, prices=[UnitPrice(quantity="uncached_input_tokens", unit_pico=40_000_000)])
        ],
    ),
    Price(model="mini", uncached_input_pico=20_000_000, minimum_pico=1_000_000_000),
    Price(model="tts", unit_pico={"characters": 150, "requests": 7 * 10**9}),
    Price(model="tts", tenant_id=FOREIGN, unit_pico={"characters": 100}),
    # At the close all of the month is as cheap as its last unit.
    Price(
        model="volume",
        schedules=[
            Schedule(
                quantity="uncached_input_tokens",
                mode=SCHEDULE_MODE_VOLUME,
                tiers=[Tier(up_to_units=250, unit_pico=20_000_000), Tier(unit_pico=10_000_000)],
            )
        ],
    ),
]
TAXES = [TaxRate(name="State sales tax", rate_millionths=62_500), TaxRate(name="City sales tax", rate_millionths=8_750)]


def _used(tenant_id: str, month: str, at_ms: int) -> list[UsageEvent]:
    """A month's requests, their last at `at_ms`."""

    def one(name: str, **fields: object) -> UsageEvent:
        ended_ms = at_ms - len(name) * DAY_MS // 7
        return usage(f"{month}-{name}", tenant_id, ended_ms=ended_ms, started_ms=ended_ms - 300, **fields)

    if tenant_id == DOLLARS:
        return [
            *(one(f"s{n}", output_tokens=n, cache_read_tokens=7 * n, project_id="team") for n in range(1, 10)),
            *(one(f"f{n}", model="flat", output_tokens=1_000_003 * n, project_id="assistant") for n in range(1, 9)),
            one("batch", model="flat", service_class=SERVICE_CLASS_BATCH, project_id="nightly"),
            one("free", outcome=OUTCOME_REJECTED),
            one("unrated", model="unpriced"),
        ]
    units = [UnitQuantity(unit="characters", quantity=1_234), UnitQuantity(unit="requests", quantity=1)]
    return [
        *(one(f"q{n}", model=f"qwen-{n % 2}", output_tokens=17 * n, project_id="智能客服") for n in range(1, 9)),
        one("long", model="qwen-1", uncached_input_tokens=1_001, project_id=""),
        one("mini", model="mini", uncached_input_tokens=1, output_tokens=0),
        one("tts", model="tts", operation=7, units=units),
        *(one(f"v{n}", model="volume", output_tokens=0, project_id="مشروع") for n in range(1, 4)),
    ]


def finalization(tenant_id: str, start_ms: int, *, draft: bool = False) -> InvoiceFinalization:
    """The command that draws a month's invoice."""
    yuan = tenant_id != DOLLARS
    return InvoiceFinalization(
        tenant_id=tenant_id,
        period_start_ms=start_ms,
        draft=draft,
        series_prefix="INV",
        rounding_rule=ROUNDING_RULE_HALF_EVEN if yuan else ROUNDING_RULE_HALF_UP,
        currency_decimals=2,
        taxes=[TaxRate(name="增值税", rate_millionths=60_000)] if yuan else TAXES,
        seller=["Example Inference Ltd", "12 Meter Street, Dublin 2"],
        buyer=["上海云端科技有限公司"] if yuan else ["Acme Analytics Inc."],
        note="Payment within 30 days.",
    )


def _line(adjustment_id: str, parts: dict[PartKey, Sum], period: Period, **names: object) -> PeriodLine:
    key = PeriodLineKey(
        tenant_id=DOLLARS,
        period_start_ms=period.start_ms,
        period_end_ms=period.end_ms,
        currency="USD",
        adjustment_id=adjustment_id,
        **names,  # type: ignore[arg-type]  # a test's own names
    )
    cost = to_amount(sum(part.amount_pico for part in parts.values()))
    return PeriodLine(key=key, parts=to_line_parts(parts), cost=cost)


def _void(request_id: str, output_tokens: int, period: Period) -> Adjustment:
    """Gives back what a request of model "flat" was charged."""
    parts = {
        PartKey("uncached_input_tokens", "", 270_000): Sum(-100, -100 * 270_000),
        PartKey("output_tokens", "", 1_100_000): Sum(-output_tokens, -output_tokens * 1_100_000),
    }
    names = {"project_id": "assistant", "model": "flat", "operation": 1, "service_class": 1, "price_version": 1}
    return Adjustment(
        tenant_id=DOLLARS,
        kind=ADJUSTMENT_KIND_VOID,
        currency="USD",
        lines=[_line(f"void-{request_id}", parts, period, **names)],
        corrected_request_ids=[request_id],
    )


def _adjust(ledger: Ledger, adjustment: Adjustment, log_time_ms: int, reason: str) -> None:
    result = ledger.command(
        log_time_ms,
        command_id=adjustment.lines[0].key.adjustment_id,
        adjustment=adjustment,
        issuer="ann@example.com",
        reason=reason,
    )
    assert result.record.command.applied, result.record.command.refusal


def volume() -> Ledger:
    """November and December invoiced for two tenants; usage of November comes late, some is voided, a credit note is given.

    A third tenant has no invoice yet, and one correction waits for the next.
    """
    ledger = Ledger()
    ledger.price(DOLLAR_PRICES)
    ledger.command(price_book=PriceBook(version=1, currency="CNY", prices=YUAN_PRICES))
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=DOLLARS, display_name="Acme", currency="USD", plan=PLAN))
    for tenant_id in (YUAN, FOREIGN):
        ledger.command(
            tenant_upsert=TenantUpsert(
                tenant_id=tenant_id, display_name="上海云端", currency="CNY", plan=PLAN, calendar=SHANGHAI
            )
        )
    for name, kind, pico in (("welcome", CREDIT_KIND_PROMOTIONAL, 5 * PICO), ("paid-1", CREDIT_KIND_PAID, 20 * PICO)):
        ledger.command(
            credit_grant=CreditGrant(tenant_id=DOLLARS, amount=to_amount(pico), currency="USD", kind=kind), command_id=name
        )
    for tenant_id in (DOLLARS, YUAN, FOREIGN):
        ledger.usage(batch(_used(tenant_id, "november", NOW_MS)))
    after = DECEMBER_MS + 3_600_000
    for tenant_id, start_ms in ((DOLLARS, NOVEMBER_MS), (YUAN, NOVEMBER_MS - EIGHT_HOURS_MS)):
        ledger.command(after, invoice_finalization=finalization(tenant_id, start_ms))
    late = [usage("late-1", DOLLARS), usage("late-2", YUAN, model="qwen-1", output_tokens=33, project_id="智能客服")]
    ledger.usage(batch(late), after)
    november = Period(NOVEMBER_MS, DECEMBER_MS)
    _adjust(ledger, _void("november-f3", 3_000_009, november), after, "answered with another tenant's text")
    note = _line("sla-11", {PartKey("credit note", "half a day without service", 0): Sum(0, -PICO // 4)}, november)
    said = Adjustment(tenant_id=DOLLARS, kind=ADJUSTMENT_KIND_CREDIT_NOTE, currency="USD", lines=[note])
    _adjust(ledger, said, after, "promised by the contract")
    for tenant_id in (DOLLARS, YUAN):
        ledger.usage(batch(_used(tenant_id, "december", DECEMBER_MS + 20 * DAY_MS)), DECEMBER_MS + 20 * DAY_MS)
    for tenant_id, start_ms in ((DOLLARS, DECEMBER_MS), (YUAN, DECEMBER_MS - EIGHT_HOURS_MS)):
        ledger.command(JANUARY_MS + 3_600_000, invoice_finalization=finalization(tenant_id, start_ms))
    _adjust(ledger, _void("november-f4", 4_000_012, november), JANUARY_MS + 3_600_000, "metered twice")
    ledger.usage(batch([usage("later", YUAN, model="tts", operation=7, output_tokens=0)]), JANUARY_MS + 3_600_000)
    return ledger


def invoices(ledger: Ledger) -> list[bytes]:
    """The stored bytes of all final invoices, in the order of their numbers."""
    drawn = [record.command.invoice for record in ledger.records() if record.command.invoice]
    return [stored for stored in drawn if Invoice.FromString(stored).number]
