"""The FOCUS export: what the specification asks of each row, and sums that are the ledger's to the last digit."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal

import pytest

from billing.amounts import PICO, decimal_text, from_amount
from billing.line_parts import PartKey
from billing.periods import Period
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    ContextBand,
    Price,
    PriceBook,
    Schedule,
    TenantUpsert,
    Tier,
    UnitPrice,
)
from billing.v1.invoice_pb2 import CREDIT_KIND_PROMOTIONAL, Invoice
from billing.v1.usage_pb2 import OUTCOME_REJECTED, SERVICE_CLASS_BATCH, UnitQuantity
from sinks import queries
from sinks.charged_usage import ChargeDiffers, UsageName
from sinks.engine import Reader
from sinks.engines.chdb import ChdbEngine
from sinks.focus import focus_rows, invoice_rows
from sinks.focus_rows import COLUMNS, Billed, Payee, usage_row
from sinks.follow import feed
from sinks.invoices import IssuedInvoice, is_of_requests
from tests.billing.invoice_sheets import Sheet, american, chinese, japanese
from tests.billing.ledgers import KEYS, NOW_MS, PLAN, Ledger, batch, tenants_in, usage
from tests.sinks.focus_rules import focus_problems

ONE, TWO, THREE = tenants_in(1)
DAY_MS = 86_400_000
TODAY_MS = NOW_MS // DAY_MS * DAY_MS
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[1], offset_minutes=[480])
YUAN = PriceBook(
    version=1,
    currency="CNY",
    prices=[
        # 0.02 yuan per thousand tokens; the second hundred of the month's output is cheaper; long context costs more.
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
        # Another tenant's own price.
        Price(model="tts", tenant_id=THREE, unit_pico={"characters": 100}),
    ],
)


def _ledger() -> Ledger:
    ledger = Ledger()
    ledger.price()
    ledger.command(price_book=YUAN)
    ledger.tenant(ONE)
    for tenant_id in (TWO, THREE):
        ledger.command(
            tenant_upsert=TenantUpsert(
                tenant_id=tenant_id, display_name="上海云端", currency="CNY", plan=PLAN, calendar=SHANGHAI
            )
        )
    ledger.usage(
        batch(
            [
                *(usage(f"r{n}", ONE, output_tokens=n, cache_read_tokens=7 * n, project_id=f"p{n % 2}") for n in range(1, 20)),
                usage("batch", ONE, service_class=SERVICE_CLASS_BATCH),
                usage("before", ONE, ended_ms=NOW_MS - DAY_MS, started_ms=NOW_MS - DAY_MS),
                usage("free", ONE, outcome=OUTCOME_REJECTED),
                usage("unrated", ONE, model="unpriced"),
                *(usage(f"q{n}", TWO, model=f"qwen-{n % 2}", output_tokens=17 * n, project_id="智能") for n in range(1, 9)),
                usage("long", TWO, model="qwen-1", uncached_input_tokens=1_001, project_id=""),
                usage("small", TWO, model="mini", uncached_input_tokens=1, output_tokens=0),
                *(
                    usage(
                        f"t{tenant_id}",
                        tenant_id,
                        model="tts",
                        operation=7,
                        units=[UnitQuantity(unit="characters", quantity=1_234), UnitQuantity(unit="requests", quantity=1)],
                    )
                    for tenant_id in (TWO, THREE)
                ),
            ]
        )
    )
    return ledger


@pytest.fixture
def reader(engine: ChdbEngine) -> Reader:
    feed(engine, _ledger().stored, KEYS.seal_key)
    return engine


def _csv(rows: Iterator[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _export(reader: Reader, start_ms: int = TODAY_MS - 40 * DAY_MS, end_ms: int = TODAY_MS + DAY_MS) -> str:
    return _csv(dict(row) for row in focus_rows(reader, start_ms, end_ms, "Example Inference"))


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_every_row_is_what_the_specification_asks_for(reader: Reader) -> None:
    text = _export(reader)
    assert focus_problems(text) == []
    rows = _rows(text)
    assert Counter(row["ChargeCategory"] for row in rows).keys() == {"Usage", "Adjustment"}
    assert {row["BillingCurrency"] for row in rows} == {"USD", "CNY"}


def test_billed_cost_is_what_the_ledger_charged_to_the_last_digit(reader: Reader) -> None:
    spent = {balance.tenant_id: balance.spend_pico for balance in queries.balances(reader)}
    billed: dict[str, Decimal] = dict.fromkeys(spent, Decimal(0))
    for row in _rows(_export(reader)):
        billed[row["BillingAccountId"]] += Decimal(row["BilledCost"])
    assert {tenant: amount * PICO for tenant, amount in billed.items()} == spent
    assert min(spent.values()) > 0


def test_a_day_alone_has_that_days_charges_and_tiers_go_on(reader: Reader) -> None:
    whole = _rows(_export(reader))
    days = [_rows(_export(reader, day, day + DAY_MS)) for day in (TODAY_MS - DAY_MS, TODAY_MS)]
    assert all(days)
    assert [row for day in days for row in day if row["BillingAccountId"] == TWO] == [
        row for row in whole if row["BillingAccountId"] == TWO
    ]
    assert sum(len(day) for day in days) == len(whole)


def test_prices_tiers_and_skus_are_told_apart(reader: Reader) -> None:
    rows = [row for row in _rows(_export(reader)) if row["BillingAccountId"] == TWO]
    tiers = {row["SkuPriceId"] for row in rows if row["SkuId"] == "qwen-1/generate/standard/output_tokens"}
    assert tiers == {f"qwen-1/generate/standard/output_tokens/{terms}" for terms in ("free", "tier 1", "tier 2")}
    [characters] = [row for row in rows if row["SkuMeter"] == "Characters"]
    assert (characters["PricingUnit"], characters["PricingQuantity"]) == ("1000000 Characters", "0.001234")
    assert (characters["ContractedUnitPrice"], characters["BilledCost"]) == ("0.00015", decimal_text(1_234 * 150))
    [minimum] = [row for row in rows if row["ChargeCategory"] == "Adjustment"]
    assert minimum["ChargeDescription"] == "Minimum of mini (generate, standard), up to the least price of a request"
    assert {row["BillingPeriodStart"][8:] for row in rows} == {"31T16:00:00Z"}


def test_a_price_of_ones_own_stands_beside_that_of_everyone(reader: Reader) -> None:
    [row] = [row for row in _rows(_export(reader)) if row["BillingAccountId"] == THREE and row["SkuMeter"] == "Characters"]
    assert (row["ContractedUnitPrice"], row["ListUnitPrice"]) == ("0.0001", "0.00015")
    assert Decimal(row["ListCost"]) > Decimal(row["ContractedCost"]) == Decimal(row["BilledCost"])


def test_a_cost_that_its_price_does_not_give_is_named(reader: Reader, engine: ChdbEngine) -> None:
    engine.execute(
        "ALTER TABLE usage_events UPDATE cost = cost + toDecimal128('0.000000000001', 12) WHERE request_id = 'long' "
        "SETTINGS mutations_sync = 1"
    )
    with pytest.raises(ChargeDiffers, match=r"request long: its price gives .* was charged; run `taximeter audit`"):
        _export(reader)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("BilledCost", "1,5", "BilledCost '1,5' is no number"),
        ("ChargeCategory", "Usages", "ChargeCategory 'Usages' is not allowed"),
        ("ChargePeriodStart", "2025-11-23", "ChargePeriodStart '2025-11-23' is no time"),
        ("PricingQuantity", "", "PricingQuantity is null for Usage"),
        ("ContractedUnitPrice", "1", "ContractedUnitPrice times PricingQuantity is not ContractedCost"),
        ("ChargePeriodEnd", "2001-01-01T00:00:00Z", "ChargePeriodEnd is not after ChargePeriodStart"),
        ("ChargeCategory", "Tax", "SkuId is not null for Tax"),
        ("BillingCurrency", "usd", "BillingCurrency 'usd' is no ISO 4217 code"),
        ("PricingUnit", "millions of tokens", "PricingUnit 'millions of tokens' is no unit"),
        ("Tags", "[]", "Tags '[]' is no object of plain values"),
        ("ProviderName", "", "ProviderName is null"),
    ],
)
def test_the_validator_sees_each_broken_rule(column: str, value: str, problem: str) -> None:
    payee = Payee("Example Inference", ONE, "Acme", "USD")
    billed = Billed(TODAY_MS, TODAY_MS + DAY_MS, Period(TODAY_MS, TODAY_MS + 30 * DAY_MS))
    name = UsageName("p", "m", 1, 1, 1)
    row = dict(usage_row(payee, billed, name, 3, PartKey("output_tokens", "", 40_000), 17, 680_000, 50_000))
    assert focus_problems(_csv(iter([row]))) == []
    row[column] = value
    assert any(problem in found for found in focus_problems(_csv(iter([row]))))


def test_the_validator_sees_columns_that_are_missing_doubled_or_invented() -> None:
    header = ",".join(COLUMNS)
    assert focus_problems(header + "\r\n") == []
    assert focus_problems(header.replace("BilledCost,", "") + "\r\n") == ["column BilledCost is missing"]
    assert focus_problems(header + ",Colour\r\n") == ["column Colour is no column of 1.2"]
    assert focus_problems(header + ",Tags\r\n") == ["column Tags stands twice"]


@pytest.mark.parametrize("sheet", [american, chinese, japanese], ids=lambda sheet: sheet.__name__)
def test_what_an_invoice_adds_to_its_requests_comes_to_its_total_less_given_credit(sheet: Callable[[], Sheet]) -> None:
    stored = sheet().stored()
    invoice = Invoice.FromString(stored)
    issued = IssuedInvoice(stored, invoice, 7)
    payee = Payee("Example Inference", invoice.tenant_id, invoice.display_name, invoice.currency)
    rows = [dict(row) for row in invoice_rows(payee, issued, 0, 2 * invoice.period_end_ms)]
    assert focus_problems(_csv(iter(rows))) == []
    assert {row["InvoiceId"] for row in rows} == {"INV-0001-1"}
    of_requests = sum(from_amount(line.part.amount) for line in invoice.lines if is_of_requests(line))
    given = sum(from_amount(credit.amount) for credit in invoice.credits if credit.kind == CREDIT_KIND_PROMOTIONAL)
    added = sum(Decimal(row["BilledCost"]) for row in rows) * PICO
    assert of_requests + added == from_amount(invoice.total) - given
