"""An invoice's figures, computed again: every one that is changed alone is named, and rounding is what fractions say."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.amounts import PICO, from_amount, set_amount
from billing.invoice_checks import invoice_problems, rounded
from billing.v1.account_pb2 import Amount
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_EVEN, ROUNDING_RULE_HALF_UP, Invoice
from tests.billing.invoice_sheets import Priced, Sheet, american, chinese, japanese


@pytest.mark.parametrize("sheet", [american, chinese, japanese], ids=lambda sheet: sheet.__name__)
def test_an_invoice_that_adds_up_has_no_problem(sheet: Callable[[], Sheet]) -> None:
    assert invoice_problems(sheet().invoice()) == []


def test_amounts_beyond_64_bits_add_up() -> None:
    large = Priced("p", "m", "output_tokens", 1 << 80, "0.000001")
    assert invoice_problems(Sheet(lines=[large, Priced("p", "m", "output_tokens", -(1 << 70), "0.000001")]).invoice()) == []


def _more(amount: Amount) -> None:
    set_amount(amount, from_amount(amount) + 1)


def _number(invoice: Invoice) -> None:
    invoice.lines[2].number = 9


def _rule(invoice: Invoice) -> None:
    invoice.rounding_rule = 7  # type: ignore[assignment]  # no rule has this number


def _decimals(invoice: Invoice) -> None:
    invoice.currency_decimals = 13


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda invoice: _more(invoice.lines[2].part.amount), "line 3: "),
        (lambda invoice: _more(invoice.usage), "usage: "),
        (lambda invoice: _more(invoice.adjustments), "adjustments: "),
        (lambda invoice: _more(invoice.net_exact), "net_exact: "),
        (lambda invoice: _more(invoice.net), "net: "),
        (lambda invoice: _more(invoice.taxes[1].base), "tax 2: base: "),
        (lambda invoice: _more(invoice.taxes[1].amount), "tax 2: "),
        (lambda invoice: _more(invoice.total), "total: "),
        (lambda invoice: set_amount(invoice.credits[0].amount, 49 * PICO), "due: "),
        (lambda invoice: _more(invoice.due), "due: "),
        (_number, "line 3: is numbered 9"),
        (_rule, "rounding_rule: 7 is not known"),
        (_decimals, "currency_decimals: 13"),
    ],
)
def test_each_figure_that_is_changed_is_named(change: Callable[[Invoice], None], named: str) -> None:
    invoice = american().invoice()
    change(invoice)
    assert any(problem.startswith(named) for problem in invoice_problems(invoice)), invoice_problems(invoice)


@given(st.integers(-(10**40), 10**40), st.integers(1, 10**20))
def test_rounding_is_what_fractions_say(numerator: int, denominator: int) -> None:
    exact = Fraction(numerator, denominator)
    assert rounded(numerator, denominator, ROUNDING_RULE_HALF_EVEN) == round(exact)
    away = (abs(exact) + Fraction(1, 2)).__floor__()
    assert rounded(numerator, denominator, ROUNDING_RULE_HALF_UP) == (away if numerator >= 0 else -away)


@pytest.mark.parametrize(("numerator", "up", "even"), [(25, 3, 2), (-25, -3, -2), (35, 4, 4), (24, 2, 2), (26, 3, 3)])
def test_halves(numerator: int, up: int, even: int) -> None:
    assert rounded(numerator, 10, ROUNDING_RULE_HALF_UP) == up
    assert rounded(numerator, 10, ROUNDING_RULE_HALF_EVEN) == even
