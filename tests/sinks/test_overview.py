"""All tenants at once: the same sums as minute by minute, whatever was summed before and whatever came late."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.v1.command_pb2 import Price
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from sinks import overview, queries
from sinks.day_totals import DAY_S, sum_days
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.migrate import migrate
from tests.billing.ledgers import KEYS, NOW_MS, PRICES, Ledger, batch, tenants_in, usage

DAY_MS = 86_400_000
TENANTS = tenants_in(1)
START_S = NOW_MS // DAY_MS * DAY_S - 5 * DAY_S


@pytest.fixture
def engine(chdb_folder: Path) -> Iterator[ChdbEngine]:
    made = ChdbEngine(chdb_folder, "overview")
    migrate(made)
    yield made
    made.close()


def sums(rows: list[queries.UsageRow]) -> set[overview.Sums]:
    return {overview.sums_of(row, row.group[0].lstrip("0")) for row in rows}


def check(engine: ChdbEngine, kept: overview.InstallationUsage, now_ms: int) -> None:
    """What is kept, and what a fresh one reads, are what the minutes say."""
    minutes_from_ms = (now_ms // 60_000 - 59) * 60_000
    for asked in (kept, overview.InstallationUsage()):
        found = asked.since(engine, START_S, now_ms // 1_000)
        assert set(found.tenants) == sums(queries.usage(engine, by=("tenant",), start_ms=START_S * 1_000))
        assert set(found.models) == sums(queries.usage(engine, by=("model",), start_ms=START_S * 1_000))
        days = queries.usage(engine, by=(), start_ms=START_S * 1_000, bucket=queries.Bucket("day"))
        assert set(found.days) == sums(days)
        minutes = queries.usage(engine, by=(), start_ms=minutes_from_ms, bucket=queries.Bucket("minute"))
        assert set(found.minutes) == sums(minutes)
        assert found.days


def test_it_is_the_sum_of_all_minutes_whatever_comes_late(engine: ChdbEngine) -> None:
    rng = random.Random(3)
    ledger, kept, fed = Ledger(), overview.InstallationUsage(), 0
    ledger.price([*PRICES, Price(model="other", uncached_input_pico=7, output_pico=9)])
    number = 0

    def say(log_ms: int, *days_ago: int) -> None:
        """Usage that ended so many days before, and the database has it."""
        nonlocal number, fed
        events = []
        for days in days_ago:
            number += 1
            at_ms = log_ms - days * DAY_MS - rng.randrange(3_000_000)
            events.append(
                usage(
                    f"r{number}",
                    rng.choice(TENANTS),
                    model=rng.choice(["smollm2", "other", "unpriced"]),
                    ended_ms=at_ms,
                    started_ms=at_ms,
                    units=[UnitQuantity(unit="gpu_ms", quantity=rng.randrange(1, 9))] if number % 3 == 0 else [],
                    **({"outcome": OUTCOME_REJECTED} if number % 5 == 0 else {}),
                )
            )
        ledger.usage(batch(events), log_ms)
        feed(engine, ledger.stored[max(0, fed - 1) :], KEYS.seal_key)
        fed = len(ledger.stored)

    say(NOW_MS, *(3, 2, 1, 0) * 6)
    check(engine, kept, NOW_MS)
    assert sum_days(engine, [1]) > 0
    check(engine, kept, NOW_MS)
    for log_ms, days_ago in (
        (NOW_MS + 60_000, (0, 0)),
        # Late, for days that are summed; the second time into the same windows or others.
        (NOW_MS + 120_000, (1, 2, 3)),
        (NOW_MS + 180_000, (1, 1, 2)),
        (NOW_MS + 240_000, (0,)),
    ):
        say(log_ms, *days_ago)
        check(engine, kept, log_ms)
    # The next day: what was today is over, and by the minute until it is summed.
    say(NOW_MS + DAY_MS, 0, 1, 2)
    check(engine, kept, NOW_MS + DAY_MS)
    sum_days(engine, [1])
    check(engine, kept, NOW_MS + DAY_MS)
    # In the first hour of a day the minutes are those of the day before, too.
    midnight_ms = (NOW_MS // DAY_MS + 2) * DAY_MS
    say(midnight_ms + 60_000, 0, 0, 0, 0)
    sum_days(engine, [1])
    check(engine, kept, midnight_ms + 60_000)


def test_the_first_are_those_that_cost_most() -> None:
    rows = [
        overview.Sums(name, "USD", 1, 0, 0, tokens, 0, 0, cost_pico)
        for name, cost_pico, tokens in (("a", 1, 1), ("b", 3, 1), ("c", 1, 2), ("d", 2, 1))
    ]
    assert [found.name for found in overview.top(rows, 3)] == ["b", "d", "c"]
