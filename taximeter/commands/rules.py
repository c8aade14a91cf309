"""When the abuse rules speak: what the ledger was founded with, and what holds for a tenant."""

from collections.abc import Iterator
from typing import Annotated

import typer

from billing.alerts import RESOLVE_MS, rule_name
from billing.drift import DRIFT_MILLIONTHS
from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES
from billing.v1.account_pb2 import Plan, RuleAction, RuleLimits
from billing.v1.ledger_pb2 import Founding
from sinks import archived
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import NotReadyError, TaximeterError

__all__ = ["show"]


@command
def show(
    context: Context,
    tenant: Annotated[str, typer.Argument(metavar="[TENANT]", help="What holds for this one (default: as founded).")] = "",
    json: JsonOption = False,
) -> None:
    """Show when abuse rules speak, and what they do. `tenant create TENANT --rule` changes it for a tenant."""
    with open_reader(context.config()) as reader:
        founded = archived.founding(reader)
        if founded is None:
            raise NotReadyError("the database has no founding record yet: see that the sink runs (`taximeter doctor`)")
        plan = archived.plan(reader, tenant) if tenant else founded.default_plan
    if plan is None:
        raise TaximeterError(f"tenant {tenant!r} is not known: create it with `taximeter tenant create {tenant}`")
    limits = plan.rules if plan.HasField("rules") else founded.default_plan.rules
    figures = dict(_figures(plan, limits))
    if not tenant:
        figures |= _ledgers_own(founded)
    actions = [_action(action) for action in limits.actions]
    if json:
        context.output.json({"tenant_id": tenant, "figures": figures, "actions": actions})
        return
    as_founded = dict(_figures(founded.default_plan, founded.default_plan.rules))
    rows = [(name, value, as_founded.get(name, value)) for name, value in figures.items()]
    if tenant:
        context.output.table(f"Rules of {tenant}", ("figure", "holds ", "as founded "), rows)
    else:
        context.output.table("Rules, as the ledger was founded", ("figure", "holds "), [row[:2] for row in rows])
    context.output.say(f"What rules do: {', '.join(actions) or 'they only tell'}")


def _figures(plan: Plan, limits: RuleLimits) -> Iterator[tuple[str, int]]:
    for name in PLAN_RULE_DEFAULTS:
        yield name, getattr(plan, name)
    for name in RULE_LIMIT_NAMES:
        yield name, getattr(limits, name)


def _ledgers_own(founded: Founding) -> dict[str, int]:
    return {
        "counting_drift_millionths": founded.drift_millionths or DRIFT_MILLIONTHS,
        "resolve_minutes": (founded.alert_resolve_ms or RESOLVE_MS) // 60_000,
    }


def _action(action: RuleAction) -> str:
    """As `--rule` takes it."""
    minutes, rule = action.duration_ms // 60_000, rule_name(action.rule)
    if not action.requests_per_minute:
        return f"{rule}:stop={minutes}"
    return f"{rule}:throttle={action.requests_per_minute}/{minutes}"
