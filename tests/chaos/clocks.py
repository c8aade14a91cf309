"""Wrong clocks: of the producer, of one worker or both, of the sink; minutes and a day off, a month's end, a change of DST.

Promises on trial: usage is charged once and in the order of the log whatever the clocks say; log time never goes back; a worker
too far ahead writes nothing (Kafka refuses it) and another goes on; usage stamped beyond what the ledger takes is refused and
told. The broker's clock is right: it is what the others are held against.
"""

from __future__ import annotations

import calendar
import datetime
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

from tests.chaos.clock import ShiftedClock
from tests.chaos.installation import KafkaInstallation
from tests.chaos.refusals import Refusing

__all__ = ["ClockInstallation"]

_PARTS: Final = ("producer", "worker-1", "worker-2", "sink")
_ZONE: Final = "Europe/Berlin"
_MINUTE_S: Final = 60.0
_DAY_S: Final = 86_400.0
# Of a moment that is to pass while the load runs.
_BEFORE_S: Final = 1.5
_ACKNOWLEDGED: Final = 150
_MOMENT_S: Final = 120.0
_AHEAD: Final = "ahead of Kafka's clock"


class ClockInstallation(KafkaInstallation):
    """Each part has a clock of its own, in a zone that changes its offset twice a year."""

    name = "clocks"

    def __init__(self, folder: Path) -> None:
        self.clocks = {name: ShiftedClock(folder / "clocks" / name) for name in _PARTS}
        super().__init__(folder)

    def environment(self, part: str) -> Mapping[str, str]:
        clock = self.clocks.get(part)
        return super().environment(part) if clock is None else {**super().environment(part), **clock.environment, "TZ": _ZONE}


class WrongClock(Refusing):
    """Some clocks jump, and jump back when it is healed."""

    name = "wrong-clock"
    checks = "I2, I5, I7"
    nightly = 20
    setup = ClockInstallation
    hold_s = (1.0, 3.0)

    def inject(self) -> None:
        installation = self.world.installation
        assert isinstance(installation, ClockInstallation)
        victims = self.draw.choice(
            [["producer"], ["producer"], ["worker-1"], ["worker-2"], ["worker-1", "worker-2"], ["sink"], _PARTS]
        )
        self._victims = list(victims)
        self._what, self._shift_s = self.draw.choice(_jumps(time.time()))
        self._began = {name: installation.parts[name].child.log_path.stat().st_size for name in _PARTS}
        before = self.world.acknowledged()
        self._shifted_ms = time.time_ns() // 1_000_000
        for name in self._victims:
            installation.clocks[name].shift(self._shift_s)
        if "producer" in self._victims:
            # The driver stamps usage for it.
            installation.load.clock_ahead_ms = int(self._shift_s * 1_000)
        self.world.wait(lambda: self.world.acknowledged() >= before + _ACKNOWLEDGED, _MOMENT_S, "usage while clocks are wrong")
        self._acknowledged = self.world.acknowledged() - before

    def heal(self) -> None:
        installation = self.world.installation
        assert isinstance(installation, ClockInstallation)
        installation.load.clock_ahead_ms = 0
        for clock in installation.clocks.values():
            clock.shift(0.0)
        installation.restart_dead()

    def evidence(self) -> str:
        if not self._acknowledged:
            return ""
        stopped = [name for name in self._victims if _AHEAD in self._said(name)]
        told = f"; {', '.join(stopped)} refused by Kafka" if stopped else ""
        refused = f"; {len(self._stated)} refused and told" if self._stated else ""
        return f"{', '.join(self._victims)} {self._what}, {self._acknowledged} acknowledged meanwhile{told}{refused}"

    def _said(self, name: str) -> str:
        path = self.world.installation.parts[name].child.log_path
        with path.open("rb") as log:
            log.seek(self._began[name])
            return log.read().decode(errors="replace")

    def violations(self) -> list[str]:
        found = super().violations()
        # Log time is in the record that charged it: a worker's clock may put it ahead, by what Kafka lets through and no more.
        latest_ms = max(self.world.ledger.charged_ms.values(), default=0)
        ahead_s = (latest_ms - time.time_ns() // 1_000_000) / 1_000
        if ahead_s > 10 * _MINUTE_S:
            found.append(f"the ledger's log time is {ahead_s:.0f} s ahead of the broker's clock")
        return found


def _jumps(now_s: float) -> list[tuple[str, float]]:
    """By name: how far a clock jumps."""
    jumps = [
        ("5 min ahead", 5 * _MINUTE_S),
        ("5 min behind", -5 * _MINUTE_S),
        ("a day ahead", _DAY_S),
        ("a day behind", -_DAY_S),
        ("at the last month's end", _last_month_end(now_s) - _BEFORE_S - now_s),
    ]
    return [*jumps, ("at the last change of DST", _last_change(now_s) - _BEFORE_S - now_s)]


def _last_month_end(now_s: float) -> float:
    """The last midnight, UTC, of a month's first day."""
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    return float(calendar.timegm((now.year, now.month, 1, 0, 0, 0)))


def _last_change(now_s: float) -> float:
    """The last hour at which the zone's offset changed: usage from then may be too old for the ledger, which says so."""
    zone = ZoneInfo(_ZONE)

    def offset(at_s: float) -> datetime.timedelta | None:
        return datetime.datetime.fromtimestamp(at_s, zone).utcoffset()

    hour = now_s // 3_600 * 3_600
    while offset(hour) == offset(hour - 3_600):
        hour -= 3_600
    return hour
