"""Price books in the database: every term comes back as it was, statements know them, and what is in use is priced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.amounts import PICO, to_amount
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_PACKAGE,
    SCHEDULE_MODE_VOLUME,
    ClassFactor,
    Commitment,
    ContextBand,
    Price,
    PriceBook,
    Schedule,
    TenantUpsert,
    Tier,
    UnitPrice,
)
from billing.v1.usage_pb2 import OPERATION_CHAT, SERVICE_CLASS_BATCH, UnitQuantity
from sinks import queries
from sinks.follow import feed
from sinks.price_books import Unpriced, price_books, unpriced
from sinks.statement import statement
from tests.billing.ledgers import KEYS, NOW_MS, PRICES, Ledger, batch, tenants_in, usage

if TYPE_CHECKING:
    from sinks.engine import Reader
    from sinks.engines.chdb import ChdbEngine

ONE, TWO = tenants_in(1, 2)
MINUTE_MS = 60_000
START_MS = NOW_MS // MINUTE_MS * MINUTE_MS
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
# Yuan: 0.02 per thousand tokens, a cache at a tenth, twice as much for long context, batch at half.
TERMS = (
    Price(
        model="qwen*",
        uncached_input_pico=20_000_000,
        cache_read_pico=2_000_000,
        schedules=[
            Schedule(
                quantity="output_tokens",
                mode=SCHEDULE_MODE_GRADUATED,
                free_units=5,
                tiers=[Tier(up_to_units=20, unit_pico=60_000_000), Tier(unit_pico=40_000_000)],
            ),
            Schedule(quantity="reasoning_tokens", mode=SCHEDULE_MODE_VOLUME, tiers=[Tier(unit_pico=8)]),
            Schedule(quantity="images", mode=SCHEDULE_MODE_PACKAGE, package_units=10, package_pico=PICO),
        ],
        context_bands=[
            ContextBand(above_tokens=1_000, prices=[UnitPrice(quantity="uncached_input_tokens", unit_pico=40_000_000)]),
            ContextBand(
                above_tokens=9_000,
                prices=[
                    UnitPrice(quantity="uncached_input_tokens", unit_pico=50_000_000),
                    UnitPrice(quantity="images", unit_pico=2),
                ],
            ),
        ],
        class_factors=[ClassFactor(service_class=SERVICE_CLASS_BATCH, factor_millionths=500_000)],
    ),
    Price(model="small", output_pico=10_000, minimum_pico=150_000, unit_pico={"characters": 0, "pages": 3}),
    # Beside that of everyone: the table's key has the tenant in it.
    Price(model="small", tenant_id=TWO, operation=OPERATION_CHAT, output_pico=1),
    Price(model="small", tenant_id=TWO, output_pico=2),
)
BOOK = PriceBook(
    version=1,
    currency="CNY",
    prices=TERMS,
    commitments=[
        Commitment(tenant_id=tenant_id, amount=to_amount(amount))
        for tenant_id, amount in sorted([(ONE, 7 * PICO), (TWO, 2**70)])
    ],
)


def made() -> Ledger:
    ledger = Ledger()
    ledger.command(price_book=BOOK)
    ledger.price()
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=ONE, currency="CNY", calendar=SHANGHAI))
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=TWO, currency="CNY"))
    return ledger


def test_every_term_comes_back_as_it_was(engine: ChdbEngine) -> None:
    feed(engine, made().stored, KEYS.seal_key)
    dollars = PriceBook(version=1, currency="USD", prices=PRICES)
    assert price_books(engine).all() == [BOOK, dollars]
    lines = engine.query("SELECT tenant_id, operation FROM price_books FINAL WHERE model = 'small' ORDER BY line").rows
    assert lines == [("", "unspecified"), (TWO, "chat"), (TWO, "unspecified")]


def test_a_statement_within_a_month_knows_the_tiers_that_were_reached(engine: ChdbEngine, loopback: Reader) -> None:
    ledger = made()
    model = {"model": "qwen-max", "uncached_input_tokens": 0, "output_tokens": 8}
    # Late usage of the first minute comes in the middle: the tiers are reached in the ledger's order.
    for number, minute in enumerate((0, 1, 0, 1, 2)):
        ledger.usage(batch([usage(f"r{number}", ONE, ended_ms=START_MS + minute * MINUTE_MS, **model)]), NOW_MS + 5 * MINUTE_MS)
    whole = [
        usage("long", ONE, model="qwen-max", uncached_input_tokens=3, output_tokens=0, context_tokens=1_001),
        usage("half", ONE, model="qwen-max", uncached_input_tokens=4, output_tokens=0, service_class=SERVICE_CLASS_BATCH),
        usage("least", ONE, model="small", uncached_input_tokens=0, output_tokens=10),
        usage("more", ONE, model="small", uncached_input_tokens=0, output_tokens=20),
        usage("odd", ONE, model="unknown", output_tokens=1),
        usage("own", TWO, model="small", units=[UnitQuantity(unit="pages", quantity=9)]),
    ]
    ledger.usage(batch(whole), NOW_MS + 5 * MINUTE_MS)
    feed(engine, ledger.stored, KEYS.seal_key)
    [account] = queries.balances(engine, ONE)
    account_statement = statement(loopback, ONE, START_MS, START_MS + 10 * MINUTE_MS)
    assert account_statement is not None
    assert account_statement.charged_pico == account.spend_pico
    assert account_statement.unrated_events == 1
    said = {
        (line.model, line.service_class, line.quantity_of, line.terms): (line.quantity, line.price_pico, line.amount_pico)
        for line in account_statement.lines
    }
    assert said == {
        ("qwen-max", "standard", "output_tokens", "free"): (5, 0, 0),
        ("qwen-max", "standard", "output_tokens", "tier 1"): (20, 60_000_000, 1_200_000_000),
        ("qwen-max", "standard", "output_tokens", "tier 2"): (15, 40_000_000, 600_000_000),
        ("qwen-max", "standard", "uncached_input_tokens", "context over 1,000 tokens"): (3, 40_000_000, 120_000_000),
        ("qwen-max", "batch", "uncached_input_tokens", ""): (4, 10_000_000, 40_000_000),
        ("small", "standard", "output_tokens", ""): (30, 10_000, 300_000),
        # The first lacked 50,000 pico of the least price.
        ("small", "standard", "minimum", "up to the least price of a request"): (1, 0, 50_000),
        ("unknown", "standard", "uncached_input_tokens", ""): (100, 0, 0),
        ("unknown", "standard", "output_tokens", ""): (1, 0, 0),
    }
    # The second minute alone: 8 units that began at the ninth of the month, 8 that began at the twenty-fifth.
    second = statement(loopback, ONE, START_MS + MINUTE_MS, START_MS + 2 * MINUTE_MS)
    assert second is not None
    assert [(line.terms, line.quantity) for line in second.lines] == [("tier 1", 9), ("tier 2", 7)]
    other = statement(loopback, TWO, START_MS, START_MS + MINUTE_MS)
    assert other is not None
    assert [(line.quantity_of, line.price_pico) for line in other.lines] == [
        ("uncached_input_tokens", 0),
        ("output_tokens", 2),
    ]


def test_models_in_use_that_a_book_has_no_price_for_are_named(engine: ChdbEngine) -> None:
    ledger = made()
    ledger.usage(batch([usage("a", ONE, model="qwen-max"), usage("b", ONE, model="small"), usage("c", TWO, model="small")]))
    ledger.usage(batch([usage("d", TWO, model="qwen-max")]))
    feed(engine, ledger.stored, KEYS.seal_key)
    book = PriceBook(version=2, currency="CNY", prices=[Price(model="small", tenant_id=TWO, output_pico=1)])
    assert unpriced(engine, book, START_MS) == [
        Unpriced("qwen-max", "generate", "standard", 2, sorted((ONE, TWO))),
        Unpriced("small", "generate", "standard", 1, [ONE]),
    ]
    book.prices.append(Price(model="*"))
    assert unpriced(engine, book, START_MS) == []
    # What nobody uses who is billed in dollars is nobody's concern.
    assert unpriced(engine, PriceBook(currency="USD", prices=[Price(model="none")]), START_MS) == []
