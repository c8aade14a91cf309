"""Credit: nothing of a grant is lost or used twice, whatever comes in whatever order; and the ledger says so everywhere."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from billing import commands, credit, grants
from billing.amounts import PICO, from_amount, to_amount
from billing.commands import CommandRefused
from billing.credit import Credits
from billing.limits import GRANTS_LIVE_MAX, RECORD_BYTES_MAX, UNINVOICED_PARTS_MAX
from billing.periods import month_of, month_start_ms
from billing.tenant_credit import TenantCredit
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import CreditGrant, LeaseRequest, TenantUpsert
from billing.v1.invoice_pb2 import CREDIT_KIND_CORRECTION, CREDIT_KIND_PAID, CREDIT_KIND_PROMOTIONAL, CreditKind
from billing.v1.ledger_pb2 import CreditState, LedgerRecord
from sinks.recompute import Recomputed
from tests.billing.agreement import agreed
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage
from tests.billing.naive_credit import CoinGrant, Coins

if TYPE_CHECKING:
    from pathlib import Path

A, B = tenants_in(1, 2)
DAY_MS = 86_400_000
EVENT_PICO = 100 * 10_000 + 10 * 40_000
MONTH_END_MS = month_start_ms(month_of(NOW_MS) + 1)
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
LOS_ANGELES = Calendar(time_zone="America/Los_Angeles", from_month=[0, month_of(NOW_MS) + 1], offset_minutes=[-420, -480])


@dataclass
class Purse:
    """What credit needs of an account."""

    credit_pico: int = 0
    spend_pico: int = 0
    calendar: Calendar = field(default_factory=lambda: SHANGHAI)


class CreditMachine(RuleBasedStateMachine):
    """One tenant against the coins, and a follower that knows the records alone."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = NOW_MS
        self.purse, self.coins = Purse(), Coins()
        self.credits, self.follower = Credits(), Credits()
        self.invoices = 0
        self.granted = self.invoiced = 0

    def begin(self) -> LedgerRecord:
        record = LedgerRecord(log_time_ms=self.now_ms)
        self.credits.advance({A: self.purse}, record)
        self.coins.expire(self.now_ms)
        return record

    def end(self, record: LedgerRecord) -> None:
        for state in record.credits:
            self.follower.set(CreditState.FromString(state.SerializeToString()))

    @rule(days=st.sampled_from((0, 1, 9, 40)))
    def time_passes(self, days: int) -> None:
        self.now_ms += days * DAY_MS
        self.end(self.begin())

    @rule(
        number=st.integers(0, 12),
        kind=st.sampled_from(CreditKind.values()[:4]),
        coins=st.integers(1, 9),
        days=st.sampled_from((0, 0, 1, 8, 30)),
        priority=st.integers(0, 1),
    )
    def grant(self, number: int, kind: CreditKind.ValueType, coins: int, days: int, priority: int) -> None:
        record, expires_ms = self.begin(), days and NOW_MS + days * DAY_MS
        said = CreditGrant(
            amount=to_amount(coins),
            grant_id=f"g{number}",
            kind=kind,
            expires_ms=expires_ms,
            priority=priority,
        )
        before = self.coins.grants.get(said.grant_id)
        order = priority, kind != CREDIT_KIND_PROMOTIONAL, float(expires_ms or "inf"), len(self.coins.grants)
        same = before is not None and (before.coins, before.expires_ms, before.order[:3]) == (coins, expires_ms, order[:3])
        try:
            outcome = self.credits.grant(A, self.purse, said, "command", record)
        except CommandRefused:
            assert before is not None or expires_ms <= self.now_ms
        else:
            # The coins do not know paid from opening credit, which a repeat must not change either.
            assert bool(outcome) == (before is not None)
            assert before is None or same
            if before is None:
                self.granted += coins
                self.coins.add(CoinGrant(said.grant_id, coins, order, expires_ms))
        self.end(record)

    @rule(coins=st.integers(1, 12))
    def use(self, coins: int) -> None:
        self.end(self.begin())
        self.purse.spend_pico += coins
        self.coins.spend(coins)

    @rule(coins=st.integers(1, 12))
    def correct(self, coins: int) -> None:
        record = self.begin()
        self.purse.spend_pico -= coins
        self.credits.correct(A, self.purse, record)
        self.end(record)
        self.coins.take_back(coins, self.now_ms)

    @rule(net=st.integers(-5, 15), drafts=st.booleans())
    def invoice(self, net: int, drafts: bool) -> None:
        record, name = self.begin(), f"invoice-{self.invoices}"
        draft = self.credits.invoice(A, self.purse, net, name, record, draft=True) if drafts else None
        applied = self.credits.invoice(A, self.purse, net, name, record)
        self.end(record)
        self.invoices += 1
        self.invoiced += max(net, 0)
        self.granted += max(-net, 0)
        paid = self.coins.invoice(net, name, len(self.coins.grants))
        assert Counter({each.grant_id: from_amount(each.amount) for each in applied}) == paid
        assert draft is None or draft == applied

    @rule(paid_too=st.booleans())
    def close(self, paid_too: bool) -> None:
        record = self.begin()
        expired = self.credits.forfeit(A, self.purse, record, paid_too=paid_too)
        self.end(record)
        gone = [grant for grant in self.coins.grants.values() if paid_too or not grant.order[1]]
        assert expired == sum(grant.left for grant in gone)
        for grant in gone:
            grant.expired += grant.left

    def settled(self) -> Coins:
        """What the ledger would state now, as coins: a draft of nothing sets all spend against grants."""
        record = LedgerRecord(log_time_ms=self.now_ms)
        self.credits.invoice(A, self.purse, 0, "", record)
        self.end(record)
        [held] = self.credits.all()
        found = Coins(due=from_amount(held.due))
        for grant in held.grants:
            used, expired = from_amount(grant.used), from_amount(grant.expired)
            found.grants[grant.grant_id] = CoinGrant(
                grant.grant_id, from_amount(grant.amount), (0, True, 0, 0), grant.expires_ms, used, expired
            )
        for part in held.uninvoiced:
            found.spent += [part.grant_id] * from_amount(part.amount)
            found.returned += max(-from_amount(part.amount), 0)
        return found

    @invariant()
    def the_ledger_has_the_coins(self) -> None:
        found, coins = self.settled(), self.coins
        assert (found.spent, found.due, found.returned) == (coins.spent, coins.due, coins.returned)
        assert {name: (grant.coins, grant.used, grant.expired) for name, grant in found.grants.items()} == {
            name: (grant.coins, grant.used, grant.expired) for name, grant in coins.grants.items()
        }

    @invariant()
    def nothing_is_lost(self) -> None:
        grants = self.coins.grants.values()
        assert self.granted == sum(grant.used + grant.expired + grant.left for grant in grants)
        assert self.purse.credit_pico == self.granted - sum(grant.expired for grant in grants)
        balance = self.purse.credit_pico - self.purse.spend_pico
        assert balance == self.coins.left - self.coins.owed
        assert not (self.coins.owed > 0 and self.coins.left), "what is left pays for what is owed"
        assert self.purse.spend_pico == self.invoiced + len(self.coins.spent) - self.coins.returned

    @invariant()
    def who_follows_has_the_same(self) -> None:
        assert list(self.follower.all()) == list(self.credits.all())
        assert self.follower.next_ms == self.credits.next_ms


