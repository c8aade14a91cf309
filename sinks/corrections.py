"""Adjustments drafted from what the database holds: which events, what they were charged, and the difference that is due.

Promise: a draft's lines take back exactly what stands as charged and add exactly what should have been, part by part, so that a
draft of what is right already is empty. Nothing is written: the ledger applies a draft, or refuses it. That an event was
corrected before is looked up here as well, since the ledger remembers it for 400 days.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import cast

from billing import line_parts
from billing.amounts import to_amount
from billing.invoices import AT_THE_CLOSE
from billing.limits import ADJUSTMENT_EVENTS_MAX, LINE_PARTS_MAX
from billing.line_parts import PartKey, Parts, Sum
from billing.period_lines import LineKey
from billing.periods import Period, period_at
from billing.prices import PriceBooks, Rate
from billing.rating import FREE_OUTCOMES, parts
from billing.schedules import Part
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_AMEND,
    ADJUSTMENT_KIND_CREDIT_NOTE,
    ADJUSTMENT_KIND_RATE_UNRATED,
    ADJUSTMENT_KIND_RERATE,
    ADJUSTMENT_KIND_VOID,
    Adjustment,
    AdjustmentKind,
    PriceBook,
)
from billing.v1.invoice_pb2 import PeriodLine, PeriodLineKey
from billing.v1.usage_pb2 import Outcome
from billing.validation import TOKEN_FIELDS
from sinks import queries
from sinks.adjustment_rows import ADJUSTMENT_KINDS
from sinks.charged_usage import UsageName, charged_requests
from sinks.engine import Reader, decimal_to_pico
from sinks.errors import SinkError
from sinks.price_books import alone, number_of_operation, number_of_service_class
from sinks.queries import EventRow
from sinks.rated_usage import Offer, Payer, Rated, rated_usage

__all__ = ["CorrectionError", "Draft", "amend", "credit_note", "rate_unrated", "rerate", "unrated_periods", "void"]

CREDIT_NOTE = "credit note"
# Of one adjustment: its command stays far below what Kafka takes.
_LINES_MAX = 400
_BYTES_MAX = 400_000
_PARTS_MAX = 10_000_000
_FREE = {Outcome.Name(outcome).removeprefix("OUTCOME_").lower() for outcome in FREE_OUTCOMES}
_UNPRICED = Rate(0, (0,) * len(TOKEN_FIELDS), {})
_NO_VERSION_LIMIT = 2**64 - 1


class CorrectionError(SinkError):
    """What was asked for cannot be corrected so; the text says what to do."""


@dataclass(slots=True)
class Draft:
    """What is to be changed for one tenant, before it is applied."""

    payer: Payer
    kind: AdjustmentKind.ValueType
    # Differences, by line.
    lines: dict[LineKey, Parts] = field(default_factory=dict)
    request_ids: tuple[str, ...] = ()
    invoice: str = ""
    # What somebody should know before it is applied.
    notes: list[str] = field(default_factory=list)
    # Makes the adjustment's ID another one when something was applied since.
    seen_adjustments: int = 0

    @property
    def difference_pico(self) -> int:
        """What it adds to the tenant's spend; below zero: gives back."""
        return sum(part.amount_pico for found in self.lines.values() for part in found.values())

    def add(self, key: LineKey, found: Parts, sign: int = 1) -> None:
        """Add to a line, or take from it."""
        line = self.lines.setdefault(key, {})
        for part, (units, amount_pico) in found.items():
            line_parts.add(line, part, sign * units, sign * amount_pico, _PARTS_MAX)

    def adjustments(self) -> list[tuple[str, Adjustment]]:
        """The commands' IDs and what they say; the same draft gives the same. Nothing where nothing differs."""
        for key, found in list(self.lines.items()):
            self.lines[key] = {part: value for part, value in found.items() if any(value) or self.request_ids}
        chunks: list[dict[LineKey, Parts]] = []
        for key in sorted(self.lines):
            of_line = sorted(self.lines[key].items())
            for begin in range(0, len(of_line), LINE_PARTS_MAX - 1):
                some = dict(of_line[begin : begin + LINE_PARTS_MAX - 1])
                chunk = next((chunk for chunk in chunks if key not in chunk and len(chunk) < _LINES_MAX and _room(chunk)), None)
                if chunk is None:
                    chunks.append(chunk := {})
                chunk[key] = some
        if self.request_ids and len(chunks) > 1:
            # The first command would note all of them as corrected, and the ledger would refuse the others.
            raise CorrectionError(
                f"{len(self.request_ids)} request IDs: what is corrected stands in {len(self.lines)} lines, more than one "
                "command holds; name fewer at once"
            )
        return [self._adjustment(number, chunk) for number, chunk in enumerate(chunks)]

    def _adjustment(self, number: int, chunk: Mapping[LineKey, Parts]) -> tuple[str, Adjustment]:
        said = Adjustment(
            tenant_id=self.payer.tenant_id,
            kind=self.kind,
            currency=self.payer.currency,
            lines=[_line(key, chunk[key]) for key in sorted(chunk)],
            corrected_request_ids=self.request_ids,
            invoice=self.invoice,
        )
        named = f"{number} {self.seen_adjustments} ".encode() + said.SerializeToString(deterministic=True)
        digest = hashlib.sha256(named)
        adjustment_id = f"{ADJUSTMENT_KINDS[self.kind].replace('_', '-')}-{digest.hexdigest()[:24]}"
        for line in said.lines:
            line.key.adjustment_id = adjustment_id
        return adjustment_id, said


