"""Rating against an independent implementation over Fractions: random books, random streams, any batching, any order.

The other implementation knows the contract's words alone: it walks every unit range of every tier with rational numbers of
currency units per million, multiplies by the class's factor there, and never asks `billing` what a line, a band or a tier is.
"""

from __future__ import annotations

import random
from collections import defaultdict
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.periods import month_start_ms
from billing.price_checks import book_problems
from billing.prices import PriceBooks
from billing.quantities import Quantities
from billing.settlement import settlements
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_PACKAGE,
    SCHEDULE_MODE_VOLUME,
    ClassFactor,
    ContextBand,
    Price,
    PriceBook,
    Schedule,
    Tier,
    UnitPrice,
)
from billing.v1.usage_pb2 import (
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    OUTCOME_REJECTED,
    SERVICE_CLASS_BATCH,
    SERVICE_CLASS_PRIORITY,
    SERVICE_CLASS_STANDARD,
    UnitQuantity,
    UsageEvent,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Shanghai is eight hours east all year; New York's offset changes in March and November.
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
NEW_YORK = Calendar(time_zone="America/New_York", from_month=[0, 675, 683], offset_minutes=[-300, -240, -300])
ZONES = {"UTC": Calendar(), "Asia/Shanghai": SHANGHAI, "America/New_York": NEW_YORK}
CURRENCIES = {"UTC": "USD", "Asia/Shanghai": "CNY", "America/New_York": "USD"}
MARCH, APRIL = month_start_ms(56 * 12 + 2), month_start_ms(56 * 12 + 3)
CLASSES = (
    "uncached_input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "image_input_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
)
INPUTS = (0, 2, 3, 5, 6)
FLAT = (
    "uncached_input_pico",
    "output_pico",
    "cache_read_pico",
    "cache_write_pico",
    "reasoning_pico",
    "image_input_pico",
    "audio_input_pico",
    "audio_output_pico",
)
UNITS = ("characters", "audio_ms", "requests")
MODELS = ("cheap-1", "cheap-2", "long", "other")
GRADUATED, VOLUME, PACKAGE = SCHEDULE_MODE_GRADUATED, SCHEDULE_MODE_VOLUME, SCHEDULE_MODE_PACKAGE


# Even: half of it is whole. Up to 600 units of currency a token, so that sums pass 2^63 pico, and half as much again is no
# more than a price may be.
PICO_MAX = 6 * 10**14
picos = st.one_of(st.integers(0, 500).map(lambda n: 2 * n), st.integers(0, PICO_MAX // 2).map(lambda n: 2 * n))
# Small ones meet the ends of tiers exactly.
quantities = st.one_of(st.integers(0, 6), st.integers(0, 2**40))
bounds = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 2**41)), max_size=4, unique=True).map(sorted)


# Each is made once: to make one costs as much as to draw from it a few times, and a book draws from them hundreds of times.
modes = st.sampled_from((GRADUATED, VOLUME, PACKAGE))
free_units = st.one_of(st.just(0), st.integers(1, 8))
package_units = st.one_of(st.integers(1, 10), st.integers(1, 10**6))
few_quantities = st.lists(st.sampled_from(CLASSES + UNITS), max_size=3, unique=True)
band_quantities = st.lists(st.sampled_from(CLASSES + UNITS), min_size=1, max_size=3, unique=True)
band_bounds = st.lists(st.integers(1, 300), max_size=2, unique=True).map(sorted)
minimums = st.one_of(st.just(0), picos)
flags = st.booleans()


@st.composite
def schedules(draw: st.DrawFn, quantity: str) -> Schedule:
    mode = draw(modes)
    free = draw(free_units)
    if mode == PACKAGE:
        units = draw(package_units)
        return Schedule(
            quantity=quantity, mode=PACKAGE, free_units=free, package_units=units, package_pico=draw(picos) * 2 % PICO_MAX
        )
    ends = [*draw(bounds), 0]
    return Schedule(
        quantity=quantity,
        mode=mode,
        free_units=free,
        tiers=[Tier(up_to_units=end, unit_pico=draw(picos)) for end in ends],
    )


