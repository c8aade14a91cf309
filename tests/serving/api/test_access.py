"""Who may call what: every RPC and every route, enumerated from the contract, refuses what it must."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from billing.v1.billing_service_pb2 import GetBalanceRequest
from serving.api import access
from serving.api.access import POLICIES, SERVICE, check_complete
from serving.api.grpc_server import make_grpc_server
from tests.billing.ledgers import tenants_in
from tests.serving.api.worlds import KeysOnly

A, B = tenants_in(1, 2)
PAST_MS = 1_000
METHODS = [method.name for method in SERVICE.methods]


@pytest.fixture
async def only() -> AsyncIterator[KeysOnly]:
    """An API whose database is nowhere: who is refused never gets there."""
    made = KeysOnly()
    yield made
    made.calls.close()


@pytest.fixture
async def channel(only: KeysOnly) -> AsyncIterator[Any]:
    server = make_grpc_server(only.calls)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(0)


def refused_keys(only: KeysOnly, name: str) -> dict[str, tuple[str | None, grpc.StatusCode]]:
    """Each kind of key that opens nothing, or not this."""
    policy = POLICIES[name]
    good = sorted(scope for scope, number in only.scopes.items() if number in policy.scopes)
    wrong = sorted(scope for scope, number in only.scopes.items() if number not in policy.scopes)
    revoked = only.key("", *good, revoked=True)
    expired = only.key("", *good, expires_ms=PAST_MS)
    refused: dict[str, tuple[str | None, grpc.StatusCode]] = {
        "missing": (None, grpc.StatusCode.UNAUTHENTICATED),
        "unknown": ("tm-nobody-knows-this", grpc.StatusCode.UNAUTHENTICATED),
        "revoked": (revoked, grpc.StatusCode.UNAUTHENTICATED),
        "expired": (expired, grpc.StatusCode.UNAUTHENTICATED),
        "of a wrong scope": (only.key("", *wrong), grpc.StatusCode.PERMISSION_DENIED),
        "without a scope": (only.key(""), grpc.StatusCode.PERMISSION_DENIED),
    }
    if policy.operators_only:
        refused["of a tenant"] = (only.key(A, *good), grpc.StatusCode.PERMISSION_DENIED)
    return refused


async def grpc_status(channel: Any, name: str, secret: str | None) -> tuple[grpc.StatusCode, str]:
    method = SERVICE.methods_by_name[name]
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    connect = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = connect(f"/{SERVICE.full_name}/{name}", request.SerializeToString, response.FromString)
    metadata = () if secret is None else (("authorization", f"Bearer {secret}"),)
    try:
        if method.server_streaming:
            async for _ in call(request(), metadata=metadata, timeout=60):
                pass
        else:
            await call(request(), metadata=metadata, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def http_status(client: httpx.AsyncClient, name: str, secret: str | None) -> tuple[int, dict[str, Any]]:
    policy = POLICIES[name]
    headers = {} if secret is None else {"x-api-key": secret}
    path = policy.path.replace("{number}", "INV-1").replace("{line}", "1")
    answer = await client.request(policy.verb, path, headers=headers)
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()


@pytest.mark.parametrize("name", METHODS)
async def test_every_rpc_and_route_refuses_a_key_that_does_not_open_it(only: KeysOnly, channel: Any, name: str) -> None:
    async with only.client(None) as client:
        for kind, (secret, status) in refused_keys(only, name).items():
            assert (await grpc_status(channel, name, secret))[0] is status, kind
            code, problem = await http_status(client, name, secret)
            assert code == {grpc.StatusCode.UNAUTHENTICATED: 401, grpc.StatusCode.PERMISSION_DENIED: 403}[status], kind
            assert problem["status"] == code
            assert problem["detail"]


@pytest.mark.parametrize("name", METHODS)
async def test_every_rpc_and_route_lets_a_good_key_through(only: KeysOnly, channel: Any, name: str) -> None:
    """The control of the test above: the same requests with a key that opens get as far as the request's own faults."""
    good = [scope for scope, number in only.scopes.items() if number in POLICIES[name].scopes]
    secret = only.key("", *good)
    closed = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.OK)
    assert (await grpc_status(channel, name, secret))[0] not in closed
    async with only.client(None) as client:
        assert (await http_status(client, name, secret))[0] not in (401, 403, 200)


