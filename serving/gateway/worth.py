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

from billing.prices import PriceBookRefused, PriceBooks
from billing.rating import cost_bound_pico, worst_case_pico
from billing.v1.command_pb2 import PriceBook
from billing.v1.usage_pb2 import UsageEvent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Worth"]

_LOG = logging.getLogger(__name__)


class Worth:
    """The price books of one gateway."""

    def __init__(self, books: Iterable[PriceBook] = ()) -> None:
        self._known: dict[tuple[str, int], PriceBook] = {(book.currency, book.version): book for book in books}
        self._books = PriceBooks()
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
        books = self._books
        rates = (
            books.rate(currency, moment_ms, event.model, event.operation, event.service_class, event.tenant_id)
            for moment_ms in books.moments(currency, event.started_ms, until_ms)
        )
        return max(worst_case_pico(rate, input_tokens, output_tokens, units) for rate in rates)

    def cost_pico(self, event: UsageEvent, currency: str) -> int:
        """What `event` costs; where that depends on what its period has seen, the most that it can."""
        rate = self._books.rate(currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id)
        return cost_bound_pico(event, rate)
