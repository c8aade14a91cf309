"""Totals per minute of event time. A record states a window's absolute total, so that writing it twice is harmless.

A window is let go when log time has passed both its end and its last change by the lateness; usage that comes later opens a
new one under another `opened_sequence`, and queries add them: lateness is unbounded, memory is not.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from billing.amounts import from_amount, set_amount
from billing.limits import WINDOW_EVENTS_MAX, WINDOW_PARTS_MAX, WINDOW_UNITS_MAX
from billing.line_parts import Parts, from_line_parts, to_line_parts
from billing.v1.ledger_pb2 import WindowKey, WindowTotal
from billing.validation import TOKEN_FIELDS

MINUTE_MS = 60_000

_TOKENS = attrgetter(*TOKEN_FIELDS)


class Key(NamedTuple):
    """What is summed together. `minute` is minutes since 1970 of the time when the usage ended."""

    tenant_id: str
    project_id: str
    model: str
    operation: int
    service_class: int
    minute: int
    # Of the book that rates it, 0 for none: what a window holds was charged by one list of prices.
    price_version: int


class Window:
    """One open window: counts, the eight classes of tokens, units, cost and, where the price has terms, its parts."""

    __slots__ = (
        "_total",
        "cost_pico",
        "currency",
        "events",
        "key",
        "opened_sequence",
        "parts",
        "refused_events",
        "release_minute",
        "tokens",
        "units",
        "unrated_events",
    )

    def __init__(self, key: Key, opened_sequence: int, currency: str) -> None:
        self.key = key
        self.opened_sequence = opened_sequence
        self.currency = currency
        self.events = 0
        self.refused_events = 0
        self.unrated_events = 0
        self.tokens = [0] * 8
        self.units: dict[str, int] = {}
        self.cost_pico = 0
        self.parts: Parts = {}
        # The minute of log time at which it may be let go; kept by LedgerState.
        self.release_minute = 0
        self._total: WindowTotal | None = None

    def takes(self, currency: str) -> bool:
        """Whether more usage in `currency` may be added; else another window of the same minute follows this one.

        One window holds one currency (a tenant without amounts may change it), and no sum of it outgrows its field.
        """
        return (
            currency == self.currency
            and self.events < WINDOW_EVENTS_MAX
            and len(self.units) <= WINDOW_UNITS_MAX
            and len(self.parts) <= WINDOW_PARTS_MAX
        )

    def to_total(self) -> WindowTotal:
        """The absolute total, as a record states it. Valid until the next call."""
        total = self._total
        if total is None:
            # The part that never changes is built once.
            total = self._total = WindowTotal(key=window_key(self.key, self.opened_sequence), currency=self.currency)
        total.events = self.events
        # Totals only grow: what is zero was never set.
        if self.refused_events:
            total.refused_events = self.refused_events
        if self.unrated_events:
            total.unrated_events = self.unrated_events
        for name, tokens in zip(TOKEN_FIELDS, self.tokens, strict=True):
            if tokens:
                setattr(total, name, tokens)
        if self.units:
            total.units.update(self.units)
        if self.parts:
            del total.parts[:]
            total.parts.extend(to_line_parts(self.parts))
        set_amount(total.cost, self.cost_pico)
        return total

    @classmethod
    def from_total(cls, total: WindowTotal) -> Window:
        """The window that `total` states."""
        window = cls(key_of(total.key), total.key.opened_sequence, total.currency)
        window.events = total.events
        window.refused_events = total.refused_events
        window.unrated_events = total.unrated_events
        window.tokens = list(_TOKENS(total))
        window.units = dict(total.units)
        window.cost_pico = from_amount(total.cost)
        window.parts = from_line_parts(total.parts)
        return window


def window_key(key: Key, opened_sequence: int) -> WindowKey:
    """The contract form of a key."""
    return WindowKey(
        tenant_id=key[0],
        project_id=key[1],
        model=key[2],
        operation=key[3],
        service_class=key[4],
        minute=key[5],
        opened_sequence=opened_sequence,
        price_version=key[6],
    )


def key_of(key: WindowKey) -> Key:
    """The key that a contract names, without its generation."""
    return Key(key.tenant_id, key.project_id, key.model, key.operation, key.service_class, key.minute, key.price_version)
