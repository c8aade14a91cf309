"""What the API says is what the database says: the same figures over gRPC and HTTP, whole pages, one tenant's own alone."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from billing.amounts import decimal_text
from billing.v1 import billing_service_pb2 as pb
from billing.v1.billing_service_pb2_grpc import BillingServiceStub
from serving.api.grpc_server import make_grpc_server
from sinks import queries
from tests.billing.ledgers import tenants_in
from tests.serving.api.worlds import World, get

A, B, _ = tenants_in(1)
# The database is made here; a machine that does other work takes its time for that.
pytestmark = pytest.mark.timeout(300)


async def status(client: httpx.AsyncClient, path: str, **query: Any) -> int:
    answer = await client.get(path, params=query)
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code


async def test_balances_are_the_databases(world: World, operator: httpx.AsyncClient) -> None:
    rows = {row.tenant_id: row for row in queries.balances(world.engine)}
    listed = (await get(operator, "/v1/tenants"))["tenants"]
    assert [entry["tenant_id"] for entry in listed] == sorted(rows)
    for entry in listed:
        row = rows[entry["tenant_id"]]
        assert (await get(operator, "/v1/balance", tenant_id=row.tenant_id))["balance"] == entry
        assert (entry["credit"], entry["spend"]) == (decimal_text(row.credit_pico), decimal_text(row.spend_pico))
        assert entry["balance"] == decimal_text(row.credit_pico - row.spend_pico)
        assert entry["requests"] == str(row.events)


async def test_usage_by_every_dimension_and_bucket_sums_to_the_same(operator: httpx.AsyncClient) -> None:
    [total] = (await get(operator, "/v1/usage", tenant_id=A))["rows"]
    assert (total["requests"], total["refused_requests"], total["units"]) == ("9", "1", {"characters": "11"})
    for by in ("project", "model", "operation", "class", "user", "key", "outcome", "region", "source"):
        rows = (await get(operator, "/v1/usage", tenant_id=A, by=by))["rows"]
        assert sum(int(row["requests"]) for row in rows) == 9, by
        assert sum(int(row["uncached_input_tokens"]) for row in rows) == int(total["uncached_input_tokens"]), by
    for bucket, starts in {
        # Days and months of Berlin, where the tenant is.
        "month": ["2025-10-31T23:00:00Z"],
        "day": ["2025-11-21T23:00:00Z", "2025-11-22T23:00:00Z"],
        "hour": ["2025-11-22T06:00:00Z", "2025-11-23T06:00:00Z"],
        "minute": ["2025-11-22T06:40:00Z", "2025-11-23T06:40:00Z"],
    }.items():
        for names in ([], ["user", "model"]):
            answer = await get(operator, "/v1/usage", tenant_id=A, bucket=bucket, by=names)
            assert answer["time_zone"] == "Europe/Berlin"
            assert sorted({row["start"] for row in answer["rows"]}) == starts, bucket
            assert sum(int(row["requests"]) for row in answer["rows"]) == 9
    by_user = (await get(operator, "/v1/usage", tenant_id=A, by="user"))["rows"]
    assert {row["user_id"]: row["requests"] for row in by_user} == {"": "3", "ann": "5", "bob": "1"}
    searched = (await get(operator, "/v1/usage", tenant_id=A, project_id="search", model="smollm2"))["rows"]
    assert [row["requests"] for row in searched] == ["5"]
    assert (await get(operator, "/v1/usage", end="2025-11-22T06:40:00Z"))["rows"] == []


@pytest.mark.parametrize("query", [{}, {"bucket": "day"}, {"by": "tenant"}, {"by": ["tenant", "model"], "bucket": "hour"}])
async def test_pages_are_the_whole_and_nothing_twice(operator: httpx.AsyncClient, query: dict[str, Any]) -> None:
    whole = (await get(operator, "/v1/usage", **query))["rows"]
    pages, token = [], ""
    while True:
        page = await get(operator, "/v1/usage", page_size=1, page_token=token, **query)
        pages += page["rows"]
        assert len(page["rows"]) == 1
        if not (token := page["next_page_token"]):
            break
    assert pages == whole


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("/v1/tenants", "tenants"),
        ("/v1/invoices", "invoices"),
        ("/v1/alerts", "alerts"),
        ("/v1/invoices/INV-0001-1/lines/2", "page"),
    ],
)
async def test_every_list_has_pages(operator: httpx.AsyncClient, path: str, rows: str) -> None:
    whole = (await get(operator, path))[rows]
    assert len(whole) > 1
    first = await get(operator, path, page_size=1)
    second = await get(operator, path, page_size=1, page_token=first["next_page_token"])
    assert [*first[rows], *second[rows]] == whole[:2]


async def test_a_page_token_is_good_for_its_question_alone(world: World, operator: httpx.AsyncClient) -> None:
    token = (await get(operator, "/v1/usage", page_size=1, by="tenant"))["next_page_token"]
    assert await status(operator, "/v1/usage", page_size=1, by="model", page_token=token) == 422
    assert await status(operator, "/v1/usage", page_size=1, by="tenant", page_token=token[:-2] + "AA") == 422
    assert await status(operator, "/v1/tenants", page_token=token) == 422
    other = world.key(A, "read")
    async with world.client(other) as client:
        assert await status(client, "/v1/usage", page_size=1, by="tenant", page_token=token) == 422


async def test_statement_invoice_and_explanation_agree(operator: httpx.AsyncClient) -> None:
    period = {"start": "2025-10-31T23:00:00Z", "end": "2025-11-30T23:00:00Z"}
    statement = await get(operator, "/v1/statement", tenant_id=A, **period)
    [usage] = (await get(operator, "/v1/usage", tenant_id=A, **period))["rows"]
    assert statement["charged"] == usage["cost"]
    number = next(row["number"] for row in (await get(operator, "/v1/invoices", tenant_id=A))["invoices"])
    invoice = await get(operator, f"/v1/invoices/{number}")
    for item in invoice["lines"]:
        explained = await get(operator, f"/v1/invoices/{number}/lines/{item['line']}")
        assert (explained["item"], explained["difference"]) == (item, "")
        assert explained["amount"] == item["amount"]
    for name, kind in {"json": "application/json", "csv": "text/csv", "html": "text/html", "pdf": "application/pdf"}.items():
        document = await operator.get(f"/v1/invoices/{number}/document", params={"format": name})
        assert document.headers["content-type"].startswith(kind)
        assert "sandbox" in document.headers["content-security-policy"]


async def test_a_tenant_sees_its_own_alone(tenant: httpx.AsyncClient) -> None:
    assert [entry["tenant_id"] for entry in (await get(tenant, "/v1/tenants"))["tenants"]] == [B]
    assert (await get(tenant, "/v1/balance"))["balance"]["tenant_id"] == B
    assert [row["tenant_id"] for row in (await get(tenant, "/v1/usage", by="tenant"))["rows"]] == [B]
    assert {alert["tenant_id"] for alert in (await get(tenant, "/v1/alerts"))["alerts"]} == {B}
    assert {invoice["tenant_id"] for invoice in (await get(tenant, "/v1/invoices"))["invoices"]} == {B}
    assert {price["tenant_id"] for price in (await get(tenant, "/v1/prices"))["book"]["prices"]} == {""}
    for path in ("/v1/balance", "/v1/usage", "/v1/tenant", "/v1/alerts", "/v1/invoices", "/v1/credit/grants"):
        refused = await tenant.get(path, params={"tenant_id": A})
        nobody = await tenant.get(path, params={"tenant_id": "nobody"})
        assert (refused.status_code, nobody.status_code) == (404, 404)
        assert refused.content.replace(A.encode(), b"nobody") == nobody.content
    assert await status(tenant, "/v1/invoices/INV-0001-1") == 404


@pytest.mark.parametrize(
    ("path", "query", "expected"),
    [
        ("/v1/usage", {"by": "colour"}, 400),
        ("/v1/usage", {"colour": "red"}, 400),
        ("/v1/usage", {"page_size": "0x10"}, 400),
        ("/v1/usage", {"page_size": "1001"}, 400),
        ("/v1/usage", {"start": "yesterday"}, 400),
        ("/v1/usage", {"bucket": ["day", "hour"]}, 400),
        ("/v1/usage", {"by": ["model", "model"]}, 422),
        ("/v1/usage", {"by": "user"}, 422),
        ("/v1/usage", {"start": "2025-11-22T06:40:01Z"}, 422),
        ("/v1/usage", {"start": "2025-11-23T00:00:00Z", "end": "2025-11-22T00:00:00Z"}, 422),
        ("/v1/usage", {"start": "1969-11-22T00:00:00Z"}, 422),
        ("/v1/usage", {"page_token": "AAAA"}, 422),
        ("/v1/balance", {}, 422),
        ("/v1/balance", {"tenant_id": "no\x00body"}, 400),
        ("/v1/balance", {"tenant_id": "' OR 1 = 1 --"}, 404),
        ("/v1/statement", {"tenant_id": A}, 400),
        ("/v1/invoices/INV-0001-1/lines/0", {}, 400),
        ("/v1/invoices/INV-0001-1/lines/99", {}, 404),
        ("/v1/invoices/INV-0001-99", {}, 404),
        ("/v1/prices", {"currency": "EUR"}, 404),
        ("/v1/nothing", {}, 404),
    ],
)
async def test_what_does_not_fit_is_named(operator: httpx.AsyncClient, path: str, query: dict[str, Any], expected: int) -> None:
    assert await status(operator, path, **query) == expected


async def test_grpc_says_the_same(world: World, operator: httpx.AsyncClient) -> None:
    server = make_grpc_server(world.calls)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    metadata = (("authorization", f"Bearer {world.key('', 'read', 'admin')}"),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = BillingServiceStub(channel)  # type: ignore[no-untyped-call]
        asked = pb.ListUsageRequest(tenant_id=A, by=["model", "user"], bucket="day")
        answer = await stub.ListUsage(asked, metadata=metadata, timeout=60)
        over_http = await get(operator, "/v1/usage", tenant_id=A, by=["model", "user"], bucket="day")
        assert json_format.ParseDict(over_http, pb.ListUsageResponse()) == answer
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetBalance(pb.GetBalanceRequest(tenant_id="nobody"), metadata=metadata, timeout=60)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        # A deadline that is over before the query begins is told as such, whoever notices.
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.ListUsage(asked, metadata=metadata, timeout=0.000001)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await server.stop(0)