def _room(chunk: Mapping[LineKey, Parts]) -> bool:
    return sum(key.names_bytes + 100 * (1 + len(found)) for key, found in chunk.items()) < _BYTES_MAX


def _line(key: LineKey, found: Parts) -> PeriodLine:
    return PeriodLine(
        key=PeriodLineKey(
            tenant_id=key.tenant_id,
            period_start_ms=key.period.start_ms,
            period_end_ms=key.period.end_ms,
            currency=key.currency,
            project_id=key.project_id,
            model=key.model,
            operation=key.operation,
            service_class=key.service_class,
            price_version=key.price_version,
        ),
        parts=line_parts.to_line_parts(found),
        cost=to_amount(sum(part.amount_pico for part in found.values())),
    )


# -- single events ------------------------------------------------------------------------------------------------------------


def void(reader: Reader, payer: Payer, books: PriceBooks, request_ids: Sequence[str], remembered_from_ms: int) -> Draft:
    """Take back what events were charged. Raises CorrectionError, naming what is unknown, free or corrected already."""
    draft = Draft(payer, ADJUSTMENT_KIND_VOID, request_ids=tuple(request_ids), seen_adjustments=_applied(reader, payer))
    events = _events(reader, payer, request_ids)
    for event, found in _charged_parts(reader, payer, books, events):
        draft.add(_key(payer, event), _summed(found), -1)
    draft.notes += _notes(reader, payer, events, remembered_from_ms)
    return draft


def amend(
    reader: Reader, payer: Payer, books: PriceBooks, request_id: str, changes: Mapping[str, int], remembered_from_ms: int
) -> Draft:
    """Charge an event for other quantities: classes of tokens or named units, each with its right number."""
    draft = Draft(payer, ADJUSTMENT_KIND_AMEND, request_ids=(request_id,), seen_adjustments=_applied(reader, payer))
    [event] = events = _events(reader, payer, [request_id])
    rate = _rate(payer, books, event)
    if rate.terms is not None and rate.terms.schedules:
        raise CorrectionError(
            f"request {request_id}: the price of {event.model} depends on the order of a period's requests; void it, and "
            "import it again under another request ID"
        )
    [(_, before)] = _charged_parts(reader, payer, books, events)
    tokens = [changes.get(name, getattr(event.quantities, name)) for name in TOKEN_FIELDS]
    units = {**event.quantities.units, **{name: number for name, number in changes.items() if name not in TOKEN_FIELDS}}
    draft.add(_key(payer, event), _summed(before), -1)
    draft.add(_key(payer, event), _summed(parts(tokens, units, event.context_tokens, rate, {})))
    draft.notes += _notes(reader, payer, events, remembered_from_ms)
    return draft


