"""The overview says what other RPCs say, to whom they would say it, and again when it has changed."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.amounts import parse_decimal_to_pico
from billing.v1.billing_service_pb2 import WatchOverviewRequest, WatchOverviewResponse
from serving.api import overview
from serving.api.errors import ApiError
from serving.api.sharing import Shared
from sinks.overview import Sums
from sinks.rows import Balance
from tests.billing.ledgers import NOW_MS, batch, tenants_in, usage
from tests.serving.api.worlds import KeysOnly, World, get

A, B, _ = tenants_in(1)
DAY_MS = 86_400_000
# Of the month in which the world's usage lies; its log time is the next month's.
SINCE = {"start": "2025-11-04T00:00:00Z"}
pytestmark = pytest.mark.timeout(300)


def figures(rows: list[dict[str, Any]], name: str) -> dict[str, tuple[str, ...]]:
    kinds = ("requests", "refused_requests", "unrated_requests", "input_tokens_all", "output_tokens_all", "cost", "currency")
    return {row[name]: tuple(row[kind] for kind in kinds) for row in rows}


async def test_the_installation_is_the_sum_that_list_usage_gives(operator: httpx.AsyncClient) -> None:
    found = (await get(operator, "/v1/overview"))["installation"]
    assert found["start"] == SINCE["start"]
    for by, rows, name in (("tenant", "tenants", "tenant_id"), ("model", "models", "model")):
        listed = figures((await get(operator, "/v1/usage", by=by, **SINCE))["rows"], name)
        assert figures(found[rows]["rows"], "name") == listed
        assert int(found[rows]["names"]) == len(listed)
    days = (await get(operator, "/v1/usage", bucket="day", **SINCE))["rows"]
    assert figures(found["days"], "start") == figures(days, "start")
    accounts = (await get(operator, "/v1/tenants"))["tenants"]
    [sums] = found["accounts"]
    assert int(sums["tenants"]) == len(accounts)
    for amount in ("credit", "spend", "balance"):
        assert parse_decimal_to_pico(sums[amount]) == sum(parse_decimal_to_pico(row[amount]) for row in accounts)
    pipeline = await get(operator, "/v1/pipeline")
    assert found["partitions"] == pipeline["partitions"]
    assert not found["completeness"]["problem"]
    assert {name: found["completeness"][name] for name in pipeline if name != "partitions"} == {
        name: value for name, value in pipeline.items() if name != "partitions"
    }
    assert (found["tenants"]["rows"][0]["name"], "tenant" in await get(operator, "/v1/overview")) == (A, False)


async def test_an_archive_with_a_gap_hides_nothing_else(world: World, operator: httpx.AsyncClient) -> None:
    whole = (await get(operator, "/v1/overview"))["installation"]
    world.engine.execute("CREATE TABLE kept AS ledger_records")
    world.engine.execute("INSERT INTO kept SELECT * FROM ledger_records")
    world.engine.execute("TRUNCATE TABLE ledger_records")
    try:
        world.calls._shared = Shared()
        found = (await get(operator, "/v1/overview"))["installation"]
    finally:
        world.engine.execute("INSERT INTO ledger_records SELECT * FROM kept")
        world.engine.execute("DROP TABLE kept")
        world.calls._shared = Shared()
    assert "taximeter audit" in found["completeness"]["problem"]
    assert {**found, "completeness": None} == {**whole, "completeness": None}
    assert (await get(operator, "/v1/overview"))["installation"] == whole


async def test_a_tenant_has_its_own_overview_alone(tenant: httpx.AsyncClient, operator: httpx.AsyncClient) -> None:
    own = await get(tenant, "/v1/overview")
    assert set(own) == {"tenant"}
    assert own == await get(operator, "/v1/overview", tenant_id=B)
    assert A not in json.dumps(own)
    for name in (A, "nobody"):
        refused = await tenant.get("/v1/overview", params={"tenant_id": name})
        watched = await tenant.get("/v1/overview/watch", params={"tenant_id": name})
        assert (refused.status_code, watched.status_code) == (404, 404)
        assert name in refused.text
    assert own["tenant"]["balance"] == (await get(tenant, "/v1/balance"))["balance"]
    assert own["tenant"]["invoices"] == (await get(tenant, "/v1/invoices"))["invoices"]


async def test_a_tenants_overview_is_what_list_usage_gives(
    world: World, operator: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the billing period and the days of its own zone, which is Berlin's."""
    period_ms = NOW_MS + 10 * DAY_MS
    events = [usage(f"now-{n}", A, user_id=f"u{n % 2}", project_id=f"p{n % 3}", ended_ms=period_ms - n) for n in range(6)]
    world.ledger.usage(batch(events), period_ms)
    world.publish()
    # What took a busy machine long is not asked again at once: nobody has asked yet.
    monkeypatch.setattr(world.calls, "_shared", Shared())
    found = (await get(operator, "/v1/overview", tenant_id=A))["tenant"]
    assert (found["period_start"], found["period_end"]) == ("2025-11-30T23:00:00Z", "2025-12-31T23:00:00Z")
    asked = {"tenant_id": A, "start": found["period_start"], "end": found["period_end"]}
    for by, rows, name in (("project", "projects", "project_id"), ("model", "models", "model"), ("user", "users", "user_id")):
        listed = (await get(operator, "/v1/usage", by=by, **asked))["rows"]
        assert figures(found[rows]["rows"], "name") == figures(listed, name), by
    [period] = (await get(operator, "/v1/usage", **asked))["rows"]
    assert [row["cost"] for row in found["period"]] == [period["cost"]]
    days = (await get(operator, "/v1/usage", tenant_id=A, bucket="day"))["rows"]
    assert figures(found["days"], "start") == figures(days, "start")
    assert found["minutes"][0]["start"] == "2025-12-03T06:39:00Z"
    assert found["burn"]["cost"] == period["cost"]


