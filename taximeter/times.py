"""Times as people write them on a command line, in UTC, and as the rows of an answer show them."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from taximeter.errors import MisuseError

__all__ = ["MINUTE_MS", "now_ms", "parse_month", "parse_time_ms", "show_month", "show_time", "yesterday_ms"]

MINUTE_MS: Final = 60_000
_DAY_MS: Final = 86_400_000
_AGO: Final = re.compile(r"(\d{1,6})([smhd])")
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})")
_UNIT_MS: Final = {"s": 1_000, "m": MINUTE_MS, "h": 60 * MINUTE_MS, "d": _DAY_MS}


def now_ms() -> int:
    """The wall clock, Unix milliseconds."""
    return time.time_ns() // 1_000_000


def yesterday_ms(now: int) -> int:
    """00:00 UTC of the day before."""
    return now // _DAY_MS * _DAY_MS - _DAY_MS


def parse_time_ms(option: str, text: str, *, now: int) -> int:
    """Unix milliseconds of "2026-01-31", "2026-01-31T12:00:00Z", or "2h" (so long ago). Without a zone: UTC."""
    if match := _AGO.fullmatch(text):
        return now - int(match[1]) * _UNIT_MS[match[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise MisuseError(
            f"{option} {text!r} is no time: write 2026-01-31, 2026-01-31T12:00:00Z, or how long ago, like 30m, 2h, 7d"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.replace(microsecond=0).timestamp()) * 1_000 + moment.microsecond // 1_000


def parse_month(text: str, option: str = "--month") -> int:
    """Months since 1970-01 of "2026-01"."""
    if (match := _MONTH.fullmatch(text)) is None or not (1970 <= int(match[1]) <= 2200 and 1 <= int(match[2]) <= 12):
        raise MisuseError(f"{option} {text!r} is no month: write it like 2026-01")
    return (int(match[1]) - 1970) * 12 + int(match[2]) - 1


def show_month(month: int) -> str:
    """2026-01 of months since 1970-01."""
    return f"{1970 + month // 12}-{month % 12 + 1:02d}"


def show_time(at_ms: int) -> str:
    """2026-01-31T12:00:00.250Z; a dash for a time that never was."""
    if at_ms <= 0:
        return "-"
    moment = datetime.fromtimestamp(at_ms // 1_000, UTC) + timedelta(milliseconds=at_ms % 1_000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at_ms % 1_000:03d}Z"
