"""From a line of an invoice down to the requests that it is made of, or that its correction is about.

Promise: units and amounts of the requests are added up and compared with the line, exactly; where they differ, the difference
is told, never hidden. An invoice takes what its record and those before it accepted, so what came late is explained by the
invoice that charged it. Memory: one page, whatever the line holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import cast

from billing.amounts import PICO, format_pico, from_amount
from billing.line_parts import OTHER, from_units
from billing.period_lines import OTHER_NAME
from billing.periods import Period
from billing.schedules import Part
from billing.v1.invoice_pb2 import InvoiceLine, LinePart
from sinks.charged_usage import UsageName, charged_requests
from sinks.engine import Parameter, Reader, decimal_to_pico
from sinks.errors import ParameterError
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES
from sinks.invoices import IssuedInvoice, invoices_of, is_of_requests
from sinks.price_books import price_books
from sinks.rated_usage import payers

__all__ = ["ExplainedRequest", "Explanation", "explain_line"]


@dataclass(frozen=True, slots=True)
class ExplainedRequest:
    """A request, and what it has of the line."""

    request_id: str
    ended_ms: int
    accepted_ms: int
    units: int
    amount_pico: int


@dataclass(slots=True)
class Explanation:
    """A line and what it is made of."""

    issued: IssuedInvoice
    line: InvoiceLine
    # Empty where requests were charged it; else where it comes from.
    note: str = ""
    # Whether what is summed here must be the line.
    is_summed: bool = True
    requests: int = 0
    units: int = 0
    amount_pico: int = 0
    page: list[ExplainedRequest] = field(default_factory=list)

    @property
    def difference(self) -> str:
        """What the sums and the line do not agree on; empty where they agree."""
        if not self.is_summed:
            return ""
        part, currency = self.line.part, self.issued.invoice.currency
        whose = "its correction" if self.note else "its requests"
        found = []
        if self.units != from_units(part.units):
            found.append(f"the line has {from_units(part.units):,} units, {whose} {self.units:,}")
        if self.amount_pico != from_amount(part.amount):
            line_amount, amount = (format_pico(pico, currency) for pico in (from_amount(part.amount), self.amount_pico))
            found.append(f"the line has {line_amount}, {whose} {amount}")
        return "; ".join(found)


def explain_line(reader: Reader, issued: IssuedInvoice, number: int, *, offset: int = 0, limit: int = 100) -> Explanation:
    """Line `number` of an invoice; `limit` of its requests from `offset` on, in the order in which the ledger took them."""
    lines = issued.invoice.lines
    if not 1 <= number <= len(lines):
        raise ParameterError(f"line {number}: invoice {issued.number} has lines 1 to {len(lines)}")
    line = lines[number - 1]
    if line.key.adjustment_id:
        return _correction(reader, issued, line, offset, limit)
    if not is_of_requests(line):
        return Explanation(issued, line, "it came with the close of the period: no request was charged it", is_summed=False)
    if line.part.quantity_of == OTHER.quantity_of:
        note = "it sums more prices than a line tells apart: its requests are those that no other part of this line has"
        return Explanation(issued, line, note, is_summed=False)
    return _of_requests(reader, issued, line, offset, limit)


def _of_requests(reader: Reader, issued: IssuedInvoice, line: InvoiceLine, offset: int, limit: int) -> Explanation:
    found, key = Explanation(issued, line), line.key
    [payer] = payers(reader, issued.invoice.tenant_id)
    takers = [entry for entry in invoices_of(reader, payer.tenant_id) if entry.invoice.period_end_ms >= key.period_end_ms]
    place = [entry.number for entry in takers].index(issued.number)
    charged = charged_requests(
        reader,
        payer._replace(currency=key.currency),
        price_books(reader),
        Period(key.period_start_ms, key.period_end_ms),
        _names(issued, line),
        after=takers[place - 1].version if place else 0,
        until=issued.version,
    )
    for request in charged:
        parts = [part for part in request.parts if _is_of(part, line.part)]
        if not parts:
            continue
        units, amount_pico = sum(part.quantity for part in parts), sum(part.amount_pico for part in parts)
        if offset <= found.requests < offset + limit:
            found.page.append(ExplainedRequest(request.request_id, request.ended_ms, request.accepted_ms, units, amount_pico))
        found.requests += 1
        found.units += units
        found.amount_pico += amount_pico
    return found


def _correction(reader: Reader, issued: IssuedInvoice, line: InvoiceLine, offset: int, limit: int) -> Explanation:
    """Who corrected what and why, with the requests that it is about."""
    key, part = line.key, line.part
    asked: dict[str, Parameter] = {"tenant": key.tenant_id, "adjustment": key.adjustment_id}
    [[events]] = reader.query(
        "SELECT count() FROM corrected_events FINAL WHERE tenant_id = {tenant:String} AND adjustment_id = {adjustment:String}",
        asked,
    ).rows
    rows = reader.query(
        "SELECT kind, issuer, reason, toUnixTimestamp64Milli(log_time), project_id, model, operation, service_class, "
        "price_version, toUnixTimestamp64Milli(period_start), quantity_of, terms, unit_price, units, amount "
        "FROM adjustments FINAL WHERE tenant_id = {tenant:String} AND adjustment_id = {adjustment:String} ORDER BY line, part",
        asked,
    ).rows
    if not rows:
        return Explanation(issued, line, f"a correction by command {key.adjustment_id}, which is not known here")
    kind, issuer, reason = map(str, rows[0][:3])
    found = Explanation(issued, line, f"a correction ({kind.replace('_', ' ')}) that {issuer} asked for: {reason}")
    name = (key.project_id, key.model, OPERATIONS[key.operation], SERVICE_CLASSES[key.service_class], key.price_version)
    for row in rows:
        same = row[4:9] == name and row[9] == key.period_start_ms
        if same and (row[10], row[11], _pico(row[12])) == (part.quantity_of, part.terms, part.unit_pico):
            found.units += _pico(row[13]) // PICO
            found.amount_pico += _pico(row[14])
    found.requests = cast("int", events)
    corrected = reader.query(
        "SELECT request_id, toUnixTimestamp64Milli(log_time) FROM corrected_events FINAL WHERE tenant_id = {tenant:String} "
        "AND adjustment_id = {adjustment:String} ORDER BY request_id LIMIT {limit:UInt32} OFFSET {offset:UInt64}",
        asked | {"limit": limit, "offset": offset},
    ).rows
    found.page = [ExplainedRequest(str(request_id), 0, cast("int", at_ms), 0, 0) for request_id, at_ms in corrected]
    return found


def _pico(value: object) -> int:
    return decimal_to_pico(cast("Decimal", value))


def _names(issued: IssuedInvoice, line: InvoiceLine) -> Callable[[UsageName], bool]:
    """Whose requests the line sums; the line of all others takes what no line of its period names."""
    key = line.key
    own = UsageName(key.project_id, key.model, key.operation, key.service_class, key.price_version)
    if key.model != OTHER_NAME:
        return own.__eq__
    named = {
        UsageName(other.key.project_id, other.key.model, other.key.operation, other.key.service_class, other.key.price_version)
        for other in issued.invoice.lines
        if other.key.period_start_ms == key.period_start_ms
    }

    def is_other(name: UsageName) -> bool:
        # An invoice that would be too large sums all operations and classes too.
        return (
            name not in named
            and name.price_version == key.price_version
            and key.operation in (0, name.operation)
            and key.service_class in (0, name.service_class)
        )

    return is_other


def _is_of(part: Part, stated: LinePart) -> bool:
    """Whether a request's part was summed in the line's. What lifts requests to their least price has no price a unit."""
    if (part.quantity_of, part.terms) != (stated.quantity_of, stated.terms):
        return False
    return stated.unit_pico in (0, part.price_pico)
