"""A price book as people read it: in the form of a file, as lines of a table, and as what one changes against another.

Promise: `file_values` is what `read_price_book` reads the same book from, so a book that is shown as JSON can be edited and
applied. Prices are decimal texts per million units, exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from billing.amounts import format_pico, from_amount
from billing.price_checks import MILLION, PRICE_FIELDS
from billing.v1.command_pb2 import SCHEDULE_MODE_PACKAGE, ScheduleMode
from billing.v1.usage_pb2 import Operation, ServiceClass
from billing.validation import TOKEN_FIELDS
from taximeter.price_files import CLASS_KEYS
from taximeter.times import show_time

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from billing.v1.command_pb2 import Price, PriceBook, Schedule

__all__ = ["Change", "Term", "changes", "file_values", "terms"]

_KEY_OF: Final = {name: key for key, name in CLASS_KEYS.items()}


class Term(NamedTuple):
    """One thing that a line of a book says. The first four name the line, the next two what it is about."""

    tenant_id: str
    model: str
    operation: str
    service_class: str
    what: str
    terms: str
    price: str


class Change(NamedTuple):
    """A term that another book says differently; an empty price: not at all."""

    term: Term
    before: str
    after: str


def file_values(book: PriceBook) -> dict[str, Any]:
    """The book in the form of a file."""
    values: dict[str, Any] = {
        "version": book.version,
        "currency": book.currency,
        "effective": _effective(book.effective_ms),
        "prices": [_line_values(price) for price in book.prices],
    }
    if book.commitments:
        values["commitments"] = [
            {"tenant": entry.tenant_id, "amount": _decimal(from_amount(entry.amount))} for entry in book.commitments
        ]
    return values


def _line_values(price: Price) -> dict[str, Any]:
    values: dict[str, Any] = {"model": price.model}
    if price.operation:
        values["operation"] = _name(Operation.items(), "OPERATION_", price.operation)
    if price.service_class:
        values["service_class"] = _name(ServiceClass.items(), "SERVICE_CLASS_", price.service_class)
    if price.tenant_id:
        values["tenant"] = price.tenant_id
    values |= {_KEY_OF[name]: _per_million(pico) for name, pico in _flat_classes(price)}
    if price.unit_pico:
        values["units"] = {unit: _per_million(pico) for unit, pico in sorted(price.unit_pico.items())}
    if price.minimum_pico:
        values["minimum"] = _decimal(price.minimum_pico)
    if price.class_factors:
        values["class_factors"] = {
            _name(ServiceClass.items(), "SERVICE_CLASS_", entry.service_class): _factor(entry.factor_millionths)
            for entry in price.class_factors
        }
    if price.schedules:
        values["schedules"] = [_schedule_values(schedule) for schedule in price.schedules]
    if price.context_bands:
        values["context"] = []
        for band in price.context_bands:
            entry: dict[str, Any] = {"above": band.above_tokens}
            for unit in band.prices:
                place = entry if unit.quantity in _KEY_OF else entry.setdefault("units", {})
                place[_KEY_OF.get(unit.quantity, unit.quantity)] = _per_million(unit.unit_pico)
            values["context"].append(entry)
    return values


def _schedule_values(schedule: Schedule) -> dict[str, Any]:
    values: dict[str, Any] = {
        "quantity": _KEY_OF.get(schedule.quantity, schedule.quantity),
        "mode": _name(ScheduleMode.items(), "SCHEDULE_MODE_", schedule.mode),
    }
    if schedule.free_units:
        values["free"] = schedule.free_units
    if schedule.mode == SCHEDULE_MODE_PACKAGE:
        return values | {"package": schedule.package_units, "package_price": _decimal(schedule.package_pico)}
    values["tiers"] = [
        ({"up_to": tier.up_to_units} if tier.up_to_units else {}) | {"price": _per_million(tier.unit_pico)}
        for tier in schedule.tiers
    ]
    return values


def terms(book: PriceBook) -> list[Term]:
    """Everything that the book says, line by line."""
    found = []
    for price in book.prices:
        line = (
            price.tenant_id,
            price.model,
            _name(Operation.items(), "OPERATION_", price.operation) if price.operation else "",
            _name(ServiceClass.items(), "SERVICE_CLASS_", price.service_class) if price.service_class else "",
        )
        found += [Term(*line, *said) for said in _said(price)]
    for entry in book.commitments:
        amount = _decimal(from_amount(entry.amount))
        found.append(Term(entry.tenant_id, "", "", "", "commitment", "at least, each period", amount))
    return found


def _said(price: Price) -> Iterator[tuple[str, str, str]]:
    """What each term of a line is about, on which terms, and its price."""
    yield from ((_KEY_OF[name], "", f"{_per_million(pico)} per million") for name, pico in _flat_classes(price))
    yield from ((unit, "", f"{_per_million(pico)} per million") for unit, pico in sorted(price.unit_pico.items()))
    for schedule in price.schedules:
        what, mode = (
            _KEY_OF.get(schedule.quantity, schedule.quantity),
            _name(ScheduleMode.items(), "SCHEDULE_MODE_", schedule.mode),
        )
        if schedule.free_units:
            yield what, f"the first {schedule.free_units:,} of a period", "free"
        if schedule.mode == SCHEDULE_MODE_PACKAGE:
            yield what, f"package of {schedule.package_units:,}", f"{_decimal(schedule.package_pico)} a package"
        for number, tier in enumerate(schedule.tiers, start=1):
            end = f"up to {tier.up_to_units:,}" if tier.up_to_units else "beyond" if number > 1 else "all"
            yield what, f"{mode}, tier {number}: {end}", f"{_per_million(tier.unit_pico)} per million"
    for band in price.context_bands:
        for unit in band.prices:
            what = _KEY_OF.get(unit.quantity, unit.quantity)
            yield what, f"context over {band.above_tokens:,} tokens", f"{_per_million(unit.unit_pico)} per million"
    if price.minimum_pico:
        yield "request", "at least", _decimal(price.minimum_pico)
    for entry in price.class_factors:
        service_class = _name(ServiceClass.items(), "SERVICE_CLASS_", entry.service_class)
        yield service_class, "all of the line, times", _factor(entry.factor_millionths)
    if not (any(_flat_classes(price)) or price.unit_pico or price.schedules or price.context_bands or price.minimum_pico):
        yield "everything", "", "free"


def changes(before: PriceBook | None, after: PriceBook) -> list[Change]:
    """What `after` says otherwise than `before`, in the order of `after`, and then what it says no more."""
    old = {term[:-1]: term for term in (terms(before) if before else ())}
    found = []
    for term in terms(after):
        known = old.pop(term[:-1], None)
        if known is None or known.price != term.price:
            found.append(Change(term, known.price if known else "", term.price))
    return found + [Change(term, term.price, "") for term in old.values()]


def _flat_classes(price: Price) -> list[tuple[str, int]]:
    """Classes of tokens that have a flat price over zero: a class that is not named is free."""
    named = ((name, getattr(price, field)) for name, field in zip(TOKEN_FIELDS, PRICE_FIELDS, strict=True))
    return [(name, pico) for name, pico in named if pico]


def _effective(effective_ms: int) -> str:
    return show_time(effective_ms) if effective_ms else "always"


def _name(items: Sequence[tuple[str, int]], prefix: str, number: int) -> str:
    return next(name for name, value in items if value == number).removeprefix(prefix).lower()


def _per_million(pico: int) -> str:
    return _decimal(pico * MILLION)


def _factor(millionths: int) -> str:
    return _decimal(millionths * MILLION, decimals_min=1)


def _decimal(pico: int, decimals_min: int = 2) -> str:
    return format_pico(pico, decimals_min=decimals_min).replace(",", "")
