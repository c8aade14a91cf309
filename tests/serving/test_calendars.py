"""The months of time zones, as the ledger wants them stated."""

from __future__ import annotations

import pytest

from billing.periods import calendar_problem, month_of, same_through
from serving.calendars import calendar_of

DAY_MS = 86_400_000
NOVEMBER_MS = 1_763_880_000_000


@pytest.mark.parametrize("time_zone", ["Asia/Shanghai", "America/Los_Angeles", "Australia/Lord_Howe", "UTC"])
def test_a_zone_given_again_keeps_the_months_that_have_begun(time_zone: str) -> None:
    """The calendar began ten years before the command: a month later another one, which was refused."""
    first = calendar_of(time_zone, NOVEMBER_MS)
    for days in (30, 200, 365, 10 * 365):
        later_ms = NOVEMBER_MS + days * DAY_MS
        again = calendar_of(time_zone, later_ms)
        assert calendar_problem(again) is None
        assert same_through(first, again, month_of(later_ms) + 1)
