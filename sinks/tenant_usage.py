"""A tenant's usage as its overview shows it: by day, by minute, by project and model of the billing period.

Promise: the sums are those that `queries.usage` gives of the same minutes. What is over, the days of UTC before the one in
which log time lies, is summed once and kept until something of those days is stated anew: the writer says so of a tenant's day
before it writes the minutes, and who was told so before the minutes were there asks again. So an update reads the day that
runs, whatever came late before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, NamedTuple, cast

from billing.periods import Period
from sinks import queries
from sinks.day_totals import DAY_S, TrustedDays, day_marks
from sinks.engine import Reader, decimal_to_pico
from sinks.overview import SUMMED, Sums, minutes_of, totals_of
from sinks.queries import ROWS_MAX

__all__ = ["Asked", "TenantSums", "TenantUsage"]

_NEVER_S: Final = 2**32 - 1
_DAY_MS: Final = DAY_S * 1_000
_OF_TENANT: Final = " WHERE tenant_id = {tenant:String}"
# In which part of what is asked a minute lies.
_BESIDE, _BEFORE, _IN_PERIOD = range(3)
_SUMS: Final = ", ".join(f"sum({name})" for name in SUMMED)


class Asked(NamedTuple):
    """Of which times: a billing period and the days before it from `days_from_ms`, both as long as log time is `at_ms`; and
    minutes, from one on. Days are those of the zone."""

    zone: str
    period: Period
    days_from_ms: int
    minutes_from_ms: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class TenantSums:
    """The period's total, and each by name; days and minutes by the second in which they begin, from where they were asked."""

    total: list[Sums]
    days: list[Sums]
    minutes: list[Sums]
    projects: list[Sums]
    models: list[Sums]


class _Key(NamedTuple):
    """Whose sum it is: "total", "day", "minute", "project" or "model"."""

    kind: str
    name: str
    currency: str


# In the order of the last fields of `Sums`.
_Found = dict[_Key, tuple[int, ...]]


class TenantUsage:
    """Of one tenant; asked again and again, by one thread at a time."""

    def __init__(self) -> None:
        self._over: _Found = {}
        # What was asked, and what had been stated of it, when that was read; None: it is read again.
        self._known: object = None

    def since(self, reader: Reader, tenant_id: str, asked: Asked, written: Mapping[int, int]) -> TenantSums:
        """The sums, where the database had everything up to `written` (by partition: a version) before it was asked."""
        zone, period, days_from_ms, minutes_from_ms, at_ms = asked
        start_s, minutes_from_s = min(period.start_ms, days_from_ms) // 1_000, minutes_from_ms // 1_000
        over_s = max(start_s, at_ms // _DAY_MS * DAY_S)
        marks = day_marks(reader, tenant_id, start_s)
        stated = marks.stated_before(over_s)
        known = (zone, period, start_s, over_s, stated)
        over = self._over
        if self._known != known:
            # A day of UTC is a day of another zone in part, and may be of two periods.
            is_whole = zone == "UTC" and period.start_ms % _DAY_MS == 0
            source = queries.totals_between(start_s, over_s, marks.trusted() if is_whole else TrustedDays(), _OF_TENANT)
            over = _ask(reader, tenant_id, totals_of(source), asked, start_s, _NEVER_S)
            is_there = all(version <= written.get(partition, 0) for partition, _, version in stated)
            # What is not to be trusted the next time, or too much, takes no memory until then.
            self._known, self._over = (known, over) if is_there and len(over) <= ROWS_MAX else (None, {})
        since_s = min(over_s, minutes_from_s)
        source = minutes_of(f"tenant_id = {{tenant:String}} AND minute >= toDateTime({since_s}, 'UTC')")
        sums = dict(over)
        for key, counts in _ask(reader, tenant_id, source, asked, over_s, minutes_from_s).items():
            before = sums.get(key)
            sums[key] = counts if before is None else tuple(a + b for a, b in zip(before, counts, strict=True))
        days = [row for row in _rows(sums, "day") if int(row.name) * 1_000 >= days_from_ms]
        return TenantSums(_rows(sums, "total"), days, *(_rows(sums, kind) for kind in ("minute", "project", "model")))


def _ask(reader: Reader, tenant_id: str, source: str, asked: Asked, from_s: int, minutes_from_s: int) -> _Found:
    """The sums of `source`: minutes from `minutes_from_s` on, and everything else from `from_s` on."""
    period = asked.period
    start_s, end_s = period.start_ms // 1_000, min(period.end_ms // 1_000, _NEVER_S)
    part = (
        f"multiIf(minute < toDateTime({from_s}, 'UTC') OR minute >= toDateTime({end_s}, 'UTC'), {_BESIDE}, "
        f"minute < toDateTime({start_s}, 'UTC'), {_BEFORE}, {_IN_PERIOD})"
    )
    recent = f"if(minute >= toDateTime({minutes_from_s}, 'UTC'), toUnixTimestamp(minute), 0)"
    rows = reader.query(
        f"SELECT grouping(day), grouping(project), grouping(model), part, day, project, model, recent, currency, {_SUMS} FROM "  # noqa: S608
        f"(SELECT {part} AS part, toUnixTimestamp(toStartOfDay(minute, {{zone:String}})) AS day, {recent} AS recent, "
        f"toString(project_id) AS project, toString(model) AS model, currency, {', '.join(SUMMED)} FROM ({source})) GROUP BY "
        "GROUPING SETS ((part, day, currency), (part, project, currency), (part, model, currency), (recent, currency))",
        {"tenant": tenant_id, "zone": asked.zone},
    ).rows
    found: _Found = {}

    def add(kind: str, name: object, currency: object, counts: tuple[int, ...]) -> None:
        key = _Key(kind, str(name), str(currency))
        before = found.get(key)
        found[key] = counts if before is None else tuple(a + b for a, b in zip(before, counts, strict=True))

    for of_no_day, of_no_project, of_no_model, part_of, day_s, project, model, recent_s, currency, *summed in rows:
        sums = (*cast("list[int]", summed[:-1]), decimal_to_pico(cast("Decimal", summed[-1])))
        # ClickHouse: 0 where a column is one of the set's.
        if not of_no_day and part_of != _BESIDE:
            # The days of a zone may begin in one part and end in another.
            add("day", day_s, currency, sums)
            if part_of == _IN_PERIOD:
                add("total", "", currency, sums)
        elif not of_no_project and part_of == _IN_PERIOD:
            add("project", project, currency, sums)
        elif not of_no_model and part_of == _IN_PERIOD:
            add("model", model, currency, sums)
        elif of_no_day and of_no_project and of_no_model and recent_s:
            add("minute", recent_s, currency, sums)
    return found


def _rows(sums: _Found, kind: str) -> list[Sums]:
    return [Sums(key.name, key.currency, *counts) for key, counts in sorted(sums.items()) if key.kind == kind]
