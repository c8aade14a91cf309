"""When the months of a time zone begin, as the ledger wants it stated: looked up once, here, from the zone's rules of today."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from billing.periods import month_of, month_start_ms
from billing.v1.account_pb2 import Calendar

__all__ = ["UnknownTimeZone", "calendar_of"]

# A fixed month: the same zone given again, a year later, is the same calendar, which only goes on for longer.
_FIRST_MONTH: Final = 12 * (2016 - 1970)
_YEARS_AHEAD: Final = 50


class UnknownTimeZone(ValueError):
    """No rules of such a zone are at hand."""


def calendar_of(time_zone: str, now_ms: int) -> Calendar:
    """The months of `time_zone` from 2016 to long after `now_ms`. Raises UnknownTimeZone for a zone that nobody knows."""
    try:
        zone = ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UnknownTimeZone(f"time zone {time_zone!r} is not known: write its IANA name, like Asia/Shanghai") from None
    calendar = Calendar(time_zone=time_zone)
    this_month = month_of(now_ms)
    for month in range(_FIRST_MONTH, this_month + 12 * _YEARS_AHEAD):
        midnight = datetime.fromtimestamp(month_start_ms(month) // 1_000, UTC).replace(tzinfo=zone)
        offset = midnight.utcoffset()
        assert offset is not None
        minutes = int(offset.total_seconds()) // 60
        if not calendar.offset_minutes or minutes != calendar.offset_minutes[-1]:
            calendar.from_month.append(month)
            calendar.offset_minutes.append(minutes)
    return calendar
