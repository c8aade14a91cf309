"""A tenant's usage as its overview shows it: the same sums as minute by minute, whatever was kept and whatever came late."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from billing.periods import Period
from billing.v1.command_pb2 import Price
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from sinks import overview, queries, tenant_usage
from sinks.day_totals import sum_days
from sinks.engine import Rows
from sinks.engines.chdb import ChdbEngine
from sinks.engines.json_rows import decode_rows
from sinks.follow import feed
from sinks.parameters import Parameter, bind
from sinks.queries import Bucket
from sinks.tenant_usage import Asked, TenantSums, TenantUsage
from tests.billing.ledgers import KEYS, NOW_MS, PRICES, Ledger, batch, tenants_in, usage

DAY_MS = 86_400_000
ONE, OTHER = tenants_in(1, 2)
ZONES = ("UTC", "America/St_Johns")


class Counting:
    """A reader that knows how many questions it was asked, and how many rows the engine read for them."""

    def __init__(self, engine: ChdbEngine) -> None:
        self._engine = engine
        self.questions = self.rows_read = 0

    def query(self, sql: str, parameters: Mapping[str, Parameter] | None = None, *, timeout_s: float = 30.0) -> Rows:
        answer = self._engine.query_json(bind(sql, parameters), timeout_s=timeout_s)
        self.questions += 1
        self.rows_read += json.loads(answer)["statistics"]["rows_read"]
        return decode_rows(answer)

    def close(self) -> None:
        """The engine goes on."""


class Said:
    """A ledger whose usage the database has, and what was kept of it, by zone."""

    def __init__(self, engine: ChdbEngine) -> None:
        self.engine, self.ledger, self.fed, self.number = engine, Ledger(), 0, 0
        self.kept = {zone: TenantUsage() for zone in ZONES}
        self.ledger.price([*PRICES, Price(model="other", uncached_input_pico=7, output_pico=9)])

    def say(self, log_ms: int, *ended_ms: int) -> None:
        """Usage that ended then."""
        events = []
        for at_ms in ended_ms:
            self.number = number = self.number + 1
            events.append(
                usage(
                    f"r{number}",
                    OTHER if number % 7 == 0 else ONE,
                    project_id=f"p{number % 3}",
                    model=("smollm2", "other", "unpriced")[number % 4 % 3],
                    ended_ms=at_ms,
                    started_ms=at_ms,
                    units=[UnitQuantity(unit="gpu_ms", quantity=number)] if number % 3 == 0 else [],
                    **({"outcome": OUTCOME_REJECTED} if number % 5 == 0 else {}),
                )
            )
        self.ledger.usage(batch(events), log_ms)
        self.feed()

    def feed(self) -> None:
        feed(self.engine, self.ledger.stored[max(0, self.fed - 1) :], KEYS.seal_key)
        self.fed = len(self.ledger.stored)

    def check(self, now_ms: int, *, afresh: bool = False) -> None:
        """What is kept, or what a fresh one reads, is what the minutes say."""
        written = queries.positions(self.engine)
        for zone in ZONES:
            asked = asked_of(zone, now_ms)
            expected = from_minutes(self.engine, asked)
            assert expected.total
            assert (TenantUsage() if afresh else self.kept[zone]).since(self.engine, ONE, asked, written) == expected


def asked_of(zone: str, now_ms: int) -> Asked:
    """The month of the zone in which that lies, the last 30 days and the last 60 minutes."""
    here = datetime.fromtimestamp(now_ms / 1_000, ZoneInfo(zone)).replace(hour=0, minute=0, second=0, microsecond=0)
    begins = here.replace(day=1)
    ends = (begins + timedelta(days=32)).replace(day=1)
    period = Period(*(int(time.timestamp()) * 1_000 for time in (begins, ends)))
    days_from_ms = int((here - timedelta(days=29)).timestamp()) * 1_000
    return Asked(zone, period, days_from_ms, (now_ms // 60_000 - 59) * 60_000, now_ms)


def from_minutes(engine: ChdbEngine, asked: Asked) -> TenantSums:
    def read(by: tuple[str, ...], start_ms: int, end_ms: int, bucket: Bucket | None = None) -> list[overview.Sums]:
        rows = queries.usage(engine, ONE, by, start_ms, end_ms, bucket=bucket)
        return [overview.sums_of(row, row.group[0] if row.group else "") for row in rows]

    period, ever_ms = asked.period, queries.TIME_MS_MAX
    return TenantSums(
        read((), *period),
        read((), asked.days_from_ms, period.end_ms, Bucket("day", asked.zone)),
        read((), asked.minutes_from_ms, ever_ms, Bucket("minute")),
        read(("project",), *period),
        read(("model",), *period),
    )


def test_it_is_the_sum_of_all_minutes_whatever_comes_late(engine: ChdbEngine) -> None:
    said = Said(engine)
    # Of two months, and around midnights of each zone.
    hours = [*range(0, 72, 5), *range(500, 800, 37)]
    said.say(NOW_MS, *(NOW_MS - hour * 3_600_000 - 1_000 for hour in hours))
    said.check(NOW_MS)
    assert sum_days(engine, [1, 2]) > 0
    said.check(NOW_MS, afresh=True)
    for minutes, *days_ago in ((1, 0, 0), (2, 1, 2, 3, 25), (3, 1, 1, 2, 25), (4, 0)):
        log_ms = NOW_MS + minutes * 60_000
        said.say(log_ms, *(log_ms - days * DAY_MS - 90_000 for days in days_ago))
        said.check(log_ms)
    # The next day: what was today is over, and by the minute until it is summed. Then in the first hour of a day.
    midnight_ms = (NOW_MS // DAY_MS + 2) * DAY_MS
    for log_ms in (NOW_MS + DAY_MS, midnight_ms + 60_000):
        said.say(log_ms, *(log_ms - ago_ms for ago_ms in (0, 90_000, 2_000_000, DAY_MS)))
        said.check(log_ms)
        sum_days(engine, [1, 2])
        said.check(log_ms, afresh=True)
    # Another month, which begins in a zone after another.
    month_ms = int(datetime(2025, 12, 1, tzinfo=UTC).timestamp()) * 1_000
    for log_ms in (month_ms + 1_000, month_ms + 4 * 3_600_000):
        said.say(log_ms, log_ms, log_ms - 7_200_000)
        said.check(log_ms)


def test_what_is_over_is_read_again_only_when_something_of_it_was_stated(engine: ChdbEngine) -> None:
    said, kept, asked = Said(engine), TenantUsage(), asked_of("UTC", NOW_MS)
    said.say(NOW_MS, *(NOW_MS - hour * 3_600_000 for hour in range(0, 400, 3)))

    def ask() -> tuple[int, int]:
        reader = Counting(engine)
        found = kept.since(reader, ONE, asked, queries.positions(engine))
        assert found == from_minutes(engine, asked)
        return reader.questions, reader.rows_read

    first, rows = ask()
    then, fewer = ask()
    assert then == first - 1
    assert fewer < rows
    # Today's alone is new.
    said.say(NOW_MS + 1, NOW_MS)
    assert ask()[0] == then
    said.say(NOW_MS + 2, NOW_MS - 3 * DAY_MS)
    assert ask()[0] == first
    assert ask()[0] == then


def test_who_is_told_of_late_usage_before_it_is_there_asks_again(engine: ChdbEngine) -> None:
    """The writer states a day before it writes its minutes, and its position last."""
    said, kept, asked = Said(engine), TenantUsage(), asked_of("UTC", NOW_MS)
    late_ms = NOW_MS - 2 * DAY_MS
    said.say(NOW_MS, NOW_MS, late_ms)
    written = queries.positions(engine)
    said.say(NOW_MS + 1, late_ms, late_ms)
    tables = ("usage_totals", "usage_by_minute")
    for table in tables:
        engine.execute(f"CREATE TABLE kept_{table} AS {table}")
        engine.execute(f"INSERT INTO kept_{table} SELECT * FROM {table}")
        engine.execute(f"DELETE FROM {table} WHERE version > {written[1]}")
    before = kept.since(engine, ONE, asked, written)
    assert before == from_minutes(engine, asked)
    for table in tables:
        engine.execute(f"INSERT INTO {table} SELECT * FROM kept_{table}")
        engine.execute(f"DROP TABLE kept_{table}")
    after = kept.since(engine, ONE, asked, queries.positions(engine))
    assert after == from_minutes(engine, asked) != before


def test_sums_of_too_many_names_take_no_memory_between_updates(engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_usage, "ROWS_MAX", 3)
    said = Said(engine)
    said.say(NOW_MS, *(NOW_MS - n * DAY_MS for n in range(12)))
    said.check(NOW_MS)
    said.check(NOW_MS)
    assert all(not kept._over for kept in said.kept.values())
