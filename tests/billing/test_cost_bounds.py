"""What a gateway sets aside before it knows: never less than the ledger then charges, whatever book and period so far."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from billing.prices import PriceBooks
from billing.rating import cost_bound_pico, event_cost_pico, worst_prices
from billing.v1.command_pb2 import Price, PriceBook
from billing.v1.usage_pb2 import OUTCOME_COMPLETED, UnitQuantity, UsageEvent
from tests.billing.test_rating_property import CLASSES, UNITS, books, usage_events

counts = st.one_of(st.integers(0, 12), st.integers(0, 2**41))
periods = st.dictionaries(st.sampled_from(CLASSES + UNITS), counts)


@settings(max_examples=150, deadline=None)
@given(book=books("USD"), event=usage_events(), counted=periods)
def test_no_event_costs_more_than_its_bound(book: PriceBook, event: UsageEvent, counted: dict[str, int]) -> None:
    rate = PriceBooks([book]).rate("USD", event.ended_ms, event.model, 0, event.service_class, event.tenant_id)
    assert event_cost_pico(event, rate, counted) <= cost_bound_pico(event, rate)


@settings(max_examples=150, deadline=None)
@given(
    book=books("USD"),
    event=usage_events(),
    counted=periods,
    seen=st.tuples(counts, counts, counts),
    written=st.tuples(counts, counts),
    context_tokens=st.integers(0, 400),
)
def test_no_text_request_costs_more_than_its_worst_case(
    book: PriceBook,
    event: UsageEvent,
    counted: dict[str, int],
    seen: tuple[int, int, int],
    written: tuple[int, int],
    context_tokens: int,
) -> None:
    request = UsageEvent(
        tenant_id=event.tenant_id,
        model=event.model,
        service_class=event.service_class,
        outcome=OUTCOME_COMPLETED,
        ended_ms=event.ended_ms,
        context_tokens=context_tokens,
        uncached_input_tokens=seen[0],
        cache_read_tokens=seen[1],
        cache_write_tokens=seen[2],
        output_tokens=written[0],
        reasoning_tokens=written[1],
        units=[UnitQuantity(unit="requests", quantity=1)],
    )
    rate = PriceBooks([book]).rate("USD", request.ended_ms, request.model, 0, request.service_class, request.tenant_id)
    worst_pico = worst_prices(rate).cost_pico(sum(seen), sum(written)) if rate is not None else 0
    assert event_cost_pico(request, rate, counted) <= worst_pico


def test_at_flat_prices_the_bound_is_the_cost() -> None:
    price = Price(model="*", uncached_input_pico=7, output_pico=11, cache_read_pico=2)
    rate = PriceBooks([PriceBook(version=1, currency="USD", prices=[price])]).rate("USD", 1, "m", 0, 0, "t")
    assert rate is not None
    event = UsageEvent(outcome=OUTCOME_COMPLETED, uncached_input_tokens=100, cache_read_tokens=5, output_tokens=10)
    assert cost_bound_pico(event, rate) == event_cost_pico(event, rate, {}) == 820
    assert worst_prices(rate).cost_pico(105, 10) == 845
