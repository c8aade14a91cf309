"""Whether a price book can take effect: everything that is wrong with it, each with its line, its value and its mend."""

from __future__ import annotations

from collections.abc import Iterator

from billing.amounts import from_amount
from billing.limits import ID_CHARS_MAX, QUANTITY_MAX, TIME_MS_MAX, UNIT_CHARS_MAX
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_PACKAGE,
    SCHEDULE_MODE_VOLUME,
    Price,
    PriceBook,
    Schedule,
)
from billing.v1.usage_pb2 import SERVICE_CLASS_TEST
from billing.validation import TOKEN_FIELDS

# 10^15 pico = 1,000 currency units per token, times a class's factor too: beyond it, a price is a unit mistake. Within it no
# event costs more than 2^95 pico, and 2^32 of the dearest still sum to less than the 128 bits of an amount.
PRICE_PICO_MAX = 10**15
PRICES_MAX = 10_000
COMMITMENTS_MAX = 10_000
COMMITMENT_PICO_MAX = 10**30
TIERS_MAX = 32
SCHEDULES_MAX = 16
BANDS_MAX = 8
# Of a period: a thousand times what one event may hold.
PERIOD_UNITS_MAX = QUANTITY_MAX * 1_000
FACTOR_MILLIONTHS_MAX = 1_000_000_000
MILLION = 1_000_000
# The fields of Price that hold the flat prices, in the order of validation.TOKEN_FIELDS.
PRICE_FIELDS = (
    "uncached_input_pico",
    "output_pico",
    "cache_read_pico",
    "cache_write_pico",
    "reasoning_pico",
    "image_input_pico",
    "audio_input_pico",
    "audio_output_pico",
)
_FIELD_OF = dict(zip(TOKEN_FIELDS, PRICE_FIELDS, strict=True))


def book_problems(book: PriceBook) -> list[str]:
    """Everything that is wrong with `book` by itself."""
    problems = []
    if not book.currency or len(book.currency) > 8:
        problems.append(f"currency: {book.currency[:16]!r}; write a code such as USD")
    if book.version < 1:
        problems.append(f"version: {book.version}; versions start at 1")
    if not 0 <= book.effective_ms <= TIME_MS_MAX:
        problems.append(f"effective_ms: {book.effective_ms} is not a Unix time in milliseconds")
    if not 0 < len(book.prices) <= PRICES_MAX:
        problems.append(f"prices: {len(book.prices)} entries; write 1 to {PRICES_MAX}")
    seen: dict[tuple[str, str, int, int], int] = {}
    for line, price in enumerate(book.prices, start=1):
        where = f"prices[{line}]"
        key = (price.tenant_id, price.model, price.operation, price.service_class)
        if key in seen:
            problems.append(f"{where}: the same model, operation and class as prices[{seen[key]}]; keep one")
        seen.setdefault(key, line)
        problems += (f"{where}{problem}" for problem in _price_problems(price))
    problems += _commitment_problems(book)
    return problems


def _price_problems(price: Price) -> Iterator[str]:
    if SERVICE_CLASS_TEST in (price.service_class, *(factor.service_class for factor in price.class_factors)):
        yield ".service_class: test usage is free whatever a book says; leave the class out"
    if not price.model or len(price.model) > ID_CHARS_MAX or "*" in price.model[:-1]:
        yield f".model: {price.model[:64]!r}; write a name, or a prefix that ends in *"
    if len(price.tenant_id) > ID_CHARS_MAX:
        yield f".tenant_id: {price.tenant_id[:32]!r}…; write at most {ID_CHARS_MAX} characters"
    for name, pico in flat_amounts(price):
        if pico > PRICE_PICO_MAX:
            yield f".{name}: {pico} pico a unit is over {PRICE_PICO_MAX}; prices are per unit, not per million"
    yield from _schedules_problems(price)
    yield from _band_problems(price)
    if price.minimum_pico > PRICE_PICO_MAX:
        yield f".minimum_pico: {price.minimum_pico} pico a request is over {PRICE_PICO_MAX}; check the unit"
    if price.minimum_pico and price.schedules:
        yield (
            ".minimum_pico: stands beside schedules, so what is paid in sum would depend on the order of requests; "
            'take it out, or price each request by the unit "requests"'
        )
    yield from _factor_problems(price)


