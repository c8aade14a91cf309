"""When abuse rules speak of a tenant, and what they do, as it stands on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final

import typer

from billing.rule_limits import RULE_LIMIT_NAMES, rule_limits
from billing.v1.account_pb2 import RuleAction, RuleLimits
from billing.v1.alert_pb2 import AlertRule
from taximeter.errors import MisuseError

__all__ = ["RuleOption", "parse_rules"]

_STOP, _THROTTLE, _HIGHEST = "stop", "throttle", 2**31 - 1
_MINUTE_MS: Final = 60_000
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=NUMBER",
        help=f"When rules speak: {', '.join(RULE_LIMIT_NAMES)}; 0: never. Or what one does: RULE:stop=MINUTES, "
        "RULE:throttle=REQUESTS/MINUTES, as in key_places:stop=60 or token_burst:throttle=60/30. May be repeated.",
    ),
]


def parse_rules(option: str, texts: Iterable[str]) -> RuleLimits | None:
    """The defaults with those that are named in their place; None: none is. Raises MisuseError."""
    values: dict[str, int] = {}
    actions: list[RuleAction] = []
    for text in texts:
        name, _, number = text.partition("=")
        rule, colon, kind = name.partition(":")
        if colon:
            actions.append(_action(option, text, rule, kind, number))
        else:
            values[name] = _number(option, text, number)
    if not values and not actions:
        return None
    try:
        return rule_limits(values, actions)
    except ValueError as error:
        raise MisuseError(f"{option}: {error}") from None


def _action(option: str, text: str, rule: str, kind: str, number: str) -> RuleAction:
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
