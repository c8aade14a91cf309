"""Sums of minute totals by day, so that a month of a busy tenant is hundreds of rows and not hundreds of thousands.

Promise: whoever reads by day what `trusted_days` says, and everything else by minute, has the sum of all minutes, at any moment
and whatever comes late. A day is trusted only if it was summed and no minute of it was stated after the ledger position
up to which that sum surely reaches; when that was, the writer states of each tenant's day before it writes the minutes, so
nobody looks through minutes for it. That position is written last, after every sum; a crash half-way leaves the earlier one,
under which nothing that was replaced is trusted. Nothing needs the sums: without them, answers take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import cast

from sinks.engine import Engine, Reader, decimal_to_pico
from sinks.tables import TOKEN_COLUMNS, USAGE_DAYS, USAGE_DAYS_SUMMED

__all__ = ["COUNTS", "DAY_S", "DayMarks", "TrustedDays", "day_marks", "sum_days", "summed_until", "trusted_days"]

DAY_S = 86_400
_TENANTS_AT_ONCE = 50
# Few parts are what reading is quick from.
_ROWS_AT_ONCE = 100_000
_TIMEOUT_S = 120.0
_KEY = "tenant_id, day, project_id, model, operation, service_class, currency, ledger_partition"
# In the order in which `usage_days.counts` has them.
COUNTS = ("events", "refused_events", "unrated_events", *TOKEN_COLUMNS)
# Minutes of one partition, of days that are over, that were stated since the last time, or were not over then.
_CHANGED = (
    "ledger_partition = {partition:UInt32} AND minute < toDateTime({today:Int64}, 'UTC') "
    "AND (version > {version:UInt64} OR minute >= toDateTime({before:Int64}, 'UTC'))"
)


@dataclass(frozen=True, slots=True)
class TrustedDays:
    """Days, by the second in which they begin, that `usage_days` is right about: all before `before_s`, but for `stale_s`."""

    before_s: int = 0
    stale_s: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DayMarks:
    """Of a tenant's days: which are summed, by partition, and up to which version; and which had a minute stated, and when."""

    start_s: int
    summed: dict[int, tuple[int, int]]
    # Partition, the second in which the day begins, the highest version.
    stated: tuple[tuple[int, int, int], ...]

    def trusted(self) -> TrustedDays:
        """What may be read by day of the tenant's usage since then."""
        before_s = max((before_s for before_s, _ in self.summed.values()), default=0)
        stale_s = set()
        for partition, day_s, version in self.stated:
            until_s, summed_version = self.summed.get(partition, (0, 0))
            if day_s < before_s and (day_s >= until_s or version > summed_version):
                stale_s.add(day_s)
        return TrustedDays(before_s, tuple(sorted(stale_s))) if before_s > self.start_s else TrustedDays()

    def stated_before(self, before_s: int) -> tuple[tuple[int, int, int], ...]:
        """What was stated of days before that. While it is the same, and the database has all of it, their minutes are."""
        return tuple(row for row in self.stated if row[1] < before_s)


def day_marks(reader: Reader, tenant_id: str, start_s: int) -> DayMarks:
    """Those of the tenant's days from the one in which `start_s` lies."""
    # One question: what it costs to ask is more than what there is to read.
    rows = reader.query(
        "SELECT 1 AS summed, ledger_partition, toUInt32(before_day), version FROM usage_days_summed FINAL UNION ALL "
        "SELECT 0, ledger_partition, toUInt32(day), max(version) FROM usage_days_stated WHERE tenant_id = {tenant:String} "
        "AND day >= toStartOfDay(toDateTime({start:Int64}, 'UTC')) GROUP BY ledger_partition, day",
        {"tenant": tenant_id, "start": start_s},
    ).rows
    marks = cast("list[tuple[int, int, int, int]]", rows)
    summed = {partition: (before_s, version) for is_mark, partition, before_s, version in marks if is_mark}
    return DayMarks(start_s, summed, tuple(sorted(row[1:] for row in marks if not row[0])))


