"""Prices that depend on how many units a period has seen: free allowance, graduated, volume and package tiers.

Promise: what a request pays is a difference of one function of the cumulative quantity, so requests of one period and one book
add up to the same in any order and any batching; and what is paid at the close is a function of the final quantity alone.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

from billing.v1 import command_pb2
from billing.v1.command_pb2 import SCHEDULE_MODE_PACKAGE, SCHEDULE_MODE_VOLUME


class Part(NamedTuple):
    """Units at one price: what a request's cost is the sum of."""

    # A class of tokens by its name in UsageEvent, or a named unit; MINIMUM for what lifts a request to its least price.
    quantity_of: str
    # For people, empty for a flat price: "free", "tier 2", "context over 200,000 tokens".
    terms: str
    quantity: int
    price_pico: int

    @property
    def amount_pico(self) -> int:
        """Exactly quantity times price."""
        return self.quantity * self.price_pico


class Schedule(NamedTuple):
    """One quantity of one price line, as it is computed with."""

    mode: int
    free_units: int
    # The last units of all tiers but the last, rising, behind the free ones; and the prices of all tiers.
    bounds: tuple[int, ...]
    prices_pico: tuple[int, ...]
    package_units: int = 0
    package_pico: int = 0

    def parts(self, quantity_of: str, before: int, quantity: int) -> list[Part]:
        """What `quantity` more units cost now, where the period has seen `before`: at most one part a tier."""
        parts: list[Part] = []
        free = min(max(self.free_units - before, 0), quantity)
        if free:
            parts.append(Part(quantity_of, "free", free, 0))
        at = max(before - self.free_units, 0)
        left = quantity - free
        if self.mode in (SCHEDULE_MODE_VOLUME, SCHEDULE_MODE_PACKAGE):
            # Charged flat until the close; `settlement_pico` makes it right.
            if left:
                price = self.prices_pico[0] if self.mode == SCHEDULE_MODE_VOLUME else self.package_pico // self.package_units
                parts.append(Part(quantity_of, "until the close", left, price))
            return parts
        tier = bisect_left(self.bounds, at + 1)
        while left:
            taken = left if tier == len(self.bounds) else min(left, self.bounds[tier] - at)
            terms = f"tier {tier + 1}" if self.bounds else ""
            parts.append(Part(quantity_of, terms, taken, self.prices_pico[tier]))
            at += taken
            left -= taken
            tier += 1
        return parts

    def settlement_pico(self, units: int) -> int:
        """What is still to pay (below zero: to give back) when the period closes at `units`. Graduated tiers: nothing."""
        charged = max(units - self.free_units, 0)
        if self.mode == SCHEDULE_MODE_VOLUME:
            return charged * (self.prices_pico[bisect_left(self.bounds, charged)] - self.prices_pico[0])
        if self.mode == SCHEDULE_MODE_PACKAGE:
            packages = -(-charged // self.package_units)
            return packages * self.package_pico - charged * (self.package_pico // self.package_units)
        return 0


def schedule_of(stated: command_pb2.Schedule, factor_millionths: int) -> Schedule:
    """The schedule that a price line states, for a service class that pays this much of it. The line has been checked."""
    return Schedule(
        stated.mode,
        stated.free_units,
        tuple(tier.up_to_units for tier in stated.tiers[:-1]),
        tuple(tier.unit_pico * factor_millionths // 1_000_000 for tier in stated.tiers),
        stated.package_units,
        stated.package_pico * factor_millionths // 1_000_000,
    )
