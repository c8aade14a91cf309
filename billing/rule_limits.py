"""When the abuse rules speak, by name: what a ledger is founded with unless told otherwise, and what a plan may say.

Promise: figures come from the founding record and from commands, and from nowhere else. A plan that does not give one has the
ledger's, filled in when the command is taken, so that whoever reads an account sees the figure that holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from billing.limits import KEY_PLACES_KEPT, RULE_ACTIONS_MAX
from billing.v1.account_pb2 import Plan, RuleAction, RuleLimits
from billing.v1.alert_pb2 import AlertRule

_DEFAULTS: Final = {
    "prompt_outlier_tokens_floor": 16_384,
    "prompt_outlier_factor": 16,
    "burst_requests_floor": 600,
    "burst_requests_factor": 10,
    # A month: to the end of the period, whenever that is.
    "burn_horizon_minutes": 44_640,
    "conflict_flood_events": 20,
    "key_places_max": 8,
    "cancelled_requests": 50,
    "cancelled_percent": 50,
    "refused_requests": 100,
}
RULE_LIMIT_NAMES: Final = tuple(_DEFAULTS)
# Of rules too, but fields of the plan itself.
PLAN_RULE_DEFAULTS: Final = {"burst_tokens_floor": 1_000_000, "burst_factor": 10, "duplicate_flood_events": 1_000}
_VALUE_MAX: Final = 2**31
_ACTION_MS_MAX: Final = 400 * 86_400_000


def rule_limits(values: Mapping[str, int], actions: Iterable[RuleAction] = ()) -> RuleLimits:
    """The defaults with `values` in their place. Raises ValueError."""
    return given_limits({**_DEFAULTS, **values}, actions)


def given_limits(values: Mapping[str, int], actions: Iterable[RuleAction] = ()) -> RuleLimits:
    """These alone: in a command, the others are the ledger's. Raises ValueError."""
    unknown = sorted(values.keys() - _DEFAULTS.keys())
    if unknown:
        known = ", ".join((*PLAN_RULE_DEFAULTS, *RULE_LIMIT_NAMES))
        raise ValueError(f"{unknown[0]}: no rule has such a figure; write one of {known}")
    check_figures(values)
    limits = RuleLimits(**values, actions=actions)
    problem = rules_problem(limits)
    if problem:
        raise ValueError(problem)
    return limits


def check_figures(values: Mapping[str, int]) -> None:
    """Raises ValueError for one that no rule takes."""
    for name, value in values.items():
        if not 0 <= value < _VALUE_MAX:
            raise ValueError(f"{name}: {value}; give 0 (the rule does not speak) to {_VALUE_MAX - 1}")


def completed(plan: Plan, founded: Plan) -> Plan:
    """The plan with the figures of rules that it does not give, as the ledger was founded."""
    whole = Plan()
    whole.CopyFrom(plan)
    _fill(whole, founded, PLAN_RULE_DEFAULTS)
    if whole.HasField("rules"):
        _fill(whole.rules, founded.rules, RULE_LIMIT_NAMES)
    return whole


def _fill(message: Plan | RuleLimits, founded: Plan | RuleLimits, names: Iterable[str]) -> None:
    given = {field.name for field, _ in message.ListFields()}
    for name in names:
        if name not in given:
            setattr(message, name, getattr(founded, name))


def rules_problem(limits: RuleLimits) -> str:
    """What is wrong with them, for a person; empty: nothing."""
    if limits.key_places_max >= KEY_PLACES_KEPT:
        return f"key_places_max: {limits.key_places_max}; so many places are not remembered, give at most {KEY_PLACES_KEPT - 1}"
    if limits.cancelled_percent > 100:
        return f"cancelled_percent: {limits.cancelled_percent}; give 0 to 100"
    if len(limits.actions) > RULE_ACTIONS_MAX:
        return f"actions: {len(limits.actions)}; give at most {RULE_ACTIONS_MAX}"
    for action in limits.actions:
        if not action.rule or action.rule not in AlertRule.values():
            return f"actions: rule {action.rule} is not known here; upgrade the workers first"
        if not 0 < action.duration_ms <= _ACTION_MS_MAX:
            return f"actions: duration_ms: {action.duration_ms}; an action ends, give 1 ms to 400 days"
        if action.requests_per_minute >= _VALUE_MAX:
            return f"actions: requests_per_minute: {action.requests_per_minute}; give 0 (nothing) to {_VALUE_MAX - 1}"
    return ""


DEFAULT_RULES: Final = rule_limits({})
