"""The ledger's own figures of the abuse rules, and how a command changes them.

Promise: what a command does not name stays. A tenant whose figure was the ledger's has the new one in the same record, which
states its account; a figure that a tenant has otherwise stays. The record states the ledger's figures as they hold from there
on, so a replay sets them and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from billing.accounts import AccountState
from billing.commands import CommandRefused
from billing.limits import RECORD_BYTES_MAX
from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES, check_figures, rules_problem
from billing.state import LedgerState
from billing.v1.account_pb2 import Plan, RuleLimits
from billing.v1.command_pb2 import RulesChange
from billing.v1.ledger_pb2 import Founding, LedgerRecord, LedgerRules

__all__ = ["change_rules", "changed", "rules_of", "with_rules"]

# Of accounts that one record states; the rest of it is what it lets go.
_ACCOUNTS_BYTES_MAX = RECORD_BYTES_MAX * 5 // 8


def rules_of(settings: Founding) -> LedgerRules:
    """What stands in the settings of it."""
    return LedgerRules(
        default_plan=settings.default_plan,
        alert_resolve_ms=settings.alert_resolve_ms,
        drift_millionths=settings.drift_millionths,
    )


def with_rules(settings: Founding, rules: LedgerRules) -> Founding:
    """The settings with these rules in place of their own."""
    changed = Founding()
    changed.CopyFrom(settings)
    changed.default_plan.CopyFrom(rules.default_plan)
    changed.alert_resolve_ms = rules.alert_resolve_ms
    changed.drift_millionths = rules.drift_millionths
    return changed


def changed(before: LedgerRules, said: RulesChange) -> LedgerRules:
    """What holds after the command. Raises CommandRefused."""
    if not said.ListFields():
        raise CommandRefused("rules_change: changes nothing; name a figure, an action, or what actions there are to drop")
    after = LedgerRules()
    after.CopyFrom(before)
    plan = after.default_plan
    _set_given(plan, said, PLAN_RULE_DEFAULTS)
    _set_given(plan.rules, said.rules, RULE_LIMIT_NAMES)
    if said.drop_actions or said.rules.actions:
        plan.rules.ClearField("actions")
        plan.rules.actions.extend(said.rules.actions)
    after.alert_resolve_ms = said.alert_resolve_ms or before.alert_resolve_ms
    after.drift_millionths = said.drift_millionths or before.drift_millionths
    if problem := rules_problem(plan.rules):
        raise CommandRefused(problem)
    return after


def change_rules(state: LedgerState, said: RulesChange, record: LedgerRecord) -> tuple[LedgerRules, str]:
    """Change what holds, state whose accounts follow, and say how many do."""
    before = rules_of(state.settings)
    after = changed(before, said)
    following = {
        tenant_id: plan
        for tenant_id in sorted(state.accounts)
        if (plan := _followed(state.accounts[tenant_id].plan, before.default_plan, after.default_plan)) is not None
    }
    # Looked at before anything is changed: a command is refused as a whole.
    size = sum(_bytes_of(state.accounts[tenant_id], plan) for tenant_id, plan in following.items())
    if size > _ACCOUNTS_BYTES_MAX:
        raise CommandRefused(
            f"rules_change: {len(following)} tenants of this partition have the ledger's figures in {size} bytes of accounts, "
            f"and one record has room for {_ACCOUNTS_BYTES_MAX}; give tenants figures of their own by their plans instead"
        )
    state.settings = with_rules(state.settings, after)
    for tenant_id, plan in following.items():
        account = state.accounts[tenant_id]
        account.plan = plan
        record.accounts.append(account.to_account(state.generation, record.sequence, record.log_time_ms))
    return after, f"{len(following)} tenant(s) follow in partition {state.partition}"


def _set_given(message: Plan | RuleLimits, said: RulesChange | RuleLimits, names: Iterable[str]) -> None:
    given = {name: getattr(said, name) for name in names if said.HasField(name)}  # type: ignore[arg-type]  # names of ours
    try:
        check_figures(given)
    except ValueError as error:
        raise CommandRefused(str(error)) from None
    for name, value in given.items():
        setattr(message, name, value)


def _followed(plan: Plan, before: Plan, after: Plan) -> Plan | None:
    """The plan with what it had of the ledger as the ledger has it now; None: nothing of it changes."""
    moved = Plan()
    moved.CopyFrom(plan)
    _follow(moved, before, after, PLAN_RULE_DEFAULTS)
    if plan.HasField("rules"):
        _follow(moved.rules, before.rules, after.rules, RULE_LIMIT_NAMES)
        if list(plan.rules.actions) == list(before.rules.actions):
            moved.rules.ClearField("actions")
            moved.rules.actions.extend(after.rules.actions)
    return moved if moved != plan else None


def _follow(message: Plan | RuleLimits, before: Plan | RuleLimits, after: Plan | RuleLimits, names: Iterable[str]) -> None:
    for name in names:
        if getattr(message, name) == getattr(before, name):
            setattr(message, name, getattr(after, name))


def _bytes_of(account: AccountState, plan: Plan) -> int:
    """With both plans, which is more than it takes. As of the beginning of time: nothing of it has expired."""
    return account.to_account(b"", 0, 0).ByteSize() + plan.ByteSize()
