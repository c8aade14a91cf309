"""Budgets: they count what is charged in their period, warn once at each threshold, and begin anew when the month does."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing import budgets
from billing.amounts import from_amount, to_amount
from billing.limits import BATCH_EVENTS_MAX, BUDGET_ALERTS_MAX, RECORD_BYTES_MAX
from billing.periods import month_at, month_of, month_start_ms, period_at
from billing.v1.account_pb2 import Amount, BudgetState, Calendar
from billing.v1.alert_pb2 import ALERT_RULE_BUDGET, ALERT_STATE_RESOLVED, SEVERITY_CRITICAL, SEVERITY_WARNING, Alert
from billing.v1.command_pb2 import BudgetUpsert, TenantUpsert
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.recompute import Recomputed
from tests.billing.agreement import agreed
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage

A, B = tenants_in(1, 2)
EVENT_PICO = 100 * 10_000 + 10 * 40_000
HOUR_MS = 3_600_000
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
MONTH_END_MS = month_start_ms(month_of(NOW_MS) + 1) - 8 * HOUR_MS


def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="USD", calendar=SHANGHAI))
    made.tenant(B)
    return made


def budget(made: Ledger, events: int, at_ms: int = NOW_MS, **fields: Any) -> LedgerRecord:
    """A budget of so many events' cost."""
    values: dict[str, Any] = {"tenant_id": A, "amount": to_amount(events * EVENT_PICO)}
    said = BudgetUpsert(**(values | fields))
    return made.command(at_ms, budget_upsert=said).record


def use(made: Ledger, *names: str, at_ms: int = NOW_MS, **fields: Any) -> LedgerRecord:
    events = [usage(name, A, ended_ms=fields.get("ended_ms", at_ms), started_ms=1, **{
        key: value for key, value in fields.items() if key != "ended_ms"}) for name in names]  # fmt: skip
    return made.usage(batch(events), at_ms).record


def told_of(record: LedgerRecord) -> list[Alert]:
    """The thresholds that were reached, not what is over."""
    return [alert for alert in record.alerts if alert.rule == ALERT_RULE_BUDGET and alert.state != ALERT_STATE_RESOLVED]


def warned(record: LedgerRecord) -> list[int]:
    return [alert.figures["threshold_millionths"] for alert in told_of(record)]


def test_each_threshold_warns_once_and_the_last_one_stops(tmp_path: Path) -> None:
    made = ledger()
    budget(made, 4, threshold_millionths=[1_000_000, 500_000, 750_000], hard_stop=True)
    assert warned(use(made, "r1")) == []
    first = use(made, "r2")
    [alert] = first.alerts
    assert (alert.rule, alert.severity, alert.tenant_id) == (ALERT_RULE_BUDGET, SEVERITY_WARNING, A)
    assert (alert.figures["spend_micros"], alert.figures["amount_micros"]) == (2, 5)
    assert "is used to 50 %: 0.0000028 USD of 0.0000056 USD" in alert.summary
    assert not first.budgets[0].used_up
    assert warned(use(made, "r2")) == [], "a duplicate"
    last = use(made, "r3", "r4", "r5")
    assert warned(last) == [750_000, 1_000_000]
    assert "gateways refuse" in last.alerts[-1].summary
    assert last.alerts[-1].severity == SEVERITY_CRITICAL
    assert last.budgets[0].used_up
    assert warned(use(made, "r6")) == []
    agreed(made, tmp_path)


def test_projects_and_users_have_their_own_and_others_pay_nothing() -> None:
    made = ledger()
    assert not use(made, "r0").budgets
    budget(made, 3, project_id="p")
    budget(made, 2, user_id="u")
    record = use(made, "r1", project_id="p", user_id="u")
    assert [(b.project_id, b.user_id, from_amount(b.spend)) for b in record.budgets] == [
        ("", "u", EVENT_PICO),
        ("p", "", EVENT_PICO),
    ]
    assert not use(made, "r2", project_id="q", user_id="v").budgets
    assert not made.usage(batch([usage("r3", B, project_id="p", user_id="u")])).record.budgets


