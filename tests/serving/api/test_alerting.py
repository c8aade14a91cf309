"""A watch of alerts goes on where an earlier one stopped: nothing is missed, nothing comes twice, and it ends with its key.
Taking an alert on changes it once.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from billing.v1.account_pb2 import LedgerPosition
from billing.v1.alert_pb2 import Alert
from billing.v1.billing_service_pb2 import AcknowledgeAlertRequest, ListAlertsRequest, WatchAlertsRequest
from serving.api import alerting
from serving.api.alert_feed import AlertFeed
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


def raise_alerts(world: World, day: int) -> list[tuple[str, str]]:
    """Two rules speak in one record. Days apart, so that no rule is silent because it has just spoken. B's alerts, as told."""
    at_ms = NOW_MS + day * DAY_MS
    events = [
        usage(f"odd-{day}", B, model=f"odd-{day}", ended_ms=at_ms),
        usage(f"twice-{day}", B, ended_ms=at_ms),
        usage(f"twice-{day}", B, ended_ms=at_ms, output_tokens=11),
        usage(f"other-{day}", A, model=f"odd-{day}", ended_ms=at_ms),
    ]
    before = len(world.ledger.records())
    world.ledger.usage(batch(events), at_ms)
    world.publish()
    told = [alert for record in world.ledger.records()[before:] for alert in record.alerts if alert.tenant_id == B]
    return [(alert.alert_id, alerting._told_entry(alert).state) for alert in told]


def seen(answers: list[Any]) -> list[tuple[str, str]]:
    return [(answer.alert.alert_id, answer.alert.state) for answer in answers]


def watching(world: World, secret: str, after: str = "") -> Any:
    return aclosing(world.calls.watch("WatchAlerts", WatchAlertsRequest(after=after), secret))


async def test_a_watch_resumes_within_a_record_each_state_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = world.key(B, "read")
    # So few in a look that a record's alerts come in several.
    monkeypatch.setattr(alerting, "_LOOK_ALERTS", 1)
    async with watching(world, secret) as watch:
        begun: Any = await anext(watch)
        expected = raise_alerts(world, 20)
        told = await some(watch, 1)
    expected += raise_alerts(world, 22)
    assert len(expected) >= 5
    assert {state for _, state in expected} == {"raised", "updated", "resolved"}
    # The topic is read again from its beginning, as after a lost connection.
    for record in world.ledger.records():
        for alert in record.alerts:
            world.calls.alerts.take(b"", alert.SerializeToString(), record.partition)
    while len(told) < len(expected):
        async with watching(world, secret, told[-1].position) as watch:
            told += await some(watch, 1)
    assert seen(told) == expected
    async with watching(world, secret, begun.position) as watch:
        assert seen(await some(watch, len(expected))) == expected


async def test_a_watch_sees_its_own_tenant_and_ends_with_its_key(world: World) -> None:
    secret, other, operator = world.key(A, "read", "prices"), world.key(B, "read"), world.key("", "read")
    async with watching(world, secret) as watch, watching(world, operator) as everything:
        first: Any = await anext(watch)
        await anext(everything)
        raise_alerts(world, 24)
        [own] = await some(watch, 1)
        assert own.alert.tenant_id == A
        # What others are told cannot be read in a position, nor in its length.
        assert len(own.position) == len(first.position)
        assert {answer.alert.tenant_id for answer in await some(everything, 3)} == {A, B}
        world.revoke(secret)
        with pytest.raises(ApiError, match="revoked"):
            await some(watch, 100)
    # Another tenant's position is no position.
    with pytest.raises(ApiError, match="after"):
        await anext(world.calls.watch("WatchAlerts", WatchAlertsRequest(after=first.position), other))


async def refused(world: World, secret: str, after: str) -> ApiError:
    with pytest.raises(ApiError) as told:
        await anext(world.calls.watch("WatchAlerts", WatchAlertsRequest(after=after), secret))
    return told.value


async def test_a_position_behind_which_something_may_be_missing_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = world.key(B, "read")
    async with watching(world, secret) as watch:
        first: Any = await anext(watch)
        expected = raise_alerts(world, 26)
        assert seen(await some(watch, len(expected))) == expected
    # As old as the topic keeps alerts, and older.
    monkeypatch.setattr(world.calls.alerts, "retention_ms", 60_000_000)
    async with watching(world, secret, first.position) as watch:
        assert seen(await some(watch, len(expected))) == expected
    monkeypatch.setattr(world.calls.alerts, "retention_ms", -1)
    error = await refused(world, secret, first.position)
    assert (error.status, error.problem.status) == (grpc.StatusCode.OUT_OF_RANGE, 410)
    assert "list them with ListAlerts, and watch without `after`" in error.message
    monkeypatch.undo()
    # More was told since than is kept.
    monkeypatch.setattr(world.calls.alerts, "_bytes_max", 1)
    raise_alerts(world, 28)
    assert (await refused(world, secret, first.position)).status is grpc.StatusCode.OUT_OF_RANGE
    # Of an earlier version.
    principal = world.calls.authenticate("WatchAlerts", secret)
    earlier = world.calls._tokens.seal(principal, WatchAlertsRequest(), ["0:12", "1:7"])
    assert (await refused(world, secret, earlier)).status is grpc.StatusCode.OUT_OF_RANGE
    monkeypatch.undo()


