"""Usage that the database holds, rated under any price books: what it costs, in parts, exactly as the ledger would rate it.

Promise: where a model's price is flat, quantities are summed by the database and multiplied here; where it has terms, requests
are rated in the ledger's order, with the counters of their whole period, by the ledger's own code: each by itself, or with
those like it in one sum where their order says nothing. Several offers are rated by in one go. Nothing is written. Memory: one
page of requests, and the counters of one tenant.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast

from billing import line_parts
from billing.line_parts import Parts, add_rated
from billing.periods import Period, period_at
from billing.prices import PriceBooks, Rate
from billing.quantities import Counter
from billing.rating import counted_quantities, flat_parts, input_tokens
from billing.rating import parts as parts_of
from billing.schedules import Part
from billing.settlement import Settlement, commitment, settlements
from billing.v1.account_pb2 import Calendar
from billing.validation import TOKEN_FIELDS
from sinks.engine import Parameter, Reader
from sinks.price_books import number_of_operation, number_of_service_class
from sinks.queries import CHARGED

__all__ = ["Offer", "Payer", "Rated", "RatedLine", "UsageKey", "payers", "rated_usage"]

# Whether an adjustment voided or amended the event.
_CORRECTED = "request_id IN (SELECT request_id FROM corrected_events WHERE tenant_id = {tenant:String}) AS corrected"
Counters = dict[Counter, dict[str, int]]

_PAGE_EVENTS = 200_000
_CHUNK_EVENTS = 5_000
# No book has so many prices: every one is kept apart here.
_PARTS_MAX = 10_000_000
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


class Offer(NamedTuple):
    """Books to rate by."""

    books: PriceBooks
    # By the version that each event says it was rated by, and not by the one in effect when it ended: a book may have come
    # later than the usage that it is for.
    as_charged: bool = False
    # By this version, whenever it takes effect.
    version: int | None = None
    # Only what no book has rated goes into lines, under the book in effect when it ended; the rest moves the counters.
    unrated_alone: bool = False
    # What an adjustment voided or amended moves the counters, and goes into no line.
    without_corrected: bool = False

    def rate(
        self, payer: Payer, stated_version: int, ended_ms: int, model: str, operation: int, service_class: int
    ) -> Rate | None:
        """The rate of usage whose events state `stated_version`; None: unrated."""
        names = model, operation, service_class, payer.tenant_id
        if self.as_charged or (self.unrated_alone and stated_version):
            return self.books.rate_of_version(payer.currency, stated_version, *names)
        if self.version is not None:
            return self.books.rate_of_version(payer.currency, self.version, *names)
        return self.books.rate(payer.currency, ended_ms, *names)

    def takes(self, stated_version: int, corrected: int) -> bool:
        """Whether such usage goes into lines."""
        return not (self.unrated_alone and stated_version) and not (self.without_corrected and corrected)


class UsageKey(NamedTuple):
    """What is summed together: of one period, rated by one version of the book (0: by none)."""

    period: Period
    project_id: str
    model: str
    operation: int
    service_class: int
    price_version: int


@dataclass(slots=True)
class RatedLine:
    """What usage under one key comes to."""

    events: int = 0
    parts: Parts = field(default_factory=dict)

    @property
    def cost_pico(self) -> int:
        return sum(part.amount_pico for part in self.parts.values())

    def add(self, parts: Sequence[Part], events: int) -> None:
        """Add requests that were rated by `parts`."""
        self.events += events
        add_rated(self.parts, parts, _PARTS_MAX)

    def merge(self, other: RatedLine) -> None:
        """Add all of another line."""
        self.events += other.events
        for key, (units, amount_pico) in other.parts.items():
            line_parts.add(self.parts, key, units, amount_pico, _PARTS_MAX)


@dataclass(slots=True)
class Rated:
    """What one offer makes of a tenant's usage."""

    lines: dict[UsageKey, RatedLine] = field(default_factory=dict)
    # What the close of each period that was rated from its beginning to its end adds: volume, packages, commitments.
    settlements: list[tuple[Period, Settlement]] = field(default_factory=list)

    @property
    def cost_pico(self) -> int:
        """All of it, as after the close."""
        return sum(line.cost_pico for line in self.lines.values()) + sum(found.amount_pico for _, found in self.settlements)

    @property
    def events(self) -> int:
        return sum(line.events for line in self.lines.values())

    @property
    def unrated_events(self) -> int:
        return sum(line.events for key, line in self.lines.items() if not key.price_version)

    def line(self, key: UsageKey) -> RatedLine:
        """The line of `key`, made if it is not there."""
        found = self.lines.get(key)
        if found is None:
            found = self.lines[key] = RatedLine()
        return found


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
    offers: Sequence[Offer],
    start_ms: int,
    end_ms: int,
    on_progress: Callable[[int], None] = lambda events: None,
) -> list[Rated]:
    """What the tenant's usage that ended in [start_ms, end_ms) costs under each of `offers`. Free requests are left out.

    `on_progress` is told of every so many events that were rated.
    """
    work = _Rating(reader, payer, offers, start_ms, end_ms, on_progress)
    for period in _periods(reader, payer, start_ms, end_ms):
        work.rate(period)
    return work.rated


