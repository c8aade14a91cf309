"""The notifier behind a real broker: each alert to whom it concerns, endpoints apart, nothing lost or sent under another ID."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from confluent_kafka import Producer
from confluent_kafka.admin import NewTopic
from standardwebhooks import Webhook

from billing.v1.alert_pb2 import ALERT_RULE_BUDGET, SEVERITY_CRITICAL, Alert
from serving.notifier.journal import Journal
from serving.notifier.notifier import Notifier
from serving.notifier.settings import Endpoint, NotifierSettings
from taximeter.embedded.broker import TansuBroker
from tests.producers.support import create_topics
from tests.serving.notifier.support import QUICK, SECRET, Answer, Receiver, alert, endpoint, receiving
from tests.serving.notifier.test_deliveries import until


class Topic:
    """The alert topic of a test."""

    def __init__(self, bootstrap: str, name: str) -> None:
        self.bootstrap, self.name = bootstrap, name
        create_topics(bootstrap, NewTopic(name, 2, 1))
        self._producer = Producer({"bootstrap.servers": bootstrap})

    def tell(self, *alerts: Alert) -> None:
        for each in alerts:
            partition = each.position.sequence % 2
            self._producer.produce(self.name, key=each.tenant_id, value=each.SerializeToString(), partition=partition)
        assert self._producer.flush(60) == 0


@contextlib.asynccontextmanager
async def notifying(topic: Topic, path: Path, *endpoints: Endpoint, **limits: Any) -> AsyncIterator[Notifier]:
    settings = NotifierSettings(topic.bootstrap, path, endpoints, topic.name, limits=replace(QUICK, **limits))
    notifier = Notifier(settings)
    ready = asyncio.Event()
    task = asyncio.create_task(notifier.run(ready.set))
    try:
        await asyncio.wait_for(ready.wait(), 60)
        yield notifier
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def settled(notifier: Notifier, receiver: Receiver, requests: int) -> None:
    """So many requests came, and the notifier has noted that they were taken: its receiver knows it earlier."""
    await until(lambda: len(receiver.requests) == requests and not any(each.waiting for each in notifier.status()))


async def test_each_alert_goes_to_those_who_want_it_once_over_restarts(
    bootstrap: str, unique_name: Callable[[str], str], tmp_path: Path, receiver: Receiver
) -> None:
    topic = Topic(bootstrap, unique_name("alerts"))
    topic.tell(alert(1, told_ms=1_000))
    ends = (
        endpoint(receiver.url, "all"),
        endpoint(receiver.url.replace("hook", "severe"), "severe", severities=frozenset({"critical"})),
        endpoint(receiver.url.replace("hook", "budgets"), "budgets", rules=frozenset({"budget"}), format="alertmanager"),
        endpoint(receiver.url.replace("hook", "beta"), "beta", tenants=frozenset({"beta"})),
    )
    path = tmp_path / "journal.sqlite"
    async with notifying(topic, path, *ends) as notifier:
        topic.tell(alert(2), alert(3, severity=SEVERITY_CRITICAL), alert(4, rule=ALERT_RULE_BUDGET, tenant_id="beta"))
        await settled(notifier, receiver, 6)
    assert not Journal(path, dead_max=1).waiting()
    # Told while nobody was there; what was told before is written again, as a publisher that was killed does.
    again = alert(4, rule=ALERT_RULE_BUDGET, tenant_id="beta")
    topic.tell(again, alert(6))
    async with notifying(topic, path, *ends) as notifier:
        await settled(notifier, receiver, 7)
        [everything, *_] = notifier.status()
        assert (everything.name, everything.waiting, everything.dead) == ("all", 0, 0)
    by_path: dict[str, list[str]] = {}
    for request in receiver.requests:
        by_path.setdefault(request.path, []).append(request.webhook_id)
    assert {name: sorted(ids) for name, ids in by_path.items()} == {
        # Not the first one: it was told before there was a journal.
        "/hook": ["abc-0-2-0-r1", "abc-0-3-0-r1", "abc-0-4-0-r1", "abc-0-6-0-r1"],
        "/severe": ["abc-0-3-0-r1"],
        "/budgets": ["abc-0-4-0-r1"],
        "/beta": ["abc-0-4-0-r1"],
    }
    # Alerts of different tenants keep no order among each other.
    one = next(request for request in receiver.requests if (request.path, request.webhook_id) == ("/hook", "abc-0-2-0-r1"))
    assert Webhook(SECRET).verify(one.body, one.headers)["data"]["tenant_id"] == "acme"


async def test_a_slow_endpoint_and_one_that_overflows_hold_no_other(
    tansu: TansuBroker, unique_name: Callable[[str], str], tmp_path: Path, receiver: Receiver
) -> None:
    topic = Topic(tansu.bootstrap, unique_name("alerts"))
    gate = threading.Event()
    with receiving() as slow:
        slow.answer = lambda _: Answer(gate=gate)
        ends = endpoint(receiver.url, "quick"), endpoint(slow.url, "slow")
        async with notifying(topic, tmp_path / "journal.sqlite", *ends, queue_max=3, attempts_at_once=2) as notifier:
            for number in range(2, 12):
                topic.tell(alert(number))
                await until(receiver.has(number - 1))
                # Or the quick one's own places would be taken by what it has sent and not noted yet.
                await until(lambda: not notifier.status()[0].waiting)
            status = {each.name: each for each in notifier.status()}
            assert (status["slow"].waiting, status["slow"].dead, status["quick"].dead) == (3, 7, 0)
            assert status["slow"].oldest_s > 0
            gate.set()
            await until(lambda: len(slow.requests) == 3)


async def test_dead_letters_that_an_operator_retries_are_delivered_at_once(
    tansu: TansuBroker, unique_name: Callable[[str], str], tmp_path: Path, receiver: Receiver
) -> None:
    topic = Topic(tansu.bootstrap, unique_name("alerts"))
    path = tmp_path / "journal.sqlite"
    receiver.answers.append(Answer(410))
    async with notifying(topic, path, endpoint(receiver.url)) as notifier:
        topic.tell(alert(2))
        await until(lambda: notifier.status()[0].dead == 1)
        topic.tell(alert(3))
        await until(lambda: notifier.status()[0].dead == 2)
        assert notifier.status()[0].gone
        beside = Journal(path, dead_max=9)
        assert len(beside.retry()) == 2
        beside.close()
        await settled(notifier, receiver, 3)
        assert not notifier.status()[0].gone
    # Another address is another receiver; the same one stays gone over a restart.
    receiver.answers.append(Answer(410))
    async with notifying(topic, path, endpoint(receiver.url)) as notifier:
        topic.tell(alert(4))
        await until(lambda: notifier.status()[0].gone)
    async with notifying(topic, path, endpoint(receiver.url)) as notifier:
        assert notifier.status()[0].gone
    async with notifying(topic, path, endpoint(f"{receiver.url}/new")) as notifier:
        assert not notifier.status()[0].gone


async def test_what_waits_for_an_endpoint_that_is_not_configured_any_more_is_a_dead_letter(
    tansu: TansuBroker, unique_name: Callable[[str], str], tmp_path: Path, receiver: Receiver
) -> None:
    topic = Topic(tansu.bootstrap, unique_name("alerts"))
    path = tmp_path / "journal.sqlite"
    receiver.answer = lambda _: Answer(500)
    async with notifying(topic, path, endpoint(receiver.url, "old")):
        topic.tell(alert(2))
        await until(lambda: receiver.requests)
    async with notifying(topic, path, endpoint(receiver.url, "new")):
        journal = Journal(path, dead_max=9)
        assert [(each.endpoint, each.reason) for each in journal.dead()] == [
            ("old", "the configuration has no such endpoint any more")
        ]
        journal.close()


async def test_an_alert_is_at_its_endpoint_within_a_second(
    tansu: TansuBroker, unique_name: Callable[[str], str], tmp_path: Path, receiver: Receiver
) -> None:
    """Generous: the bound is measured by benchmarks/alerts.py; here nothing waits for a timer of seconds."""
    topic = Topic(tansu.bootstrap, unique_name("alerts"))
    async with notifying(topic, tmp_path / "journal.sqlite", endpoint(receiver.url)):
        quickest_s = 60.0
        for number in range(2, 6):
            begun_s = time.monotonic()
            topic.tell(alert(number))
            await until(receiver.has(number - 1))
            quickest_s = min(quickest_s, time.monotonic() - begun_s)
    assert quickest_s < 10
