"""When a batch is due and when its balances are, by a clock that the test turns."""

from __future__ import annotations

import math

import pytest

from billing.v1.ledger_pb2 import LedgerRecord
from sinks.collecting import Collected
from sinks.columns import Accepted
from sinks.settings import SinkSettings

SETTINGS = SinkSettings("", linger_ms=100, collect_ms=1_000, preview_ms=50, batch_bytes=100_000)


def records(count: int, *, size: int = 100) -> list[Accepted]:
    return [Accepted(LedgerRecord(), bytes(size), bytes(32), 1, offset) for offset in range(count)]


def test_it_is_due_when_nothing_more_comes() -> None:
    collected = Collected(SETTINGS)
    assert collected.wait_s(0.0) == math.inf
    collected.add(records(1), 0.0)
    collected.show()
    assert collected.wait_s(0.0) == pytest.approx(0.1)
    collected.add(records(1), 0.09)
    collected.show()
    assert not collected.is_due(0.11)
    collected.add([], 0.15)
    assert collected.is_due(0.2)
    assert len(collected.take()) == 2
    assert collected.wait_s(0.2) == math.inf


def test_it_is_due_when_it_is_old() -> None:
    collected = Collected(SETTINGS)
    for tenth in range(20):
        collected.add(records(1), tenth / 20)
    assert not collected.is_due(0.99)
    assert collected.is_due(1.0)


def test_it_is_full_at_its_bytes() -> None:
    collected = Collected(SETTINGS)
    collected.add(records(9, size=10_000), 0.0)
    before = collected.is_full
    collected.add(records(1, size=10_000), 0.0)
    assert (before, collected.is_full) == (False, True)
    collected.take()
    assert collected.take() == []


def test_what_is_new_is_shown_after_its_time() -> None:
    collected = Collected(SETTINGS)
    first, second, third = records(3)
    collected.add([first], 0.0)
    collected.add([second], 0.04)
    assert not collected.is_to_show(0.049)
    assert collected.is_to_show(0.05)
    assert collected.show() == [first, second]
    assert not collected.is_to_show(9.0)
    collected.add([third], 0.06)
    assert not collected.is_to_show(0.1)
    assert collected.is_to_show(0.11)
    assert collected.show() == [third]
    assert collected.take() == [first, second, third]
    assert not collected.is_to_show(9.0)


def test_every_record_is_taken_once() -> None:
    collected = Collected(SETTINGS)
    given = records(50)
    taken: list[Accepted] = []
    for number, start in enumerate(range(0, len(given), 7)):
        collected.add(given[start : start + 7], number / 10)
        collected.show()
        if number % 3 == 2:
            taken += collected.take()
    assert taken + collected.take() == given
