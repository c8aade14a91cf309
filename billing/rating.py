"""What one usage event costs: the one place where quantity meets price. Exact integers in pico."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, mul
from types import MappingProxyType
from typing import NamedTuple

from billing.prices import Rate, Terms
from billing.schedules import Part
from billing.v1.usage_pb2 import (
    OUTCOME_BACKEND_ERROR,
    OUTCOME_REJECTED,
    UsageEvent,
)
from billing.validation import TOKEN_FIELDS

# Recorded at price 0, and kept out of the totals of tokens: nothing of it was delivered.
FREE_OUTCOMES = frozenset({OUTCOME_REJECTED, OUTCOME_BACKEND_ERROR})
# Of a Part: what lifts a request to the least that it costs.
MINIMUM = "minimum"
MINIMUM_TERMS = "up to the least price of a request"

# The unit of which every request is one.
REQUESTS = "requests"

_CLASSES = frozenset(TOKEN_FIELDS)
_TOKENS = attrgetter(*TOKEN_FIELDS)
_INPUT_CLASSES = tuple(
    TOKEN_FIELDS.index(name)
    for name in (
        "uncached_input_tokens",
        "cache_read_tokens",
        "cache_write_tokens",
        "image_input_tokens",
        "audio_input_tokens",
    )
)

_TEXT_INPUT_CLASSES = tuple(map(TOKEN_FIELDS.index, ("uncached_input_tokens", "cache_read_tokens", "cache_write_tokens")))
_TEXT_OUTPUT_CLASSES = tuple(map(TOKEN_FIELDS.index, ("output_tokens", "reasoning_tokens")))


def token_quantities(event: UsageEvent) -> tuple[int, ...]:
    """The event's eight classes of tokens, in the order of validation.TOKEN_FIELDS."""
    tokens: tuple[int, ...] = _TOKENS(event)
    return tokens


def input_tokens(tokens: Sequence[int]) -> int:
    """All that the model was given: the context of a request that does not say how much it saw."""
    return sum([tokens[place] for place in _INPUT_CLASSES])


def unit_quantities(event: UsageEvent) -> dict[str, int]:
    """The event's named units."""
    return {entry.unit: entry.quantity for entry in event.units}


def cost_pico(tokens: Sequence[int], units: Mapping[str, int], rate: Rate) -> int:
    """The cost of quantities under a rate without terms; a unit that the rate does not name is free."""
    assert len(tokens) == len(rate.token_pico)
    cost: int = sum(map(mul, tokens, rate.token_pico))
    for unit, quantity in units.items():
        cost += quantity * rate.unit_pico.get(unit, 0)
    return cost


def parts(
    tokens: Sequence[int], units: Mapping[str, int], context_tokens: int, rate: Rate, counted: Mapping[str, int]
) -> list[Part]:
    """What a request's cost is made of; `counted`: what its period has seen before it, by quantity, under the rate's terms.

    A request that does not say how much context the model saw had its input as context.
    """
    terms = rate.terms
    band, band_terms = _band(terms, context_tokens or input_tokens(tokens))
    schedules = terms.schedules if terms else {}
    found: list[Part] = []
    named = [(name, quantity, price) for name, quantity, price in zip(TOKEN_FIELDS, tokens, rate.token_pico, strict=True)]
    named += [(unit, quantity, rate.unit_pico.get(unit, 0)) for unit, quantity in units.items() if unit not in _CLASSES]
    for name, quantity, price in named:
        if not quantity:
            continue
        if name in band:
            found.append(Part(name, band_terms, quantity, band[name]))
        elif name in schedules:
            found += schedules[name].parts(name, counted.get(name, 0), quantity)
        else:
            found.append(Part(name, "", quantity, price))
    # A unit that took the name of a class is priced as a unit, and never by a schedule that means the class.
    found += [Part(u, "", quantity, rate.unit_pico.get(u, 0)) for u, quantity in units.items() if u in _CLASSES and quantity]
    if terms and (missing := terms.minimum_pico - sum(part.amount_pico for part in found)) > 0:
        found.append(Part(MINIMUM, MINIMUM_TERMS, 1, missing))
    return found


def flat_parts(tokens: Sequence[int], units: Mapping[str, int], rate: Rate) -> list[Part]:
    """What quantities cost under a rate without terms, however many requests they are the sum of."""
    return parts(tokens, units, 0, rate, {})