async def test_who_hears_nothing_is_given_a_new_position(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerting, "_POSITION_S", 0.0)
    async with watching(world, world.key(A, "read")) as watch:
        first, second = await anext(watch), await anext(watch)
    assert first.position
    assert second.position
    assert not second.HasField("alert")


def message(sequence: int, summary: str = "") -> bytes:
    position = LedgerPosition(generation=b"g", sequence=sequence)
    return Alert(alert_id=str(sequence), position=position, told_ms=sequence, summary=summary).SerializeToString()


def test_a_feed_keeps_what_has_room_and_knows_what_had_to_go() -> None:
    feed = AlertFeed(bytes_max=1_000)
    before, number = feed.end()
    for sequence in (1, 2, 1, 3):
        feed.take(b"", message(sequence), 0)
    feed.take(b"", b"\xff no alert", 0)
    found, next_number = feed.since(number, 2)
    assert [each.alert.alert_id for each in found] == ["1", "2"]
    assert [each.alert.alert_id for each in feed.since(next_number, 9)[0]] == ["3"]
    assert not feed.has_lost(before, None)
    middle, _ = feed.end()
    feed.take(b"", message(4, "x" * 990), 1)
    assert feed.has_lost(before, None)
    assert feed.has_lost(before, [0])
    assert not feed.has_lost(before, [1])
    assert not feed.has_lost(middle, None), "what had to go was behind it already"
    assert [each.partition for each in feed.since(0, 9)[0]] == [1]


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
            raise_alerts(world, 30)
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


async def acknowledge(world: World, secret: str, alert_id: str, **fields: str) -> Any:
    request = AcknowledgeAlertRequest(alert_id=alert_id, **fields)
    answer: Any = await world.calls.call("AcknowledgeAlert", request, secret)
    return answer.alert


async def test_an_alert_is_taken_on_once_by_who_may_see_it(world: World) -> None:
    """The last one: it moves the ledger's time to the clock's, which a command's time must be near."""
    admin, operator, other = world.key(B, "admin"), world.key("", "admin"), world.key(A, "admin")
    now_ms = time.time_ns() // 1_000_000
    world.ledger.usage(batch([usage("now", B, model="odd-now", ended_ms=now_ms)]), now_ms)
    world.publish()
    listed: Any = await world.calls.call("ListAlerts", ListAlertsRequest(), admin)
    [entry] = [each for each in listed.alerts if each.subject == "odd-now"]
    assert (entry.state, entry.acknowledged_by, entry.HasField("resolved")) == ("raised", "", False)
    for key, name in ((other, entry.alert_id), (admin, "no-such-alert")):
        with pytest.raises(ApiError) as unseen:
            await acknowledge(world, key, name)
        assert unseen.value.status is grpc.StatusCode.NOT_FOUND
    with pytest.raises(ApiError, match="scope") as unscoped:
        await acknowledge(world, world.key(B, "read"), entry.alert_id)
    assert unscoped.value.status is grpc.StatusCode.PERMISSION_DENIED
    async with watching(world, admin) as watch:
        await anext(watch)
        taken = await acknowledge(world, admin, entry.alert_id, note="on it", idempotency_key="k")
        assert (taken.state, taken.note) == ("acknowledged", "on it")
        assert taken.acknowledged_by.startswith("api/key-")
        assert (await some(watch, 1))[0].alert == taken
    told = sum(len(record.alerts) for record in world.ledger.records())
    # Again, by another, with or without the key: as it is.
    assert await acknowledge(world, admin, entry.alert_id, note="on it", idempotency_key="k") == taken
    assert await acknowledge(world, operator, entry.alert_id, note="me too") == taken
    assert sum(len(record.alerts) for record in world.ledger.records()) == told
    over = next(each for each in listed.alerts if each.state == "resolved")
    with pytest.raises(ApiError) as ended:
        await acknowledge(world, admin, over.alert_id)
    assert ended.value.status is grpc.StatusCode.FAILED_PRECONDITION