def flat_amounts(price: Price) -> list[tuple[str, int]]:
    """The flat prices of a line, by the names that a person finds in the contract."""
    amounts = [(name, getattr(price, name)) for name in PRICE_FIELDS]
    return amounts + [(f"unit_pico[{unit}]", pico) for unit, pico in sorted(price.unit_pico.items())]


def _quantity_problem(where: str, quantity: str) -> Iterator[str]:
    if not 0 < len(quantity) <= UNIT_CHARS_MAX:
        yield f"{where}.quantity: {quantity[:40]!r}; write a class of tokens or a unit of 1 to {UNIT_CHARS_MAX} characters"


def _schedules_problems(price: Price) -> Iterator[str]:
    if len(price.schedules) > SCHEDULES_MAX:
        yield f".schedules: {len(price.schedules)} entries; write at most {SCHEDULES_MAX}"
    seen: set[str] = set()
    for number, schedule in enumerate(price.schedules, start=1):
        where = f".schedules[{number}]"
        quantity = schedule.quantity
        yield from _quantity_problem(where, quantity)
        if quantity in seen:
            yield f"{where}.quantity: {quantity!r} has a schedule already; the two overlap, keep one"
        seen.add(quantity)
        flat = getattr(price, _FIELD_OF[quantity]) if quantity in _FIELD_OF else price.unit_pico.get(quantity, 0)
        if flat:
            yield f"{where}.quantity: {quantity!r} has a flat price too; the two overlap, keep one"
        if schedule.free_units > PERIOD_UNITS_MAX:
            yield f"{where}.free_units: {schedule.free_units} is over {PERIOD_UNITS_MAX}; check the unit"
        yield from (f"{where}{problem}" for problem in _schedule_problems(schedule))


def _schedule_problems(schedule: Schedule) -> Iterator[str]:
    if schedule.mode == SCHEDULE_MODE_PACKAGE:
        if schedule.tiers:
            yield ".tiers: a package has none; write its size and its price"
        if not 0 < schedule.package_units <= PERIOD_UNITS_MAX:
            yield f".package_units: {schedule.package_units}; write how many units a package holds, 1 to {PERIOD_UNITS_MAX}"
        elif schedule.package_pico > PRICE_PICO_MAX * schedule.package_units:
            yield f".package_pico: {schedule.package_pico} is over {PRICE_PICO_MAX} pico a unit; check the unit"
        return
    if schedule.mode not in (SCHEDULE_MODE_GRADUATED, SCHEDULE_MODE_VOLUME):
        yield f".mode: {schedule.mode} is not known here; write graduated, volume or package"
    if schedule.package_units or schedule.package_pico:
        yield ".package_units: belongs to packages alone; take it out"
    if not 0 < len(schedule.tiers) <= TIERS_MAX:
        yield f".tiers: {len(schedule.tiers)} entries; write 1 to {TIERS_MAX}"
    before = 0
    for number, tier in enumerate(schedule.tiers, start=1):
        where = f".tiers[{number}]"
        if tier.unit_pico > PRICE_PICO_MAX:
            yield f"{where}.unit_pico: {tier.unit_pico} pico a unit is over {PRICE_PICO_MAX}; prices are per unit"
        if number == len(schedule.tiers):
            if tier.up_to_units:
                yield f"{where}.up_to_units: leaves a gap, no tier prices what is beyond {tier.up_to_units}; take it out here"
        elif not tier.up_to_units:
            yield f"{where}.up_to_units: has no end, so it overlaps the tiers after it; write where it ends"
        elif tier.up_to_units <= before:
            yield f"{where}.up_to_units: {tier.up_to_units} overlaps the tier before it, which ends at {before}; write more"
        elif tier.up_to_units > PERIOD_UNITS_MAX:
            yield f"{where}.up_to_units: {tier.up_to_units} is over {PERIOD_UNITS_MAX}; check the unit"
        before = tier.up_to_units