_SETTINGS = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "25")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
CreditMachine.TestCase.settings = _SETTINGS
TestCreditModel = CreditMachine.TestCase


def _newest_first() -> Any:
    return mock.patch.object(grants.Grant, "order", lambda self: -self.number)


def _expired_credit_stays() -> Any:
    """What expires is still in the balance."""
    expire_grant = TenantCredit._expire_grant

    def expire(tenant: Any, grant: grants.Grant, _: Any, now_ms: int) -> None:
        expire_grant(tenant, grant, Purse(), now_ms)

    return mock.patch.object(TenantCredit, "_expire_grant", expire)


def _paid_once_more() -> Any:
    """What a new grant pays for is not named."""
    return mock.patch.object(TenantCredit, "_name_parts")


@pytest.mark.parametrize("control", [_newest_first, _expired_credit_stays, _paid_once_more])
def test_a_broken_rule_is_seen(control: Any) -> None:
    made = settings(_SETTINGS, max_examples=100, derandomize=True, database=None, phases=[Phase.generate], print_blob=False)
    with control(), pytest.raises(AssertionError):
        run_state_machine_as_test(CreditMachine, settings=made)


# --- in the ledger ---


def ledger(calendar: Calendar = SHANGHAI) -> Ledger:
    made = Ledger()
    made.price()
    made.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="USD", calendar=calendar))
    return made


