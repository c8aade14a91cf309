"""The meter: what a caller may rely on."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import pytest

from billing.identity import partition_of
from billing.v1.usage_pb2 import OUTCOME_COMPLETED, OUTCOME_INTERRUPTED, UsageEvent
from producers.errors import InvalidEvent, JournalFull, JournalWriteFailed, NotDurableInTime, ProducerError, RequestClosed
from producers.meter import UsageMeter
from producers.receipt import Receipt
from tests.producers.support import PARTITIONS, journaled, open_meter, usage_event


def events_of(meter: UsageMeter) -> dict[str, UsageEvent]:
    held = [event for events in journaled(meter.journal).values() for event in events.values()]
    assert len({event.request_id for event in held}) == len(held)
    return {event.request_id: event for event in held}


def fill(meter: UsageMeter, numbers: Iterator[int]) -> None:
    for number in numbers:
        meter.record(usage_event(number)).durable()


def test_a_durable_event_is_in_its_tenants_partition_as_it_was(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    event = usage_event(7, tenant_id="acme")
    meter.record(event).durable()
    assert journaled(meter.journal) == {partition_of("acme", PARTITIONS): {1: event}}
    meter.close()


def test_the_bytes_of_an_event_do_not_depend_on_the_order_in_which_it_was_filled(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    one, other = usage_event(1, tenant_id="acme"), usage_event(1, tenant_id="acme")
    for number in range(20):
        one.attributes[f"k{number}"] = "v"
        other.attributes[f"k{19 - number}"] = "v"
    meter.record(one)
    meter.record(other).durable()
    first, second = meter.journal.read(partition_of("acme", PARTITIONS), 0, 10, 10_000).events
    assert first == second
    meter.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("tenant_id", ""), ("request_id", ""), ("ended_ms", 0), ("output_tokens", 2**63), ("model", "x" * 1_000)],
)
def test_what_cannot_be_billed_is_refused_in_the_call(tmp_path: Path, field: str, value: object) -> None:
    meter = open_meter(tmp_path)
    event = usage_event(1)
    setattr(event, field, value)
    with pytest.raises(InvalidEvent, match=field):
        meter.record(event)
    with pytest.raises(ValueError):
        meter.record(event)
    assert meter.metrics()["recorded"] == 0
    meter.close()


def test_a_full_journal_refuses_new_requests_but_never_the_end_of_an_open_one(tmp_path: Path) -> None:
    meter = open_meter(tmp_path, journal_bytes_max=5_000)
    request = meter.open(usage_event(0, output_tokens=0))
    request.receipt.durable()
    numbers = itertools.count(1)
    with pytest.raises(JournalFull):
        fill(meter, numbers)
    with pytest.raises(JournalFull):
        meter.open(usage_event(next(numbers)))
    request.progress(usage_event(0, output_tokens=10)).durable()
    request.close(usage_event(0, output_tokens=11)).durable()
    assert events_of(meter)["request-00000000"].output_tokens == 11
    meter.close()


def test_a_closed_request_is_one_event_and_nothing_is_left_open(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    request = meter.open(usage_event(1, output_tokens=0))
    request.receipt.durable()
    for tokens in range(1, 50):
        request.progress(usage_event(1, output_tokens=tokens))
    request.close(usage_event(1, output_tokens=50)).durable()
    meter.close()
    meter = open_meter(tmp_path)
    assert meter.recover() == 0
    assert [event.output_tokens for event in events_of(meter).values()] == [50]
    assert next(iter(events_of(meter).values())).outcome == OUTCOME_COMPLETED
    meter.close()


def test_what_a_dead_process_left_open_becomes_what_its_last_progress_said(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    opened = usage_event(1, output_tokens=0)
    opened.ended_ms = 0
    before_ms = time.time_ns() // 1_000_000
    silent = meter.open(opened)
    streaming = meter.open(usage_event(2, output_tokens=0))
    finished = meter.open(usage_event(3, output_tokens=0))
    streaming.progress(usage_event(2, output_tokens=5))
    last = usage_event(2, output_tokens=9)
    streaming.progress(last)
    finished.close(usage_event(3, output_tokens=30)).durable()
    silent.receipt.durable()
    # As after kill -9: what was durable is all that there is.
    meter.close()

    meter = open_meter(tmp_path)
    assert meter.metrics()["open_requests"] == 2
    assert meter.recover() == 2
    assert meter.recover() == 0
    assert meter.metrics()["open_requests"] == 0
    events = events_of(meter)
    assert {number: event.outcome for number, event in events.items()} == {
        "request-00000001": OUTCOME_INTERRUPTED,
        "request-00000002": OUTCOME_INTERRUPTED,
        "request-00000003": OUTCOME_COMPLETED,
    }
    assert events["request-00000001"].output_tokens == 0
    assert before_ms <= events["request-00000001"].ended_ms <= time.time_ns() // 1_000_000
    assert (events["request-00000002"].output_tokens, events["request-00000002"].ended_ms) == (9, last.ended_ms)
    assert opened.outcome == OUTCOME_COMPLETED, "the caller's event is the caller's"
    # New requests do not take the place of old ones.
    meter.open(usage_event(4)).receipt.durable()
    meter.close()
    meter = open_meter(tmp_path)
    assert meter.recover() == 1
    assert len(events_of(meter)) == 4
    meter.close()


@pytest.mark.usefixtures("patient_journal")
def test_many_updates_of_one_request_in_a_group_are_one_write(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    request = meter.open(usage_event(1))
    request.receipt.durable()
    blocker = apsw.Connection(str(tmp_path / "usage.journal"))
    blocker.execute("BEGIN IMMEDIATE")
    # The writer takes the first; all that follows waits for it, in one group.
    first = request.progress(usage_event(1, output_tokens=1))
    while (receipt := request.progress(usage_event(1, output_tokens=2))) is first:
        pass
    receipts = {request.progress(usage_event(1, output_tokens=tokens)) for tokens in range(3, 1_000)}
    assert receipts == {receipt}
    blocker.execute("ROLLBACK")
    blocker.close()
    receipt.durable()
    assert meter.metrics()["commits"] == 3
    meter.close()
    meter = open_meter(tmp_path)
    meter.recover()
    assert events_of(meter)["request-00000001"].output_tokens == 999
    meter.close()


def test_a_request_takes_only_its_own_events_and_nothing_after_its_end(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    request = meter.open(usage_event(1))
    with pytest.raises(InvalidEvent, match="another request"):
        request.progress(usage_event(2))
    request.close(usage_event(1))
    with pytest.raises(RequestClosed):
        request.progress(usage_event(1))
    with pytest.raises(RequestClosed):
        request.close(usage_event(1))
    meter.close()


@pytest.mark.usefixtures("patient_journal")
async def test_coroutines_wait_together_and_cancelling_one_leaves_the_others(tmp_path: Path) -> None:
    meter = open_meter(tmp_path)
    blocker = apsw.Connection(str(tmp_path / "usage.journal"))
    blocker.execute("BEGIN IMMEDIATE")
    receipts = [meter.record(usage_event(number)) for number in range(100)]
    waiting = [asyncio.create_task(receipt.wait()) for receipt in receipts]
    await asyncio.sleep(0)
    waiting[50].cancel()
    with pytest.raises(NotDurableInTime, match=r"timeout_s=0\.01"):
        await receipts[0].wait(0.01)
    blocker.execute("ROLLBACK")
    blocker.close()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [result for result in results if result is not None] == [results[50]]
    assert isinstance(results[50], asyncio.CancelledError)
    await receipts[0].wait()
    await asyncio.to_thread(meter.close)


async def test_a_failed_group_tells_every_waiter_its_own_error() -> None:
    receipt = Receipt()
    threaded: list[BaseException] = []

    def block() -> None:
        try:
            receipt.durable(60)
        except ProducerError as error:
            threaded.append(error)

    thread = threading.Thread(target=block)
    thread.start()
    waiting = [asyncio.create_task(receipt.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    cause = OSError(5, "Input/output error")
    failure = JournalWriteFailed("journal_path=x: SQLITE_IOERR")
    failure.__cause__ = cause
    await asyncio.to_thread(receipt.settle, failure)
    results = [*await asyncio.gather(*waiting, return_exceptions=True), *threaded]
    thread.join()
    results = [*results[:3], *threaded]
    assert len({id(result) for result in results}) == 4
    for result in results:
        assert isinstance(result, JournalWriteFailed)
        assert result.args == failure.args
        assert result.__cause__ is cause
    assert receipt.has_failed
    assert not receipt.is_durable


def test_a_receipt_of_a_loop_that_is_gone_settles_all_the_same() -> None:
    receipt = Receipt()

    async def give_up() -> None:
        with pytest.raises(NotDurableInTime):
            await receipt.wait(0.01)

    asyncio.run(give_up())
    receipt.settle(None)
    assert receipt.is_durable


async def test_a_group_wakes_each_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = Receipt()
    loop = asyncio.get_running_loop()
    wakes: list[object] = []
    threadsafe = loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *arguments: object) -> asyncio.Handle:
        wakes.append(callback)
        return threadsafe(callback, *arguments)

    waiting = [asyncio.create_task(receipt.wait()) for _ in range(500)]
    await asyncio.sleep(0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", counted)
        receipt.settle(None)
        await asyncio.gather(*waiting)
    assert len(wakes) == 1
    await receipt.wait()