def _events(reader: Reader, payer: Payer, request_ids: Sequence[str]) -> list[EventRow]:
    if not 0 < len(request_ids) <= ADJUSTMENT_EVENTS_MAX or len(set(request_ids)) < len(request_ids):
        raise CorrectionError(f"{len(request_ids)} request IDs: name 1 to {ADJUSTMENT_EVENTS_MAX}, each once")
    found = {event.request_id: event for event in queries.events(reader, payer.tenant_id, request_ids)}
    problems = [f"{request_id} is not known" for request_id in request_ids if request_id not in found]
    problems += [f"{event.request_id} was free ({event.outcome})" for event in found.values() if event.outcome in _FREE]
    problems += [
        f"{event.request_id} was charged in {event.currency}" for event in found.values() if event.currency != payer.currency
    ]
    problems += [
        f"{row[0]} was corrected by {row[1]} before"
        for row in reader.query(
            "SELECT request_id, adjustment_id FROM corrected_events FINAL WHERE tenant_id = {tenant:String} "
            "AND request_id IN {ids:Array(String)} ORDER BY request_id",
            {"tenant": payer.tenant_id, "ids": request_ids},
        ).rows
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CorrectionError(
            f"tenant {payer.tenant_id}: {', '.join(problems[:5])}{more}: leave these out; an event is corrected once, write a "
            "credit note for the rest"
        )
    return [found[request_id] for request_id in request_ids]


def _name(event: EventRow) -> UsageName:
    return UsageName(
        event.project_id,
        event.model,
        number_of_operation(event.operation),
        number_of_service_class(event.service_class),
        event.price_version,
    )


def _key(payer: Payer, event: EventRow) -> LineKey:
    return LineKey(payer.tenant_id, period_at(payer.calendar, event.ended_ms), payer.currency, *_name(event))


def _rate(payer: Payer, books: PriceBooks, event: EventRow) -> Rate:
    """The rate that an event says it was charged by; all zero where none was."""
    name = _name(event)
    names = name.model, name.operation, name.service_class, payer.tenant_id
    found = books.rate_of_version(payer.currency, name.price_version, *names)
    if found is None and name.price_version:
        raise CorrectionError(f"price version {name.price_version} of {event.model} is not known here; run `taximeter audit`")
    return found or _UNPRICED


def _charged_parts(
    reader: Reader, payer: Payer, books: PriceBooks, events: Sequence[EventRow]
) -> Iterator[tuple[EventRow, Sequence[Part]]]:
    """What each event was charged for: in the ledger's order where its price depends on it."""
    ordered: dict[Period, dict[str, EventRow]] = {}
    for event in events:
        rate = _rate(payer, books, event)
        if rate.terms is not None and rate.terms.schedules:
            ordered.setdefault(period_at(payer.calendar, event.ended_ms), {})[event.request_id] = event
            continue
        quantities = event.quantities
        tokens = [getattr(quantities, name) for name in TOKEN_FIELDS]
        found = parts(tokens, quantities.units, event.context_tokens, rate, {})
        if (cost := sum(part.amount_pico for part in found)) != event.cost_pico:
            raise CorrectionError(
                f"request {event.request_id} was charged {event.cost_pico} pico, and costs {cost} by its price; run "
                "`taximeter audit`"
            )
        yield event, found
    for period, wanted in ordered.items():
        names = {_name(event) for event in wanted.values()}
        for request in charged_requests(reader, payer, books, period, names.__contains__, 0, _NO_VERSION_LIMIT):
            if request.request_id in wanted:
                yield wanted[request.request_id], request.parts


def _summed(found: Iterable[Part]) -> Parts:
    summed: Parts = {}
    line_parts.add_rated(summed, found, _PARTS_MAX)
    return summed


def _notes(reader: Reader, payer: Payer, events: Sequence[EventRow], remembered_from_ms: int) -> list[str]:
    notes = []
    if beyond := sum(1 for event in events if max(event.accepted_ms, event.ended_ms) < remembered_from_ms):
        notes.append(f"{beyond} of {len(events)} events are beyond the ledger's memory: the database has each, charged once")
    periods = {period_at(payer.calendar, event.ended_ms).start_ms for event in events}
    rows = reader.query(
        "SELECT DISTINCT toUnixTimestamp64Milli(period_start), adjustment_id FROM adjustments FINAL "
        "WHERE tenant_id = {tenant:String} AND kind IN ('rerate', 'rate_unrated') ORDER BY adjustment_id",
        {"tenant": payer.tenant_id},
    ).rows
    if again := [str(row[1]) for row in rows if row[0] in periods]:
        notes.append(
            f"the period was rated again by {', '.join(again[:3])}: what that changed of these events is not in here, run "
            "`taximeter rerate` for the period once more after this"
        )
    return notes


def _applied(reader: Reader, payer: Payer) -> int:
    [[count]] = reader.query(
        "SELECT uniqExact(adjustment_id) FROM adjustments WHERE tenant_id = {tenant:String}", {"tenant": payer.tenant_id}
    ).rows
    return cast("int", count)


def credit_note(reader: Reader, payer: Payer, amount_pico: int, period: Period, invoice: str) -> Draft:
    """Give an amount back, for a reason, in the lines of a period."""
    draft = Draft(payer, ADJUSTMENT_KIND_CREDIT_NOTE, invoice=invoice, seen_adjustments=_applied(reader, payer))
    key = LineKey(payer.tenant_id, period, payer.currency, "", "", 0, 0, 0)
    draft.add(key, {PartKey(CREDIT_NOTE, "", 0): Sum(1, -amount_pico)})
    return draft


# -- whole periods ------------------------------------------------------------------------------------------------------------


def rerate(
    reader: Reader,
    payer: Payer,
    period: Period,
    books: PriceBooks,
    other: PriceBook | int,
    on_progress: Callable[[int], None] = lambda events: None,
) -> Draft:
    """The difference that another book makes to a period that is over: a version of the ledger's, or one that it does not have.

    What earlier re-rating changed is taken into account; events that were voided or amended are left as they were corrected.
    Tiers, packages and the like count as after the close on both sides. Committed spend is settled by invoices, not here.
    """
    draft = Draft(payer, ADJUSTMENT_KIND_RERATE, seen_adjustments=_applied(reader, payer))
    offers = (
        Offer(books, as_charged=True, without_corrected=True),
        Offer(books, version=other, without_corrected=True)
        if isinstance(other, int)
        else Offer(alone(other), without_corrected=True),
    )
    before, after = rated_usage(reader, payer, offers, *period, on_progress)
    _add_rated(draft, payer, before, books, -1)
    _add_rated(draft, payer, after, offers[1].books, 1, in_ledger=isinstance(other, int))
    _take_earlier(reader, draft, period, ("rerate", "rate_unrated"))
    return draft


def rate_unrated(
    reader: Reader,
    payer: Payer,
    period: Period,
    books: PriceBooks,
    on_progress: Callable[[int], None] = lambda events: None,
) -> Draft:
    """What usage that had no price when it came costs under the book that is in effect for it now."""
    draft = Draft(payer, ADJUSTMENT_KIND_RATE_UNRATED, seen_adjustments=_applied(reader, payer))
    offer = Offer(books, unrated_alone=True, without_corrected=True)
    [after] = rated_usage(reader, payer, [offer], *period, on_progress)
    for key, line in after.lines.items():
        if key.price_version:
            draft.add(LineKey(payer.tenant_id, key.period, payer.currency, *key[1:]), line.parts)
    _take_earlier(reader, draft, period, ("rate_unrated",))
    return draft


def unrated_periods(reader: Reader, payer: Payer) -> list[Period]:
    """The tenant's periods with usage that no book has rated."""
    rows = reader.query(
        "SELECT DISTINCT toUnixTimestamp64Milli(toDateTime64(toStartOfHour(minute), 3, 'UTC')) AS hour FROM usage_totals FINAL "
        "WHERE tenant_id = {tenant:String} AND currency = {currency:String} AND unrated_events > 0 ORDER BY hour",
        {"tenant": payer.tenant_id, "currency": payer.currency},
    ).rows
    # An hour may lie in two periods, where a zone is off by half an hour.
    hours = [cast("int", row[0]) for row in rows]
    return sorted({period_at(payer.calendar, moment) for hour in hours for moment in (hour, hour + 3_599_999)})


def _add_rated(draft: Draft, payer: Payer, rated: Rated, books: PriceBooks, sign: int, *, in_ledger: bool = True) -> None:
    """All of one side; a book that the ledger does not have is no version of it."""
    for key, line in rated.lines.items():
        name = key if in_ledger else key._replace(price_version=0)
        if key.price_version:
            draft.add(LineKey(payer.tenant_id, name.period, payer.currency, *name[1:]), line.parts, sign)
    for period, entry in rated.settlements:
        if not entry.price_line:
            continue
        book = books.version(payer.currency, entry.price_version)
        assert book is not None, entry
        price = book.prices[entry.price_line - 1]
        service_class = entry.counted_class or price.service_class
        version = entry.price_version if in_ledger else 0
        line_key = LineKey(payer.tenant_id, period, payer.currency, "", price.model, price.operation, service_class, version)
        draft.add(line_key, {PartKey(entry.quantity_of, AT_THE_CLOSE, 0): Sum(entry.units, entry.amount_pico)}, sign)


def _take_earlier(reader: Reader, draft: Draft, period: Period, kinds: Sequence[str]) -> None:
    """Take what earlier adjustments of these kinds changed already from the draft."""
    payer = draft.payer
    rows = reader.query(
        "SELECT project_id, model, operation, service_class, price_version, quantity_of, terms, unit_price, sum(units), "
        "sum(amount) FROM adjustments FINAL WHERE tenant_id = {tenant:String} AND currency = {currency:String} "
        "AND period_start = fromUnixTimestamp64Milli({start:Int64}) AND kind IN {kinds:Array(String)} "
        "GROUP BY project_id, model, operation, service_class, price_version, quantity_of, terms, unit_price",
        {"tenant": payer.tenant_id, "currency": payer.currency, "start": period.start_ms, "kinds": kinds},
    ).rows
    for row in rows:
        unit_pico, units, amount = (decimal_to_pico(cast("Decimal", value)) for value in row[7:])
        operation, service_class = number_of_operation(str(row[2])), number_of_service_class(str(row[3]))
        key = LineKey(
            payer.tenant_id,
            period,
            payer.currency,
            str(row[0]),
            str(row[1]),
            operation,
            service_class,
            cast("int", row[4]),
        )
        draft.add(key, {PartKey(str(row[5]), str(row[6]), unit_pico): Sum(units // 10**12, amount)}, -1)