async def test_a_revoked_key_opens_nothing_from_its_message_on(only: KeysOnly, channel: Any) -> None:
    secret = only.key("", "read")
    assert (await grpc_status(channel, "GetBalance", secret))[0] is not grpc.StatusCode.UNAUTHENTICATED
    only.revoke(secret)
    assert (await grpc_status(channel, "GetBalance", secret))[0] is grpc.StatusCode.UNAUTHENTICATED
    async with only.client(secret) as client:
        assert (await client.get("/v1/balance")).status_code == 401


def test_an_rpc_without_a_policy_keeps_the_server_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    check_complete(set(METHODS))
    with pytest.raises(RuntimeError, match="GetBalance: RPC without a handler"):
        check_complete(set(METHODS) - {"GetBalance"})
    monkeypatch.setattr(access, "POLICIES", {name: policy for name, policy in POLICIES.items() if name != "RevokeKey"})
    with pytest.raises(RuntimeError, match="RevokeKey: RPC without a policy"):
        check_complete(set(METHODS))


def test_routes_are_one_each() -> None:
    routes = {(policy.verb, policy.path) for policy in POLICIES.values()}
    assert len(routes) == len(POLICIES)


async def test_who_comes_too_much_is_told_to_come_again(only: KeysOnly) -> None:
    """Of one tenant no more run than its limit says; others are not held up."""
    waiting = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(waiting.set)

    release = only.block(tell)
    secret, other = only.key(A, "read"), only.key(B, "read")
    first = asyncio.ensure_future(only.calls.call("GetBalance", GetBalanceRequest(), secret))
    await asyncio.wait_for(waiting.wait(), 60)
    async with only.client(secret) as client:
        refused = await client.get("/v1/balance")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    second = asyncio.ensure_future(only.calls.call("GetBalance", GetBalanceRequest(), other))
    release()
    answers = await asyncio.gather(first, second, return_exceptions=True)
    assert ["does not answer" in str(answer) for answer in answers] == [True, True]


async def test_more_metadata_than_has_room_is_refused(only: KeysOnly, channel: Any) -> None:
    call = channel.unary_unary(f"/{SERVICE.full_name}/GetBalance")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(b"", metadata=(("x-large", "x" * 64_000),), timeout=60)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # The connection goes on.
    assert (await grpc_status(channel, "GetBalance", None))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_health_needs_no_key(only: KeysOnly, channel: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    async with only.client(None) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.get("/readyz")).status_code == 200
        only.keys.ready = False
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/v1/balance")).status_code == 503
        described = await client.get("/openapi.json")
        assert (await client.get("/openapi.json", headers={"if-none-match": described.headers["etag"]})).status_code == 304


async def test_of_a_body_full_of_mistakes_the_first_one_is_told(only: KeysOnly) -> None:
    """Whoever sends a hundred thousand of them does not hold up everybody else while each is put into words."""
    called = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal called
        called += event == "call"

    async def calls_for(mistakes: int) -> int:
        nonlocal called
        called = 0
        async with only.client(only.key(A, "admin")) as client:
            # What the collector calls for other tests' garbage is no work of this request.
            gc.disable()
            sys.setprofile(count)
            try:
                answer = await client.post("/v1/keys", json={"scopes": [1] * mistakes})
            finally:
                sys.setprofile(None)
                gc.enable()
        assert (answer.status_code, "scopes" in answer.json()["detail"]) == (400, True)
        return called

    assert await calls_for(2_000) < 2 * await calls_for(20)


async def test_however_deeply_a_body_is_nested_it_is_refused_and_nothing_breaks(only: KeysOnly) -> None:
    async with only.client(only.key(A, "admin")) as client:
        for depth in range(50, 1_200, 50):
            body = b'{"scopes": ' + b"[" * depth + b"]" * depth + b"}"
            answer = await client.post("/v1/keys", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, depth