of_quantity = {name: schedules(name) for name in CLASSES + UNITS}


@st.composite
def prices(draw: st.DrawFn, model: str, tenant_id: str) -> Price:
    price = Price(model=model, tenant_id=tenant_id)
    scheduled = draw(few_quantities)
    for name, field in zip(CLASSES, FLAT, strict=True):
        if name not in scheduled:
            setattr(price, field, draw(picos))
    for unit in UNITS:
        if unit not in scheduled and draw(flags):
            price.unit_pico[unit] = draw(picos)
    price.schedules.extend(draw(of_quantity[name]) for name in scheduled)
    if not scheduled:
        price.minimum_pico = draw(minimums)
    for above in draw(band_bounds):
        names = draw(band_quantities)
        price.context_bands.append(
            ContextBand(above_tokens=above, prices=[UnitPrice(quantity=name, unit_pico=draw(picos)) for name in names])
        )
    if draw(flags):
        price.class_factors.append(ClassFactor(service_class=3, factor_millionths=500_000))
    if draw(flags):
        price.class_factors.append(ClassFactor(service_class=2, factor_millionths=1_500_000))
    return price


book_lines = st.tuples(
    *(prices(model, "") for model in ("cheap-*", "long", "*")), prices("cheap-1", "UTC"), prices("*", "Asia/Shanghai")
)


def books(currency: str) -> st.SearchStrategy[PriceBook]:
    return book_lines.map(lambda lines: PriceBook(version=1, currency=currency, prices=lines))


tenants = st.sampled_from(tuple(ZONES))
models = st.sampled_from(MODELS)
service_classes = st.sampled_from((SERVICE_CLASS_STANDARD, SERVICE_CLASS_PRIORITY, SERVICE_CLASS_BATCH))
outcomes = st.sampled_from((OUTCOME_COMPLETED, OUTCOME_COMPLETED, OUTCOME_CANCELLED, OUTCOME_REJECTED))
# Around the month's end: some zones are still in March when others are in April.
ends_ms = st.integers(APRIL - 20 * 3_600_000, APRIL + 20 * 3_600_000)
contexts = st.one_of(st.just(0), st.integers(1, 400))
used_classes = st.lists(st.sampled_from(CLASSES), max_size=4, unique=True)
used_units = st.lists(st.sampled_from(UNITS), max_size=2, unique=True)


@st.composite
def usage_events(draw: st.DrawFn) -> UsageEvent:
    event = UsageEvent(
        tenant_id=draw(tenants),
        model=draw(models),
        service_class=draw(service_classes),
        outcome=draw(outcomes),
        ended_ms=draw(ends_ms),
        context_tokens=draw(contexts),
    )
    for name in draw(used_classes):
        setattr(event, name, draw(quantities))
    for unit in draw(used_units):
        event.units.append(UnitQuantity(unit=unit, quantity=draw(quantities)))
    return event


# -- the independent implementation ---------------------------------------------------------------------------------------


def own_line(book: PriceBook, event: UsageEvent) -> int:
    """By elimination: the first of these orders that has a line."""
    for tenant in (event.tenant_id, ""):
        for pattern in (event.model, "cheap-*" if event.model.startswith("cheap-") else None, "*"):
            for place, price in enumerate(book.prices):
                if price.tenant_id == tenant and price.model == pattern:
                    return place
    raise AssertionError(event)


def own_factors(price: Price) -> dict[int, Fraction]:
    return {entry.service_class: Fraction(entry.factor_millionths, 10**6) for entry in price.class_factors}


def own_month(event: UsageEvent) -> int:
    """3 or 4, by the hour at which the zone's April begins: UTC, eight hours earlier, four hours later (summer time)."""
    starts = {"UTC": APRIL, "Asia/Shanghai": APRIL - 8 * 3_600_000, "America/New_York": APRIL + 4 * 3_600_000}
    return 4 if event.ended_ms >= starts[event.tenant_id] else 3


