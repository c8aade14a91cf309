"""Usage from the database under other books: what Fractions say, by tenant and period, whatever order it came in."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import sinks.rated_usage
from billing.founding import LedgerSettings
from billing.periods import Period, month_of, month_start_ms
from billing.v1.command_pb2 import (
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
from billing.v1.usage_pb2 import UnitQuantity
from sinks.follow import feed
from sinks.price_books import alone, price_books
from sinks.rated_usage import Offer, payers, rated_usage
from sinks.rerating import RatingDiffers, month_of_payer, simulate
from tests.billing.ledgers import KEYS, Ledger, batch, usage
from tests.billing.test_rating_property import (
    APRIL,
    CURRENCIES,
    GRADUATED,
    MARCH,
    MODELS,
    PACKAGE,
    VOLUME,
    ZONES,
    own_month,
    own_total,
)

if TYPE_CHECKING:
    from billing.v1.usage_pb2 import UsageEvent
    from sinks.engines.chdb import ChdbEngine

HALF = [ClassFactor(service_class=3, factor_millionths=500_000)]
EVENTS = 240


def book(currency: str, cheap: int) -> PriceBook:
    """Every kind of term; `cheap` makes another one of it."""
    tiers = [Tier(up_to_units=300, unit_pico=10 * cheap), Tier(up_to_units=900, unit_pico=6 * cheap), Tier(unit_pico=2 * cheap)]
    lines = [
        Price(
            model="cheap-*",
            uncached_input_pico=20_000 * cheap,
            cache_read_pico=2_000 * cheap,
            schedules=[
                Schedule(quantity="output_tokens", mode=GRADUATED, free_units=50, tiers=tiers),
                Schedule(quantity="reasoning_tokens", mode=VOLUME, tiers=tiers),
                Schedule(quantity="requests", mode=PACKAGE, package_units=7, package_pico=10**12),
            ],
            class_factors=HALF,
        ),
        Price(
            model="long",
            uncached_input_pico=10 * cheap,
            output_pico=20,
            context_bands=[ContextBand(above_tokens=100, prices=[UnitPrice(quantity="uncached_input_tokens", unit_pico=40)])],
            class_factors=HALF,
        ),
        Price(model="*", uncached_input_pico=10_000, output_pico=40_000 * cheap, unit_pico={"requests": 4}),
        Price(model="cheap-1", tenant_id="UTC", output_pico=2 * cheap, minimum_pico=1_000),
    ]
    return PriceBook(version=1, currency=currency, prices=lines)


def stream(seed: int) -> list[UsageEvent]:
    """Around the end of March, some zones' already April, in no order of time."""
    chance = random.Random(seed)
    found = []
    for number in range(EVENTS):
        ended_ms = APRIL + chance.randrange(-20 * 3_600_000, 20 * 3_600_000)
        found.append(
            usage(
                f"r{number}",
                chance.choice(tuple(ZONES)),
                project_id=chance.choice("ab"),
                model=chance.choice(MODELS),
                service_class=chance.choice((1, 2, 3)),
                outcome=chance.choice((1, 1, 1, 2, 6)),
                started_ms=ended_ms - 1,
                ended_ms=ended_ms,
                uncached_input_tokens=chance.randrange(200),
                cache_read_tokens=chance.randrange(30),
                output_tokens=chance.choice((0, 7, 100, 2**40)),
                reasoning_tokens=chance.randrange(50),
                units=[UnitQuantity(unit="requests", quantity=1)],
            )
        )
    return found


@pytest.fixture
def events(engine: ChdbEngine) -> list[UsageEvent]:
    """In the database, through a ledger whose books came first."""
    found = stream(7)
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    log_time_ms = APRIL + 24 * 3_600_000
    for currency in ("CNY", "USD"):
        ledger.command(log_time_ms, price_book=book(currency, 1))
    for tenant_id, calendar in ZONES.items():
        upsert = TenantUpsert(tenant_id=tenant_id, currency=CURRENCIES[tenant_id], calendar=calendar)
        ledger.command(log_time_ms, tenant_upsert=upsert)
    for begin in range(0, EVENTS, 30):
        ledger.usage(batch(found[begin : begin + 30]), log_time_ms)
    feed(engine, ledger.stored, KEYS.seal_key)
    return found