def trusted_days(reader: Reader, tenant_id: str, start_s: int) -> TrustedDays:
    """What may be read by day of the tenant's usage since then."""
    return day_marks(reader, tenant_id, start_s).trusted()


def summed_until(reader: Reader) -> dict[int, tuple[int, int]]:
    """By partition: before which day its tenants' days are summed, and up to which version surely."""
    rows = reader.query("SELECT ledger_partition, toUInt32(before_day), version FROM usage_days_summed FINAL").rows
    return {partition: (before_s, version) for partition, before_s, version in cast("list[tuple[int, int, int]]", rows)}


def sum_days(engine: Engine, partitions: Collection[int], stopped: Callable[[], bool] = lambda: False) -> int:
    """Sum the days that are over by their partition's log time and have changed since they were; returns the rows written.

    Belongs beside the writer of these partitions. Raises EngineError; then sum again when the engine is back.
    """
    summed = summed_until(engine)
    # Read before the minutes are: what is stated meanwhile may be in a sum, and is not trusted to be.
    positions = engine.query(
        "SELECT ledger_partition, toUInt32(toStartOfDay(toDateTime(log_time, 'UTC'))), version FROM sink_positions FINAL "
        "ORDER BY ledger_partition"
    ).rows
    written = 0
    for partition, today_s, version in cast("list[tuple[int, int, int]]", positions):
        before = summed.get(partition, (0, 0))
        if partition not in partitions or before == (today_s, version):
            continue
        changed = {"partition": partition, "today": today_s, "before": before[0], "version": before[1]}
        rows = engine.query(
            f"SELECT DISTINCT tenant_id FROM usage_totals WHERE {_CHANGED} ORDER BY tenant_id",  # noqa: S608
            changed,
            timeout_s=_TIMEOUT_S,
        ).rows
        tenants = [str(tenant_id) for [tenant_id] in rows]
        sums: list[tuple[object, ...]] = []
        for first in range(0, len(tenants), _TENANTS_AT_ONCE):
            if stopped():
                return written
            sums += _sums(engine, changed, tenants[first : first + _TENANTS_AT_ONCE])
            if len(sums) >= _ROWS_AT_ONCE:
                written += _write(engine, sums, version)
                sums = []
        written += _write(engine, sums, version)
        engine.insert(USAGE_DAYS_SUMMED, {"ledger_partition": [partition], "before_day": [today_s], "version": [version]})
    return written


def _sums(engine: Engine, changed: dict[str, int], tenants: Sequence[str]) -> list[tuple[object, ...]]:
    """The sums of those tenants' days in which something has changed, whole."""
    whose = "tenant_id IN {tenants:Array(String)}"
    sums = ", ".join(f"sum({name})" for name in COUNTS)
    return engine.query(
        "SELECT tenant_id, toUInt32(toStartOfDay(minute)) AS day, project_id, model, operation, service_class, currency, "  # noqa: S608
        f"ledger_partition, [{sums}], sumMap(unit_names, unit_quantities), sum(cost) FROM usage_totals FINAL "
        f"WHERE {whose} AND ledger_partition = {{partition:UInt32}} AND (tenant_id, toStartOfDay(minute)) IN "
        f"(SELECT DISTINCT tenant_id, toStartOfDay(minute) FROM usage_totals WHERE {whose} AND {_CHANGED}) GROUP BY {_KEY}",
        {**changed, "tenants": tenants},
        timeout_s=_TIMEOUT_S,
    ).rows


def _write(engine: Engine, rows: Sequence[tuple[object, ...]], version: int) -> int:
    """How many rows that gave."""
    if not rows:
        return 0
    *plain, units, costs = zip(*rows, strict=True)
    names, quantities = zip(*cast("list[tuple[list[str], list[int]]]", units), strict=True)
    costs_pico = [decimal_to_pico(cost) for cost in costs]
    values = [*plain, names, quantities, costs_pico, [version] * len(rows)]
    return engine.insert(USAGE_DAYS, dict(zip(USAGE_DAYS.columns, values, strict=True)))
