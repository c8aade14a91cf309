"""Abuse rules as they stand on the command line."""

from __future__ import annotations

import pytest

from billing.rule_limits import DEFAULT_RULES
from billing.v1.alert_pb2 import ALERT_RULE_KEY_PLACES, ALERT_RULE_TOKEN_BURST
from taximeter.errors import MisuseError
from taximeter.rule_options import parse_rules


def test_what_is_named_takes_the_default_s_place_and_what_rules_do_is_read() -> None:
    rules = parse_rules("--rule", ["key_places_max=3", "key_places:stop=60", "token_burst:throttle=60/30"])
    assert rules is not None
    assert (rules.key_places_max, rules.refused_requests) == (3, DEFAULT_RULES.refused_requests)
    assert [(each.rule, each.requests_per_minute, each.duration_ms) for each in rules.actions] == [
        (ALERT_RULE_KEY_PLACES, 0, 3_600_000),
        (ALERT_RULE_TOKEN_BURST, 60, 1_800_000),
    ]
    assert parse_rules("--rule", []) is None


@pytest.mark.parametrize(
    "text",
    [
        "nothing=1",
        "key_places_max",
        "key_places_max=-1",
        "key_places_max=99",
        "burst:stop=1",
        "budget:stop=0",
        "token_burst:throttle=60",
        "token_burst:throttle=0/1",
        "token_burst:slow=1/1",
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(MisuseError, match="--rule"):
        parse_rules("--rule", [text])
