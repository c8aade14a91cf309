"""Credit, budgets, leases and projects in the database; the bookkeeper's report to the last pico at months' ends."""

from __future__ import annotations

from typing import Any

from billing import commands
from billing.amounts import from_amount, to_amount
from billing.founding import found_again
from billing.periods import month_of, month_start_ms
from billing.v1.account_pb2 import ACCOUNT_STATUS_CLOSED, Calendar
from billing.v1.command_pb2 import BudgetUpsert, CreditGrant, LeaseRequest, ProjectUpsert, TenantUpsert
from billing.v1.invoice_pb2 import CREDIT_KIND_OPENING, CREDIT_KIND_PAID, CREDIT_KIND_PROMOTIONAL
from billing.v1.usage_pb2 import OUTCOME_REJECTED, REFUSAL_REASON_BUDGET
from sinks import account_queries
from sinks.account_queries import BudgetRow, CreditMonths, LeaseRow
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

A, B = tenants_in(1, 2)
EVENT_PICO = 100 * 10_000 + 10 * 40_000
HOUR_MS = 3_600_000
MONTH = month_of(NOW_MS)
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
END_MS = month_start_ms(MONTH + 1) - 8 * HOUR_MS


def grant(made: Ledger, name: str, events: int, at_ms: int = NOW_MS, tenant_id: str = A, **fields: Any) -> None:
    amount = to_amount(events * EVENT_PICO)
    said = CreditGrant(tenant_id=tenant_id, currency="USD", grant_id=name, amount=amount, **fields)
    assert made.command(at_ms, credit_grant=said).record.command.applied


def use(made: Ledger, name: str, at_ms: int, tenant_id: str = A, count: int = 1) -> None:
    made.usage(batch([usage(f"{name}-{i}", tenant_id, ended_ms=at_ms, started_ms=at_ms) for i in range(count)]), at_ms)


def ledger() -> Ledger:
    """Two months: in Shanghai and in UTC, which end eight hours apart."""
    made = Ledger()
    made.price()
    made.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="USD", calendar=SHANGHAI))
    made.tenant(B)
    for tenant_id in (A, B):
        grant(made, "brought along", 10, tenant_id=tenant_id, kind=CREDIT_KIND_OPENING)
    grant(made, "trial", 5, kind=CREDIT_KIND_PROMOTIONAL, expires_ms=END_MS)
    use(made, "first", END_MS - 1, count=3)
    use(made, "also first for B", END_MS - 1, B, count=2)
    # Shanghai's month is over: the trial with it.
    use(made, "second", END_MS, count=4)
    use(made, "still first for B", END_MS, B)
    grant(made, "bought", 20, END_MS + HOUR_MS, kind=CREDIT_KIND_PAID, reference="pi_1")
    use(made, "second for B", END_MS + 9 * HOUR_MS, B, count=7)
    made.tick(month_start_ms(MONTH + 2))
    return made