def test_a_month_that_begins_in_the_tenants_zone_begins_a_budget(tmp_path: Path) -> None:
    made = ledger()
    budget(made, 1, threshold_millionths=[1_000_000], hard_stop=True)
    assert use(made, "r1").budgets[0].used_up
    assert not made.tick(MONTH_END_MS - 1).record.budgets
    [state] = made.tick(MONTH_END_MS).record.budgets
    assert (state.used_up, state.warned, from_amount(state.spend)) == (False, 0, 0)
    assert state.period_start_ms == MONTH_END_MS
    # Usage of the month before is not this month's business.
    assert not use(made, "late", at_ms=MONTH_END_MS + 1, ended_ms=MONTH_END_MS - 1).budgets
    assert warned(use(made, "r2", at_ms=MONTH_END_MS + 1)) == [1_000_000]
    agreed(made, tmp_path)


def test_a_budget_is_changed_and_ended(tmp_path: Path) -> None:
    made = ledger()
    assert "from now on" in budget(made, 4, threshold_millionths=[500_000]).command.outcome
    use(made, "r1", "r2")
    # What it said before is not said again; what is true only now is.
    lower = budget(made, 2, threshold_millionths=[500_000, 1_000_000])
    assert warned(lower) == [1_000_000]
    assert lower.budgets[0].used_up
    assert not budget(made, 9).budgets[0].used_up
    [gone] = budget(made, 0).budgets
    assert gone.gone
    assert "no such budget" in budget(made, 0).command.outcome
    assert not use(made, "r3").budgets
    budget(made, 1, user_id="u")
    assert not made.state.accounts[A].credit_pico
    refused = made.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="CNY")).record.command.refusal
    assert "stays its currency" in refused
    agreed(made, tmp_path)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"project_id": "p", "user_id": "u"}, "leave one empty"),
        ({"project_id": "p" * 300}, "at most 256"),
        ({"project_id": "ü" * 200}, "bytes"),
        ({"threshold_millionths": [0]}, "800000 is 80 %"),
        ({"threshold_millionths": range(1, 10)}, "at most 8"),
        ({"amount": Amount(high=-1)}, "amount"),
        ({"tenant_id": tenants_in(1, 3)[2]}, "create the tenant"),
        ({"tenant_id": tenants_in(2, 1)[0]}, "partition 2"),
    ],
)
def test_a_budget_that_cannot_be_meant_is_refused(fields: dict[str, Any], names: str) -> None:
    record = budget(ledger(), 1, **fields)
    assert names in record.command.refusal
    assert not record.budgets


events = st.tuples(
    st.sampled_from(("", "p", "q")), st.sampled_from(("", "u", "v")), st.sampled_from((0, -1, -40 * 24 * HOUR_MS + 5))
)
places = st.sampled_from((("", ""), ("p", ""), ("", "u")))
steps = st.one_of(
    st.tuples(st.just("use"), st.lists(events, min_size=1, max_size=5)),
    st.tuples(st.just("set"), places, st.integers(0, 6)),
    st.tuples(st.just("wait"), st.sampled_from((1, HOUR_MS, 9 * 24 * HOUR_MS))),
)


def test_a_month_is_the_tenants_own() -> None:
    assert [month_at(SHANGHAI, MONTH_END_MS + offset_ms) - month_of(NOW_MS) for offset_ms in (-1, 0)] == [0, 1]
    assert month_at(Calendar(), MONTH_END_MS) == month_of(MONTH_END_MS) == month_of(NOW_MS)


THRESHOLDS = (300_000, 1_000_000)


