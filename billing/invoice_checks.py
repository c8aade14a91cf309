"""Whether an invoice's figures follow from one another: every amount, sum, tax and rounding, computed again from its lines.

Promise: an invoice without a problem says nothing that a reader with a pencil could refute. It is checked from the message
alone, by other code than what drew it; what it was drawn from is the audit's business. Where a price stands beside units, their
product is the amount; a part without a price (a minimum, a settlement, a credit note) has an amount alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from billing.amounts import PICO, from_amount
from billing.line_parts import from_units
from billing.v1.invoice_pb2 import (
    ROUNDING_RULE_HALF_EVEN,
    ROUNDING_RULE_HALF_UP,
    Invoice,
    InvoiceLine,
    RoundingRule,
)

__all__ = ["credits_pico", "invoice_problem", "invoice_problems", "rounded", "smallest_pico"]

_MILLIONTHS = 1_000_000
_DECIMALS_MAX = 12


def smallest_pico(decimals: int) -> int:
    """The smallest unit of a currency with so many decimals."""
    assert 0 <= decimals <= _DECIMALS_MAX, decimals
    return int(PICO // 10**decimals)


def rounded(numerator: int, denominator: int, rule: RoundingRule.ValueType) -> int:
    """The whole number nearest to numerator / denominator; halves as `rule` says."""
    assert denominator > 0, denominator
    whole, rest = divmod(abs(numerator), denominator)
    if 2 * rest > denominator or (2 * rest == denominator and (rule == ROUNDING_RULE_HALF_UP or whole % 2)):
        whole += 1
    return -whole if numerator < 0 else whole


def credits_pico(invoice: Invoice) -> int:
    """The credit that was applied, exact."""
    return sum(from_amount(credit.amount) for credit in invoice.credits)


def invoice_problem(invoice: Invoice) -> str | None:
    """The first of `invoice_problems`, or None."""
    return next(iter(invoice_problems(invoice)), None)


def invoice_problems(invoice: Invoice) -> list[str]:
    """What does not follow, each with the figure that stands there and the one that should."""
    if invoice.currency_decimals > _DECIMALS_MAX:
        return [f"currency_decimals: {invoice.currency_decimals}; an amount has at most {_DECIMALS_MAX}"]
    if invoice.rounding_rule not in (ROUNDING_RULE_HALF_UP, ROUNDING_RULE_HALF_EVEN):
        return [f"rounding_rule: {invoice.rounding_rule} is not known"]
    problems: list[str] = []

    def equal(name: str, stated: int, computed: int) -> None:
        if stated != computed:
            problems.append(f"{name}: {stated} pico stands there, the figures above it come to {computed}")

    for place, line in enumerate(invoice.lines, 1):
        if line.number != place:
            problems.append(f"line {place}: is numbered {line.number}")
        if line.part.unit_pico:
            equal(f"line {place}", from_amount(line.part.amount), from_units(line.part.units) * line.part.unit_pico)
    equal("usage", from_amount(invoice.usage), _sum(line for line in invoice.lines if not line.adjustment))
    equal("adjustments", from_amount(invoice.adjustments), _sum(line for line in invoice.lines if line.adjustment))
    net_exact = from_amount(invoice.net_exact)
    equal("net_exact", net_exact, from_amount(invoice.usage) + from_amount(invoice.adjustments))
    smallest, rule = smallest_pico(invoice.currency_decimals), invoice.rounding_rule
    net = from_amount(invoice.net)
    equal("net", net, rounded(net_exact, smallest, rule) * smallest)
    for place, tax in enumerate(invoice.taxes, 1):
        equal(f"tax {place}: base", from_amount(tax.base), net)
        amount = rounded(net * tax.rate.rate_millionths, smallest * _MILLIONTHS, rule) * smallest
        equal(f"tax {place}", from_amount(tax.amount), amount)
    total = from_amount(invoice.total)
    equal("total", total, net + sum(from_amount(tax.amount) for tax in invoice.taxes))
    # What credit left of the exact net is rounded like the net itself.
    due = rounded(net_exact - credits_pico(invoice), smallest, rule) * smallest + total - net
    equal("due", from_amount(invoice.due), due)
    return problems


def _sum(lines: Iterable[InvoiceLine]) -> int:
    return sum(from_amount(line.part.amount) for line in lines)
