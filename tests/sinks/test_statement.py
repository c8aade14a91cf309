"""A statement ends with the balance, whatever happened to the credit and at the close of months."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from billing.amounts import PICO, to_amount
from billing.v1.command_pb2 import Commitment, CreditGrant, InvoiceFinalization, PriceBook
from billing.v1.invoice_pb2 import CREDIT_KIND_PROMOTIONAL, ROUNDING_RULE_HALF_UP
from sinks import queries
from sinks.engine import Parameter, Rows
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.statement import StatementError, statement
from tests.billing.ledgers import KEYS, PRICES, Ledger, batch, tenants_in, usage

ONE = tenants_in(1)[0]
NOVEMBER, DECEMBER, DAY_MS = 1_761_955_200_000, 1_764_547_200_000, 86_400_000


def test_a_statement_ends_with_the_balance(engine: ChdbEngine) -> None:
    """A top-up that was repeated stood there twice; expired credit and what the close added did not stand there."""
    ledger = Ledger()
    promised = [Commitment(tenant_id=ONE, amount=to_amount(PICO))]
    ledger.command(price_book=PriceBook(version=1, currency="USD", prices=PRICES, commitments=promised))
    ledger.tenant(ONE)
    paid = CreditGrant(tenant_id=ONE, amount=to_amount(3 * PICO), currency="USD", grant_id="pi_1")
    for _ in range(2):
        ledger.command(NOVEMBER, credit_grant=paid)
    trial = CreditGrant(
        tenant_id=ONE,
        amount=to_amount(2 * PICO),
        currency="USD",
        kind=CREDIT_KIND_PROMOTIONAL,
        expires_ms=DECEMBER - DAY_MS,
    )
    ledger.command(NOVEMBER, credit_grant=trial)
    ledger.usage(batch([usage("r1", ONE, started_ms=NOVEMBER, ended_ms=NOVEMBER)]), NOVEMBER)
    terms = InvoiceFinalization(
        tenant_id=ONE,
        period_start_ms=NOVEMBER,
        series_prefix="INV",
        rounding_rule=ROUNDING_RULE_HALF_UP,
        currency_decimals=2,
    )
    assert not ledger.command(DECEMBER, invoice_finalization=terms).record.command.refusal
    feed(engine, ledger.stored, KEYS.seal_key)
    [balance] = queries.balances(engine, ONE)
    whole = statement(engine, ONE, 0, DECEMBER + DAY_MS)
    assert whole is not None
    assert whole.closing_pico == balance.balance_pico == 2 * PICO + 1_400_000
    assert (whole.credited_pico, whole.expired_pico) == (5 * PICO, 2 * PICO - 1_400_000)
    assert whole.charged_pico + whole.at_close_pico == PICO
    # Cut anywhere, one begins as the other ends.
    for cut_ms in (NOVEMBER + DAY_MS, DECEMBER - DAY_MS, DECEMBER):
        before, after = statement(engine, ONE, 0, cut_ms), statement(engine, ONE, cut_ms, DECEMBER + DAY_MS)
        assert before is not None
        assert after is not None
        assert before.closing_pico == after.opening_pico
        assert after.closing_pico == balance.balance_pico


class Busy:
    """A database into which `more` writes each time that its events have been summed."""

    def __init__(self, engine: ChdbEngine, more: Callable[[], None]) -> None:
        self._engine, self._more = engine, more

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        rows = self._engine.query(sql, parameters, timeout_s=timeout_s)
        if "GROUP BY project_id, model, operation, service_class, price_version" in sql:
            self._more()
        return rows

    def close(self) -> None:
        self._engine.close()


@pytest.mark.parametrize("comes", [0, 1, 3])
def test_usage_that_comes_while_a_statement_is_made_is_on_it_whole(engine: ChdbEngine, comes: int) -> None:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(ONE)
    ledger.usage(batch([usage("before", ONE, started_ms=NOVEMBER, ended_ms=NOVEMBER)]), NOVEMBER)
    feed(engine, ledger.stored, KEYS.seal_key)
    left = [f"r{number}" for number in range(comes)]

    def more() -> None:
        if left:
            ledger.usage(batch([usage(left.pop(), ONE, started_ms=NOVEMBER, ended_ms=NOVEMBER)]), NOVEMBER)
            feed(engine, ledger.stored[-1:], KEYS.seal_key)

    made = statement(Busy(engine, more), ONE, 0, DECEMBER)
    assert made is not None
    [balance] = queries.balances(engine, ONE)
    assert (made.events, made.closing_pico) == (1 + comes, balance.balance_pico)


def test_usage_that_comes_faster_than_it_is_read_ends_with_what_helps(engine: ChdbEngine) -> None:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(ONE)
    ledger.usage(batch([usage("before", ONE, started_ms=NOVEMBER, ended_ms=NOVEMBER)]), NOVEMBER)
    feed(engine, ledger.stored, KEYS.seal_key)

    def more() -> None:
        name = f"r{len(ledger.stored)}"
        ledger.usage(batch([usage(name, ONE, started_ms=NOVEMBER, ended_ms=NOVEMBER)]), NOVEMBER)
        feed(engine, ledger.stored[-1:], KEYS.seal_key)

    with pytest.raises(StatementError, match="give an end that has passed"):
        statement(Busy(engine, more), ONE, 0, DECEMBER)