def counted_quantities(tokens: Sequence[int], units: Mapping[str, int], context_tokens: int, rate: Rate) -> dict[str, int]:
    """By how much a request moves the period's counters of its price line."""
    terms = rate.terms
    if terms is None or not terms.schedules:
        return {}
    band, _ = _band(terms, context_tokens or input_tokens(tokens))
    quantities = {**units, **dict(zip(TOKEN_FIELDS, tokens, strict=True))}
    return {name: quantities[name] for name in terms.schedules if name not in band and quantities.get(name)}


def _band(terms: Terms | None, context_tokens: int) -> tuple[Mapping[str, int], str]:
    """The prices of the highest band that so much context passes."""
    for band in reversed(terms.bands if terms else ()):
        if context_tokens > band.above_tokens:
            return band.prices_pico, f"context over {band.above_tokens:,} tokens"
    return {}, ""


def event_cost_pico(event: UsageEvent, rate: Rate | None, counted: Mapping[str, int]) -> int:
    """What `event` costs: 0 if it is unrated or its outcome is free. `counted`: as for `parts`."""
    if rate is None or event.outcome in FREE_OUTCOMES:
        return 0
    if rate.terms is None:
        return cost_pico(token_quantities(event), unit_quantities(event), rate)
    return sum(part.amount_pico for part in event_parts(event, rate, counted))


def cost_bound_pico(event: UsageEvent, rate: Rate | None) -> int:
    """The most that `event` costs whatever its period has seen before it; equal to its cost where the rate has no terms."""
    if rate is None or event.outcome in FREE_OUTCOMES:
        return 0
    if rate.terms is None:
        return cost_pico(token_quantities(event), unit_quantities(event), rate)
    bound = sum(quantity * _dearest_pico(rate, name, price) for name, quantity, price in _priced(event, rate) if quantity)
    return max(bound, rate.terms.minimum_pico)


class WorstPrices(NamedTuple):
    """The most that a rate asks for a token of text in, one out and a request, however tokens fall into classes."""

    rate: Rate
    input_pico: int
    output_pico: int
    request_pico: int
    minimum_pico: int

    def cost_pico(self, input_tokens: int, output_tokens: int, units: Mapping[str, int] = MappingProxyType({})) -> int:
        """The most that a request costs whose model sees so much and writes so much; `units`: what it uses beside text, and
        beside being one request."""
        bound = input_tokens * self.input_pico + output_tokens * self.output_pico + self.request_pico
        for unit, quantity in units.items():
            if unit != REQUESTS:
                bound += quantity * _dearest_pico(self.rate, unit, self.rate.unit_pico.get(unit, 0))
        return max(bound, self.minimum_pico)


def worst_prices(rate: Rate) -> WorstPrices:
    """What the worst case of any request is computed from; the same for as long as the rate is."""

    def dearest_pico(places: Sequence[int]) -> int:
        return max([_dearest_pico(rate, TOKEN_FIELDS[place], rate.token_pico[place]) for place in places])

    return WorstPrices(
        rate,
        dearest_pico(_TEXT_INPUT_CLASSES),
        dearest_pico(_TEXT_OUTPUT_CLASSES),
        _dearest_pico(rate, REQUESTS, rate.unit_pico.get(REQUESTS, 0)),
        rate.terms.minimum_pico if rate.terms else 0,
    )


def _priced(event: UsageEvent, rate: Rate) -> list[tuple[str, int, int]]:
    """Each quantity of the event with its flat price."""
    tokens = zip(TOKEN_FIELDS, token_quantities(event), rate.token_pico, strict=True)
    return [*tokens, *((unit, quantity, rate.unit_pico.get(unit, 0)) for unit, quantity in unit_quantities(event).items())]


def _dearest_pico(rate: Rate, name: str, flat_pico: int) -> int:
    """The most that one unit costs under any of the rate's terms."""
    terms = rate.terms
    if terms is None:
        return flat_pico
    schedule = terms.schedules.get(name)
    prices = [flat_pico] if schedule is None else [*schedule.prices_pico]
    if schedule is not None and schedule.package_units:
        prices.append(-(-schedule.package_pico // schedule.package_units))
    return max([*prices, *(band.prices_pico.get(name, 0) for band in terms.bands)], default=0)


def event_parts(event: UsageEvent, rate: Rate, counted: Mapping[str, int]) -> list[Part]:
    """What an event that is neither unrated nor free costs, in parts."""
    return parts(token_quantities(event), unit_quantities(event), event.context_tokens, rate, counted)