def grant(made: Ledger, name: str, pico: int, at_ms: int = NOW_MS, **fields: Any) -> LedgerRecord:
    said = CreditGrant(tenant_id=A, currency="USD", amount=to_amount(pico), grant_id=name, **fields)
    return made.command(at_ms, credit_grant=said).record


def left(state: CreditState) -> dict[str, int]:
    return {g.grant_id: from_amount(g.amount) - from_amount(g.used) - from_amount(g.expired) for g in state.grants}


def test_a_grant_that_comes_again_is_harmless_and_another_of_its_name_is_refused(tmp_path: Path) -> None:
    made = ledger()
    top_up: dict[str, Any] = {"kind": CREDIT_KIND_PAID, "reference": "pi_3", "expires_ms": NOW_MS + DAY_MS}
    assert grant(made, "pi_3", PICO, **top_up).command.applied
    again = grant(made, "pi_3", PICO, **top_up).command
    assert again.applied
    assert "a repeat changes nothing" in again.outcome
    # The kind that is meant where none is said.
    assert grant(made, "pi_3", PICO, reference="pi_3", expires_ms=NOW_MS + DAY_MS).command.applied
    for change in ({"kind": CREDIT_KIND_PROMOTIONAL}, {"reference": ""}, {"expires_ms": 0}, {"priority": 1}):
        assert "a name of its own" in grant(made, "pi_3", PICO, **(top_up | change)).command.refusal
    assert "a name of its own" in grant(made, "pi_3", 2 * PICO, **top_up).command.refusal
    assert made.state.accounts[A].credit_pico == PICO
    agreed(made, tmp_path)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"expires_ms": NOW_MS}, "expires_ms"),
        ({"expires_ms": -1}, "expires_ms"),
        ({"kind": 99}, "kind: 99"),
        ({"reference": "x" * 257}, "reference"),
        ({"name": "ü" * 129}, "grant_id"),
        ({"name": grants.SEVERAL}, "grant_id"),
    ],
)
def test_a_grant_that_cannot_be_meant_is_refused(fields: dict[str, Any], names: str) -> None:
    made = ledger()
    record = grant(made, fields.pop("name", "g"), PICO, **fields)
    assert names in record.command.refusal
    assert not record.credits
    assert made.state.accounts[A].credit_pico == 0


def test_promotional_credit_goes_first_and_what_expires_sooner(tmp_path: Path) -> None:
    made = ledger()
    grant(made, "paid", 10 * EVENT_PICO)
    grant(made, "late", EVENT_PICO, kind=CREDIT_KIND_PROMOTIONAL, expires_ms=NOW_MS + 2 * DAY_MS)
    grant(made, "soon", EVENT_PICO, kind=CREDIT_KIND_PROMOTIONAL, expires_ms=NOW_MS + DAY_MS)
    grant(made, "last", EVENT_PICO, kind=CREDIT_KIND_PROMOTIONAL, priority=1)
    made.usage(batch([usage(f"r{n}", A) for n in range(3)]))
    stated = left(grant(made, "more", 1).credits[0])
    assert stated == {"paid": 9 * EVENT_PICO, "late": 0, "soon": 0, "more": 1}
    agreed(made, tmp_path)


def test_what_is_left_leaves_the_balance_with_the_record_that_passes_the_expiry(tmp_path: Path) -> None:
    made = ledger()
    grant(made, "trial", 5 * EVENT_PICO, kind=CREDIT_KIND_PROMOTIONAL, expires_ms=NOW_MS + 1_000)
    made.usage(batch([usage("r1", A)]))
    before = made.usage(batch([usage("r2", A)]), NOW_MS + 999).record
    assert not before.credits
    # Usage of that very record is not paid by it any more.
    record = made.usage(batch([usage("r3", A)]), NOW_MS + 1_000).record
    [state] = record.credits
    assert [(from_amount(g.used), from_amount(g.expired)) for g in state.grants] == [(2 * EVENT_PICO, 3 * EVENT_PICO)]
    assert made.state.accounts[A].balance_pico == -EVENT_PICO
    assert [from_amount(account.credit) for account in record.accounts] == [2 * EVENT_PICO]
    # The next grant pays for it first.
    assert left(grant(made, "paid", 3 * EVENT_PICO).credits[0]) == {"paid": 2 * EVENT_PICO}
    # A tick lets it expire too, and states the account.
    grant(made, "other", 7, expires_ms=NOW_MS + 5_000)
    assert [account.tenant_id for account in made.tick(NOW_MS + 5_000).record.accounts] == [A]
    agreed(made, tmp_path)


