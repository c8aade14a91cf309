"""Usage is the same whether its days are summed or not, at every moment: between records, late ones, and half-way through."""

from __future__ import annotations

import random

import pytest

from billing.v1.usage_pb2 import OUTCOME_COMPLETED, OUTCOME_REJECTED, UnitQuantity, UsageEvent
from sinks import queries
from sinks.day_totals import DAY_S, TrustedDays, sum_days, trusted_days
from sinks.engine import Columns, Table
from sinks.engines.chdb import ChdbEngine
from sinks.errors import EngineError
from sinks.follow import feed
from sinks.tables import USAGE_DAYS, USAGE_DAYS_SUMMED
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

ONE, TWO, *_ = tenants_in(1)
TODAY_S = NOW_MS // 1_000 // DAY_S * DAY_S
MINUTE_MS = 60_000


class _Numbers:
    """Events in batches of one producer, at random minutes of the last days."""

    def __init__(self) -> None:
        self._random = random.Random(11)
        self._next = 1

    def batch(self, days_ago: tuple[int, ...] = (0, 1, 2, 3)) -> bytes:
        first, self._next = self._next, self._next + 20
        return batch([self._event(number, days_ago) for number in range(first, first + 20)], "p", first, first + 19)

    def _event(self, number: int, days_ago: tuple[int, ...]) -> UsageEvent:
        draw = self._random
        ended_ms = NOW_MS - draw.choice(days_ago) * DAY_S * 1_000 - draw.randrange(5) * 7 * MINUTE_MS
        return usage(
            f"r{number}",
            draw.choice((ONE, ONE, TWO)),
            started_ms=ended_ms - 500,
            ended_ms=ended_ms,
            project_id=draw.choice(("a", "b")),
            model=draw.choice(("m1", "m2")),
            output_tokens=draw.randrange(100),
            outcome=draw.choice((OUTCOME_COMPLETED, OUTCOME_COMPLETED, OUTCOME_REJECTED)),
            units=[UnitQuantity(unit="characters", quantity=draw.randrange(1, 9))],
        )


def _seen(engine: ChdbEngine) -> list[object]:
    """What is asked: by project and day, of all time and of a range that begins and ends within days."""
    range_ms = (TODAY_S - 3 * DAY_S) * 1_000 + 6 * 3_600_000, (TODAY_S - DAY_S) * 1_000 + 6 * 3_600_000 + 20 * MINUTE_MS
    by = ("project", "model", "day")
    return [queries.usage(engine, ONE, by), queries.usage(engine, ONE, by, *range_ms), queries.usage(engine, TWO, by)]


def _by_minute(engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    with monkeypatch.context() as patch:
        patch.setattr(queries, "trusted_days", lambda *_: TrustedDays())
        return _seen(engine)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.price()
    return ledger


def test_sums_by_day_and_minutes_are_the_same_sum_whatever_comes_late(
    engine: ChdbEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = _Numbers()
    for step in range(3):
        for _ in range(2):
            ledger.usage(numbers.batch())
        feed(engine, ledger.stored, KEYS.seal_key)
        assert _seen(engine) == _by_minute(engine, monkeypatch), step
        assert step == 0 or trusted_days(engine, ONE, 0).stale_s, "what came late is seen"
        assert sum_days(engine, (1,)) > 0
        assert sum_days(engine, (1,)) == 0, "nothing has changed"
        assert trusted_days(engine, ONE, 0) == TrustedDays(TODAY_S)
        assert _seen(engine) == _by_minute(engine, monkeypatch), step
    assert sum_days(engine, (0,)) == 0, "another sink's"


def test_a_day_is_read_from_its_sum(engine: ChdbEngine, ledger: Ledger) -> None:
    """The control of the test above: a sum that is wrong shows, but not in a day of which a minute came later."""
    ledger.usage(_Numbers().batch((1, 2)))
    feed(engine, ledger.stored, KEYS.seal_key)
    sum_days(engine, (1,))
    right = queries.usage(engine, ONE, ("day",))
    more = "arrayMap(n -> n + 1, counts) AS counts, version + 1 AS version"
    engine.execute(f"INSERT INTO usage_days SELECT * REPLACE ({more}) FROM usage_days")
    wrong = queries.usage(engine, ONE, ("day",))
    assert all(one.events > other.events for one, other in zip(wrong, right, strict=True))
    assert sum(row.events for row in queries.usage(engine, ONE, ("hour",))) == sum(row.events for row in right)
    late = usage("late", ONE, started_ms=NOW_MS - DAY_S * 1_000 - 1, ended_ms=NOW_MS - DAY_S * 1_000)
    ledger.usage(batch([late], "p", 21, 21))
    feed(engine, ledger.stored, KEYS.seal_key)
    [before, yesterday] = queries.usage(engine, ONE, ("day",))
    assert yesterday.events == right[1].events + 1
    assert before.events == wrong[0].events


def test_a_day_of_a_partition_that_nobody_summed_is_read_by_minute(engine: ChdbEngine, ledger: Ledger) -> None:
    ledger.usage(_Numbers().batch((1, 2)))
    feed(engine, ledger.stored, KEYS.seal_key)
    right = queries.usage(engine, ONE, ("day",))
    engine.insert(USAGE_DAYS_SUMMED, {"ledger_partition": [0], "before_day": [TODAY_S], "version": [2**50]})
    assert trusted_days(engine, ONE, 0) == TrustedDays(TODAY_S, (TODAY_S - 2 * DAY_S, TODAY_S - DAY_S))
    assert right
    assert queries.usage(engine, ONE, ("day",)) == right


class _Crashing:
    """An engine that fails at the first insert of the place that says how far the sums are."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        self.query, self.execute, self.close = engine.query, engine.execute, engine.close

    def insert(self, table: Table, columns: Columns) -> int:
        if table is USAGE_DAYS_SUMMED:
            raise EngineError("cut")
        return self._engine.insert(table, columns)


def test_a_crash_between_the_sums_and_their_place_changes_no_answer(
    engine: ChdbEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = _Numbers()
    for step in range(2):
        ledger.usage(numbers.batch())
        feed(engine, ledger.stored, KEYS.seal_key)
        with pytest.raises(EngineError, match="cut"):
            sum_days(_Crashing(engine), (1,))
        [[rows]] = engine.query(f"SELECT count() FROM {USAGE_DAYS.name}").rows
        assert rows
        assert _seen(engine) == _by_minute(engine, monkeypatch), step
        ledger.usage(numbers.batch())
        feed(engine, ledger.stored, KEYS.seal_key)
        assert _seen(engine) == _by_minute(engine, monkeypatch), step
        sum_days(engine, (1,))


def test_whoever_is_told_to_stop_leaves_the_earlier_place(engine: ChdbEngine, ledger: Ledger) -> None:
    ledger.usage(_Numbers().batch())
    feed(engine, ledger.stored, KEYS.seal_key)
    assert sum_days(engine, (1,), lambda: True) == 0
    assert trusted_days(engine, ONE, 0) == TrustedDays()