async def test_a_watch_says_what_changed_and_goes_on_where_it_stopped(world: World) -> None:
    # It is revoked below, and no other test's.
    secret = world.key(B, "read", "meter")
    request = WatchOverviewRequest()
    async with asyncio.timeout(120), aclosing(world.calls.watch("WatchOverview", request, secret)) as watch:
        first: Any = await anext(watch)
        at_ms = NOW_MS + 11 * DAY_MS
        world.ledger.usage(batch([usage("more", B, ended_ms=at_ms)]), at_ms)
        world.publish()
        last: Any = first
        while last.tenant.balance.requests == first.tenant.balance.requests or not last.tenant.users.rows:
            last = await anext(watch)
        assert last.tenant.balance.requests == first.tenant.balance.requests + 1
    # The same again is not sent again: the position stands for it.
    request = WatchOverviewRequest(after=last.position)
    async with asyncio.timeout(120), aclosing(world.calls.watch("WatchOverview", request, secret)) as watch:
        assert await anext(watch) == WatchOverviewResponse(position=last.position)
        world.revoke(secret)
        with pytest.raises(ApiError, match="revoked"):
            await anext(watch)


async def test_all_watches_of_a_tenant_share_its_queries(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    build = overview._tenant

    def counted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return build(*arguments)

    monkeypatch.setattr(overview, "_tenant", counted)
    secret = world.key(B, "read")
    # Nobody has asked yet.
    monkeypatch.setattr(world.calls, "_shared", Shared())
    watches = [world.calls.watch("WatchOverview", WatchOverviewRequest(), secret) for _ in range(8)]
    async with asyncio.timeout(120):
        answers: list[Any] = await asyncio.gather(*(anext(watch) for watch in watches))
    for watch in watches:
        await watch.aclose()
    assert made == 1
    assert all(answer == answers[0] for answer in answers)


async def test_the_first_page_finds_what_the_start_has_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    build = overview._installation

    def counted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return build(*arguments)

    monkeypatch.setattr(overview, "_installation", counted)
    monkeypatch.setattr(world.calls, "_shared", Shared())
    await world.calls.warm_up(60.0)
    async with world.client(world.key("", "read")) as client:
        assert "installation" in await get(client, "/v1/overview")
    assert made == 1


async def test_a_start_waits_for_a_database_for_a_while_and_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    only, asked, loop = KeysOnly(), asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(asked.set)

    release = only.block(tell)
    warming = asyncio.ensure_future(only.calls.warm_up(60.0))
    async with asyncio.timeout(60), only.client(None) as client:
        await asked.wait()
        assert (await client.get("/readyz")).status_code == 503
        release()
        # It is away, and asked again.
        asked.clear()
        await asked.wait()
        only.calls.close()
        await warming
        assert (await client.get("/readyz")).status_code == 200
    assert "no overview yet" in caplog.text
    caplog.clear()
    only = KeysOnly()
    await only.calls.warm_up(0.0)
    assert "no overview yet" in caplog.text
    only.calls.close()


@given(
    credit=st.integers(-(10**30), 10**30),
    limit=st.integers(0, 10**20),
    cost=st.integers(0, 10**25),
    minutes=st.integers(60, 7 * 1_440),
)
def test_the_day_of_depletion_is_when_the_rate_has_used_up_what_is_left(
    credit: int, limit: int, cost: int, minutes: int
) -> None:
    account = Balance("t", "", "active", "USD", credit, 0, 0, 0, 0, 0, "", "prepaid", 0, credit_limit_pico=limit)
    end_ms = NOW_MS // 60_000 * 60_000
    span_ms = minutes * 60_000
    found = overview.burn(account, end_ms - span_ms, end_ms, cost)
    per_day = parse_decimal_to_pico(found.cost_per_day)
    assert per_day * span_ms <= cost * DAY_MS < (per_day + 1) * span_ms
    left = max(credit + limit, 0)
    if found.HasField("depleted"):
        spent_ms = found.depleted.ToMilliseconds() - end_ms
        # All but the last millisecond's worth is used by then, and not more than there is.
        assert cost * spent_ms <= left * span_ms < cost * (spent_ms + 1)
    else:
        assert cost == 0 or left * span_ms >= cost * 100 * 365 * DAY_MS


@pytest.mark.parametrize("zone", ["UTC", "America/St_Johns"])
@pytest.mark.parametrize("since_midnight_ms", [0, 60_000, 43_200_000, DAY_MS - 60_000])
def test_the_rate_of_steady_usage_is_its_rate_at_any_time_of_day(zone: str, since_midnight_ms: int) -> None:
    """A pico each second for ten days and the one that runs, which begins in the zone at midnight."""
    account = Balance("t", "", "active", "USD", 0, 0, 0, 0, 0, 0, "", "postpaid", 0)
    midnight_s = NOW_MS // DAY_MS * 86_400 + (0 if zone == "UTC" else 12_600)
    at_ms = midnight_s * 1_000 + since_midnight_ms
    costs = [*[86_400] * 10, since_midnight_ms // 1_000 + 60]
    days = [Sums(str(midnight_s - (10 - n) * 86_400), "USD", 1, 0, 0, 0, 0, 0, cost) for n, cost in enumerate(costs)]
    found = overview._burn(account, zone, at_ms, days)
    assert parse_decimal_to_pico(found.cost_per_day) == 86_400
    assert found.start.ToSeconds() == midnight_s - 6 * 86_400


def test_a_postpaid_tenant_without_a_limit_never_runs_dry() -> None:
    account = Balance("t", "", "active", "USD", 0, 5, 0, 0, 0, 0, "", "postpaid", 0)
    assert not overview.burn(account, 0, 3_600_000, 10).HasField("depleted")
    assert overview.burn(account, 0, 3_600_000, 10).cost_per_day == "0.00000000024"
