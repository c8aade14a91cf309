"""What tenant A does changes nothing that tenant B can see: two worlds that differ in A alone answer B with the same bytes.

The worlds have the same number of records, since IDs of alerts count them, and B's invoice is drawn first, since each invoice
names the hash of the one before: both are what `docs/api.md` says that a tenant can learn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from billing.amounts import to_amount
from billing.v1.command_pb2 import CreditGrant, InvoiceFinalization, Price, ProjectUpsert, TenantUpsert
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP
from billing.v1.usage_pb2 import OUTCOME_COMPLETED, OUTCOME_REJECTED, UsageEvent
from serving.api.access import POLICIES, SERVICE, Principal
from sinks.engines.chdb import ChdbEngine
from tests.billing.ledgers import NOW_MS, PRICES, Ledger, batch, usage
from tests.serving.api.conftest import DAY_MS, A, B
from tests.serving.api.worlds import World

NOBODY: Final = "tenant-that-is-not"
NOVEMBER_MS: Final = 1_761_955_200_000
# What B asks beside the tenant, where a route takes it.
ASKED: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"by": ["model", "project"], "bucket": "day"},
    {"by": ["user", "key", "outcome"]},
    {"start": "2025-11-01T00:00:00Z", "end": "2025-12-01T00:00:00Z"},
    {"page_size": 1},
)
READS: Final = [
    policy.path
    for name, policy in POLICIES.items()
    if policy.verb == "GET" and not SERVICE.methods_by_name[name].server_streaming
]
NUMBERS: Final = ("INV-0001-1", "INV-0001-2", "INV-0001-3")

events_of_a = st.lists(
    st.builds(
        lambda tokens, model, user, outcome: {
            "uncached_input_tokens": tokens,
            "model": model,
            "user_id": user,
            "outcome": outcome,
        },
        st.sampled_from([0, 7, 100, 50_000_000]),  # the last raises alerts
        st.sampled_from(["smollm2", "private", "unpriced"]),
        st.sampled_from(["ann", "bob"]),
        st.sampled_from([OUTCOME_COMPLETED, OUTCOME_REJECTED]),
    ),
    min_size=1,
    max_size=12,
)


def the_ledger(done_by_a: list[dict[str, Any]], named: str, credit: int) -> Ledger:
    """A and B side by side; what A does is told by the arguments, what B does is always the same."""
    ledger = Ledger()
    ledger.price([*PRICES, Price(model="private", uncached_input_pico=credit, tenant_id=A)])
    for tenant_id, display_name, units in ((A, named, credit), (B, "B", 5)):
        ledger.command(tenant_upsert=TenantUpsert(tenant_id=tenant_id, display_name=display_name, currency="USD"))
        granted = to_amount(units * 10**12)
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=granted, currency="USD", grant_id="first"))
    ledger.command(project_upsert=ProjectUpsert(tenant_id=A, project_id=named))
    of_a = [usage(f"a{number}", A, **fields) for number, fields in enumerate(done_by_a)]
    of_b: list[UsageEvent] = [usage(f"b{number}", B, user_id="eve") for number in range(3)]
    ledger.usage(batch(of_b, "pb", 1, len(of_b)))
    ledger.usage(batch(of_a, "pa", 1, len(of_a)))
    # The same request ID as one of A's, and a prompt that alarms.
    ledger.usage(batch([usage("a0", B), usage("huge", B, uncached_input_tokens=50_000_000)], "pb", 4, 5))
    for tenant_id in (B, A):
        said = InvoiceFinalization(
            tenant_id=tenant_id,
            period_start_ms=NOVEMBER_MS,
            series_prefix="INV",
            rounding_rule=ROUNDING_RULE_HALF_UP,
            currency_decimals=2,
        )
        drawn = ledger.command(NOW_MS + 10 * DAY_MS, invoice_finalization=said).record.command
        assert drawn.applied, drawn.refusal
    return ledger


async def everything_b_is_told(engine: ChdbEngine, ledger: Ledger) -> dict[str, tuple[int, str]]:
    """Every answer to B's key. What it asks of A must be answered as what it asks of nobody."""
    world = World(engine, ledger)
    world.key(A, "read", "admin")
    secret = world.key(B, "read", "admin")
    written = len(ledger.stored)
    told: dict[str, tuple[int, str]] = {}
    async with world.client(secret) as client:
        for path in READS:
            for number in NUMBERS if "{number}" in path else ("",):
                where = path.replace("{number}", number).replace("{line}", "1")
                for asked in ASKED:
                    told[f"{where} {asked}"] = await _asked(client, where, asked)
                    of_a = await _asked(client, where, asked | {"tenant_id": A})
                    status, text = await _asked(client, where, asked | {"tenant_id": NOBODY})
                    assert of_a == (status, text.replace(NOBODY, A)), (where, asked)
        for key_id, of in (("key-0", A), ("key-0", B), ("key-that-is-not", B)):
            body = {"key_id": key_id, "tenant_id": of, "reason": "not mine"}
            answer = await client.post("/v1/keys/revoke", json=body)
            assert answer.status_code == 404, answer.text
            told[f"revoke {body}"] = (answer.status_code, answer.text)
    world.calls.close()
    assert len(ledger.stored) == written
    return told


async def _asked(client: httpx.AsyncClient, path: str, parameters: Mapping[str, Any]) -> tuple[int, str]:
    answer = await client.get(path, params=dict(parameters))
    return answer.status_code, answer.text


def test_what_another_tenant_does_changes_nothing_that_a_tenant_can_see(empty_engine: Callable[[], ChdbEngine]) -> None:
    expected = asyncio.run(everything_b_is_told(empty_engine(), the_ledger([{}], "acme", 5)))
    assert sum(status == 200 for status, _ in expected.values()) > len(READS)

    @settings(max_examples=2, phases=[Phase.generate], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(done_by_a=events_of_a, named=st.sampled_from(["acme", "B", "zeta"]), credit=st.sampled_from([1, 1_000_000]))
    def holds(done_by_a: list[dict[str, Any]], named: str, credit: int) -> None:
        told = asyncio.run(everything_b_is_told(empty_engine(), the_ledger(done_by_a, named, credit)))
        assert {question for question in expected if told[question] != expected[question]} == set()

    holds()


def test_a_tenant_that_may_name_another_is_seen(
    empty_engine: Callable[[], ChdbEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the test above is red where the tenant is taken from the question."""
    monkeypatch.setattr(Principal, "tenant", lambda principal, named: named or principal.tenant_id)
    with pytest.raises(AssertionError, match="/v1/balance"):
        asyncio.run(everything_b_is_told(empty_engine(), the_ledger([{}], "acme", 5)))
