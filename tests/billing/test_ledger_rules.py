"""A command changes the ledger's figures of rules: for who had them, from that record on, and a replay has the same."""

from __future__ import annotations

import pytest

from billing.alerts import rule_name
from billing.founding import LedgerSettings, found_again
from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES, given_limits, rule_limits
from billing.v1.account_pb2 import Plan, RuleAction, RuleLimits
from billing.v1.alert_pb2 import ALERT_RULE_REFUSALS, ALERT_RULE_TOKEN_BURST
from billing.v1.command_pb2 import RulesChange
from billing.v1.usage_pb2 import OUTCOME_REJECTED
from tests.billing.ledgers import KEYS, NOW_MS, PARTITIONS, Ledger, batch, tenants_in, usage

FOLLOWS, OWN, NOBODY, LATER = tenants_in(1, 4)
STOP = RuleAction(rule=ALERT_RULE_REFUSALS, duration_ms=60_000)


@pytest.fixture
def ledger() -> Ledger:
    """One tenant without figures of its own, one with; and usage of somebody whom nobody has created."""
    rules = rule_limits({"refused_requests": 9})
    made = Ledger(settings=LedgerSettings(partitions=PARTITIONS, dedupe_key=b"k" * 32, default_rules=rules))
    made.price()
    made.tenant(FOLLOWS, Plan(plan_id="follows"))
    made.tenant(OWN, Plan(plan_id="own", burst_factor=2, rules=given_limits({"refused_requests": 4})))
    made.usage(batch([usage("first", NOBODY)]))
    return made


def figures(ledger: Ledger, tenant_id: str) -> tuple[int, int, int]:
    """Two that are the plan's and one that is of its rules."""
    account = ledger.state.accounts[tenant_id]
    return (
        account.plan.burst_tokens_floor,
        account.plan.burst_factor,
        ledger.state.rule_limits(account).refused_requests,
    )


def test_who_had_the_ledgers_figures_has_the_new_ones_and_a_replay_has_the_same(ledger: Ledger) -> None:
    change = RulesChange(burst_tokens_floor=5, burst_factor=3, rules=given_limits({"refused_requests": 2}, [STOP]))
    record = ledger.command(rules_change=change).record
    assert record.command.applied, record.command.refusal
    assert figures(ledger, FOLLOWS) == figures(ledger, NOBODY) == (5, 3, 2)
    assert figures(ledger, OWN) == (5, 2, 4), "its own stay"
    assert list(ledger.state.rule_limits(ledger.state.accounts[FOLLOWS]).actions) == [STOP]
    assert list(ledger.state.rule_limits(ledger.state.accounts[OWN]).actions) == [STOP], "it had none of its own"
    assert {account.tenant_id for account in record.accounts} == {FOLLOWS, OWN, NOBODY}
    ledger.usage(batch([usage("later", LATER)]))
    assert figures(ledger, LATER) == (5, 3, 2), "who comes later has them"
    assert ledger.replayed().digest() == ledger.state.digest()
    # Given once more, nothing follows.
    assert not ledger.command(rules_change=change).record.accounts
    ledger.command(rules_change=RulesChange(drop_actions=True, drift_millionths=7, alert_resolve_ms=60_000))
    assert not ledger.state.settings.default_plan.rules.actions
    assert (ledger.state.settings.drift_millionths, ledger.state.settings.alert_resolve_ms) == (7, 60_000)
    assert figures(ledger, FOLLOWS) == (5, 3, 2), "what a command does not name stays"
    assert ledger.replayed().digest() == ledger.state.digest()


def test_rules_speak_by_the_new_figures_from_that_record_on(ledger: Ledger) -> None:
    def told(start: int, log_time_ms: int) -> list[str]:
        refused = [
            usage(f"r{number}", FOLLOWS, outcome=OUTCOME_REJECTED, ended_ms=log_time_ms) for number in range(start, start + 5)
        ]
        return [rule_name(alert.rule) for alert in ledger.usage(batch(refused), log_time_ms).record.alerts]

    assert told(0, NOW_MS) == []
    ledger.command(rules_change=RulesChange(rules=given_limits({"refused_requests": 3})))
    assert told(5, NOW_MS + 120_000) == ["refusals"]


def test_a_ledger_that_is_founded_again_carries_them_on(ledger: Ledger) -> None:
    ledger.command(rules_change=RulesChange(burst_factor=77, drift_millionths=7))
    record, _ = found_again(ledger.state, b"n" * 16, NOW_MS, KEYS.seal_key, "test")
    assert (record.founding.default_plan.burst_factor, record.founding.drift_millionths) == (77, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (RulesChange(), "rules_change: changes nothing"),
        (RulesChange(burst_tokens_floor=2**40), "burst_tokens_floor: 1099511627776"),
        (RulesChange(rules=RuleLimits(cancelled_percent=101)), "cancelled_percent: 101"),
        (RulesChange(rules=RuleLimits(actions=[RuleAction(rule=ALERT_RULE_TOKEN_BURST)])), "actions: duration_ms: 0"),
    ],
)
def test_what_cannot_hold_is_refused_whole(ledger: Ledger, change: RulesChange, said: str) -> None:
    before = ledger.state.settings
    record = ledger.command(rules_change=change).record
    assert record.command.refusal.startswith(said)
    assert ledger.state.settings is before
    assert not record.accounts
    assert ledger.replayed().digest() == ledger.state.digest()


def test_more_accounts_than_a_record_holds_are_refused_whole(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billing.ledger_rules._ACCOUNTS_BYTES_MAX", 100)
    before = ledger.state.digest()
    record = ledger.command(rules_change=RulesChange(burst_factor=3)).record
    assert "2 tenants of this partition have the ledger's figures" in record.command.refusal
    assert figures(ledger, FOLLOWS)[1] == PLAN_RULE_DEFAULTS["burst_factor"]
    assert ledger.replayed().digest() == ledger.state.digest() != before


def test_every_figure_can_be_changed() -> None:
    names = {field.name for field in RulesChange.DESCRIPTOR.fields} - {"rules", "drop_actions"}
    assert names == {*PLAN_RULE_DEFAULTS, "drift_millionths", "alert_resolve_ms"}
    made = Ledger()
    change = RulesChange(rules=given_limits(dict.fromkeys(RULE_LIMIT_NAMES, 1)))
    for name in PLAN_RULE_DEFAULTS:
        setattr(change, name, 1)
    assert made.command(rules_change=change).record.command.applied
    plan = made.state.settings.default_plan
    assert {getattr(plan, name) for name in PLAN_RULE_DEFAULTS} == {1}
    assert {getattr(plan.rules, name) for name in RULE_LIMIT_NAMES} == {1}
