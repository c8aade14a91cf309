"""What usage cost as the ledger charged it, in parts, down to the request: what explains an invoice's lines and a cost export.

Promise: usage is rated by the version of the price book that its record names, by the ledger's own code: the totals of minutes
where the price is flat, else each request, with the counters that the ledger had. Its parts sum to the cost that stands beside
it, or ChargeDiffers names what does not. Usage without a price and what was free by its outcome is left out: it is on no line.
Memory: one page of requests, one period of one tenant.

An invoice takes the usage of its record and those before it; what comes later for the same period is the next invoice's. So
usage is also told apart by cuts: the versions (positions in the ledger's order) of the records that drew the invoices.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from billing.amounts import format_pico
from billing.periods import Period, period_at
from billing.prices import PriceBooks, Rate
from billing.quantities import Quantities
from billing.rating import parts as parts_of
from billing.schedules import Part
from billing.v1.usage_pb2 import UnitQuantity, UsageEvent
from billing.validation import TOKEN_FIELDS
from sinks.engine import Parameter, Reader, decimal_to_pico
from sinks.errors import SinkError
from sinks.price_books import number_of_operation, number_of_service_class
from sinks.queries import CHARGED
from sinks.rated_usage import Payer, RatedLine

__all__ = ["ChargeDiffers", "ChargeKey", "ChargedRequest", "UsageName", "charged_requests", "charged_usage", "periods_between"]

DAY_MS = 86_400_000
_PAGE_EVENTS = 100_000
# More are not named to the database; then all models' events are read.
_MODELS_MAX = 1_000
_TIMEOUT_S = 120.0
# The version of the record that opened a window. An invoice lets go of its windows: each is wholly its, or the next one's.
_OPENED = "bitOr(bitShiftLeft(bitShiftRight(version, 40), 40), opened_sequence)"
_TOKEN_COLUMNS = ", ".join(TOKEN_FIELDS)
_TOKEN_SUMS = ", ".join(f"sum(toUInt128({name}))" for name in TOKEN_FIELDS)
_OF_TENANT = (
    f"tenant_id = {{tenant:String}} AND currency = {{currency:String}} AND {CHARGED} AND price_version != 0 "
    "AND ended >= fromUnixTimestamp64Milli({start:Int64}) AND ended < fromUnixTimestamp64Milli({end:Int64})"
)


class ChargeDiffers(SinkError):
    """A request's cost is not what its price gives: the message names it, both figures, and the mend."""


class UsageName(NamedTuple):
    """What stands together on an invoice: everything of a line's key but its period."""

    project_id: str
    model: str
    operation: int
    service_class: int
    price_version: int


class ChargeKey(NamedTuple):
    """Usage of one name, of one UTC day, that one invoice takes."""

    day_ms: int
    # How many cuts are before it: 0 is the first invoice's, and as many as there are cuts is no invoice's yet.
    cut: int
    name: UsageName


@dataclass(frozen=True, slots=True)
class ChargedRequest:
    """One request, and what it was charged for."""

    request_id: str
    ended_ms: int
    accepted_ms: int
    version: int
    name: UsageName
    parts: tuple[Part, ...]


def periods_between(payer: Payer, start_ms: int, end_ms: int) -> Iterator[Period]:
    """The tenant's periods that have a moment in [start_ms, end_ms), in order."""
    while start_ms < end_ms:
        period = period_at(payer.calendar, start_ms)
        yield period
        start_ms = period.end_ms


