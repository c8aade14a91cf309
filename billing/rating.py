"""What one usage event costs: the one place where quantity meets price. Exact integers in pico."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from billing.prices import Rate
from billing.v1.usage_pb2 import (
    OUTCOME_BACKEND_ERROR,
    OUTCOME_REJECTED,
    UsageEvent,
)
from billing.validation import TOKEN_FIELDS

# Recorded at price 0, and kept out of the totals of tokens: nothing of it was delivered.
FREE_OUTCOMES = frozenset({OUTCOME_REJECTED, OUTCOME_BACKEND_ERROR})


def token_quantities(event: UsageEvent) -> tuple[int, ...]:
    """The event's eight classes of tokens, in the order of validation.TOKEN_FIELDS."""
    return tuple(getattr(event, name) for name in TOKEN_FIELDS)


def unit_quantities(event: UsageEvent) -> dict[str, int]:
    """The event's named units."""
    return {entry.unit: entry.quantity for entry in event.units}


def cost_pico(tokens: Sequence[int], units: Mapping[str, int], rate: Rate) -> int:
    """The cost of quantities under `rate`; a unit that the rate does not name is free."""
    cost = sum(quantity * price for quantity, price in zip(tokens, rate.token_pico, strict=True))
    for unit, quantity in units.items():
        cost += quantity * rate.unit_pico.get(unit, 0)
    return cost


def event_cost_pico(event: UsageEvent, rate: Rate | None) -> int:
    """What `event` costs: 0 if it is unrated or its outcome is free."""
    if rate is None or event.outcome in FREE_OUTCOMES:
        return 0
    return cost_pico(token_quantities(event), unit_quantities(event), rate)
