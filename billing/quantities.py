"""How much of each scheduled price a tenant's period has seen: the counters that tiers and allowances depend on.

Promise: a counter is moved by exactly the events that its price line rated, and a record states each that it moved as an
absolute number, so a replay has the same counters without rating anything. A counter is let go when log time has passed its
period's end by KEPT_MS; usage that comes as a backfill even later finds its tiers at their beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from billing.periods import Period, period_at
from billing.prices import Rate
from billing.rating import counted_quantities, event_parts, token_quantities, unit_quantities
from billing.schedules import Part
from billing.v1.account_pb2 import Calendar
from billing.v1.ledger_pb2 import PeriodQuantities, PeriodUnits
from billing.v1.usage_pb2 import UsageEvent

KEPT_MS = 400 * 86_400_000
_LOW = (1 << 64) - 1


class Counter(NamedTuple):
    """What is counted together. Everything that a rate under the same key depends on is the same."""

    tenant_id: str
    period: Period
    currency: str
    price_version: int
    price_line: int
    counted_class: int


class Quantities:
    """The counters of many tenants."""

    def __init__(self) -> None:
        self._units: dict[Counter, dict[str, int]] = {}
        self._moved: dict[Counter, set[str]] = {}

    def counted(self, event: UsageEvent, rate: Rate | None, currency: str, calendar: Calendar) -> Mapping[str, int]:
        """What stands before `event` under its rate."""
        return {} if rate is None or rate.terms is None else self._units.get(_counter(event, rate, currency, calendar), {})

    def take(self, event: UsageEvent, rate: Rate, currency: str, calendar: Calendar) -> list[Part]:
        """What `event` costs, in parts; its counters are moved. The caller rates in the order of the batch."""
        if rate.terms is None:
            return event_parts(event, rate, {})
        counter = _counter(event, rate, currency, calendar)
        units = self._units.get(counter, {})
        found = event_parts(event, rate, units)
        counted = counted_quantities(token_quantities(event), unit_quantities(event), event.context_tokens, rate)
        if counted:
            self._units.setdefault(counter, units)
            self._moved.setdefault(counter, set()).update(counted)
            for name, quantity in counted.items():
                units[name] = units.get(name, 0) + quantity
        return found

    def take_moved(self) -> list[PeriodQuantities]:
        """The counters that were moved since the last call, as a record states them, in a stated order."""
        moved = [_stated(counter, self._units[counter], sorted(self._moved[counter])) for counter in sorted(self._moved)]
        self._moved.clear()
        return moved

    def all(self) -> Iterator[PeriodQuantities]:
        """Every counter, in a stated order."""
        return (_stated(counter, self._units[counter], sorted(self._units[counter])) for counter in sorted(self._units))

    def items(self) -> Iterator[tuple[Counter, Mapping[str, int]]]:
        """Every counter and its quantities, in a stated order."""
        return ((counter, self._units[counter]) for counter in sorted(self._units))

    def set(self, stated: PeriodQuantities) -> None:
        """Take what a record states."""
        units = self._units.setdefault(counter_of(stated), {})
        for entry in stated.units:
            units[entry.quantity] = entry.units_high << 64 | entry.units

    def forget(self, before_ms: int) -> None:
        """Let go of periods that ended before then."""
        for counter in [counter for counter in self._units if counter.period.end_ms < before_ms]:
            del self._units[counter]


def counter_of(stated: PeriodQuantities) -> Counter:
    """The counter that a record's entry is about."""
    return Counter(
        stated.tenant_id,
        Period(stated.period_start_ms, stated.period_end_ms),
        stated.currency,
        stated.price_version,
        stated.price_line,
        stated.service_class,
    )


def _counter(event: UsageEvent, rate: Rate, currency: str, calendar: Calendar) -> Counter:
    assert rate.terms is not None
    period = period_at(calendar, event.ended_ms)
    return Counter(event.tenant_id, period, currency, rate.version, rate.terms.line, rate.terms.counted_class)


def _stated(counter: Counter, units: Mapping[str, int], names: list[str]) -> PeriodQuantities:
    return PeriodQuantities(
        tenant_id=counter.tenant_id,
        period_start_ms=counter.period.start_ms,
        period_end_ms=counter.period.end_ms,
        currency=counter.currency,
        price_version=counter.price_version,
        price_line=counter.price_line,
        service_class=counter.counted_class,
        units=[PeriodUnits(quantity=name, units=units[name] & _LOW, units_high=units[name] >> 64) for name in names],
    )