def _check(script: list[Any]) -> None:
    """The ledger against sums of what was used, kept by month."""
    made, now_ms, number = ledger(), MONTH_END_MS - 10 * 24 * HOUR_MS, 0
    amounts: dict[tuple[str, str], int] = {}
    spends: defaultdict[tuple[str, str, int], int] = defaultdict(int)
    told: set[tuple[str, str, int, int]] = set()

    def month() -> int:
        return period_at(SHANGHAI, now_ms).start_ms

    for kind, *what in script:
        before = {(p, u, month(), t) for (p, u) in amounts for t in THRESHOLDS if (p, u, month(), t) in told}
        if kind == "wait":
            now_ms += what[0]
            made.tick(now_ms)
            continue
        if kind == "set":
            place, count = what
            budget(made, count, now_ms, project_id=place[0], user_id=place[1], threshold_millionths=THRESHOLDS)
            if not count:
                amounts.pop(place, None)
            else:
                if place not in amounts:
                    spends[*place, month()] = 0
                    told -= {(*place, month(), threshold) for threshold in THRESHOLDS}
                    before = told & before
                amounts[place] = count
        else:
            said = []
            for project_id, user_id, ago_ms in what[0]:
                number += 1
                ended_ms = now_ms + ago_ms
                said.append(
                    usage(
                        f"r{number}", A, project_id=project_id, user_id=user_id, ended_ms=ended_ms, started_ms=1, backfill=True
                    )
                )
                for place in {("", ""), (project_id, ""), ("", user_id)} & amounts.keys():
                    if ended_ms >= month():
                        spends[*place, month()] += 1
            made.usage(batch(said), now_ms)
        record = made.records()[-1]
        reached = {
            (*place, month(), threshold)
            for place, count in amounts.items()
            for threshold in THRESHOLDS
            if spends[*place, month()] * 1_000_000 >= count * threshold
        }
        # A threshold that a raised amount takes back may be reached, and told, again.
        told = {each for each in told if each in reached or each[2] != month() or kind != "set"}
        new = reached - told
        assert sorted(map(_named, told_of(record))) == sorted(
            (project_id, user_id, threshold) for project_id, user_id, _, threshold in new
        )
        told |= new
        for state in made.state.budgets.all():
            place = state.project_id, state.user_id
            assert from_amount(state.spend) == spends[*place, month()] * EVENT_PICO
            assert from_amount(state.amount) == amounts[place] * EVENT_PICO
        assert len(list(made.state.budgets.all())) == len(amounts)
    with tempfile.TemporaryDirectory() as folder:
        agreed(made, Path(folder))


def _named(alert: Alert) -> tuple[str, str, int]:
    return alert.labels["project_id"], alert.labels["user_id"], alert.figures["threshold_millionths"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, min_size=3, max_size=25))
def test_budgets_are_the_sums_of_their_months(script: list[Any]) -> None:
    _check(script)


SCRIPT = [
    ("set", ("p", ""), 3),
    ("use", [("p", "u", 0), ("q", "", 0)]),
    ("use", [("p", "u", 0)] * 3),
    ("wait", 9 * 24 * HOUR_MS),
    ("wait", 9 * 24 * HOUR_MS),
    ("use", [("p", "", 0)]),
]


def test_a_broken_rule_is_seen() -> None:
    _check(SCRIPT)
    for broken in (
        mock.patch.object(budgets, "_reached", return_value=[]),
        mock.patch.object(budgets.Budgets, "charge"),
    ):
        with broken, pytest.raises(AssertionError):
            _check(SCRIPT)


def test_a_full_batch_of_budgets_is_stated_within_the_bound_and_none_is_silenced() -> None:
    made = ledger()
    for number in range(BUDGET_ALERTS_MAX + 36):
        budget(made, 1, user_id=f"{number}".ljust(200, "x"), threshold_millionths=[1])
    said = [usage(f"r{n}", A, user_id=f"{n % 100}".ljust(200, "x")) for n in range(BATCH_EVENTS_MAX)]
    result = made.usage(batch(said))
    assert len(result.stored) < RECORD_BYTES_MAX // 4
    assert len(result.record.budgets) == 100
    assert len(warned(result.record)) == BUDGET_ALERTS_MAX
    again = made.usage(batch([usage(f"again-{n}", A, user_id=f"{n}".ljust(200, "x")) for n in range(100)]))
    assert len(warned(again.record)) == 36
    assert made.replayed().digest() == made.state.digest()


def test_the_largest_state_of_a_budget_is_small() -> None:
    largest = BudgetState(
        tenant_id="t" * 128, project_id="p" * 128, amount=to_amount(10**30), spend=to_amount(10**35), used_up=True,
        hard_stop=True, threshold_millionths=range(10**7 - 8, 10**7), period_start_ms=NOW_MS, period_end_ms=NOW_MS, warned=8,
    )  # fmt: skip
    largest.version.generation, largest.version.sequence = b"g" * 16, 2**63
    assert largest.ByteSize() <= 410


def test_the_audit_sees_a_budget_that_was_made_smaller() -> None:
    made = ledger()
    budget(made, 4)
    use(made, "r1")
    recomputed = Recomputed(1)
    *before, last = made.records()
    for record in before:
        recomputed.take(record)
    last.budgets[0].spend.low -= 1
    recomputed.take(last)
    assert [finding.kind for finding in recomputed.findings] == ["budgets_differ"]
