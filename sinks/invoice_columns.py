"""Periods' lines and invoices of ledger records as columns of the tables: no I/O, the same records give the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from billing.amounts import PICO, from_amount
from billing.line_parts import from_units
from billing.v1.invoice_pb2 import Invoice, LinePart, PeriodLine, PeriodLineKey
from billing.v1.ledger_pb2 import LedgerRecord
from sinks import tables
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES

if TYPE_CHECKING:
    from sinks.columns import Accepted
    from sinks.engine import Table

__all__ = ["invoice_rows", "line_id", "line_rows"]

Row = tuple[object, ...]


def line_id(key: PeriodLineKey) -> str:
    """What a line is called in the database: short, and another one for each line."""
    return hashlib.sha256(key.SerializeToString(deterministic=True)).hexdigest()


def final_invoice(record: LedgerRecord) -> tuple[Invoice, bytes] | None:
    """The final invoice that a record drew, and its stored bytes."""
    if not record.invoice_series or record.WhichOneof("source") != "command":
        return None
    stored = record.command.invoice
    return Invoice.FromString(stored), stored


def line_rows(batch: Sequence[Accepted]) -> list[Row]:
    """Of period_lines: each line as the last record of `batch` that states it does."""
    last: dict[str, tuple[Accepted, PeriodLine]] = {}
    for accepted in batch:
        for line in accepted.record.lines:
            last[line_id(line.key)] = (accepted, line)
    return [row for name, (accepted, line) in last.items() for row in _line_rows(name, accepted, line)]


def _line_rows(name: str, accepted: Accepted, line: PeriodLine) -> Iterator[Row]:
    key = line.key
    where = (key.tenant_id, key.period_start_ms, key.period_end_ms, key.currency, *_names(key), name)
    place = (accepted.record.partition, accepted.version)
    yield (*where, "", "", 0, 0, 0, line.events, line.refused_events, line.unrated_events, *place)
    for part in line.parts:
        yield (*where, *_part(part), 0, 0, 0, *place)


def _names(key: PeriodLineKey) -> Row:
    operation, service_class = OPERATIONS[key.operation], SERVICE_CLASSES[key.service_class]
    return key.project_id, key.model, operation, service_class, key.price_version, key.adjustment_id


def _part(part: LinePart) -> Row:
    return part.quantity_of, part.terms, part.unit_pico, from_units(part.units) * PICO, from_amount(part.amount)


def invoice_rows(batch: Sequence[Accepted]) -> dict[Table, list[Row]]:
    """Of the tables about invoices."""
    invoices: list[Row] = []
    lines: list[Row] = []
    invoiced: list[Row] = []
    for accepted in batch:
        found = final_invoice(accepted.record)
        if found is None:
            continue
        invoice, stored = found
        name = (invoice.series, invoice.number)
        place = (accepted.record.partition, accepted.version)
        invoices.append(_invoice(accepted, invoice, stored))
        lines += _invoice_lines(invoice, place)
        invoiced += [(key.tenant_id, line_id(key), *name, *place) for key in accepted.record.invoiced]
    return {tables.INVOICES: invoices, tables.INVOICE_LINES: lines, tables.INVOICED_LINES: invoiced}


def _invoice(accepted: Accepted, invoice: Invoice, stored: bytes) -> Row:
    record = accepted.record
    return (
        invoice.tenant_id,
        invoice.series,
        invoice.number,
        invoice.period_start_ms,
        invoice.period_end_ms,
        invoice.time_zone,
        invoice.issued_ms,
        invoice.currency,
        invoice.events,
        invoice.unrated_events,
        from_amount(invoice.usage),
        from_amount(invoice.adjustments),
        from_amount(invoice.net_exact),
        from_amount(invoice.net),
        sum(from_amount(tax.amount) for tax in invoice.taxes),
        from_amount(invoice.total),
        sum(from_amount(credit.amount) for credit in invoice.credits),
        from_amount(invoice.due),
        hashlib.sha256(stored).hexdigest(),
        invoice.previous_hash.hex(),
        stored,
        record.partition,
        record.generation.hex(),
        record.sequence,
        accepted.version,
    )


def _invoice_lines(invoice: Invoice, place: Row) -> Iterable[Row]:
    for line in invoice.lines:
        key = line.key
        where = (invoice.tenant_id, invoice.series, invoice.number, line.number, int(line.adjustment))
        period = (key.period_start_ms, key.period_end_ms, key.currency)
        yield (*where, *period, *_names(key), *_part(line.part), *place)