@pytest.mark.parametrize(("calendar", "hours"), [(SHANGHAI, -8), (LOS_ANGELES, 8)])
def test_a_months_figures_are_its_own(tmp_path: Path, calendar: Calendar, hours: int) -> None:
    made = ledger(calendar)
    end_ms = MONTH_END_MS + hours * 3_600_000
    grant(made, "paid", 100 * EVENT_PICO)
    grant(made, "month", 100 * EVENT_PICO, expires_ms=end_ms)
    made.usage(batch([usage("r1", A)]), end_ms - 1)
    record = made.usage(batch([usage("r2", A, ended_ms=end_ms, started_ms=end_ms)]), end_ms).record
    [state] = record.credits
    # The last moment of the month that ended: r1 is in it, and so is what expired with it; r2 is not.
    assert state.at_ms == end_ms - 1
    assert [(g.grant_id, from_amount(g.used), from_amount(g.expired)) for g in state.grants] == [
        ("month", EVENT_PICO, 99 * EVENT_PICO)
    ]
    assert state.period_end_ms > end_ms
    [state] = grant(made, "more", 1, end_ms + 1).credits
    assert [(g.grant_id, from_amount(g.used)) for g in state.grants] == [("paid", EVENT_PICO), ("more", 0)]
    agreed(made, tmp_path)


def test_a_ledger_that_stood_still_closes_the_month_and_expires_the_rest_on_its_return(tmp_path: Path) -> None:
    made = ledger(Calendar())
    grant(made, "in the month", 5, expires_ms=NOW_MS + DAY_MS)
    grant(made, "after it", 6, expires_ms=MONTH_END_MS + DAY_MS)
    at_ms = MONTH_END_MS + 70 * DAY_MS
    record = made.tick(at_ms).record
    assert [(state.at_ms, [g.grant_id for g in state.grants]) for state in record.credits] == [
        (MONTH_END_MS - 1, ["in the month"]),
        (at_ms, ["after it"]),
    ]
    assert made.state.accounts[A].credit_pico == 0
    agreed(made, tmp_path)


def test_grants_are_bounded_and_the_refusal_says_so(tmp_path: Path) -> None:
    made = ledger()
    for number in range(GRANTS_LIVE_MAX):
        grant(made, f"g{number}", EVENT_PICO)
    refused = grant(made, "one too many", EVENT_PICO)
    assert "let one be used up" in refused.command.refusal
    assert not refused.credits
    made.usage(batch([usage("r1", A)]))
    assert grant(made, "fits now", EVENT_PICO).command.applied
    with mock.patch.object(credit, "GRANTS_KEPT_MAX", 5):
        assert "400 days" in grant(made, "often", 1).command.refusal
    agreed(made, tmp_path)


def test_expiries_of_many_tenants_come_in_as_many_records_as_they_need() -> None:
    made = Ledger()
    tenants = tenants_in(1, 40)
    for tenant_id in tenants:
        made.tenant(tenant_id)
        for number in range(10):
            said = CreditGrant(
                tenant_id=tenant_id, currency="USD", amount=to_amount(5), grant_id=f"{number}".ljust(256, "x"),
                reference="y" * 256, expires_ms=NOW_MS + 1_000,
            )  # fmt: skip
            made.command(credit_grant=said)
    records = [made.tick(NOW_MS + 1_000 + number).record for number in range(4)]
    counts = [len(record.credits) for record in records]
    assert sum(counts) == 40
    assert counts[0] < 40
    assert counts[-1] == 0
    assert all(made.state.accounts[tenant_id].credit_pico == 0 for tenant_id in tenants)
    assert made.replayed().digest() == made.state.digest()


def test_the_largest_statement_of_a_tenant_is_small() -> None:
    made, purse = Credits(), Purse()
    for number in range(UNINVOICED_PARTS_MAX + GRANTS_LIVE_MAX + 20):
        record = LedgerRecord(log_time_ms=NOW_MS)
        said = CreditGrant(amount=to_amount(10**30), grant_id=f"{number}".ljust(256, "x"), reference="r" * 256)
        made.grant(A, purse, said, "c", record)
        if number < UNINVOICED_PARTS_MAX + 20:
            purse.spend_pico += 10**30
    [held] = made.all()
    assert len(held.uninvoiced) == UNINVOICED_PARTS_MAX
    assert held.uninvoiced[0].grant_id == grants.SEVERAL
    purse.spend_pico += GRANTS_LIVE_MAX * 10**30
    record = LedgerRecord(log_time_ms=held.period_end_ms)
    made.advance({A: purse}, record)
    assert len(record.credits[0].grants) >= GRANTS_LIVE_MAX - 1
    assert record.ByteSize() < 200_000 < RECORD_BYTES_MAX - 7_700_000


