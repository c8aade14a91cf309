"""What a request is worth: the price books as the ledger published them, the worst case before, the cost after.

The same code rates in the ledger. What depends on a period's running totals (graduated prices) is not known here, so the
dearest price that may come is taken: what is set aside then exceeds the cost, never the other way round.

The follower's thread hands books over; everything else is the event loop's. A set of books is replaced as a whole.
"""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from billing.prices import PriceBookRefused, PriceBooks, Rate
from billing.rating import WorstPrices, cost_bound_pico, worst_prices
from billing.v1.command_pb2 import PriceBook
from billing.v1.usage_pb2 import UsageEvent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Worth"]

_WORST_REMEMBERED_MAX = 65_536

_LOG = logging.getLogger(__name__)


class Worth:
    """The price books of one gateway."""

    def __init__(self, books: Iterable[PriceBook] = ()) -> None:
        self._known: dict[tuple[str, int], PriceBook] = {(book.currency, book.version): book for book in books}
        self._books = PriceBooks()
        # By the identity of their rates, which they hold.
        self._worst: dict[int, WorstPrices] = {}
        self.unreadable = 0
        self._rebuild()

    def on_book(self, key: bytes, value: bytes, partition: int) -> None:
        """Take a message of `billing.prices`. Each partition of the ledger says the same."""
        if not value:
            return
        try:
            book = PriceBook.FromString(value)
        except DecodeError:
            self.unreadable += 1
            return
        place = book.currency, book.version
        if self._known.get(place) != book:
            self._known[place] = book
            self._rebuild()

    def _rebuild(self) -> None:
        books = PriceBooks()
        for place in sorted(self._known):
            try:
                books.add(self._known[place])
            except PriceBookRefused as refused:
                # A version before it is still to come: a topic is read one partition after the other.
                _LOG.debug("price book %s of %s waits: %s", place[1], place[0], refused)
        self._books = books
        self._worst.clear()

    def worst_case_pico(
        self,
        event: UsageEvent,
        currency: str,
        input_tokens: int,
        output_tokens: int,
        until_ms: int,
        units: Mapping[str, int] = MappingProxyType({}),
    ) -> int:
        """The most that the request of `event` can cost if it ends by `until_ms`; 0 where nothing prices it."""
        rates = self._books.rates(
            currency, event.started_ms, until_ms, event.model, event.operation, event.service_class, event.tenant_id
        )
        worst_pico = 0
        for rate in rates:
            worst_pico = max(worst_pico, self._worst_prices(rate).cost_pico(input_tokens, output_tokens, units))
        return worst_pico

    def _worst_prices(self, rate: Rate) -> WorstPrices:
        worst = self._worst.get(id(rate))
        if worst is None:
            if len(self._worst) >= _WORST_REMEMBERED_MAX:
                self._worst.clear()
            worst = self._worst[id(rate)] = worst_prices(rate)
        return worst

    def cost_pico(self, event: UsageEvent, currency: str) -> int:
        """What `event` costs; where that depends on what its period has seen, the most that it can."""
        rate = self._books.rate(currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id)
        return cost_bound_pico(event, rate)
