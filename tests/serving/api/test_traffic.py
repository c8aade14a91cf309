"""What was asked is counted by the contract's methods, whatever a client sends, in both protocols; watches apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from billing.v1.billing_service_pb2 import GetBalanceRequest, WatchAlertsRequest
from billing.v1.billing_service_pb2_grpc import BillingServiceStub
from serving.api.access import POLICIES, SERVICE
from serving.api.grpc_server import make_grpc_server
from serving.api.traffic import OTHER, Traffic
from tests.billing.ledgers import tenants_in
from tests.serving.api.worlds import KeysOnly
from tests.serving.notifier.test_deliveries import until

(A,) = tenants_in(1, 1)


@pytest.fixture
async def only() -> AsyncIterator[KeysOnly]:
    """An API that knows keys and no database."""
    made = KeysOnly()
    made.calls.alerts.is_fed = True
    yield made
    made.calls.close()


def counted(only: KeysOnly) -> dict[tuple[str, str, str], int]:
    return {labels: count for labels, count in only.calls.traffic.counts() if count}


async def test_http_is_counted_by_route_and_status(only: KeysOnly) -> None:
    secret = only.key("", "read")
    async with only.client(secret) as client:
        assert (await client.get("/v1/invoices/INV-1")).status_code == 503, "the database is away"
        assert (await client.get("/v1/invoices/INV-2?no=such")).status_code == 400
        assert (await client.delete("/v1/invoices/INV-3")).status_code == 405
        assert (await client.get(f"/v1/{secret}")).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 200
    async with only.client("tm-unknown") as client:
        assert (await client.get("/v1/balance")).status_code == 401
    assert counted(only) == {
        ("http", "GetInvoice", "503"): 1,
        ("http", "GetInvoice", "400"): 1,
        ("http", "GetInvoice", "405"): 1,
        ("http", OTHER, "404"): 1,
        ("http", OTHER, "200"): 1,
        ("http", "GetBalance", "401"): 1,
    }
    durations = only.calls.traffic.durations.series
    assert {labels: sum(series.counts) for labels, series in durations.items()} == {
        ("http", "GetInvoice"): 3,
        ("http", OTHER): 2,
        ("http", "GetBalance"): 1,
    }


async def test_an_error_that_nobody_expected_is_a_500(only: KeysOnly, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> Message:
        raise ZeroDivisionError

    monkeypatch.setattr(only.calls, "call", broken)
    async with only.client(only.key("", "read")) as client:
        assert (await client.get("/v1/pipeline")).status_code == 500
    assert counted(only) == {("http", "GetPipeline", "500"): 1}


async def test_grpc_is_counted_by_status_and_a_watch_when_it_is_over(only: KeysOnly) -> None:
    secret = only.key(A, "read")
    server = make_grpc_server(only.calls)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    metadata = (("authorization", f"Bearer {secret}"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = BillingServiceStub(channel)  # type: ignore[no-untyped-call]
        for sent, status in ((metadata, grpc.StatusCode.UNAVAILABLE), ((), grpc.StatusCode.UNAUTHENTICATED)):
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await stub.GetBalance(GetBalanceRequest(), metadata=sent, timeout=60)
            assert ended.value.code() is status
        watch = stub.WatchAlerts(WatchAlertsRequest(), metadata=metadata, timeout=120)
        await watch.read()
        assert only.calls.watching == 1
        assert only.calls.running == 0
        watch.cancel()
        await until(lambda: not only.calls.watching and ("grpc", "WatchAlerts", "CANCELLED") in counted(only))
    await server.stop(0)
    assert counted(only) == {
        ("grpc", "GetBalance", "UNAVAILABLE"): 1,
        ("grpc", "GetBalance", "UNAUTHENTICATED"): 1,
        ("grpc", "WatchAlerts", "CANCELLED"): 1,
    }
    assert set(only.calls.traffic.durations.series) == {("grpc", "GetBalance")}, "how long a watch was open is no duration"


def test_what_has_not_happened_is_zero_of_every_method() -> None:
    counts = dict(Traffic().counts())
    assert set(counts.values()) == {0}
    assert {method for _, method, _ in counts} == set(POLICIES) == {method.name for method in SERVICE.methods}
    assert {(protocol, status) for protocol, _, status in counts} == {
        ("grpc", "OK"),
        ("grpc", "INTERNAL"),
        ("http", "200"),
        ("http", "500"),
    }