def own_tiers(schedule: Schedule, units: int, factor: Fraction, *, closed: bool) -> Fraction:
    """What so many units of a period cost in all, before or after its close."""
    units = max(0, units - schedule.free_units)
    if schedule.mode == PACKAGE:
        package = schedule.package_pico * factor
        by_unit = package // schedule.package_units
        return -(-units // schedule.package_units) * package if closed else Fraction(units * by_unit)
    if schedule.mode == VOLUME:
        reached = next(tier for tier in schedule.tiers if not tier.up_to_units or units <= tier.up_to_units)
        return units * factor * (reached if closed else schedule.tiers[0]).unit_pico
    cost, start = Fraction(0), 0
    for tier in schedule.tiers:
        end = min(units, tier.up_to_units or units)
        cost += max(0, end - start) * tier.unit_pico * factor
        start = max(start, end)
    return cost


def own_total(offered: dict[str, PriceBook], stream: Iterable[UsageEvent], *, closed: bool) -> dict[str, Fraction]:
    """What each tenant pays for the stream as a whole: sums first, prices after."""
    cost: defaultdict[str, Fraction] = defaultdict(Fraction)
    # By tenant, month, line, quantity and the class that is counted for itself.
    pools: defaultdict[tuple[str, int, int, str, int], int] = defaultdict(int)
    for event in stream:
        if event.outcome == OUTCOME_REJECTED:
            continue
        book = offered[CURRENCIES[event.tenant_id]]
        line = own_line(book, event)
        price = book.prices[line]
        factor = own_factors(price).get(event.service_class, Fraction(1))
        tokens = [getattr(event, name) for name in CLASSES]
        context = event.context_tokens or sum(tokens[place] for place in INPUTS)
        band: dict[str, int] = {}
        for entry in price.context_bands:
            if context > entry.above_tokens:
                band = {unit.quantity: unit.unit_pico for unit in entry.prices}
        used = [(name, quantity, getattr(price, field)) for name, quantity, field in zip(CLASSES, tokens, FLAT, strict=True)]
        used += [(entry.unit, entry.quantity, price.unit_pico.get(entry.unit, 0)) for entry in event.units]
        request = Fraction(0)
        tiers = {schedule.quantity for schedule in price.schedules}
        for name, quantity, flat in used:
            if name in band:
                request += quantity * band[name] * factor
            elif name in tiers:
                counted = event.service_class if event.service_class in own_factors(price) else 0
                pools[event.tenant_id, own_month(event), line, name, counted] += quantity
            else:
                request += quantity * flat * factor
        cost[event.tenant_id] += max(request, price.minimum_pico * factor)
    for (tenant_id, _, line, name, counted), units in pools.items():
        price = offered[CURRENCIES[tenant_id]].prices[line]
        factor = own_factors(price).get(counted, Fraction(1))
        [schedule] = [schedule for schedule in price.schedules if schedule.quantity == name]
        cost[tenant_id] += own_tiers(schedule, units, factor, closed=closed)
    return cost


# -- what is tested -------------------------------------------------------------------------------------------------------


def rated(offered: PriceBooks, stream: Sequence[UsageEvent], cuts: random.Random) -> tuple[dict[str, int], Quantities]:
    """The sum of what each event costs, through records of random size: after each, the counters are what it stated."""
    cost: defaultdict[str, int] = defaultdict(int)
    here, replayed = Quantities(), Quantities()
    for event in stream:
        currency = CURRENCIES[event.tenant_id]
        rate = offered.rate(currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id)
        assert rate is not None
        if event.outcome != OUTCOME_REJECTED:
            cost[event.tenant_id] += sum(part.amount_pico for part in here.take(event, rate, currency, ZONES[event.tenant_id]))
        if cuts.random() < 0.4:
            for stated in here.take_moved():
                replayed.set(stated)
            assert list(replayed.all()) == list(here.all())
            here, replayed = replayed, here
            for stated in here.all():
                replayed.set(stated)
    return cost, here


@settings(max_examples=100, deadline=None)
@given(books("USD"), books("CNY"), st.lists(usage_events(), max_size=30), st.randoms(use_true_random=False))
def test_any_order_and_any_batching_costs_what_fractions_say(
    dollars: PriceBook, yuan: PriceBook, stream: list[UsageEvent], cuts: random.Random
) -> None:
    assert book_problems(dollars) == book_problems(yuan) == []
    offered = PriceBooks([dollars, yuan])
    by_currency = {"USD": dollars, "CNY": yuan}
    expected = own_total(by_currency, stream, closed=False)
    final = own_total(by_currency, stream, closed=True)
    for _ in range(3):
        cost, counters = rated(offered, stream, cuts)
        assert {tenant: cost.get(tenant, 0) for tenant in expected} == expected
        for tenant_id in ZONES:
            of_tenant = [pair for pair in counters.items() if pair[0].tenant_id == tenant_id]
            settled = sum(settlement.amount_pico for settlement in settlements(offered, of_tenant))
            assert cost.get(tenant_id, 0) + settled == final[tenant_id]
        cuts.shuffle(stream)


def test_amounts_pass_63_bits() -> None:
    """What the property's ranges reach: one event of 2^40 tokens at 1,000 a token."""
    schedule = Schedule(quantity="output_tokens", mode=GRADUATED, tiers=[Tier(up_to_units=1), Tier(unit_pico=10**15)])
    offered = PriceBooks([PriceBook(version=1, currency="USD", prices=[Price(model="*", schedules=[schedule])])])
    event = UsageEvent(tenant_id="UTC", model="m", ended_ms=APRIL, output_tokens=2**40)
    rate = offered.rate("USD", APRIL, "m", 0, 0, "UTC")
    assert rate is not None
    counters = Quantities()
    costs = [sum(part.amount_pico for part in counters.take(event, rate, "USD", Calendar())) for _ in range(2)]
    assert costs == [(2**40 - 1) * 10**15, 2**40 * 10**15]
    assert min(costs) > 2**63


def test_counters_beyond_64_bits_are_stated_whole() -> None:
    counters, replayed = Quantities(), Quantities()
    schedule = Schedule(quantity="output_tokens", mode=GRADUATED, tiers=[Tier(unit_pico=1)])
    offered = PriceBooks([PriceBook(version=1, currency="USD", prices=[Price(model="*", schedules=[schedule])])])
    rate = offered.rate("USD", APRIL, "m", 0, 0, "UTC")
    assert rate is not None
    event = UsageEvent(tenant_id="UTC", model="m", ended_ms=APRIL, output_tokens=2**40)
    counters.take(event, rate, "USD", Calendar())
    [stated] = counters.take_moved()
    stated.units[0].units_high = 3
    replayed.set(stated)
    [(_, units)] = replayed.items()
    assert units == {"output_tokens": 3 * 2**64 + 2**40}
    replayed.take(event, rate, "USD", Calendar())
    [again] = replayed.take_moved()
    assert (again.units[0].units_high, again.units[0].units) == (3, 2**41)


@pytest.mark.parametrize("zone", ZONES)
def test_a_request_counts_in_the_month_of_its_tenant(zone: str) -> None:
    """The last millisecond of March and the first of April, as the zone has them, are in different periods."""
    start = {"UTC": APRIL, "Asia/Shanghai": APRIL - 8 * 3_600_000, "America/New_York": APRIL + 4 * 3_600_000}[zone]
    schedule = Schedule(quantity="requests", mode=GRADUATED, free_units=1, tiers=[Tier(unit_pico=7)])
    offered = PriceBooks([PriceBook(version=1, currency="USD", prices=[Price(model="*", schedules=[schedule])])])
    counters = Quantities()
    costs = []
    for ended_ms in (start - 1, start - 2, start, start + 1):
        event = UsageEvent(tenant_id=zone, model="m", ended_ms=ended_ms, units=[UnitQuantity(unit="requests", quantity=1)])
        rate = offered.rate("USD", ended_ms, "m", 0, 0, zone)
        assert rate is not None
        costs.append(sum(part.amount_pico for part in counters.take(event, rate, "USD", ZONES[zone])))
    assert costs == [0, 7, 0, 7]
