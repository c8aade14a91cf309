"""The price book: append-only, effective-dated, one line of versions per currency, refused whole when it is not right.

A price is a whole number of pico per unit, so cost = quantity * price is exact. Which price rates an event: the latest version
that is effective when the usage ended; in it a line of the tenant's own before any, then the exact model name before the
longest "prefix*", then an exact operation before any, then an exact service class before any.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from billing.limits import ID_CHARS_MAX
from billing.price_checks import MILLION, PRICE_FIELDS, book_problems
from billing.schedules import Schedule, schedule_of
from billing.v1.command_pb2 import Price, PriceBook
from billing.v1.usage_pb2 import SERVICE_CLASS_TEST

_RATES_REMEMBERED_MAX = 65_536


class Band(NamedTuple):
    """Prices of requests with more than `above_tokens` of context, by quantity."""

    above_tokens: int
    prices_pico: dict[str, int]


class Terms(NamedTuple):
    """What a rate has besides flat prices."""

    # Which line of the book, from 1, and the service class that is counted for itself under it, or 0: names the counters.
    line: int
    counted_class: int
    schedules: dict[str, Schedule]
    bands: tuple[Band, ...]
    minimum_pico: int


class Rate(NamedTuple):
    """What one unit of each class costs, in pico, under one version of the book."""

    version: int
    token_pico: tuple[int, ...]
    unit_pico: dict[str, int]
    # None: the prices above are all there is.
    terms: Terms | None = None


class PriceBookRefused(ValueError):
    """A price book that must not take effect; `problems` are for a person, one a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class PriceBooks:
    """All versions of all currencies, and the rate for a usage."""

    def __init__(self, books: Iterable[PriceBook] = ()) -> None:
        self._books: dict[str, list[PriceBook]] = {}
        self._effective_ms: dict[str, list[int]] = {}
        self._rates: dict[tuple[str, int, str, int, int, str], Rate | None] = {}
        # Tenants with a line of their own in any book: all others share what is remembered.
        self._tenants: set[str] = set()
        # Whether any book has more than flat prices.
        self.any_terms = False
        for book in books:
            self.add(book)

    def all(self) -> list[PriceBook]:
        """Every version, by currency, oldest first."""
        return [book for currency in sorted(self._books) for book in self._books[currency]]

    def problems(self, book: PriceBook) -> list[str]:
        """Everything that keeps `book` from being the next version."""
        problems = book_problems(book)
        line = self._books.get(book.currency, [])
        if book.version != len(line) + 1:
            problems.append(f"version: {book.version}; the next one of {book.currency or 'its currency'} is {len(line) + 1}")
        if line and book.effective_ms <= line[-1].effective_ms:
            problems.append(
                f"effective_ms: {book.effective_ms} is not after version {line[-1].version}'s {line[-1].effective_ms}; "
                "a book is append-only, correct the past by re-rating"
            )
        return problems

    def add(self, book: PriceBook) -> None:
        """Take the next version of its currency. Raises PriceBookRefused, and then nothing has changed."""
        problems = self.problems(book)
        if problems:
            raise PriceBookRefused(problems)
        kept = PriceBook.FromString(book.SerializeToString())
        self._books.setdefault(book.currency, []).append(kept)
        self._effective_ms.setdefault(book.currency, []).append(kept.effective_ms)
        self._tenants.update(price.tenant_id for price in kept.prices if price.tenant_id)
        self.any_terms = self.any_terms or any(map(_has_terms, kept.prices))

    def book_at(self, currency: str, time_ms: int) -> PriceBook | None:
        """The version that rates usage that ended then."""
        version = bisect_right(self._effective_ms.get(currency, []), time_ms)
        return self._books[currency][version - 1] if version else None

    def version(self, currency: str, version: int) -> PriceBook | None:
        """A version by its number."""
        books = self._books.get(currency, [])
        return books[version - 1] if 0 < version <= len(books) else None

    def rate(self, currency: str, ended_ms: int, model: str, operation: int, service_class: int, tenant_id: str) -> Rate | None:
        """The rate for usage that ended at `ended_ms`, or None: unrated."""
        starts = self._effective_ms.get(currency)
        if starts is None:
            return None
        version = bisect_right(starts, ended_ms)
        if version == 0:
            return None
        return self.rate_of_version(currency, version, model, operation, service_class, tenant_id)

    def rate_of_version(
        self, currency: str, version: int, model: str, operation: int, service_class: int, tenant_id: str
    ) -> Rate | None:
        """The rate under a version; None for version 0, which stands for none."""
        key = (currency, version, model, operation, service_class, tenant_id if tenant_id in self._tenants else "")
        try:
            return self._rates[key]
        except KeyError:
            book = self.version(currency, version)
            if book is None:
                return None
            # Model names come from outside: what is remembered of them is bounded.
            if len(self._rates) >= _RATES_REMEMBERED_MAX:
                self._rates.clear()
            rate = self._rates[key] = _find(book, model, operation, service_class, tenant_id)
            return rate

    def rates(
        self,
        currency: str,
        from_ms: int,
        until_ms: int,
        model: str,
        operation: int,
        service_class: int,
        tenant_id: str,
    ) -> list[Rate]:
        """The rates that may rate usage which ends from `from_ms` to `until_ms`, one for each version that has any."""
        starts = self._effective_ms.get(currency, [])
        first, last = bisect_right(starts, from_ms), bisect_right(starts, until_ms)
        found = []
        for version in range(max(first, 1), last + 1):
            rate = self.rate_of_version(currency, version, model, operation, service_class, tenant_id)
            if rate is not None:
                found.append(rate)
        return found

    def moments(self, currency: str, from_ms: int, until_ms: int) -> list[int]:
        """A time under each version that rates usage which ends from `from_ms` to `until_ms`."""
        starts = self._effective_ms.get(currency, [])
        return [from_ms, *starts[bisect_right(starts, from_ms) : bisect_right(starts, until_ms)]]

    def change_within(self, start_ms: int, end_ms: int, currency: str | None = None) -> bool:
        """Whether usage that ends from `start_ms` to before `end_ms` is rated by more than one version of a currency; None: of
        any.
        """
        lines = self._effective_ms.values() if currency is None else [self._effective_ms.get(currency, [])]
        return any(bisect_right(starts, start_ms) != bisect_right(starts, end_ms - 1) for starts in lines)


