"""Figures of rules: from the founding record, and from commands where they give them; from nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from billing.founding import LedgerSettings
from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES, completed, given_limits, rule_limits
from billing.v1.account_pb2 import Plan, RuleLimits
from tests.billing.ledgers import PARTITIONS, Ledger, tenants_in

A, B, C = tenants_in(1)


@pytest.fixture
def ledger() -> Ledger:
    """Founded with figures of its own."""
    return Ledger(
        settings=LedgerSettings(
            partitions=PARTITIONS,
            dedupe_key=b"k" * 32,
            default_burst_tokens_floor=7_000,
            default_burst_factor=3,
            default_duplicate_flood_events=70,
            default_rules=rule_limits({"refused_requests": 9, "burst_requests_floor": 33}),
        )
    )


def test_a_plan_has_the_figures_that_the_ledger_was_founded_with_but_for_those_that_it_gives(ledger: Ledger) -> None:
    ledger.tenant(A, Plan(plan_id="a"))
    ledger.tenant(B, Plan(plan_id="b", burst_factor=0, rules=given_limits({"refused_requests": 0, "key_places_max": 2})))
    plan = ledger.state.accounts[A].plan
    assert (plan.burst_tokens_floor, plan.burst_factor, plan.duplicate_flood_events) == (7_000, 3, 70)
    assert ledger.state.rule_limits(ledger.state.accounts[A]).refused_requests == 9
    plan = ledger.state.accounts[B].plan
    assert (plan.burst_tokens_floor, plan.burst_factor) == (7_000, 0), "0 is a figure: that rule does not speak"
    assert (plan.rules.refused_requests, plan.rules.key_places_max, plan.rules.burst_requests_floor) == (0, 2, 33)
    # Nobody has created it.
    assert ledger.state.account_of(C).plan == ledger.state.settings.default_plan
    replayed = ledger.replayed()
    assert [replayed.accounts[each].plan for each in (A, B)] == [ledger.state.accounts[each].plan for each in (A, B)]


def whole_plan(of_plan: Mapping[str, int], rules: Mapping[str, int]) -> Plan:
    plan = Plan(rules=rule_limits(rules))
    for name, value in of_plan.items():
        setattr(plan, name, value)
    return plan


def test_every_figure_can_be_left_out_and_given() -> None:
    founded = whole_plan(PLAN_RULE_DEFAULTS, {})
    assert completed(Plan(rules=RuleLimits()), founded) == founded
    off = whole_plan(dict.fromkeys(PLAN_RULE_DEFAULTS, 0), dict.fromkeys(RULE_LIMIT_NAMES, 0))
    assert completed(off, founded) == off
    names = {field.name for field in RuleLimits.DESCRIPTOR.fields}
    assert names == {*RULE_LIMIT_NAMES, "actions"}, "a figure that no default has"


def test_what_no_rule_takes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="nothing: no rule has such a figure"):
        given_limits({"nothing": 1})
    with pytest.raises(ValueError, match="refused_requests: -1"):
        given_limits({"refused_requests": -1})
