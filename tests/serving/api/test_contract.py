"""The HTTP API against its own OpenAPI document: whatever is sent, no 5xx, and no answer that the document does not describe.

Schemathesis makes the requests from the document, good ones and bad ones, for an operator and for a tenant, on a real ledger
and real rows. Watches are left out: they are streams without an end, and `test_alerting` and `test_overview` have them.
"""

from __future__ import annotations

import os
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.config import SchemathesisConfig
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from serving.api.openapi import document
from tests.serving.api.conftest import A
from tests.serving.api.worlds import World

# Of each operation, good and bad each. A long look: CONTRACT_EXAMPLES=500.
_EXAMPLES: Final = int(os.environ.get("CONTRACT_EXAMPLES", "10"))
# What the document allows may still not be meant: an end before its start, credit for a tenant that there is not.
_MEANT: Final = ["2xx", "403", "404", "409", "422"]
_CONFIG: Final = SchemathesisConfig.from_dict(
    {
        "generation": {"deterministic": True},
        "checks": {
            "positive_data_acceptance": {"expected-statuses": _MEANT},
            "ignored_auth": {"enabled": False},  # test_access has it, for every kind of key
        },
    }
)
_WATCHES: Final = ("/v1/alerts/watch", "/v1/overview/watch")
_PATHS: Final = document("1")["paths"]
NAMES: Final = [f"{verb.upper()} {path}" for path, verbs in _PATHS.items() for verb in verbs if path not in _WATCHES]


@pytest.fixture(scope="module")
def operations(world: World) -> dict[str, Any]:
    """By verb and path, as the server itself describes them."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", world.app, config=_CONFIG)
    found = [described.ok() for described in schema.get_all_operations() if isinstance(described, Ok)]
    assert {operation.label for operation in found} >= set(NAMES)
    return {operation.label: operation for operation in found}


@pytest.fixture(scope="module")
def keys(world: World) -> tuple[str, ...]:
    """An operator's and a tenant's."""
    return world.key("", "read", "admin", "prices"), world.key(A, "read", "admin")


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_sent_is_answered_as_the_document_says(
    operations: dict[str, Any], keys: tuple[str, ...], name: str, mode: GenerationMode
) -> None:
    # What is found is not made smaller: that takes minutes, and the request is told as it was.
    @settings(
        max_examples=_EXAMPLES,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[name].as_strategy(mode), secret=st.sampled_from(keys))
    def sent(case: Any, secret: str) -> None:
        case.call_and_validate(headers={"authorization": f"Bearer {secret}"})

    sent()