def _periods(reader: Reader, payer: Payer, start_ms: int, end_ms: int) -> Iterator[Period]:
    """The periods in which the tenant has usage; one that was asked for alone in any case, for its close may ask for more."""
    period = period_at(payer.calendar, start_ms)
    if period.end_ms >= end_ms:
        yield period
        return
    [[first_ms, last_ms, count]] = reader.query(
        "SELECT toUnixTimestamp64Milli(min(ended)), toUnixTimestamp64Milli(max(ended)), count() "  # noqa: S608 - names of ours
        f"FROM usage_events WHERE {_OF_TENANT}",
        _asked(payer, start_ms, end_ms),
        timeout_s=_TIMEOUT_S,
    ).rows
    start_ms = cast("int", first_ms)
    while count and start_ms <= cast("int", last_ms):
        period = period_at(payer.calendar, start_ms)
        yield period
        start_ms = period.end_ms


def _asked(payer: Payer, start_ms: int, end_ms: int) -> dict[str, Parameter]:
    return {"tenant": payer.tenant_id, "currency": payer.currency, "start": start_ms, "end": end_ms}


class _Rating:
    def __init__(
        self,
        reader: Reader,
        payer: Payer,
        offers: Sequence[Offer],
        start_ms: int,
        end_ms: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.rated = [Rated() for _ in offers]
        self._reader = reader
        self._payer = payer
        self._offers = offers
        self._start_ms = start_ms
        self._end_ms = end_ms
        self._on_progress = on_progress

    def rate(self, period: Period) -> None:
        """Rate the usage of one period, as far as it lies between the bounds."""
        start_ms, end_ms = max(period.start_ms, self._start_ms), min(period.end_ms, self._end_ms)
        moments = {end_ms}
        for offer in self._offers:
            moments.update(offer.books.moments(self._payer.currency, start_ms, end_ms - 1))
        with_terms: set[str] = set()
        for from_ms, until_ms in pairwise(sorted(moments)):
            # One version of each offer rates all of it.
            with_terms |= self._rate_sums(period, from_ms, until_ms)
        counters = self._rate_each(period, sorted(with_terms))
        if (start_ms, end_ms) == period:
            for offer, rated, counted in zip(self._offers, self.rated, counters, strict=True):
                self._settle(offer.books, rated, counted, period)

    def _settle(self, books: PriceBooks, rated: Rated, counters: Counters, period: Period) -> None:
        payer = self._payer
        found = settlements(books, sorted(counters.items()))
        spend = sum(line.cost_pico for key, line in rated.lines.items() if key.period == period)
        spend += sum(entry.amount_pico for entry in found)
        if missing := commitment(books, payer.tenant_id, payer.currency, period, spend):
            found.append(missing)
        rated.settlements += [(period, entry) for entry in found]

    def _rate_sums(self, period: Period, start_ms: int, end_ms: int) -> set[str]:
        """Rate what has flat prices by its sums; returns the models of which some usage has terms."""
        rows = self._reader.query(
            f"SELECT project_id, model, operation, service_class, price_version, {_CORRECTED}, count(), {_TOKEN_SUMS}, "  # noqa: S608 - names of ours
            f"sumMap(unit_names, unit_quantities) FROM usage_events FINAL WHERE {_OF_TENANT} "
            "GROUP BY project_id, model, operation, service_class, price_version, corrected "
            "ORDER BY project_id, model, operation, service_class, price_version, corrected",
            _asked(self._payer, start_ms, end_ms),
            timeout_s=_TIMEOUT_S,
        ).rows
        with_terms = set()
        for row in rows:
            project_id, model, stated_version, events = str(row[0]), str(row[1]), cast("int", row[4]), cast("int", row[6])
            corrected = cast("int", row[5])
            operation, service_class = number_of_operation(str(row[2])), number_of_service_class(str(row[3]))
            # A wide number comes as text in one engine's answers.
            tokens = [int(cast("str", value)) for value in row[7:15]]
            names, quantities = cast("tuple[list[str], list[int]]", row[15])
            units = dict(zip(names, quantities, strict=True))
            each = False
            for offer, rated in zip(self._offers, self.rated, strict=True):
                rate = offer.rate(self._payer, stated_version, start_ms, model, operation, service_class)
                if rate is not None and rate.terms is not None:
                    each = True
                    continue
                if not offer.takes(stated_version, corrected):
                    continue
                key = UsageKey(period, project_id, model, operation, service_class, rate.version if rate else 0)
                rated.line(key).add(flat_parts(tokens, units, rate or _UNRATED), events)
            if each:
                with_terms.add(model)
            else:
                self._on_progress(events)
        return with_terms

    def _rate_each(self, period: Period, models: list[str]) -> list[Counters]:
        """Rate the requests of `models` in the ledger's order; returns each offer's counters: the whole period moves them."""
        pages = [_OfferPage(offer, rated, self._payer, period) for offer, rated in zip(self._offers, self.rated, strict=True)]
        moments = {self._start_ms, self._end_ms}
        for offer in self._offers:
            moments.update(offer.books.moments(self._payer.currency, period.start_ms, period.end_ms))
        times, thresholds = sorted(moments), sorted({above for offer in self._offers for above in _thresholds(offer.books)})
        for number in range(0, len(models), _MODELS_MAX):
            for rows in self._pages(period, models[number : number + _MODELS_MAX]):
                for begin in range(0, len(rows), _CHUNK_EVENTS):
                    chunk = [_Request(row, times, thresholds) for row in rows[begin : begin + _CHUNK_EVENTS]]
                    for page in pages:
                        page.rate(chunk, self._start_ms, self._end_ms)
                self._on_progress(len(rows))
        return [page.counters for page in pages]

    def _pages(self, period: Period, models: list[str]) -> Iterator[list[Any]]:
        """The period's events of `models`, in the ledger's order."""
        parameters = _asked(self._payer, period.start_ms, period.end_ms) | {"models": models, "limit": _PAGE_EVENTS}
        version, index = 0, 0
        while True:
            rows: list[Any] = self._reader.query(
                "SELECT version, record_index, price_version, toUnixTimestamp64Milli(ended), project_id, model, operation, "  # noqa: S608
                f"service_class, {_CORRECTED}, context_tokens, unit_names, unit_quantities, {_TOKEN_COLUMNS} "
                f"FROM usage_events FINAL WHERE {_OF_TENANT} "
                "AND model IN {models:Array(String)} "
                "AND (version, record_index) > ({version:UInt64}, {index:UInt32}) "
                "ORDER BY version, record_index LIMIT {limit:UInt32}",
                parameters | {"version": version, "index": index},
                timeout_s=_TIMEOUT_S,
            ).rows
            yield rows
            if len(rows) < _PAGE_EVENTS:
                return
            version, index = rows[-1][:2]


class _Request:
    """One request, and what it has in common with those that are rated alike whatever the books."""

    __slots__ = ("alike", "context_tokens", "ended_ms", "tokens", "units")

    def __init__(self, row: Sequence[Any], times: Sequence[int], thresholds: Sequence[int]) -> None:
        self.ended_ms: int = row[3]
        self.tokens: Sequence[int] = row[12:]
        self.units: dict[str, int] = dict(zip(row[10], row[11], strict=True)) if row[10] else {}
        self.context_tokens: int = row[9] or input_tokens(self.tokens)
        # The version that it states, its names, whether it was corrected, between which moments it ended, which thresholds of
        # context it passes.
        self.alike = (*row[2:3], *row[4:9], bisect_right(times, self.ended_ms), bisect_left(thresholds, self.context_tokens))


class _OfferPage:
    """One offer's counters of one period, and how a chunk of requests is rated by it.

    Requests that are alike are rated as one sum where their order says nothing: where none of their counters crosses into
    another tier within the chunk, and where no request has a least price. Else each is rated by itself, in order.
    """

    def __init__(self, offer: Offer, rated: Rated, payer: Payer, period: Period) -> None:
        self.counters: Counters = {}
        self._offer = offer
        self._rated = rated
        self._payer = payer
        self._period = period
        self._places: dict[tuple[Any, ...], _Place | None] = {}

    def rate(self, chunk: Sequence[_Request], start_ms: int, end_ms: int) -> None:
        """Rate a chunk, and put what ended between the bounds into lines."""
        groups: dict[tuple[Any, ...], list[_Request]] = {}
        for request in chunk:
            groups.setdefault(request.alike, []).append(request)
        found = [(place, _summed(group)) for group in groups.values() if (place := self._place(group[0])) is not None]
        ordered = self._ordered(found)
        for place, (request, events) in found:
            if place.counter not in ordered:
                place.rate(request, events, inside=start_ms <= request.ended_ms < end_ms and self._takes(request))
        for request in chunk if ordered else ():
            each = self._places[request.alike]
            if each is not None and each.counter in ordered:
                each.rate(request, 1, inside=start_ms <= request.ended_ms < end_ms and self._takes(request))

    def _takes(self, request: _Request) -> bool:
        return self._offer.takes(request.alike[0], request.alike[5])

    def _place(self, request: _Request) -> _Place | None:
        try:
            return self._places[request.alike]
        except KeyError:
            found = self._places[request.alike] = self._new_place(request)
            return found

    def _new_place(self, request: _Request) -> _Place | None:
        payer = self._payer
        stated_version, project_id, model = request.alike[:3]
        operation, service_class = number_of_operation(request.alike[3]), number_of_service_class(request.alike[4])
        rate = self._offer.rate(payer, stated_version, request.ended_ms, model, operation, service_class)
        if rate is None or rate.terms is None:
            return None
        counter = Counter(
            payer.tenant_id, self._period, payer.currency, rate.version, rate.terms.line, rate.terms.counted_class
        )
        key = UsageKey(self._period, project_id, model, operation, service_class, rate.version)
        return _Place(rate, counter, self.counters.setdefault(counter, {}), self._rated.line(key))

    @staticmethod
    def _ordered(found: Sequence[tuple[_Place, tuple[_Request, int]]]) -> set[Counter]:
        """The counters whose requests are to be rated one after the other."""
        ordered = set()
        added: dict[tuple[Counter, str], int] = {}
        for place, (request, _) in found:
            terms = place.under.terms
            assert terms is not None
            if terms.minimum_pico:
                ordered.add(place.counter)
            counted = counted_quantities(request.tokens, request.units, request.context_tokens, place.under)
            for name, quantity in counted.items():
                units = added[place.counter, name] = added.get((place.counter, name), 0) + quantity
                if len(terms.schedules[name].parts(name, place.counted.get(name, 0), units)) > 1:
                    ordered.add(place.counter)
        return ordered


@dataclass(slots=True)
class _Place:
    """What requests that are alike have in common under one offer."""

    under: Rate
    counter: Counter
    counted: dict[str, int]
    line: RatedLine

    def rate(self, request: _Request, events: int, *, inside: bool) -> None:
        """Rate a request, or the sum of several, and move the counters."""
        tokens, units, context = request.tokens, request.units, request.context_tokens
        parts = parts_of(tokens, units, context, self.under, self.counted)
        for name, quantity in counted_quantities(tokens, units, context, self.under).items():
            self.counted[name] = self.counted.get(name, 0) + quantity
        if inside:
            self.line.add(parts, events)


def _summed(group: Sequence[_Request]) -> tuple[_Request, int]:
    """Requests that are alike, as one, and how many they are."""
    if len(group) == 1:
        return group[0], 1
    one = copy(group[0])
    one.tokens = [sum(column) for column in zip(*[request.tokens for request in group], strict=True)]
    one.units = {}
    for request in group:
        for unit, quantity in request.units.items():
            one.units[unit] = one.units.get(unit, 0) + quantity
    return one, len(group)


def _thresholds(books: PriceBooks) -> Iterator[int]:
    return (band.above_tokens for book in books.all() for price in book.prices for band in price.context_bands)


# What usage without a price is shown at.
_UNRATED = Rate(0, (0,) * len(TOKEN_FIELDS), {})
