"""One endpoint's queue: order within an alert, attempts until the horizon, an endpoint that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from serving.notifier.deliveries import EndpointQueue
from serving.notifier.journal import Journal, NewDelivery
from tests.serving.notifier.support import QUICK, Answer, Receiver, Request, endpoint


@contextlib.asynccontextmanager
async def delivering(journal: Journal, url: str, *, gone: bool = False, **limits: Any) -> AsyncIterator[EndpointQueue]:
    queue = EndpointQueue(endpoint(url), journal, replace(QUICK, **limits), gone=gone)
    try:
        yield queue
    finally:
        await queue.close()


def put(journal: Journal, queue: EndpointQueue, *ids: str) -> None:
    """`a-r1`: revision 1 of alert a."""
    for webhook_id in ids:
        alert_id = webhook_id.partition("-")[0]
        [number] = journal.take(webhook_id, [NewDelivery("ops", webhook_id, alert_id, b"{}")])
        queue.add(number, alert_id)


async def until(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, "it did not happen"
        await asyncio.sleep(0.01)


async def test_states_of_an_alert_arrive_in_order_whatever_fails(journal: Journal, receiver: Receiver) -> None:
    seen: Counter[str] = Counter()

    def twice(request: Request) -> Answer:
        seen[request.webhook_id] += 1
        return Answer(200 if seen[request.webhook_id] > 2 else 500)

    receiver.answer = twice
    names = [f"{alert}-r{revision}" for revision in (1, 2, 3) for alert in ("a", "b")]
    async with delivering(journal, receiver.url) as queue:
        put(journal, queue, *names)
        await until(lambda: not queue.waiting)
    for alert in ("a", "b"):
        taken = [name for name in receiver.ids() if name.startswith(alert)]
        assert taken == [f"{alert}-r{revision}" for revision in (1, 2, 3) for _ in range(3)]
    assert journal.waiting() == []
    assert queue.outcomes == {"taken": 6, "failed": 12}


async def test_one_alert_that_is_never_taken_holds_no_other(journal: Journal, receiver: Receiver) -> None:
    receiver.answer = lambda request: Answer(500 if request.webhook_id.startswith("bad") else 200)
    async with delivering(journal, receiver.url, attempts_at_once=1) as queue:
        put(journal, queue, "bad-r1", "good-r1", "fine-r1")
        await until(lambda: queue.waiting == 1)
        assert [row[2] for row in journal.waiting()] == ["bad"]


async def test_no_more_attempts_run_at_once_than_the_bound(journal: Journal, receiver: Receiver) -> None:
    gate, lock, running, most = threading.Event(), threading.Lock(), 0, 0

    def count(_: Request) -> Answer:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(60)
        with lock:
            running -= 1
        return Answer()

    receiver.answer = count
    async with delivering(journal, receiver.url, attempts_at_once=3) as queue:
        put(journal, queue, *(f"a{number}-r1" for number in range(9)))
        await until(lambda: most == 3)
        gate.set()
        await until(lambda: not queue.waiting)
    assert most == 3


async def test_behind_the_horizon_it_is_a_dead_letter_and_the_next_state_follows(journal: Journal, receiver: Receiver) -> None:
    receiver.answer = lambda request: Answer(503 if request.webhook_id == "a-r1" else 200)
    async with delivering(journal, receiver.url, horizon_s=0.1) as queue:
        put(journal, queue, "a-r1", "a-r2")
        await until(lambda: not queue.waiting)
    [letter] = journal.dead()
    assert (letter.endpoint, letter.webhook_id) == ("ops", "a-r1")
    # How many fit in is the machine's matter.
    assert letter.attempts == receiver.ids().count("a-r1") >= 1
    assert letter.reason == "not taken within 0.1 s; at last: HTTP 503"
    assert receiver.ids()[-1] == "a-r2"


async def test_the_horizon_counts_from_the_first_attempt_of_an_earlier_process(journal: Journal, receiver: Receiver) -> None:
    receiver.answer = lambda _: Answer(500)
    [number] = journal.take("c", [NewDelivery("ops", "a-r1", "a", b"{}")])
    journal.failed(number, "before")
    async with delivering(journal, receiver.url, horizon_s=0.001) as queue:
        await asyncio.sleep(0.01)
        queue.add(number, "a")
        await until(lambda: not queue.waiting)
    assert receiver.ids() == ["a-r1"], "it is tried once more"
    assert [letter.attempts for letter in journal.dead()] == [2]


async def test_a_receiver_s_own_pause_is_kept(journal: Journal, receiver: Receiver) -> None:
    receiver.answers.append(Answer(429, {"retry-after": "1"}))
    async with delivering(journal, receiver.url) as queue:
        begun_s = time.monotonic()
        put(journal, queue, "a-r1")
        await until(lambda: not queue.waiting)
    assert time.monotonic() - begun_s >= 1
    assert receiver.ids() == ["a-r1"] * 2


async def test_who_is_gone_is_asked_nothing_more(
    journal: Journal, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers.append(Answer(410))
    async with delivering(journal, receiver.url) as queue:
        put(journal, queue, "a-r1")
        await until(lambda: not queue.waiting)
        assert queue.gone
        put(journal, queue, "a-r2", "b-r1")
        await until(lambda: not queue.waiting)
    assert receiver.ids() == ["a-r1"]
    assert len(journal.dead()) == 3
    assert journal.gone() == {"ops": receiver.url}
    assert "answered 410 Gone" in caplog.text


async def test_what_is_under_way_when_it_stops_stays_in_the_journal(journal: Journal, receiver: Receiver) -> None:
    receiver.answer = lambda _: Answer(500)
    async with delivering(journal, receiver.url) as queue:
        put(journal, queue, "a-r1", "a-r2")
        await until(lambda: receiver.requests)
    receiver.answer = None
    async with delivering(journal, receiver.url) as queue:
        for number, _, alert_id in journal.waiting():
            queue.add(number, alert_id)
        await until(lambda: not queue.waiting)
    assert receiver.ids()[-2:] == ["a-r1", "a-r2"]
    assert journal.waiting() == []


async def test_an_attempt_that_is_under_way_when_it_stops_ends_and_is_noted(journal: Journal, receiver: Receiver) -> None:
    gate = threading.Event()
    receiver.answer = lambda _: Answer(gate=gate)
    async with delivering(journal, receiver.url) as queue:
        put(journal, queue, "a-r1", "a-r2")
        await until(lambda: receiver.requests)
        closing = asyncio.ensure_future(queue.close())
        # A turn of the loop in which it would have been given up.
        await asyncio.sleep(0.05)
        gate.set()
        await closing
    assert receiver.ids() == ["a-r1"], "nothing is begun any more"
    assert [alert_id for _, _, alert_id in journal.waiting()] == ["a"], "what was taken does not come again"


async def test_an_answer_that_never_comes_holds_up_no_stop(journal: Journal, receiver: Receiver) -> None:
    gate = threading.Event()
    receiver.answer = lambda _: Answer(gate=gate)
    async with delivering(journal, receiver.url, attempt_timeout_s=0.5) as queue:
        put(journal, queue, "a-r1", "b-r1")
        await until(lambda: len(receiver.requests) == 2)
    gate.set()
    assert len(journal.waiting()) == 2
