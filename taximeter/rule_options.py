"""When abuse rules speak, and what they do, as it stands on the command line and in the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from billing.rule_limits import PLAN_RULE_DEFAULTS, RULE_LIMIT_NAMES, check_figures, given_limits
from billing.v1.account_pb2 import RuleAction, RuleLimits
from billing.v1.alert_pb2 import AlertRule
from taximeter.errors import MisuseError

__all__ = ["GivenRules", "RuleOption", "parse_actions", "parse_rules"]

_STOP, _THROTTLE, _HIGHEST = "stop", "throttle", 2**31 - 1
_MINUTE_MS: Final = 60_000
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=NUMBER",
        help=f"When rules speak: {', '.join((*PLAN_RULE_DEFAULTS, *RULE_LIMIT_NAMES))}; 0: never; what is not named: as the "
        "ledger was founded. Or what one does: RULE:stop=MINUTES, RULE:throttle=REQUESTS/MINUTES, as in key_places:stop=60 or "
        "token_burst:throttle=60/30. May be repeated.",
    ),
]


@dataclass(frozen=True, slots=True)
class GivenRules:
    """What was named, and nothing else."""

    # Figures that are fields of a plan, by name; and the others, with what rules do.
    of_plan: Mapping[str, int]
    limits: RuleLimits | None


def parse_rules(option: str, texts: Iterable[str]) -> GivenRules:
    """The rules that are named. Raises MisuseError."""
    texts = list(texts)
    actions = parse_actions(option, [text for text in texts if _is_action(text)])
    values = {}
    for text in texts:
        if not _is_action(text):
            name, _, number = text.partition("=")
            values[name] = _number(option, text, number)
    of_plan = {name: values.pop(name) for name in PLAN_RULE_DEFAULTS if name in values}
    try:
        check_figures(of_plan)
        return GivenRules(of_plan, given_limits(values, actions) if values or actions else None)
    except ValueError as error:
        raise MisuseError(f"{option}: {error}") from None


def parse_actions(option: str, texts: Iterable[str]) -> list[RuleAction]:
    """What rules do. Raises MisuseError."""
    return [_action(option, text) for text in texts]


def _is_action(text: str) -> bool:
    return ":" in text.partition("=")[0]


def _action(option: str, text: str) -> RuleAction:
    name, _, number = text.partition("=")
    rule, _, kind = name.partition(":")
    known = {name.removeprefix("ALERT_RULE_").lower(): value for name, value in AlertRule.items() if value}
    if rule not in known or kind not in (_STOP, _THROTTLE):
        raise MisuseError(
            f"{option} {text[:80]!r}: write RULE:stop=MINUTES or RULE:throttle=REQUESTS/MINUTES with a rule's name"
        )
    requests, slash, minutes = number.partition("/") if kind == _THROTTLE else ("0", "/", number)
    per_minute = _number(option, text, requests)
    if not slash or (kind == _THROTTLE and not per_minute):
        raise MisuseError(f"{option} {text[:80]!r}: write RULE:throttle=REQUESTS/MINUTES, with one request at least")
    return RuleAction(rule=known[rule], requests_per_minute=per_minute, duration_ms=_number(option, text, minutes) * _MINUTE_MS)


def _number(option: str, text: str, number: str) -> int:
    if not number.isascii() or not number.isdigit() or int(number[:12]) > _HIGHEST:
        raise MisuseError(f"{option} {text[:80]!r}: write a whole number up to {_HIGHEST} after the name")
    return int(number)
