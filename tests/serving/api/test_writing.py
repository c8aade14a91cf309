"""What changes something: once for each idempotency key, by who may, with the ledger's own words where it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from billing.v1.account_pb2 import ApiKey
from billing.v1.command_pb2 import Command, KeyUpsert
from sinks import queries
from tests.billing.ledgers import tenants_in
from tests.serving.api.worlds import World

A, B, C, D = tenants_in(1, 4)
# The database is made here; a machine that does other work takes its time for that.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
async def operator(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with world.client(world.key("", "read", "admin")) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, key: str | None, **body: Any) -> tuple[int, Any]:
    headers = {} if key is None else {"idempotency-key": key}
    answer = await client.post(path, json=body, headers=headers)
    return answer.status_code, answer.json()


async def test_credit_is_granted_once_for_an_idempotency_key(world: World, operator: httpx.AsyncClient) -> None:
    before = queries.balances(world.engine, B)[0].credit_pico
    asked = {"tenant_id": B, "amount": "12.000000000001", "reference": "pi_1"}
    first = await post(operator, "/v1/credit/grants", "once", **asked)
    assert first[0] == 200
    assert (first[1]["grant"]["amount"], first[1]["grant"]["reference"]) == ("12.000000000001", "pi_1")
    assert await post(operator, "/v1/credit/grants", "once", **asked) == first
    assert queries.balances(world.engine, B)[0].credit_pico == before + 12 * 10**12 + 1
    # The same key for something else, whatever it is, is refused and does nothing.
    for path, other in (
        ("/v1/credit/grants", asked | {"amount": "13"}),
        ("/v1/credit/grants", asked | {"tenant_id": A}),
        ("/v1/tenant/status", {"tenant_id": B, "status": "suspended"}),
    ):
        code, problem = await post(operator, path, "once", **other)
        assert (code, "used before" in problem["detail"]) == (422, True)
    assert queries.balances(world.engine, B)[0].credit_pico == before + 12 * 10**12 + 1
    assert queries.balances(world.engine, B)[0].status == "active"
    # The payment's own ID does the same, whatever the idempotency key; another amount under it is refused by the ledger.
    payment = {"tenant_id": B, "amount": "1", "grant_id": "payment"}
    again = [await post(operator, "/v1/credit/grants", f"try-{number}", **payment) for number in range(2)]
    assert again[0] == again[1]
    code, problem = await post(operator, "/v1/credit/grants", "try-3", **(payment | {"amount": "2"}))
    assert (code, "payment" in problem["detail"]) == (409, True)
    assert queries.balances(world.engine, B)[0].credit_pico == before + 13 * 10**12 + 1


async def test_a_key_is_made_shown_once_and_revoked(world: World, operator: httpx.AsyncClient) -> None:
    asked = {"tenant_id": B, "scopes": ["read", "admin"], "user_id": "ann"}
    code, made = await post(operator, "/v1/keys", "key", **asked)
    assert code == 200
    assert made["key"]["scopes"] == ["read", "admin"]
    code, again = await post(operator, "/v1/keys", "key", **asked)
    assert (code, again) == (200, made | {"secret": ""})
    async with world.client(made["secret"]) as client:
        assert (await client.get("/v1/balance")).json()["balance"]["tenant_id"] == B
        # What a tenant's own admin may give, and what it may not.
        code, inner = await post(client, "/v1/keys", "key", scopes=["meter"])
        assert (code, inner["key"]["tenant_id"]) == (200, B)
        assert inner["key"]["key_id"] != made["key"]["key_id"], "the idempotency keys of others are others"
        for scopes in (["operate"], ["read", "prices"]):
            assert (await post(client, "/v1/keys", "more", scopes=scopes))[0] == 403
        assert (await post(client, "/v1/keys", "theirs", tenant_id=A))[0] == 404
        listed = (await client.get("/v1/keys")).json()["keys"]
        assert {key["key_id"] for key in listed} == {made["key"]["key_id"], inner["key"]["key_id"]}
        assert "secret" not in str(listed)
        code, revoked = await post(client, "/v1/keys/revoke", None, key_id=made["key"]["key_id"], reason="lost")
        assert (code, revoked["key"]["state"]) == (200, "revoked")
        assert (await client.get("/v1/balance")).status_code == 401
    stored = world.engine.query("SELECT toString(tuple(*)) FROM api_keys").rows
    assert made["secret"] not in str(stored)
    assert (await post(operator, "/v1/keys/revoke", None, key_id=made["key"]["key_id"], tenant_id=A))[0] == 404


@pytest.mark.parametrize("idempotency_keys", [(None, None), ("revoke", "revoke"), ("revoke", None)])
@pytest.mark.parametrize("is_known", [True, False], ids=["topic read", "topic behind"])
async def test_a_key_is_revoked_once_however_often_it_is_said(
    world: World, operator: httpx.AsyncClient, idempotency_keys: tuple[str | None, str | None], is_known: bool
) -> None:
    name = "-".join(map(str, (*idempotency_keys, is_known)))
    code, made = await post(operator, "/v1/keys", name, tenant_id=B, expires="2199-06-01T00:00:00Z")
    assert code == 200
    key_id = made["key"]["key_id"]
    before = world.calls.keys.find(key_id)
    asked = {"tenant_id": B, "key_id": key_id, "reason": "lost"}
    names = [name and f"{name}-{key_id}" for name in idempotency_keys]
    first = await post(operator, "/v1/keys/revoke", names[0], **asked)
    assert first == (200, {"key": made["key"] | {"state": "revoked"}})
    if not is_known:
        assert before is not None
        world.calls.keys._stated[key_id] = before
    assert await post(operator, "/v1/keys/revoke", names[1], **asked) == first
    said = [Command.FromString(record.command.command) for record in world.ledger.records() if record.command.applied]
    revoked = [each for each in said if each.key_upsert.key.key_id == key_id and each.key_upsert.key.revoked]
    assert [(each.reason, each.issuer[:4]) for each in revoked] == [("lost", "api/")]
    # A change that was made before that was known does not bring it back.
    stale = ApiKey.FromString(before.SerializeToString()) if before else ApiKey()
    refused = world.ledger.command(key_upsert=KeyUpsert(key=stale)).record.command
    assert refused.refusal.startswith(f"key_id: {key_id} is revoked")


async def test_a_tenant_is_created_once_and_suspended(operator: httpx.AsyncClient) -> None:
    asked = {
        "tenant_id": C,
        "display_name": "Corp",
        "billing_mode": "postpaid",
        "credit_limit": "7.5",
        "time_zone": "Asia/Tokyo",
    }
    first = await post(operator, "/v1/tenants", "tenant", **asked)
    assert first[0] == 200
    assert (first[1]["balance"]["credit_limit"], first[1]["balance"]["billing_mode"]) == ("7.5", "postpaid")
    assert await post(operator, "/v1/tenants", "tenant", **asked) == first
    assert (await post(operator, "/v1/tenants", "another", **asked))[0] == 409
    shown = (await operator.get("/v1/tenant", params={"tenant_id": C})).json()
    assert shown["time_zone"] == "Asia/Tokyo"
    for status in ("suspended", "active"):
        code, answer = await post(operator, "/v1/tenant/status", None, tenant_id=C, status=status, reason="test")
        assert (code, answer["balance"]["status"]) == (200, status)


@pytest.mark.parametrize(
    ("path", "key", "body", "expected"),
    [
        ("/v1/credit/grants", None, {"tenant_id": B, "amount": "1"}, 400),
        ("/v1/credit/grants", "", {"tenant_id": B, "amount": "1"}, 400),
        ("/v1/credit/grants", "k", {"tenant_id": B}, 400),
        ("/v1/credit/grants", "k", {"tenant_id": B, "amount": 1}, 400),
        ("/v1/credit/grants", "k", {"tenant_id": B, "amount": "1", "colour": "red"}, 400),
        ("/v1/credit/grants", "k", {"tenant_id": B, "amount": "-1"}, 400),
        ("/v1/credit/grants", "k", {"tenant_id": B, "amount": "1", "kind": "gift"}, 400),
        ("/v1/credit/grants", "k", {"tenant_id": B, "amount": "0"}, 422),
        ("/v1/credit/grants", "k", {"tenant_id": B, "amount": "1", "expires": "2001-01-01T00:00:00Z"}, 422),
        ("/v1/credit/grants", "k", {"tenant_id": "nobody", "amount": "1"}, 404),
        ("/v1/tenants", "k", {"tenant_id": D, "credit_limit": "1"}, 422),
        ("/v1/tenants", "k", {"tenant_id": D, "time_zone": "Mars/Olympus"}, 422),
        ("/v1/tenants", "k", {"tenant_id": "/" + D}, 422),
        ("/v1/tenant/status", "k", {"tenant_id": "nobody", "status": "active"}, 404),
        ("/v1/tenant/status", "k", {"tenant_id": B, "status": "closed"}, 400),
        ("/v1/keys/revoke", "k", {"tenant_id": B, "key_id": "key-0"}, 404),
        ("/v1/keys", "k", {"scopes": ["meter"]}, 422),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(
    world: World, operator: httpx.AsyncClient, path: str, key: str | None, body: dict[str, Any], expected: int
) -> None:
    before = len(world.ledger.stored)
    code, problem = await post(operator, path, key, **body)
    assert (code, problem["status"]) == (expected, expected), problem
    assert len(world.ledger.stored) == before


async def test_a_body_is_bounded_and_json(operator: httpx.AsyncClient) -> None:
    headers = {"idempotency-key": "k", "content-type": "application/json"}
    for content, expected in ((b"{" * 300_000, 413), (b"{", 400), (b"[]", 400), (b"[" * 100_000, 400), (b"\xff", 400)):
        answer = await operator.post("/v1/keys", content=content, headers=headers)
        assert answer.status_code == expected
        assert answer.headers["content-type"] == "application/problem+json"
    assert (await operator.post("/v1/keys", content=b"{}", headers={"idempotency-key": "k"})).status_code == 415
    assert (await operator.put("/v1/keys", json={})).status_code == 405
