"""Usage that the database holds, rated under any price books: what it costs, in parts, exactly as the ledger would rate it.

Promise: where a model's price is flat, quantities are summed by the database and multiplied here; where it has terms, every
request is rated by itself, in the ledger's order, with the counters of its whole period, by the ledger's own code. Nothing is
written. Memory: one page of requests, and the counters of one tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

from billing.periods import Period, period_at
from billing.prices import PriceBooks, Rate
from billing.quantities import Quantities
from billing.rating import MINIMUM
from billing.rating import parts as parts_of
from billing.schedules import Part
from billing.v1.account_pb2 import Calendar
from billing.v1.usage_pb2 import UnitQuantity, UsageEvent
from billing.validation import TOKEN_FIELDS
from sinks.engine import Parameter, Reader
from sinks.price_books import number_of_operation, number_of_service_class
from sinks.queries import CHARGED

__all__ = ["Payer", "RatedLine", "RatedPart", "UsageKey", "payers", "rated_usage"]

_PAGE_EVENTS = 200_000
_TIMEOUT_S = 120.0
_MODELS_MAX = 1_000
_TOKEN_COLUMNS = ", ".join(TOKEN_FIELDS)
_TOKEN_SUMS = ", ".join(f"sum(toUInt128({name}))" for name in TOKEN_FIELDS)
_OF_TENANT = (
    f"tenant_id = {{tenant:String}} AND currency = {{currency:String}} AND {CHARGED} "
    "AND ended >= fromUnixTimestamp64Milli({start:Int64}) AND ended < fromUnixTimestamp64Milli({end:Int64})"
)


class Payer(NamedTuple):
    """A tenant, as far as rating asks."""

    tenant_id: str
    currency: str
    calendar: Calendar


class UsageKey(NamedTuple):
    """What is summed together: of one period, rated by one version of the book (0: by none)."""

    period: Period
    project_id: str
    model: str
    operation: int
    service_class: int
    price_version: int


class RatedPart(NamedTuple):
    """Units at one price; a price of 0 beside an amount: what lifts requests to their least price, counted in requests."""

    quantity_of: str
    terms: str
    price_pico: int


@dataclass(slots=True)
class RatedLine:
    """What usage under one key comes to."""

    events: int = 0
    # Units and amount.
    parts: dict[RatedPart, tuple[int, int]] = field(default_factory=dict)

    @property
    def cost_pico(self) -> int:
        return sum(amount for _, amount in self.parts.values())

    def add(self, parts: Sequence[Part], events: int) -> None:
        """Add requests that were rated by `parts`."""
        self.events += events
        for part in parts:
            key = RatedPart(part.quantity_of, part.terms, part.price_pico)
            if part.quantity_of == MINIMUM and part.terms:
                # Each request lacks another amount.
                key = key._replace(price_pico=0)
            self._add(key, part.quantity, part.amount_pico)

    def merge(self, other: RatedLine) -> None:
        """Add all of another line."""
        self.events += other.events
        for key, (units, amount_pico) in other.parts.items():
            self._add(key, units, amount_pico)

    def _add(self, key: RatedPart, units: int, amount_pico: int) -> None:
        before = self.parts.get(key, (0, 0))
        self.parts[key] = before[0] + units, before[1] + amount_pico


def payers(reader: Reader, tenant_id: str | None = None) -> list[Payer]:
    """Every tenant, or one (nothing: nobody knows it), with the calendar of its periods."""
    where, parameters = ("", {}) if tenant_id is None else (" WHERE tenant_id = {tenant:String}", {"tenant": tenant_id})
    rows = reader.query(
        "SELECT tenant_id, currency, time_zone, calendar_from_months, calendar_offset_minutes FROM accounts FINAL"  # noqa: S608
        f"{where} ORDER BY tenant_id",
        parameters,
    ).rows
    return [
        Payer(
            str(row[0]),
            str(row[1]),
            Calendar(time_zone=str(row[2]), from_month=cast("list[int]", row[3]), offset_minutes=cast("list[int]", row[4])),
        )
        for row in rows
    ]


def rated_usage(
    reader: Reader,
    payer: Payer,
    books: PriceBooks,
    start_ms: int,
    end_ms: int,
    on_progress: Callable[[int], None] = lambda events: None,
) -> dict[UsageKey, RatedLine]:
    """What the tenant's usage that ended in [start_ms, end_ms) costs under `books`. Free requests are left out.

    `on_progress` is told of every so many events that were looked at.
    """
    work = _Rating(reader, payer, books, start_ms, end_ms, on_progress)
    for period in _periods(payer.calendar, *_bounds(reader, payer, start_ms, end_ms)):
        work.rate(period)
    return work.lines


def _bounds(reader: Reader, payer: Payer, start_ms: int, end_ms: int) -> tuple[int, int]:
    """The times between which there is any usage; the second is not above the first where there is none."""
    [[first_ms, last_ms, count]] = reader.query(
        "SELECT toUnixTimestamp64Milli(min(ended)), toUnixTimestamp64Milli(max(ended)), count() "  # noqa: S608 - names of ours
        f"FROM usage_events WHERE {_OF_TENANT}",
        _asked(payer, start_ms, end_ms),
        timeout_s=_TIMEOUT_S,
    ).rows
    return (cast("int", first_ms), cast("int", last_ms) + 1) if count else (start_ms, start_ms)


def _periods(calendar: Calendar, start_ms: int, end_ms: int) -> Iterator[Period]:
    while start_ms < end_ms:
        period = period_at(calendar, start_ms)
        yield period
        start_ms = period.end_ms


def _asked(payer: Payer, start_ms: int, end_ms: int) -> dict[str, Parameter]:
    return {"tenant": payer.tenant_id, "currency": payer.currency, "start": start_ms, "end": end_ms}


class _Rating:
    def __init__(
        self,
        reader: Reader,
        payer: Payer,
        books: PriceBooks,
        start_ms: int,
        end_ms: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.lines: dict[UsageKey, RatedLine] = {}
        self._reader = reader
        self._payer = payer
        self._books = books
        self._start_ms = start_ms
        self._end_ms = end_ms
        self._on_progress = on_progress

    def rate(self, period: Period) -> None:
        """Rate the usage of one period, as far as it lies between the bounds."""
        start_ms, end_ms = max(period.start_ms, self._start_ms), min(period.end_ms, self._end_ms)
        moments = [*self._books.moments(self._payer.currency, start_ms, end_ms - 1), end_ms]
        with_terms: set[str] = set()
        for from_ms, until_ms in pairwise(moments):
            # One version rates all of it.
            with_terms |= self._rate_sums(period, from_ms, until_ms)
        if with_terms:
            self._rate_each(period, sorted(with_terms))

    def _rate(self, ended_ms: int, model: str, operation: int, service_class: int) -> Rate | None:
        return self._books.rate(self._payer.currency, ended_ms, model, operation, service_class, self._payer.tenant_id)

    def _rate_sums(self, period: Period, start_ms: int, end_ms: int) -> set[str]:
        """Rate what has flat prices by its sums; returns the models of which some usage has terms."""
        rows = self._reader.query(
            f"SELECT project_id, model, operation, service_class, count(), {_TOKEN_SUMS}, "  # noqa: S608 - names of ours
            f"sumMap(unit_names, unit_quantities) FROM usage_events FINAL WHERE {_OF_TENANT} "
            "GROUP BY project_id, model, operation, service_class ORDER BY project_id, model, operation, service_class",
            _asked(self._payer, start_ms, end_ms),
            timeout_s=_TIMEOUT_S,
        ).rows
        with_terms = set()
        for row in rows:
            project_id, model, events = str(row[0]), str(row[1]), cast("int", row[4])
            operation, service_class = number_of_operation(str(row[2])), number_of_service_class(str(row[3]))
            rate = self._rate(start_ms, model, operation, service_class)
            if rate is not None and rate.terms is not None:
                with_terms.add(model)
                continue
            # A wide number comes as text in one engine's answers.
            tokens = [int(cast("str", value)) for value in row[5:13]]
            names, quantities = cast("tuple[list[str], list[int]]", row[13])
            units = dict(zip(names, quantities, strict=True))
            key = UsageKey(period, project_id, model, operation, service_class, rate.version if rate else 0)
            self._line(key).add(parts_of(tokens, units, 0, rate or _UNRATED, {}), events)
            self._on_progress(events)
        return with_terms

    def _rate_each(self, period: Period, models: list[str]) -> None:
        """Rate each request of `models`, in the ledger's order: the whole period moves the counters."""
        quantities = Quantities()
        for number in range(0, len(models), _MODELS_MAX):
            for ended_ms, project_id, event in self._events(period, models[number : number + _MODELS_MAX]):
                rate = self._rate(ended_ms, event.model, event.operation, event.service_class)
                if rate is None or rate.terms is None:
                    continue
                parts = quantities.take(event, rate, self._payer.currency, self._payer.calendar)
                if self._start_ms <= ended_ms < self._end_ms:
                    key = UsageKey(period, project_id, event.model, event.operation, event.service_class, rate.version)
                    self._line(key).add(parts, 1)

    def _events(self, period: Period, models: list[str]) -> Iterator[tuple[int, str, UsageEvent]]:
        parameters = _asked(self._payer, period.start_ms, period.end_ms) | {"models": models, "limit": _PAGE_EVENTS}
        version, index = 0, 0
        operations: dict[str, int] = {}
        classes: dict[str, int] = {}
        while True:
            rows: list[Any] = self._reader.query(
                f"SELECT version, record_index, toUnixTimestamp64Milli(ended), project_id, model, operation, service_class, "  # noqa: S608
                f"context_tokens, unit_names, unit_quantities, {_TOKEN_COLUMNS} FROM usage_events FINAL WHERE {_OF_TENANT} "
                "AND model IN {models:Array(String)} "
                "AND (version, record_index) > ({version:UInt64}, {index:UInt32}) "
                "ORDER BY version, record_index LIMIT {limit:UInt32}",
                parameters | {"version": version, "index": index},
                timeout_s=_TIMEOUT_S,
            ).rows
            for row in rows:
                version, index, ended_ms, project_id, model, operation, service_class, context, names, counts, *tokens = row
                if operation not in operations:
                    operations[operation] = number_of_operation(operation)
                if service_class not in classes:
                    classes[service_class] = number_of_service_class(service_class)
                event = UsageEvent(
                    tenant_id=self._payer.tenant_id,
                    model=model,
                    operation=operations[operation],  # type: ignore[arg-type]  # any number
                    service_class=classes[service_class],  # type: ignore[arg-type]
                    ended_ms=ended_ms,
                    context_tokens=context,
                    **dict(zip(TOKEN_FIELDS, tokens, strict=True)),
                )
                if names:
                    event.units.extend(UnitQuantity(unit=u, quantity=q) for u, q in zip(names, counts, strict=True))
                yield ended_ms, project_id, event
            self._on_progress(len(rows))
            if len(rows) < _PAGE_EVENTS:
                return

    def _line(self, key: UsageKey) -> RatedLine:
        line = self.lines.get(key)
        if line is None:
            line = self.lines[key] = RatedLine()
        return line


# What usage without a price is shown at.
_UNRATED = Rate(0, (0,) * len(TOKEN_FIELDS), {})