def test_what_an_invoice_takes_back_becomes_credit(tmp_path: Path) -> None:
    made, purse, record = Credits(), Purse(), LedgerRecord(log_time_ms=NOW_MS)
    made.grant(A, purse, CreditGrant(amount=to_amount(100), grant_id="paid"), "c", record)
    purse.spend_pico = 60
    [applied] = made.invoice(A, purse, 60, "", record)
    assert (applied.grant_id, CreditKind.Name(applied.kind), from_amount(applied.amount)) == ("paid", "CREDIT_KIND_PAID", 60)
    purse.spend_pico -= 25
    balance_pico = purse.credit_pico - purse.spend_pico
    assert made.invoice(A, purse, -25, "INV-0001/2", record) == []
    assert purse.credit_pico - purse.spend_pico == balance_pico
    assert record.credits[-1].grants[-1].kind == CREDIT_KIND_CORRECTION
    assert left(record.credits[-1])["INV-0001/2"] == 25


def test_leases_on_credit_that_expired_shrink_and_get_no_more() -> None:
    made = ledger()
    grant(made, "paid", 4 * EVENT_PICO)
    grant(made, "trial", 6 * EVENT_PICO, expires_ms=NOW_MS + 1_000)

    def lease(number: int, events: int, at_ms: int) -> int:
        request = LeaseRequest(
            tenant_id=A,
            holder_id="gw",
            epoch=1,
            request_number=number,
            wanted=to_amount(events * EVENT_PICO),
            duration_ms=9_000,
        )
        record = made.command(at_ms, commands.lease_key(KEYS.command_key), lease_request=request).record
        return from_amount(record.leases[-1].granted) // EVENT_PICO

    assert lease(1, 9, NOW_MS) == 9
    account = made.state.accounts[A]
    made.tick(NOW_MS + 1_000)
    # The bound: what was leased when it expired.
    assert (account.balance_pico, account.leased_pico) == (4 * EVENT_PICO, 9 * EVENT_PICO)
    assert lease(2, 12, NOW_MS + 1_001) == 9
    assert lease(3, 3, NOW_MS + 1_002) == 3
    assert lease(4, 12, NOW_MS + 1_003) == 4
    assert account.balance_pico == account.leased_pico
    assert made.replayed().digest() == made.state.digest()


def test_ended_grants_are_forgotten_after_400_days_and_repeats_are_harmless_until_then(tmp_path: Path) -> None:
    made = ledger()
    grant(made, "trial", PICO, expires_ms=NOW_MS + DAY_MS)
    made.tick(NOW_MS + DAY_MS)
    made.tick(NOW_MS + 400 * DAY_MS)
    assert [state.grants[0].grant_id for state in made.state.credits.all()] == ["trial"]
    again = grant(made, "trial", PICO, NOW_MS + 400 * DAY_MS, expires_ms=NOW_MS + DAY_MS).command
    assert "a repeat changes nothing" in again.outcome
    made.tick(NOW_MS + 402 * DAY_MS)
    assert not next(made.state.credits.all()).grants
    agreed(made, tmp_path)


def test_a_tenant_with_credit_keeps_its_currency() -> None:
    made = ledger()
    grant(made, "trial", PICO, expires_ms=NOW_MS + DAY_MS)
    made.tick(NOW_MS + DAY_MS)
    refused = made.command(NOW_MS + DAY_MS, tenant_upsert=TenantUpsert(tenant_id=A, currency="CNY")).record.command
    assert "stays its currency" in refused.refusal


def test_the_audit_sees_credit_that_did_not_expire() -> None:
    made = ledger()
    grant(made, "trial", PICO, expires_ms=NOW_MS + DAY_MS)
    record = made.tick(NOW_MS + DAY_MS).record
    recomputed = Recomputed(1)
    for each in made.records()[:-1]:
        recomputed.take(each)
    record.credits[0].grants[0].expired.low -= 1
    recomputed.take(record)
    assert [finding.kind for finding in recomputed.findings] == ["credits_differ"]