def _band_problems(price: Price) -> Iterator[str]:
    if len(price.context_bands) > BANDS_MAX:
        yield f".context_bands: {len(price.context_bands)} entries; write at most {BANDS_MAX}"
    before = 0
    for number, band in enumerate(price.context_bands, start=1):
        where = f".context_bands[{number}]"
        if not before < band.above_tokens <= QUANTITY_MAX:
            yield f"{where}.above_tokens: {band.above_tokens} is not above {before}; write thresholds from low to high"
        before = band.above_tokens
        if not 0 < len(band.prices) <= SCHEDULES_MAX:
            yield f"{where}.prices: {len(band.prices)} entries; write 1 to {SCHEDULES_MAX}"
        names = [unit.quantity for unit in band.prices]
        for place, unit in enumerate(band.prices, start=1):
            yield from _quantity_problem(f"{where}.prices[{place}]", unit.quantity)
            if unit.quantity in names[: place - 1]:
                yield f"{where}.prices[{place}].quantity: {unit.quantity!r} stands twice; the two overlap, keep one"
            if unit.unit_pico > PRICE_PICO_MAX:
                yield f"{where}.prices[{place}].unit_pico: {unit.unit_pico} pico is over {PRICE_PICO_MAX}; prices are per unit"


def _factor_problems(price: Price) -> Iterator[str]:
    amounts = flat_amounts(price)
    amounts.append(("minimum_pico", price.minimum_pico))
    packages = {}
    for number, schedule in enumerate(price.schedules, start=1):
        amounts.append((f"schedules[{number}].package_pico", schedule.package_pico))
        packages[f"schedules[{number}].package_pico"] = max(schedule.package_units, 1)
        amounts += [(f"schedules[{number}].tiers[{n}].unit_pico", tier.unit_pico) for n, tier in enumerate(schedule.tiers, 1)]
    for number, band in enumerate(price.context_bands, start=1):
        amounts += [(f"context_bands[{number}].{unit.quantity}", unit.unit_pico) for unit in band.prices]
    seen: set[int] = set()
    for number, factor in enumerate(price.class_factors, start=1):
        where = f".class_factors[{number}]"
        millionths = factor.factor_millionths
        if not factor.service_class or factor.service_class in seen:
            yield f"{where}.service_class: {factor.service_class} is unspecified or stands twice; name each class once"
        seen.add(factor.service_class)
        if price.service_class not in (0, factor.service_class):
            yield f"{where}.service_class: this line is of class {price.service_class} alone; the factor would never apply"
        if not 0 < millionths <= FACTOR_MILLIONTHS_MAX:
            yield f"{where}.factor_millionths: {millionths}; write a factor over 0, at most {FACTOR_MILLIONTHS_MAX // MILLION}"
            continue
        for name, pico in amounts:
            if pico * millionths > PRICE_PICO_MAX * MILLION * packages.get(name, 1):
                yield (
                    f".{name}: {pico} pico times {millionths} millionths for service class {factor.service_class} is over "
                    f"{PRICE_PICO_MAX} pico a unit; check the unit, or lower the factor"
                )
            if pico * millionths % MILLION:
                yield (
                    f".{name}: {pico} pico times {millionths} millionths for service class {factor.service_class} is no whole "
                    "number of pico; change the price or the factor, or give the class a line of its own"
                )


def _commitment_problems(book: PriceBook) -> Iterator[str]:
    if len(book.commitments) > COMMITMENTS_MAX:
        yield f"commitments: {len(book.commitments)} entries; write at most {COMMITMENTS_MAX}"
    seen: set[str] = set()
    for number, commitment in enumerate(book.commitments, start=1):
        where = f"commitments[{number}]"
        tenant_id = commitment.tenant_id
        if not 0 < len(tenant_id) <= ID_CHARS_MAX or tenant_id in seen:
            yield f"{where}.tenant_id: {tenant_id[:32]!r} is empty, too long or stands twice; name each tenant once"
        seen.add(tenant_id)
        if not 0 < from_amount(commitment.amount) <= COMMITMENT_PICO_MAX:
            yield f"{where}.amount: {from_amount(commitment.amount)} pico; write more than 0, at most {COMMITMENT_PICO_MAX}"