@pytest.mark.parametrize("chunk", [7, 5_000])
def test_under_any_book_it_costs_what_fractions_say(
    engine: ChdbEngine, events: list[UsageEvent], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small chunks, most are rated in sums of those alike; in one large, tiers are crossed and each is rated by itself."""
    monkeypatch.setattr(sinks.rated_usage, "_CHUNK_EVENTS", chunk)
    charged = price_books(engine)
    assert {payer.tenant_id: payer.calendar for payer in payers(engine)} == ZONES
    for payer in payers(engine):
        other = book(payer.currency, 2)
        offers = Offer(charged, as_charged=True), Offer(alone(other))
        seen: list[int] = []
        for month in (month_of(MARCH), month_of(APRIL)):
            period = month_of_payer(payer, month)
            mine = [event for event in events if event.tenant_id == payer.tenant_id and own_month(event) == month - 56 * 12 + 1]
            assert mine
            for rated, offered in zip(
                rated_usage(engine, payer, offers, *period, seen.append), (book(payer.currency, 1), other), strict=True
            ):
                expected = own_total({payer.currency: offered}, mine, closed=True)
                assert rated.cost_pico == expected.get(payer.tenant_id, 0)
                assert {key.period for key in rated.lines} == {period}
                before_close = own_total({payer.currency: offered}, mine, closed=False)[payer.tenant_id]
                assert sum(line.cost_pico for line in rated.lines.values()) == before_close
                # Every part multiplies, but for what lifts requests to their least price.
                for line in rated.lines.values():
                    for part, (units, amount) in line.parts.items():
                        assert amount == units * part.unit_pico or part.quantity_of == "minimum"
        assert sum(seen) >= len([event for event in events if event.tenant_id == payer.tenant_id and event.outcome != 6]) // 2
        # Within a month, the tiers are where the month's beginning left them.
        middle = APRIL
        [whole] = rated_usage(engine, payer, offers[:1], MARCH - 86_400_000, APRIL + 40 * 86_400_000)
        halves = [
            rated_usage(engine, payer, offers[:1], *bounds)[0]
            for bounds in ((MARCH - 86_400_000, middle), (middle, APRIL + 40 * 86_400_000))
        ]
        costs = [sum(line.cost_pico for line in half.lines.values()) for half in halves]
        assert sum(costs) == sum(line.cost_pico for line in whole.lines.values())


def test_a_month_is_simulated_by_tenant_and_a_changed_charge_is_seen(engine: ChdbEngine, events: list[UsageEvent]) -> None:
    other = book("USD", 2)
    other.version = 2
    other.commitments.append(Commitment(tenant_id="UTC"))
    other.commitments[0].amount.high = 2**34
    found = {entry.payer.tenant_id: entry for entry in simulate(engine, other, month_of(MARCH))}
    assert set(found) == {"UTC", "America/New_York"}
    entry = found["UTC"]
    # What was promised was not used up.
    assert entry.after_pico == 2**98
    mine = [event for event in events if event.tenant_id == "UTC" and own_month(event) == 3]
    assert entry.before_pico == own_total({"USD": book("USD", 1)}, mine, closed=True)["UTC"]
    assert entry.events == len([event for event in mine if event.outcome != 6])
    # A month in which nobody used anything still has what was promised for it.
    empty = {entry.payer.tenant_id: entry for entry in simulate(engine, other, month_of(MARCH) - 1)}
    assert (empty["UTC"].before_pico, empty["UTC"].after_pico, empty["America/New_York"].after_pico) == (0, 2**98, 0)
    assert empty["UTC"].period == Period(month_start_ms(month_of(MARCH) - 1), MARCH)
    engine.execute("ALTER TABLE usage_events UPDATE cost = cost + 1 WHERE tenant_id = 'UTC' SETTINGS mutations_sync = 2")
    with pytest.raises(RatingDiffers, match="run `taximeter audit`"):
        list(simulate(engine, other, month_of(MARCH), "UTC"))
