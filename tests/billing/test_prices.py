"""The price book: which price rates what, and what is refused whole."""

from __future__ import annotations

import pytest

from billing.amounts import from_amount, to_amount
from billing.limits import QUANTITY_MAX, UNITS_MAX
from billing.price_checks import PRICE_FIELDS, book_problems
from billing.prices import PriceBookRefused, PriceBooks
from billing.rating import event_cost_pico
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_PACKAGE,
    ClassFactor,
    Price,
    PriceBook,
    Schedule,
    Tier,
)
from billing.v1.usage_pb2 import SERVICE_CLASS_STANDARD, SERVICE_CLASS_TEST, UnitQuantity, UsageEvent
from billing.validation import TOKEN_FIELDS


def book(*prices: Price, version: int = 1, effective_ms: int = 0, currency: str = "USD") -> PriceBook:
    return PriceBook(version=version, currency=currency, effective_ms=effective_ms, prices=prices)


def test_the_most_exact_price_wins() -> None:
    books = PriceBooks(
        [
            book(
                Price(model="*", output_pico=1),
                Price(model="llama-*", output_pico=2),
                Price(model="llama-70*", output_pico=3),
                Price(model="llama-70b", output_pico=4),
                Price(model="llama-70b", operation=2, output_pico=5),
                Price(model="llama-70b", service_class=3, output_pico=6),
                Price(model="llama-70b", operation=2, service_class=3, output_pico=7),
            )
        ]
    )
    cases = {
        ("other", 1, 1): 1,
        ("llama-8b", 1, 1): 2,
        ("llama-70b-chat", 1, 1): 3,
        ("llama-70b", 1, 1): 4,
        ("llama-70b", 2, 1): 5,
        ("llama-70b", 1, 3): 6,
        ("llama-70b", 2, 3): 7,
    }
    for (model, operation, service_class), pico in cases.items():
        rate = books.rate("USD", 5, model, operation, service_class, "t")
        assert rate is not None
        assert rate.token_pico[1] == pico
    assert books.rate("EUR", 5, "other", 1, 1, "t") is None


def test_a_version_rates_from_its_time_on() -> None:
    books = PriceBooks([book(Price(model="m", output_pico=1), effective_ms=1_000)])
    books.add(book(Price(model="m", output_pico=2), version=2, effective_ms=2_000))
    found = [books.rate("USD", ended_ms, "m", 1, 1, "t") for ended_ms in (999, 1_000, 1_999, 2_000)]
    assert [rate and rate.version for rate in found] == [None, 1, 1, 2]
    assert books.change_within(1_500, 2_500, "USD")
    assert books.change_within(1_500, 2_500)
    assert not books.change_within(1_000, 2_000)
    assert not books.change_within(1_500, 2_500, "EUR")


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (book(Price(model="m"), version=3), "the next one of USD is 2"),
        (book(Price(model="m"), version=2, effective_ms=0), "append-only"),
        (book(Price(model=""), version=2, effective_ms=5), "model"),
        (book(Price(model="a*b"), version=2, effective_ms=5), "ends in"),
        (book(Price(model="m"), Price(model="m"), version=2, effective_ms=5), "the same model"),
        (book(Price(model="m", output_pico=10**16), version=2, effective_ms=5), "output_pico"),
        (book(Price(model="m", unit_pico={"characters": 10**16}), version=2, effective_ms=5), "characters"),
        (book(Price(model="m"), version=1, currency=""), "currency"),
    ],
)
def test_a_wrong_book_is_refused_whole(wrong: PriceBook, names: str) -> None:
    books = PriceBooks([book(Price(model="m", output_pico=1))])
    with pytest.raises(PriceBookRefused, match=r".") as refused:
        books.add(wrong)
    assert names in str(refused.value)
    assert [kept.version for kept in books.all()] == [1]


def test_no_price_is_so_dear_that_sums_of_it_outgrow_an_amount() -> None:
    """A class's factor counts: a book at the bound made the sum of twenty million of its dearest events end the step."""
    thousandfold = [ClassFactor(service_class=SERVICE_CLASS_STANDARD, factor_millionths=1_000_000_000)]
    tier = Schedule(quantity="output_tokens", mode=SCHEDULE_MODE_GRADUATED, tiers=[Tier(unit_pico=10**13)])
    package = Schedule(quantity="requests", mode=SCHEDULE_MODE_PACKAGE, package_units=10, package_pico=10**14)
    for price, name in (
        (Price(model="m", output_pico=10**13, class_factors=thousandfold), "output_pico"),
        (Price(model="m", minimum_pico=10**13, class_factors=thousandfold), "minimum_pico"),
        (Price(model="m", schedules=[tier], class_factors=thousandfold), "schedules[1].tiers[1].unit_pico"),
        (Price(model="m", schedules=[package], class_factors=thousandfold), "schedules[1].package_pico"),
    ):
        [problem] = book_problems(book(price))
        assert problem.startswith(f"prices[1].{name}: ")
        assert problem.endswith("check the unit, or lower the factor")
    units = {f"unit-{number}": 10**12 for number in range(UNITS_MAX)}
    dearest = Price(model="m", unit_pico=units, minimum_pico=10**12, class_factors=thousandfold)
    event = UsageEvent(units=[UnitQuantity(unit=unit, quantity=QUANTITY_MAX) for unit in units])
    for price_name, quantity_name in zip(PRICE_FIELDS, TOKEN_FIELDS, strict=True):
        setattr(dearest, price_name, 10**12)
        setattr(event, quantity_name, QUANTITY_MAX)
    assert book_problems(book(dearest)) == []
    rate = PriceBooks([book(dearest)]).rate("USD", 1, "m", 0, SERVICE_CLASS_STANDARD, "t")
    assert from_amount(to_amount(event_cost_pico(event, rate, {}) * 2**32)) > 2**120


def test_all_problems_are_named_at_once() -> None:
    assert len(book_problems(PriceBook(version=0, currency="", prices=[Price(model="")]))) == 3


def test_test_usage_is_free_whatever_a_book_says() -> None:
    line = Price(model="m", output_pico=7, minimum_pico=5)
    books = PriceBooks([PriceBook(version=1, currency="USD", prices=[line])])
    rate = books.rate("USD", 1, "m", 0, SERVICE_CLASS_TEST, "t")
    event = UsageEvent(output_tokens=1_000, service_class=SERVICE_CLASS_TEST)
    assert rate is not None, "it is rated, at nothing"
    assert event_cost_pico(event, rate, {}) == 0
    assert books.rate("USD", 1, "m", 0, SERVICE_CLASS_STANDARD, "t") != rate
    named = Price(model="m", service_class=SERVICE_CLASS_TEST, output_pico=1)
    factored = Price(model="m", class_factors=[ClassFactor(service_class=SERVICE_CLASS_TEST, factor_millionths=500_000)])
    for price in (named, factored):
        with pytest.raises(PriceBookRefused, match="test usage is free"):
            PriceBooks([PriceBook(version=1, currency="USD", prices=[price])])
