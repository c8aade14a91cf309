"""docs/gateway.md says what the code does: RPCs and their policies, differences from Triton, kinds of back ends."""

from __future__ import annotations

import re
from pathlib import Path

from billing.v1.account_pb2 import KEY_SCOPE_METER, KEY_SCOPE_OPERATE
from serving.gateway.policy import POLICIES, Access
from serving.gateway.profiles import KINDS
from tests.serving.triton.conformance import DIFFERENCES

SECTIONS = dict(
    zip(
        *[iter(re.split(r"^## (.*)$", (Path(__file__).parents[2] / "docs/gateway.md").read_text(), flags=re.M)[1:])] * 2,
        strict=True,
    )
)


def rows(section: str) -> list[list[str]]:
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_rpc_stands_with_its_policy() -> None:
    told = {
        (name.rpartition("/")[2], policy): who
        for names, policy, who in rows("RPCs")
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert set(told) == {(method, policy.name) for (_, method), policy in POLICIES.items()}
    for (_, method), policy in POLICIES.items():
        who = told[method, policy.name]
        if policy.access is Access.OPEN:
            assert who == "everybody"
        elif policy.access is Access.ABSENT:
            assert who.startswith("nobody")
        elif policy.scopes in ({KEY_SCOPE_OPERATE}, {KEY_SCOPE_METER}):
            assert f"scope `{'operate' if KEY_SCOPE_OPERATE in policy.scopes else 'meter'}`" in who
        else:
            assert who.startswith("any key")


def test_every_difference_from_triton_stands_with_its_reason() -> None:
    assert {row[0]: row[1] for row in rows("What differs from Triton itself")} == DIFFERENCES


def test_every_kind_of_back_end_stands() -> None:
    assert {name for names, _, _ in rows("Models") for name in re.findall(r"`([^`]+)`", names)} == set(KINDS)
