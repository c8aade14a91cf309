"""What the close of a period adds to what its requests were charged: volume tiers, packages, committed spend. Exact, pure.

Promise: it depends on the period's quantities and on nothing else, so it is the same however often and wherever it is computed.
A settlement may be below zero: a volume tier that was reached makes the units before it cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from billing.amounts import from_amount
from billing.periods import Period
from billing.prices import PriceBooks, rate_of
from billing.quantities import Counter


class Settlement(NamedTuple):
    """One amount of the close."""

    currency: str
    # The version that says so, and its line; line 0: the tenant's commitment.
    price_version: int
    price_line: int
    # The service class that was counted for itself, or 0.
    counted_class: int
    # Empty for a commitment.
    quantity_of: str
    units: int
    amount_pico: int


def settlements(books: PriceBooks, counters: Iterable[tuple[Counter, Mapping[str, int]]]) -> list[Settlement]:
    """What the counters of one tenant's period come to beyond what was charged, in a stated order; nothing that is zero."""
    found = []
    for counter, units in counters:
        book = books.version(counter.currency, counter.price_version)
        assert book is not None, counter
        price = book.prices[counter.price_line - 1]
        terms = rate_of(book.version, counter.price_line, price, counter.counted_class).terms
        assert terms is not None, counter
        for name in sorted(units):
            amount = terms.schedules[name].settlement_pico(units[name])
            if amount:
                found.append(Settlement(*counter[2:], name, units[name], amount))
    return found


def commitment(books: PriceBooks, tenant_id: str, currency: str, period: Period, spend_pico: int) -> Settlement | None:
    """What is missing to the tenant's committed spend, where the period came to `spend_pico` with its settlements.

    The book that was in effect when the period began says what was promised for it.
    """
    book = books.book_at(currency, period.start_ms)
    for entry in book.commitments if book else ():
        missing = from_amount(entry.amount) - spend_pico
        if entry.tenant_id == tenant_id and missing > 0:
            assert book is not None
            return Settlement(currency, book.version, 0, 0, "", 0, missing)
    return None
