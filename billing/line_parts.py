"""Sums of units at one price: what the cost of a window, a period's line and an invoice's line is made of. Exact, bounded.

Promise: the amounts of the parts sum to the cost, whatever is merged. A named unit without a price is in no part: producers
name units as they like, price books do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from billing.amounts import from_amount, to_amount
from billing.rating import MINIMUM, MINIMUM_TERMS
from billing.schedules import Part
from billing.v1.invoice_pb2 import LinePart, Units
from billing.validation import TOKEN_FIELDS

_LOW = (1 << 64) - 1
_CLASSES = frozenset(TOKEN_FIELDS)


class PartKey(NamedTuple):
    """What is summed together."""

    quantity_of: str
    terms: str
    # 0 beside an amount: it has no price a unit.
    unit_pico: int


class Sum(NamedTuple):
    """Units, and what they came to."""

    units: int
    amount_pico: int


Parts = dict[PartKey, Sum]

# Where there are too many prices to keep apart: tiers of many schedules, crossed within one window.
OTHER = PartKey("other", "at other prices", 0)


def add(parts: Parts, key: PartKey, units: int, amount_pico: int, parts_max: int) -> None:
    """Add to the part of `key`; what would be one part more than `parts_max` is added to `OTHER`."""
    known = parts.get(key)
    if known is None and len(parts) >= parts_max - 1:
        key = OTHER
        known = parts.get(OTHER)
    parts[key] = Sum(units, amount_pico) if known is None else Sum(known.units + units, known.amount_pico + amount_pico)


def add_rated(parts: Parts, rated: Iterable[Part], parts_max: int) -> None:
    """Add what a request was rated by."""
    for part in rated:
        if part.terms == MINIMUM_TERMS and part.quantity_of == MINIMUM:
            # Each request lacks another amount: they are counted, and the amounts summed.
            add(parts, PartKey(MINIMUM, MINIMUM_TERMS, 0), 1, part.amount_pico, parts_max)
        elif part.price_pico or part.terms or part.quantity_of in _CLASSES:
            add(parts, PartKey(part.quantity_of, part.terms, part.price_pico), part.quantity, part.amount_pico, parts_max)


def to_units(units: int) -> Units:
    """The contract form; below zero too."""
    return Units(high=units >> 64, low=units & _LOW)


def from_units(units: Units) -> int:
    """The number that it states."""
    return (units.high << 64) | units.low


def to_line_part(key: PartKey, value: Sum) -> LinePart:
    """The contract form of one part."""
    return LinePart(
        quantity_of=key.quantity_of,
        terms=key.terms,
        units=to_units(value.units),
        unit_pico=key.unit_pico,
        amount=to_amount(value.amount_pico),
    )


def to_line_parts(parts: Parts) -> list[LinePart]:
    """The contract form, in a stated order."""
    return [to_line_part(key, parts[key]) for key in sorted(parts)]


def from_line_parts(stated: Sequence[LinePart]) -> Parts:
    """The parts that a contract states."""
    return {
        PartKey(part.quantity_of, part.terms, part.unit_pico): Sum(from_units(part.units), from_amount(part.amount))
        for part in stated
    }
