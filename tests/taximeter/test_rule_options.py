"""Abuse rules as they stand on the command line."""

from __future__ import annotations

import pytest

from billing.v1.alert_pb2 import ALERT_RULE_KEY_PLACES, ALERT_RULE_TOKEN_BURST
from taximeter.errors import MisuseError
from taximeter.rule_options import GivenRules, parse_rules


def test_what_is_named_is_given_and_the_rest_is_left_to_the_ledger() -> None:
    given = parse_rules("--rule", ["key_places_max=3", "burst_factor=0", "key_places:stop=60", "token_burst:throttle=60/30"])
    assert given.of_plan == {"burst_factor": 0}
    assert given.limits is not None
    assert given.limits.key_places_max == 3
    assert not given.limits.HasField("refused_requests")
    assert [(each.rule, each.requests_per_minute, each.duration_ms) for each in given.limits.actions] == [
        (ALERT_RULE_KEY_PLACES, 0, 3_600_000),
        (ALERT_RULE_TOKEN_BURST, 60, 1_800_000),
    ]
    assert parse_rules("--rule", []) == GivenRules({}, None)
    assert parse_rules("--rule", ["burst_tokens_floor=5"]) == GivenRules({"burst_tokens_floor": 5}, None)


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
