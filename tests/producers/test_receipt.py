"""Coroutines that wait for a group: all of them are woken by one commit, and each has its own time."""

from __future__ import annotations

import asyncio

import pytest

from producers.errors import JournalWriteFailed, NotDurableInTime
from producers.receipt import Receipt


async def waiting(receipt: Receipt, *timeouts_s: float) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(receipt.wait(timeout_s)) for timeout_s in timeouts_s]
    await asyncio.sleep(0)
    return tasks


async def test_a_commit_wakes_all_who_wait_and_who_asks_later_need_not_wait() -> None:
    receipt = Receipt()
    tasks = await waiting(receipt, 600, 600, 600)
    await asyncio.to_thread(receipt.settle, None)
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
        await receipt.wait(0)
    assert receipt.is_durable


async def test_each_waits_as_long_as_it_said_whoever_came_first() -> None:
    receipt = Receipt()
    patient, hasty, other = await waiting(receipt, 600, 0.01, 0.02)
    async with asyncio.timeout(60):
        for late, timeout in ((hasty, "0.01"), (other, "0.02")):
            with pytest.raises(NotDurableInTime, match=f"timeout_s={timeout}:"):
                await late
    assert not patient.done()
    receipt.settle(None)
    async with asyncio.timeout(60):
        await patient


async def test_one_that_is_cancelled_leaves_the_others_waiting() -> None:
    receipt = Receipt()
    gone, stays = await waiting(receipt, 600, 600)
    gone.cancel()
    await asyncio.wait({gone})
    assert not stays.done()
    receipt.settle(None)
    async with asyncio.timeout(60):
        await stays


async def test_a_group_that_failed_fails_everyone_with_an_error_of_their_own() -> None:
    receipt = Receipt()
    tasks = await waiting(receipt, 600, 600)
    receipt.settle(JournalWriteFailed("the disk is gone"))
    async with asyncio.timeout(60):
        first, second = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, JournalWriteFailed)
    assert isinstance(second, JournalWriteFailed)
    assert first is not second
    assert receipt.has_failed