def charged_usage(
    reader: Reader, payer: Payer, books: PriceBooks, period: Period, start_ms: int, end_ms: int, cuts: Sequence[int] = ()
) -> dict[ChargeKey, RatedLine]:
    """What the tenant's usage of one period that ended in [start_ms, end_ms) was charged for. Raises ChargeDiffers."""
    start_ms, end_ms = max(start_ms, period.start_ms), min(end_ms, period.end_ms)
    lines: dict[ChargeKey, RatedLine] = {}
    with_terms: set[str] = set()
    # Version of a cut's own record: what that record or an earlier one accepted is the invoice's.
    place = f"length(arrayFilter(cut -> cut < {_OPENED}, CAST([{', '.join(map(str, cuts))}], 'Array(UInt64)')))"
    rows = reader.query(
        f"SELECT intDiv(toUnixTimestamp(minute), {DAY_MS // 1_000}) AS day, {place} AS cut, project_id, model, operation, "  # noqa: S608 - names of ours
        f"service_class, price_version, sum(events - refused_events), sum(cost), {_TOKEN_SUMS}, "
        "sumMap(unit_names, unit_quantities) FROM usage_totals FINAL WHERE tenant_id = {tenant:String} "
        "AND currency = {currency:String} AND price_version != 0 AND minute >= toDateTime({start:Int64}, 'UTC') "
        "AND minute < toDateTime({end:Int64}, 'UTC') "
        "GROUP BY day, cut, project_id, model, operation, service_class, price_version "
        "ORDER BY day, cut, project_id, model, operation, service_class, price_version",
        _asked(payer, start_ms // 1_000, end_ms // 1_000),
        timeout_s=_TIMEOUT_S,
    ).rows
    for row in rows:
        day, cut = cast("int", row[0]), cast("int", row[1])
        name = UsageName(str(row[2]), str(row[3]), *_numbers(row[4], row[5]), cast("int", row[6]))
        rate = _rate(books, payer, name)
        if rate.terms is not None:
            with_terms.add(name.model)
            continue
        # A wide number comes as text in one engine's answers.
        tokens = [int(cast("str", value)) for value in row[9:17]]
        names, quantities = cast("tuple[list[str], list[int]]", row[17])
        parts = parts_of(tokens, dict(zip(names, quantities, strict=True)), 0, rate, {})
        _check(f"{name.model}, day {day}", payer, parts, decimal_to_pico(row[8]))  # type: ignore[arg-type]  # a sum of decimals
        lines.setdefault(ChargeKey(day * DAY_MS, cut, name), RatedLine()).add(parts, cast("int", row[7]))
    if with_terms:
        for request in _with_terms(reader, payer, books, period, with_terms):
            if start_ms <= request.ended_ms < end_ms:
                key = ChargeKey(request.ended_ms // DAY_MS * DAY_MS, bisect_left(cuts, request.version), request.name)
                lines.setdefault(key, RatedLine()).add(request.parts, 1)
    return lines


def charged_requests(
    reader: Reader,
    payer: Payer,
    books: PriceBooks,
    period: Period,
    is_wanted: Callable[[UsageName], bool],
    after: int,
    until: int,
) -> Iterator[ChargedRequest]:
    """The requests of one period whose names are wanted and whose records stand behind version `after`, up to `until`.

    In the ledger's order. Raises ChargeDiffers.
    """
    for request in _requests(reader, payer, books, period, _models(reader, payer, books, period, is_wanted)):
        if after < request.version <= until and is_wanted(request.name):
            yield request


def _models(
    reader: Reader, payer: Payer, books: PriceBooks, period: Period, is_wanted: Callable[[UsageName], bool]
) -> set[str]:
    """The models that are wanted, and those whose usage moves the counters that the wanted ones are rated by."""
    rows = reader.query(
        f"SELECT DISTINCT project_id, model, operation, service_class, price_version FROM usage_events WHERE {_OF_TENANT} "  # noqa: S608
        "ORDER BY project_id, model, operation, service_class, price_version",
        _asked(payer, period.start_ms, period.end_ms),
        timeout_s=_TIMEOUT_S,
    ).rows
    names = [UsageName(str(row[0]), str(row[1]), *_numbers(row[2], row[3]), cast("int", row[4])) for row in rows]
    lines = {(name.price_version, _line(books, payer, name)) for name in names if is_wanted(name)}
    return {
        name.model
        for name in names
        if is_wanted(name) or (_line(books, payer, name) and (name.price_version, _line(books, payer, name)) in lines)
    }


def _line(books: PriceBooks, payer: Payer, name: UsageName) -> int | None:
    """The line of the book whose counters a name's usage moves."""
    terms = _rate(books, payer, name).terms
    return terms.line if terms else None


def _with_terms(
    reader: Reader, payer: Payer, books: PriceBooks, period: Period, models: Collection[str]
) -> Iterator[ChargedRequest]:
    """Each request of `models` whose price has terms: all of the period, since each moves the counters of the next."""
    return (
        request
        for request in _requests(reader, payer, books, period, models)
        if _rate(books, payer, request.name).terms is not None
    )


def _requests(
    reader: Reader, payer: Payer, books: PriceBooks, period: Period, models: Collection[str]
) -> Iterator[ChargedRequest]:
    quantities = Quantities()
    asked = _asked(payer, period.start_ms, period.end_ms) | {"limit": _PAGE_EVENTS}
    of_models = ""
    if len(models) <= _MODELS_MAX:
        asked["models"] = sorted(models)
        of_models = "AND model IN {models:Array(String)} "
    version, index = 0, 0
    while True:
        rows: list[Any] = reader.query(
            "SELECT version, record_index, toUnixTimestamp64Milli(ended), toUnixTimestamp64Milli(accepted), request_id, "  # noqa: S608
            "project_id, model, operation, service_class, price_version, cost, context_tokens, unit_names, unit_quantities, "
            f"{_TOKEN_COLUMNS} FROM usage_events FINAL WHERE {_OF_TENANT} {of_models}"
            "AND (version, record_index) > ({version:UInt64}, {index:UInt32}) "
            "ORDER BY version, record_index LIMIT {limit:UInt32}",
            asked | {"version": version, "index": index},
            timeout_s=_TIMEOUT_S,
        ).rows
        for row in rows:
            version, index, ended_ms, accepted_ms, request_id, project_id, model = row[:7]
            name = UsageName(project_id, model, *_numbers(row[7], row[8]), row[9])
            event = UsageEvent(
                tenant_id=payer.tenant_id,
                model=model,
                operation=name.operation,  # type: ignore[arg-type]  # any number
                service_class=name.service_class,  # type: ignore[arg-type]
                ended_ms=ended_ms,
                context_tokens=row[11],
                units=[UnitQuantity(unit=unit, quantity=count) for unit, count in zip(row[12], row[13], strict=True)],
                **dict(zip(TOKEN_FIELDS, row[14:], strict=True)),
            )
            parts = quantities.take(event, _rate(books, payer, name), payer.currency, payer.calendar)
            _check(f"request {request_id}", payer, parts, decimal_to_pico(row[10]))
            yield ChargedRequest(request_id, ended_ms, accepted_ms, version, name, tuple(parts))
        if len(rows) < _PAGE_EVENTS:
            return


def _rate(books: PriceBooks, payer: Payer, name: UsageName) -> Rate:
    """The rate under the version that the record names, whatever came to be effective since."""
    book = books.version(payer.currency, name.price_version)
    rate = book and books.rate(
        payer.currency, book.effective_ms, name.model, name.operation, name.service_class, payer.tenant_id
    )
    if rate is None:
        raise ChargeDiffers(
            f"price version {name.price_version} of {name.model} ({payer.currency}) is not known here; run `taximeter audit`"
        )
    return rate


def _check(subject: str, payer: Payer, parts: Sequence[Part], cost_pico: int) -> None:
    amount = sum(part.amount_pico for part in parts)
    if amount != cost_pico:
        raise ChargeDiffers(
            f"tenant {payer.tenant_id}, {subject}: its price gives {format_pico(amount, payer.currency)}, and "
            f"{format_pico(cost_pico, payer.currency)} was charged; run `taximeter audit`"
        )


def _numbers(operation: object, service_class: object) -> tuple[int, int]:
    return number_of_operation(str(operation)), number_of_service_class(str(service_class))


def _asked(payer: Payer, start_ms: int, end_ms: int) -> dict[str, Parameter]:
    return {"tenant": payer.tenant_id, "currency": payer.currency, "start": start_ms, "end": end_ms}
