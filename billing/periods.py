"""Billing periods: the months of a tenant's time zone, as Unix milliseconds.

The rules of time zones change and differ from machine to machine, so nothing here looks them up: a Calendar states the offset
from UTC of each month, computed once by whoever set the tenant's zone, and every reader of the ledger, now and in ten years,
comes to the same boundaries. The empty Calendar is UTC. Offsets are whole minutes, so a minute lies within one period.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import NamedTuple

from billing.limits import TIME_MS_MAX
from billing.v1.account_pb2 import Calendar

_DAY_MS = 86_400_000
_MINUTE_MS = 60_000
# IANA zones lie between -12:00 and +14:00; a day bounds every one that may come.
_OFFSET_MINUTES_MAX = 24 * 60
_TIME_ZONE_CHARS_MAX = 64
# Twice a year for a hundred years.
_CHANGES_MAX = 200
_DAYS_IN_400_YEARS = 146_097


class Period(NamedTuple):
    """From `start_ms` to before `end_ms`."""

    start_ms: int
    end_ms: int


def month_of(time_ms: int) -> int:
    """Months since 1970-01 at `time_ms`, in UTC."""
    # Howard Hinnant's civil calendar: years begin in March, so that the leap day is a year's last.
    era, day = divmod(time_ms // _DAY_MS + 719_468, _DAYS_IN_400_YEARS)
    year = (day - day // 1_460 + day // 36_524 - day // 146_096) // 365
    day_of_year = day - (365 * year + year // 4 - year // 100)
    march_month = (5 * day_of_year + 2) // 153
    return (era * 400 + year - 1970) * 12 + march_month + 2


def month_start_ms(month: int) -> int:
    """The first midnight of a month, in UTC."""
    years, march_month = divmod(month - 2, 12)
    era, year = divmod(1970 + years, 400)
    days = era * _DAYS_IN_400_YEARS + 365 * year + year // 4 - year // 100 + (153 * march_month + 2) // 5
    return (days - 719_468) * _DAY_MS


def period_start_ms(calendar: Calendar, month: int) -> int:
    """When the period of a month begins."""
    if not calendar.from_month:
        return month_start_ms(month)
    place = max(bisect_right(calendar.from_month, month) - 1, 0)
    return month_start_ms(month) - calendar.offset_minutes[place] * _MINUTE_MS


def month_at(calendar: Calendar, time_ms: int) -> int:
    """Months since 1970-01 of the period in which `time_ms` lies."""
    month = month_of(time_ms)
    # An offset moves a month's start by a day at most, so the period is that of this month or of a neighbour.
    if time_ms < period_start_ms(calendar, month):
        return month - 1
    return month + 1 if time_ms >= period_start_ms(calendar, month + 1) else month


def period_at(calendar: Calendar, time_ms: int) -> Period:
    """The period in which `time_ms` lies."""
    month = month_at(calendar, time_ms)
    return Period(period_start_ms(calendar, month), period_start_ms(calendar, month + 1))


def calendar_problem(calendar: Calendar) -> str | None:
    """What is wrong with `calendar`, for a person, or None."""
    months, offsets = list(calendar.from_month), list(calendar.offset_minutes)
    if len(calendar.time_zone) > _TIME_ZONE_CHARS_MAX:
        return f"calendar.time_zone: {len(calendar.time_zone)} characters; give at most {_TIME_ZONE_CHARS_MAX}"
    if len(months) != len(offsets):
        return f"calendar: {len(months)} months and {len(offsets)} offsets; give one offset for each"
    if len(months) > _CHANGES_MAX:
        return f"calendar: {len(months)} entries; give at most {_CHANGES_MAX}"
    if any(later <= earlier for earlier, later in pairwise(months)):
        return "calendar.from_month: does not rise; give each month once, in order"
    if any(not 0 <= month <= month_of(TIME_MS_MAX) for month in months):
        return "calendar.from_month: is no month since 1970; count months from 1970-01"
    if any(abs(offset) > _OFFSET_MINUTES_MAX for offset in offsets):
        return f"calendar.offset_minutes: is over {_OFFSET_MINUTES_MAX}; an offset from UTC is less than a day"
    return None


def same_through(one: Calendar, other: Calendar, month: int) -> bool:
    """Whether both have the same periods up to and including that of `month`, its end too."""
    changes = {0, month, month + 1, *one.from_month, *other.from_month}
    return all(period_start_ms(one, m) == period_start_ms(other, m) for m in changes if m <= month + 1)
