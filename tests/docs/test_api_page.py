"""docs/api.md's table of RPCs and routes is the code's."""

from __future__ import annotations

import re
from pathlib import Path

from serving.api.access import POLICIES
from serving.api.fields import SCOPES

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def test_the_table_is_the_table_of_policies() -> None:
    stated = re.findall(r"^\| `(\w+)` \| `(\w+) ([^`]+)` \| ([a-z, ]+) \| ([a-z, ]+) \|$", PAGE, re.MULTILINE)
    assert stated == [
        (
            rpc,
            policy.verb,
            policy.path,
            ", ".join(sorted(name for name, number in SCOPES.items() if number in policy.scopes)),
            "operator" if policy.operators_only else "tenant, operator",
        )
        for rpc, policy in POLICIES.items()
    ]