def figures(rows: list[CreditMonths]) -> list[tuple[object, ...]]:
    return [
        (
            row.tenant_id,
            row.kind,
            *(pico // EVENT_PICO for pico in (row.opening_pico, row.granted_pico, row.used_pico, row.expired_pico)),
            row.closing_pico // EVENT_PICO,
        )
        for row in rows
    ]


def test_the_report_is_exact_at_the_ends_of_each_tenants_months(engine: ChdbEngine) -> None:
    made = ledger()
    feed(engine, made.stored, KEYS.seal_key)
    first = account_queries.credit_report(engine, MONTH, MONTH)
    assert figures(first) == sorted(
        [(A, "opening", 0, 10, 0, 0, 10), (A, "promotional", 0, 5, 3, 2, 0), (B, "opening", 0, 10, 3, 0, 7)]
    )
    second = account_queries.credit_report(engine, MONTH + 1, MONTH + 1)
    assert figures(second) == sorted(
        [(A, "opening", 10, 0, 4, 0, 6), (A, "paid", 0, 20, 0, 0, 20), (B, "opening", 7, 0, 7, 0, 0)]
    )
    both = account_queries.credit_report(engine, MONTH, MONTH + 1)
    assert sum(row.closing_pico for row in both) == sum(account.balance_pico for account in made.state.accounts.values())
    assert sum(row.used_pico for row in both) == sum(row.used_pico for row in [*first, *second])
    assert [row.deferred for row in both if row.kind == "promotional"] == [False]
    assert account_queries.credit_report(engine, MONTH + 2, MONTH + 2, B) == []
    assert account_queries.credit_report(engine, MONTH - 2, MONTH - 1) == []


def test_a_ledger_that_is_founded_again_changes_no_figure(engine: ChdbEngine) -> None:
    made = ledger()
    feed(engine, made.stored, KEYS.seal_key)
    before = account_queries.credit_report(engine, MONTH, MONTH + 1), account_queries.grants(engine, A)
    _, stored = found_again(made.state, b"h" * 16, made.state.log_time_ms + 1, KEYS.seal_key, "test")
    feed(engine, [*made.stored, stored], KEYS.seal_key)
    assert (account_queries.credit_report(engine, MONTH, MONTH + 1), account_queries.grants(engine, A)) == before


def test_an_account_is_shown_with_all_it_consists_of(engine: ChdbEngine) -> None:
    made = ledger()
    at_ms = made.state.log_time_ms
    budget = BudgetUpsert(tenant_id=A, project_id="p", amount=to_amount(EVENT_PICO), hard_stop=True)
    budget.threshold_millionths.append(800_000)
    made.command(at_ms, budget_upsert=budget)
    made.command(at_ms, budget_upsert=BudgetUpsert(tenant_id=A, user_id="u", amount=to_amount(5)))
    made.command(at_ms, budget_upsert=BudgetUpsert(tenant_id=A, user_id="u"))
    made.command(at_ms, project_upsert=ProjectUpsert(tenant_id=A, project_id="p", display_name="Search", closed=True))
    request = LeaseRequest(
        tenant_id=A, holder_id="gw", epoch=1, request_number=1, wanted=to_amount(3 * EVENT_PICO), duration_ms=9_000
    )
    made.command(at_ms, commands.lease_key(KEYS.command_key), lease_request=request)
    refused = usage("no", A, ended_ms=at_ms, started_ms=1, outcome=OUTCOME_REJECTED, refusal_reason=REFUSAL_REASON_BUDGET)
    spent = usage("yes", A, ended_ms=at_ms, started_ms=1, project_id="p")
    made.usage(batch([refused, spent], "gw", 1, 2), at_ms)
    feed(engine, made.stored, KEYS.seal_key)
    money = account_queries.money(engine, A)
    assert money.leased_pico == 2 * EVENT_PICO
    assert made.state.accounts[A].spend_pico - money.allocated_pico == EVENT_PICO
    assert (money.due_pico, money.uninvoiced_pico) == (0, 7 * EVENT_PICO)
    [held] = account_queries.leases(engine, A)
    assert held == LeaseRow("gw", 1, 3 * EVENT_PICO, EVENT_PICO, at_ms + 9_000, ended=False)
    assert held.held_pico == 2 * EVENT_PICO
    [row] = account_queries.budgets(engine, A)
    assert row == BudgetRow(
        "p", "", EVENT_PICO, EVENT_PICO, (800_000,), True, row.period_start_ms, row.period_end_ms, used_up=True
    )
    assert account_queries.projects(engine, A) == [("p", "Search", True)]
    assert account_queries.refusals(engine, A, at_ms) == {"budget": 1}
    [bought] = account_queries.grants(engine, A, "bought")
    assert (bought.kind, bought.reference, bought.left_pico) == ("paid", "pi_1", 20 * EVENT_PICO)
    assert account_queries.key_count(engine, A) == 0
    closing = made.command(at_ms, tenant_upsert=TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_CLOSED)).record
    feed(engine, made.stored, KEYS.seal_key)
    outcome = engine.query("SELECT outcome FROM commands FINAL WHERE outcome LIKE 'closed%'").rows[0][0]
    assert outcome == closing.command.outcome
    assert from_amount(closing.accounts[0].leased) == 2 * EVENT_PICO
