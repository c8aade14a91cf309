"""Jobs: functions and generators, plain and async; each is billed for what it did, however it ends."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from billing.v1.usage_pb2 import (
    OPERATION_BATCH_JOB,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_BACKEND_ERROR_PARTIAL,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
)
from producers.calls import CallMeter, Identity, Used
from producers.errors import JournalFull
from producers.jobs import metered_job
from producers.meter import UsageMeter
from tests.producers.support import journaled, open_meter

Function = TypeVar("Function", bound=Callable[..., Any])


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[UsageMeter]:
    made = open_meter(tmp_path)
    yield made
    made.close()


def bills(folder: Path, meter: UsageMeter) -> list[tuple[str, int, int]]:
    """Tenant, outcome, steps."""
    meter.close()
    again = open_meter(folder)
    found = [event for numbers in journaled(again.journal).values() for event in numbers.values()]
    again.close()
    assert all(event.operation == OPERATION_BATCH_JOB for event in found)
    return [(event.tenant_id, event.outcome, sum(unit.quantity for unit in event.units)) for event in found]


def steps(count: int) -> Used:
    return Used(units={"steps": count})


def job(meter: UsageMeter) -> Callable[[Function], Function]:
    return metered_job(CallMeter(meter), lambda owner, *_: Identity(owner), model="tuning", count=steps)


def run(job: Any, *arguments: Any) -> Any:
    """Plain or async, function or generator: its result, or its items."""

    async def gather() -> list[Any]:
        return [item async for item in made]

    async def wait() -> Any:
        return await made

    made = job(*arguments)
    if hasattr(made, "__aiter__"):
        return asyncio.run(gather())
    if inspect.iscoroutine(made):
        return asyncio.run(wait())
    return list(made) if hasattr(made, "__next__") else made


def functions(meter: UsageMeter) -> list[Any]:
    @job(meter)
    def whole(owner: str, count: int) -> int:
        return 6 // count

    @job(meter)
    async def async_whole(owner: str, count: int) -> int:
        return 6 // count

    return [whole, async_whole]


def generators(meter: UsageMeter) -> list[Any]:
    @job(meter)
    def items(owner: str, *counts: int) -> Any:
        for count in counts:
            yield 6 // count

    @job(meter)
    async def async_items(owner: str, *counts: int) -> Any:
        for count in counts:
            yield 6 // count

    return [items, async_items]


@pytest.mark.parametrize("place", [0, 1], ids=["plain", "async"])
def test_a_function_is_one_bill(tmp_path: Path, meter: UsageMeter, place: int) -> None:
    function = functions(meter)[place]
    assert run(function, "acme", 2) == 3
    with pytest.raises(ZeroDivisionError):
        run(function, "acme", 0)
    assert bills(tmp_path, meter) == [("acme", OUTCOME_COMPLETED, 3), ("acme", OUTCOME_BACKEND_ERROR, 0)]


@pytest.mark.parametrize("place", [0, 1], ids=["plain", "async"])
def test_a_generator_adds_its_items_up(tmp_path: Path, meter: UsageMeter, place: int) -> None:
    generator = generators(meter)[place]
    assert run(generator, "acme", 2, 3, 6) == [3, 2, 1]
    with pytest.raises(ZeroDivisionError):
        run(generator, "acme", 2, 3, 0)
    assert bills(tmp_path, meter) == [("acme", OUTCOME_COMPLETED, 6), ("acme", OUTCOME_BACKEND_ERROR_PARTIAL, 5)]


def test_a_generator_that_is_left_is_billed_for_its_items(tmp_path: Path, meter: UsageMeter) -> None:
    made = generators(meter)[0]("acme", 2, 3)
    next(made)
    made.close()
    assert bills(tmp_path, meter) == [("acme", OUTCOME_CANCELLED, 3)]


def test_a_full_journal_refuses_before_the_work(tmp_path: Path) -> None:
    meter = open_meter(tmp_path, journal_bytes_max=1)
    ran = []

    @job(meter)
    def work(owner: str) -> int:
        ran.append(owner)
        return 1

    with pytest.raises(JournalFull):
        work("acme")
    assert not ran
    meter.close()