def _find(book: PriceBook, model: str, operation: int, service_class: int, tenant_id: str) -> Rate | None:
    if service_class == SERVICE_CLASS_TEST:
        return Rate(book.version, (0,) * len(PRICE_FIELDS), {}, None)
    best: tuple[tuple[int, int, int, int], int, Price] | None = None
    for line, price in enumerate(book.prices, start=1):
        if price.model.endswith("*"):
            if not model.startswith(price.model[:-1]):
                continue
            name_rank = len(price.model) - 1
        elif price.model == model:
            name_rank = ID_CHARS_MAX + 1
        else:
            continue
        if price.operation not in (0, operation) or price.service_class not in (0, service_class):
            continue
        if price.tenant_id not in ("", tenant_id):
            continue
        rank = (int(price.tenant_id != ""), name_rank, int(price.operation != 0), int(price.service_class != 0))
        if best is None or rank > best[0]:
            best = (rank, line, price)
    return None if best is None else rate_of(book.version, best[1], best[2], service_class)


def rate_of(version: int, line: int, price: Price, service_class: int) -> Rate:
    """What a price line says to usage of one service class."""
    factors = {entry.service_class: entry.factor_millionths for entry in price.class_factors}
    factor = factors.get(service_class, MILLION)

    def part(pico: int) -> int:
        # Whole: a book where it is not was refused.
        return pico * factor // MILLION

    terms = None
    if _has_terms(price):
        terms = Terms(
            line,
            service_class if service_class in factors else 0,
            {schedule.quantity: schedule_of(schedule, factor) for schedule in price.schedules},
            tuple(
                Band(band.above_tokens, {unit.quantity: part(unit.unit_pico) for unit in band.prices})
                for band in price.context_bands
            ),
            part(price.minimum_pico),
        )
    return Rate(
        version,
        tuple(part(getattr(price, name)) for name in PRICE_FIELDS),
        {unit: part(pico) for unit, pico in price.unit_pico.items()},
        terms,
    )


def _has_terms(price: Price) -> bool:
    return bool(price.schedules or price.context_bands or price.minimum_pico)
