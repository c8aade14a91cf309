"""When the abuse rules speak: what holds for the ledger and for a tenant, and how the ledger's own figures are changed."""

from collections.abc import Iterator
from typing import Annotated

import typer

from billing.alerts import RESOLVE_MS, rule_name
from billing.drift import DRIFT_MILLIONTHS
from billing.ledger_rules import rules_of
from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES
from billing.v1.account_pb2 import Plan, RuleAction, RuleLimits
from billing.v1.command_pb2 import RulesChange
from billing.v1.ledger_pb2 import LedgerRules
from sinks import archived
from sinks.engine import Reader
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, NotReadyError, TaximeterError
from taximeter.rule_options import parse_rules

__all__ = ["set_", "show"]

_MINUTE_MS = 60_000
# Figures that no tenant has of its own, and what they may be: as [ledger.rules] has them.
_OWN = {"counting_drift_millionths": (1, 1_000_000), "resolve_minutes": (1, 10_080)}


@command
def show(
    context: Context,
    tenant: Annotated[str, typer.Argument(metavar="[TENANT]", help="What holds for this one (default: of the ledger).")] = "",
    json: JsonOption = False,
) -> None:
    """Show when abuse rules speak, and what they do. `rules set` changes it, and `tenant create TENANT --rule` for a tenant."""
    with open_reader(context.config()) as reader:
        ledger, founded = _of_ledger(reader)
        plan = archived.plan(reader, tenant) if tenant else ledger.default_plan
    if plan is None:
        raise TaximeterError(f"tenant {tenant!r} is not known: create it with `taximeter tenant create {tenant}`")
    limits = plan.rules if plan.HasField("rules") else ledger.default_plan.rules
    figures = dict(_figures(plan, limits))
    if not tenant:
        figures |= _ledgers_own(ledger)
    actions = [_action(action) for action in limits.actions]
    if json:
        context.output.json({"tenant_id": tenant, "figures": figures, "actions": actions})
        return
    beside = dict(_figures(ledger.default_plan, ledger.default_plan.rules)) if tenant else _all_figures(founded)
    rows = [(name, value, beside.get(name, value)) for name, value in figures.items()]
    if tenant:
        context.output.table(f"Rules of {tenant}", ("figure", "holds ", "the ledger's "), rows)
    else:
        context.output.table("Rules of the ledger", ("figure", "holds ", "as founded "), rows)
    context.output.say(f"What rules do: {', '.join(actions) or 'they only tell'}")


@command
def set_(
    context: Context,
    figures: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=NUMBER]...",
            help="As `rules show` has them; and RULE:stop=MINUTES or RULE:throttle=REQUESTS/MINUTES, in place of all that "
            "rules do now.",
        ),
    ] = None,
    drop_actions: Annotated[bool, typer.Option("--drop-actions", help="Rules only tell, but for what is named here.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for the audit.")] = "",
    json: JsonOption = False,
) -> None:
    """Change when abuse rules speak, for all of the ledger. Who had the ledger's figure has the new one; others keep theirs."""
    given = list(figures or ())
    own = [text for text in given if text.partition("=")[0] in _OWN]
    rules = parse_rules("rules set", [text for text in given if text not in own])
    change = RulesChange(drop_actions=drop_actions)
    for name, value in rules.of_plan.items():
        setattr(change, name, value)
    if rules.limits is not None:
        change.rules.CopyFrom(rules.limits)
    for text in own:
        _set_own(change, text)
    if not change.ListFields():
        raise MisuseError("rules set: names nothing; write NAME=NUMBER, as in burst_tokens_floor=5000000")
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        before, _ = _of_ledger(reader)
        commander.give([commander.rules(change, reason)], reader)
        after, _ = _of_ledger(reader)
    was, now = _all_figures(before), _all_figures(after)
    changed = {name: value for name, value in now.items() if was[name] != value}
    actions = [_action(action) for action in after.default_plan.rules.actions]
    if json:
        context.output.json({"figures": now, "changed": sorted(changed), "actions": actions})
        return
    rows = [(name, value, was[name]) for name, value in changed.items()]
    context.output.table("Rules of the ledger", ("figure", "holds ", "before "), rows, empty="all figures are as they were")
    context.output.say(f"What rules do: {', '.join(actions) or 'they only tell'}")


def _of_ledger(reader: Reader) -> tuple[LedgerRules, LedgerRules]:
    """What holds, and as it was founded."""
    founded, holds = archived.founding(reader), archived.rules(reader)
    if founded is None or holds is None:
        raise NotReadyError("the database has no founding record yet: see that the sink runs (`taximeter doctor`)")
    return holds, rules_of(founded)


def _set_own(change: RulesChange, text: str) -> None:
    name, _, number = text.partition("=")
    least, most = _OWN[name]
    if not number.isascii() or not number.isdigit() or not least <= int(number[:12]) <= most:
        raise MisuseError(f"rules set {text[:80]!r}: write a whole number from {least} to {most} after the name")
    if name == "resolve_minutes":
        change.alert_resolve_ms = int(number) * _MINUTE_MS
    else:
        change.drift_millionths = int(number)


def _figures(plan: Plan, limits: RuleLimits) -> Iterator[tuple[str, int]]:
    for name in PLAN_RULE_DEFAULTS:
        yield name, getattr(plan, name)
    for name in RULE_LIMIT_NAMES:
        yield name, getattr(limits, name)


def _ledgers_own(rules: LedgerRules) -> dict[str, int]:
    return {
        "counting_drift_millionths": rules.drift_millionths or DRIFT_MILLIONTHS,
        "resolve_minutes": (rules.alert_resolve_ms or RESOLVE_MS) // _MINUTE_MS,
    }


def _all_figures(rules: LedgerRules) -> dict[str, int]:
    return dict(_figures(rules.default_plan, rules.default_plan.rules)) | _ledgers_own(rules)


def _action(action: RuleAction) -> str:
    """As `--rule` takes it."""
    minutes, rule = action.duration_ms // _MINUTE_MS, rule_name(action.rule)
    if not action.requests_per_minute:
        return f"{rule}:stop={minutes}"
    return f"{rule}:throttle={action.requests_per_minute}/{minutes}"
