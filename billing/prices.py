"""The price book: append-only, effective-dated, one line of versions per currency, refused whole when it is not right.

A price is a whole number of pico per unit, so cost = quantity * price is exact. Which price rates an event: the latest version
that is effective when the usage ended; in it the exact model name before the longest "prefix*", then an exact operation
before any, then an exact service class before any.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from billing.limits import ID_CHARS_MAX, TIME_MS_MAX
from billing.v1.command_pb2 import Price, PriceBook

# 10^15 pico = 1,000 currency units per token: beyond it, a price is a unit mistake.
PRICE_PICO_MAX = 10**15
PRICES_MAX = 10_000
# Pairs of (class in the order of validation.TOKEN_FIELDS, field of Price).
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
_RATES_REMEMBERED_MAX = 65_536


class Rate(NamedTuple):
    """What one unit of each class costs, in pico, under one version of the book."""

    version: int
    token_pico: tuple[int, ...]
    unit_pico: dict[str, int]


class PriceBookRefused(ValueError):
    """A price book that must not take effect; `problems` are for a person, one a line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


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
    seen: dict[tuple[str, int, int], int] = {}
    for line, price in enumerate(book.prices, start=1):
        if not price.model or len(price.model) > ID_CHARS_MAX or "*" in price.model[:-1]:
            problems.append(f"prices[{line}].model: {price.model[:64]!r}; write a name, or a prefix that ends in *")
        key = (price.model, price.operation, price.service_class)
        if key in seen:
            problems.append(f"prices[{line}]: the same model, operation and class as prices[{seen[key]}]; keep one")
        seen.setdefault(key, line)
        amounts = [(name, getattr(price, name)) for name in PRICE_FIELDS]
        amounts += [(f"unit_pico[{unit}]", pico) for unit, pico in sorted(price.unit_pico.items())]
        problems += [
            f"prices[{line}].{name}: {pico} pico a unit is over {PRICE_PICO_MAX}; prices are per unit, not per million"
            for name, pico in amounts
            if pico > PRICE_PICO_MAX
        ]
    return problems


class PriceBooks:
    """All versions of all currencies, and the rate for a usage."""

    def __init__(self, books: Iterable[PriceBook] = ()) -> None:
        self._books: dict[str, list[PriceBook]] = {}
        self._effective_ms: dict[str, list[int]] = {}
        self._rates: dict[tuple[str, int, str, int, int], Rate | None] = {}
        for book in books:
            self.add(book)

    def all(self) -> list[PriceBook]:
        """Every version, by currency, oldest first."""
        return [book for currency in sorted(self._books) for book in self._books[currency]]

    def add(self, book: PriceBook) -> None:
        """Take the next version of its currency. Raises PriceBookRefused, and then nothing has changed."""
        problems = book_problems(book)
        line = self._books.get(book.currency, [])
        if book.version != len(line) + 1:
            problems.append(f"version: {book.version}; the next one of {book.currency or 'its currency'} is {len(line) + 1}")
        if line and book.effective_ms <= line[-1].effective_ms:
            problems.append(
                f"effective_ms: {book.effective_ms} is not after version {line[-1].version}'s {line[-1].effective_ms}; "
                "a book is append-only, correct the past by re-rating"
            )
        if problems:
            raise PriceBookRefused(problems)
        kept = PriceBook.FromString(book.SerializeToString())
        self._books.setdefault(book.currency, []).append(kept)
        self._effective_ms.setdefault(book.currency, []).append(kept.effective_ms)

    def rate(self, currency: str, ended_ms: int, model: str, operation: int, service_class: int) -> Rate | None:
        """The rate for usage that ended at `ended_ms`, or None: unrated."""
        starts = self._effective_ms.get(currency)
        if starts is None:
            return None
        version = bisect_right(starts, ended_ms)
        if version == 0:
            return None
        key = (currency, version, model, operation, service_class)
        try:
            return self._rates[key]
        except KeyError:
            # Model names come from outside: what is remembered of them is bounded.
            if len(self._rates) >= _RATES_REMEMBERED_MAX:
                self._rates.clear()
            rate = self._rates[key] = _find(self._books[currency][version - 1], model, operation, service_class)
            return rate

    def constant_within(self, currency: str, start_ms: int, end_ms: int) -> bool:
        """Whether one version rates all usage that ends from `start_ms` to before `end_ms`."""
        starts = self._effective_ms.get(currency, [])
        return bisect_right(starts, start_ms) == bisect_right(starts, end_ms - 1)


def _find(book: PriceBook, model: str, operation: int, service_class: int) -> Rate | None:
    best: tuple[tuple[int, int, int], Price] | None = None
    for price in book.prices:
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
        rank = (name_rank, int(price.operation != 0), int(price.service_class != 0))
        if best is None or rank > best[0]:
            best = (rank, price)
    if best is None:
        return None
    price = best[1]
    return Rate(book.version, tuple(getattr(price, name) for name in PRICE_FIELDS), dict(price.unit_pico))
