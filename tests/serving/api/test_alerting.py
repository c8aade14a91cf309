"""A watch of alerts goes on where an earlier one stopped: nothing is missed, nothing comes twice, and it ends with its key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from billing.v1.billing_service_pb2 import ListAlertsRequest, WatchAlertsRequest
from serving.api import alerting
from serving.api.errors import ApiError
from tests.billing.ledgers import NOW_MS, batch, tenants_in, usage
from tests.serving.api.worlds import World

A, B, _ = tenants_in(1)
DAY_MS = 86_400_000
pytestmark = pytest.mark.timeout(300)


async def some(answers: AsyncIterator[Any], count: int) -> list[Any]:
    """The next `count` alerts, each with the position that came with it."""
    found: list[Any] = []
    async with asyncio.timeout(60):
        async for answer in answers:
            if answer.HasField("alert"):
                found.append(answer)
            if len(found) == count:
                return found
    raise AssertionError("the watch ended")


def raise_alerts(world: World, day: int) -> None:
    """Two rules speak in one record. Days apart, so that no rule is silent because it has just spoken."""
    at_ms = NOW_MS + day * DAY_MS
    events = [
        usage(f"odd-{day}", B, model=f"odd-{day}", ended_ms=at_ms),
        usage(f"twice-{day}", B, ended_ms=at_ms),
        usage(f"twice-{day}", B, ended_ms=at_ms, output_tokens=11),
    ]
    world.ledger.usage(batch(events), at_ms)
    world.publish()


async def test_a_watch_resumes_within_a_record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = world.key(B, "read")
    # So few in a look that a record's alerts come in several.
    monkeypatch.setattr(alerting, "_LOOK_ALERTS", 1)
    before = len((await listed(world, secret)).alerts)
    async with aclosing(world.calls.watch("WatchAlerts", WatchAlertsRequest(), secret)) as watch:
        begun: Any = await anext(watch)
        raise_alerts(world, 20)
        told = await some(watch, 1)
    raise_alerts(world, 22)
    expected = [alert.alert_id for alert in (await listed(world, secret)).alerts][before:]
    assert len(expected) >= 3
    while len(told) < len(expected):
        after = WatchAlertsRequest(after=told[-1].position)
        async with aclosing(world.calls.watch("WatchAlerts", after, secret)) as watch:
            told += await some(watch, 1)
    assert [answer.alert.alert_id for answer in told] == expected
    async with aclosing(world.calls.watch("WatchAlerts", WatchAlertsRequest(after=begun.position), secret)) as watch:
        assert [answer.alert.alert_id for answer in await some(watch, len(expected))] == expected


async def listed(world: World, secret: str) -> Any:
    return await world.calls.call("ListAlerts", ListAlertsRequest(), secret)


async def test_a_watch_sees_its_own_tenant_and_ends_with_its_key(world: World) -> None:
    secret, other = world.key(A, "read"), world.key(B, "read")
    async with aclosing(world.calls.watch("WatchAlerts", WatchAlertsRequest(), secret)) as watch:
        first: Any = await anext(watch)
        raise_alerts(world, 24)
        world.revoke(secret)
        with pytest.raises(ApiError, match="revoked"):
            await anext(watch)
    # Another tenant's position is no position.
    with pytest.raises(ApiError, match="after"):
        await anext(world.calls.watch("WatchAlerts", WatchAlertsRequest(after=first.position), other))


async def test_over_http_it_is_a_stream_of_events(world: World) -> None:
    secret = world.key(B, "admin")
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/v1/alerts/watch",
        "query_string": b"",
        "headers": [(b"x-api-key", secret.encode())],
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        """Nothing more comes from the client."""
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        """As a server whose client is gone after the second event."""
        sent.append(message)
        if len(sent) == 2:
            raise_alerts(world, 26)
        if b"event: alert" in message.get("body", b""):
            raise OSError("gone")

    with pytest.raises(Exception, match=r"gone|unhandled errors"):
        await world.app(scope, receive, send)
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    fields = dict(line.split(": ", 1) for line in sent[-1]["body"].decode().strip().split("\n"))
    data = json.loads(fields["data"])
    assert (fields["event"], fields["id"]) == ("alert", data["position"])
    assert data["alert"]["tenant_id"] == B
