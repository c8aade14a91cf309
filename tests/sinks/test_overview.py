"""All tenants at once: the same sums as minute by minute, whatever was summed before and whatever came late."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import pytest

from billing.v1.command_pb2 import Price
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from sinks import day_totals, overview, queries
from sinks.columns import version_of
from sinks.day_totals import DAY_S, sum_days
from sinks.engine import Rows
from sinks.engines.chdb import ChdbEngine
from sinks.engines.json_rows import decode_rows
from sinks.follow import feed
from sinks.parameters import Parameter, bind
from tests.billing.ledgers import KEYS, NOW_MS, PRICES, Ledger, batch, tenants_in, usage
from tests.sinks.emptying import empty_tables

DAY_MS = 86_400_000
TENANTS = tenants_in(1)
START_S = NOW_MS // DAY_MS * DAY_S - 5 * DAY_S


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


class Counting:
    """A reader that knows how many rows the engine read for its answers."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        self.rows_read = 0

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        answer = self._engine.query_json(bind(sql, parameters), timeout_s=timeout_s)
        self.rows_read += json.loads(answer)["statistics"]["rows_read"]
        return decode_rows(answer)

    def close(self) -> None:
        """The engine goes on."""


# Each of the tenants uses something at the same time, again and again.
_MINUTES = """
INSERT INTO usage_totals (tenant_id, minute, project_id, model, operation, service_class, generation, opened_sequence, events,
    uncached_input_tokens, unit_names, unit_quantities, cost, currency, sequence, version)
SELECT concat('tenant-', toString(number % {tenants})), toDateTime({start} + intDiv(number, {tenants}) * {apart}, 'UTC'),
    'p', 'm', 'chat', 'standard', toString({version}), number, 1, 100, ['gpu_ms'], [5], toDecimal128(1, 12), 'USD', 1, {version}
FROM numbers({rows})
"""
_POSITION = """
INSERT INTO sink_positions (ledger_partition, generation, sequence, log_time, version)
SELECT 0, 'g', 1, toDateTime64({now}, 3), {version}
"""
_STATED = """
INSERT INTO usage_days_stated SELECT DISTINCT tenant_id, toStartOfDay(minute), ledger_partition, version FROM usage_totals
WHERE version = {version}
"""


def test_what_is_read_for_an_update_is_what_is_new_however_rows_are_merged(engine: ChdbEngine) -> None:
    tenants, of_day, start_s = 300, 96, START_S - 5 * DAY_S
    rows, now_s = tenants * of_day * 10, start_s + 10 * DAY_S - 1
    everything = {"tenants": tenants, "start": start_s, "apart": DAY_S // of_day, "rows": rows, "version": version_of(1, 1)}
    engine.execute(_MINUTES.format(**everything))
    engine.execute(_STATED.format(version=version_of(1, 1)))
    engine.execute(_POSITION.format(now=now_s, version=version_of(1, 1)))
    assert sum_days(engine, [0]) == tenants * 9
    for table in ("usage_totals", "usage_by_minute"):
        engine.execute(f"OPTIMIZE TABLE {table} FINAL")
    kept = overview.InstallationUsage()

    def asked() -> tuple[int, int]:
        """The events that the answer says there are, and the rows that were read for it."""
        reader = Counting(engine)
        found = kept.since(reader, start_s, now_s)
        assert sum(row.gpu_ms for row in found.models) == 5 * sum(row.events for row in found.tenants)
        return sum(row.events for row in found.days), reader.rows_read

    events, first_rows = asked()
    # Today's minutes, the days before as they were summed, and whose they are.
    assert (events, first_rows < rows // 3) == (rows, True), first_rows
    # Each tenant has used something since; and one of them in a day that was summed, which costs that tenant's minutes once.
    recent = {"tenants": tenants, "start": now_s // 60 * 60, "apart": 0, "rows": tenants, "version": version_of(1, 2)}
    engine.execute(_MINUTES.format(**recent))
    late = {"tenants": 1, "start": start_s + DAY_S, "apart": 0, "rows": 1, "version": version_of(1, 3)}
    engine.execute(_STATED.format(version=version_of(1, 2)))
    engine.execute(_POSITION.format(now=now_s, version=version_of(1, 2)))
    events, update_rows = asked()
    assert (events, update_rows < rows // 8) == (rows + tenants, True), update_rows
    engine.execute(_MINUTES.format(**late))
    engine.execute(_STATED.format(version=version_of(1, 3)))
    # The minutes are there, the position that says so is not yet: what is kept of them waits for it.
    for _ in range(2):
        assert asked()[0] == rows + tenants + 1
    engine.execute(_POSITION.format(now=now_s, version=version_of(1, 3)))
    assert asked()[0] == rows + tenants + 1
    events, update_rows = asked()
    assert (events, update_rows < rows // 8) == (rows + tenants + 1, True), update_rows


def test_what_settles_is_read_once_and_again_where_it_is_stated_anew(engine: ChdbEngine) -> None:
    kept, now_s, number = overview.InstallationUsage(), START_S + 12 * 3_600, 0

    def events(rows: int, minute_s: int) -> int:
        """How many there are an eighth of an hour later, with so many new ones in one minute."""
        nonlocal now_s, number
        number, now_s = number + 1, now_s + 450
        stated = {"tenants": 1, "start": minute_s, "apart": 0, "rows": rows, "version": version_of(1, number)}
        engine.execute(_MINUTES.format(**stated))
        return sum(row.events for row in kept.since(engine, START_S, now_s).days)

    expected = 0
    for hour in range(4):
        for minute_s in (now_s, now_s - 400, START_S + 3_600 * hour, now_s - 3_600):
            expected += number + 1
            assert events(number + 1, minute_s) == expected


def test_what_is_stated_before_its_minutes_are_there_is_not_kept_without_them(engine: ChdbEngine) -> None:
    """A writer states whose day changes, writes the minutes, then its position: an answer in between changes no later one."""
    start_s, now_s = START_S, START_S + 2 * DAY_S
    first = {"tenants": 2, "start": start_s, "apart": 600, "rows": 20, "version": version_of(1, 1)}
    engine.execute(_MINUTES.format(**first))
    engine.execute(_STATED.format(version=version_of(1, 1)))
    engine.execute(_POSITION.format(now=now_s, version=version_of(1, 1)))
    sum_days(engine, [0])
    kept = overview.InstallationUsage()

    def events() -> int:
        return sum(row.events for row in kept.since(engine, start_s, now_s).days)

    assert events() == 20
    engine.execute(f"INSERT INTO usage_days_stated SELECT 'tenant-0', toDateTime({start_s}, 'UTC'), 0, {version_of(1, 2)}")
    assert events() == 20
    late = {"tenants": 1, "start": start_s, "apart": 0, "rows": 1, "version": version_of(1, 2)}
    engine.execute(_MINUTES.format(**late))
    assert events() == 21
    engine.execute(_POSITION.format(now=now_s, version=version_of(1, 2)))
    assert events() == 21


def test_the_first_are_those_that_cost_most() -> None:
    rows = [
        overview.Sums(name, "USD", 1, 0, 0, tokens, 0, 0, cost_pico)
        for name, cost_pico, tokens in (("a", 1, 1), ("b", 3, 1), ("c", 1, 2), ("d", 2, 1))
    ]
    assert [found.name for found in overview.top(rows, 3)] == ["b", "d", "c"]


def test_days_that_are_read_while_they_are_being_summed_are_read_again(
    engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of sums may be written in several parts, all of one version."""
    monkeypatch.setattr(day_totals, "_TENANTS_AT_ONCE", 1)
    monkeypatch.setattr(day_totals, "_ROWS_AT_ONCE", 1)
    ledger, kept = Ledger(), overview.InstallationUsage()
    ledger.price(PRICES)

    def say(log_ms: int) -> None:
        """Each tenant's usage of the day before."""
        begin, at_ms = max(0, len(ledger.stored) - 1) if known else 0, NOW_MS - DAY_MS
        known.append(log_ms)
        events = [usage(f"r{log_ms}-{name}", name, ended_ms=at_ms, started_ms=at_ms) for name in TENANTS[:3]]
        ledger.usage(batch(events), log_ms)
        feed(engine, ledger.stored[begin:], KEYS.seal_key)

    def asked() -> bool:
        check(engine, kept, NOW_MS + 60_000)
        return False

    known: list[int] = []
    say(NOW_MS)
    sum_days(engine, [1])
    asked()
    say(NOW_MS + 60_000)
    assert sum_days(engine, [1], asked) > 1
    asked()


def test_the_users_of_the_highest_cost_are_found_among_however_many_there_are(engine: ChdbEngine) -> None:
    engine.execute(
        "INSERT INTO usage_events (tenant_id, request_id, user_id, outcome, ended, uncached_input_tokens, unit_names, "
        "unit_quantities, cost, currency, price_version, version) SELECT 't', toString(number), "
        "leftPad(toString(number), 6, '0'), if(number = 1, 'rejected', 'completed'), "
        f"toDateTime64({NOW_MS // 1_000}, 3), 7, ['gpu_ms'], [3], "
        f"toDecimal128(number, 12), 'USD', 1, 1 FROM numbers({queries.ROWS_MAX + 5})"
    )
    found, names = overview.top_users(engine, "t", NOW_MS, NOW_MS + 1, 20)
    every = queries.usage(engine, "t", ("user",), NOW_MS, NOW_MS + 1, limit=20_000)
    assert names == len(every) == queries.ROWS_MAX + 5
    assert found == overview.top([overview.sums_of(row, row.group[0]) for row in every], 20)
    [refused] = [row for row in overview.top_users(engine, "t", NOW_MS, NOW_MS + 1, names)[0] if row.refused_events]
    assert refused == overview.sums_of(every[1], every[1].group[0])


def test_a_database_that_is_made_anew_has_its_own_sums(engine: ChdbEngine) -> None:
    ledger, kept = Ledger(), overview.InstallationUsage()
    ledger.price(PRICES)
    at_ms = NOW_MS - DAY_MS
    for n in range(3):
        ledger.usage(batch([usage(f"r{n}", TENANTS[0], ended_ms=at_ms, started_ms=at_ms)]), NOW_MS + n)
    feed(engine, ledger.stored, KEYS.seal_key)
    sum_days(engine, [1])
    check(engine, kept, NOW_MS)
    empty_tables(engine)
    feed(engine, ledger.stored[:-1], KEYS.seal_key)
    sum_days(engine, [1])
    check(engine, kept, NOW_MS)
    feed(engine, ledger.stored[-2:], KEYS.seal_key)
    check(engine, kept, NOW_MS)
