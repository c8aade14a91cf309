"""Invoices in the database: the stored bytes that the ledger's step drew, never something computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import cast

from billing.invoices import AT_THE_CLOSE
from billing.v1.invoice_pb2 import Invoice, InvoiceLine
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.engine import Parameter, Reader, decimal_to_pico

__all__ = [
    "InvoiceSummary",
    "IssuedInvoice",
    "drawn_invoice",
    "invoice_by_number",
    "invoice_summaries",
    "invoices_of",
    "is_of_requests",
    "number_text",
]

_TIMEOUT_S = 60.0
# Of an unsigned 64-bit number, at most.
_DIGITS_MAX = 19


@dataclass(frozen=True, slots=True)
class IssuedInvoice:
    """A final invoice: its stored bytes, and the version of the record that drew it."""

    stored: bytes
    invoice: Invoice
    version: int

    @property
    def number(self) -> str:
        return number_text(self.invoice)


@dataclass(frozen=True, slots=True)
class InvoiceSummary:
    """What a list shows of a final invoice."""

    number: str
    tenant_id: str
    period_start_ms: int
    period_end_ms: int
    issued_ms: int
    currency: str
    net_pico: int
    total_pico: int
    due_pico: int
    invoice_hash: str


def number_text(invoice: Invoice) -> str:
    """What stands on the document."""
    return f"{invoice.series}-{invoice.number}"


def is_of_requests(line: InvoiceLine) -> bool:
    """Whether requests were charged this when they came; else it is a correction, or came with the period's close."""
    return not line.key.adjustment_id and line.part.terms != AT_THE_CLOSE


def invoices_of(reader: Reader, tenant_id: str) -> list[IssuedInvoice]:
    """A tenant's final invoices, in the order in which they were drawn."""
    return _issued(reader, "tenant_id = {tenant:String}", {"tenant": tenant_id})


def invoice_by_number(reader: Reader, number: str, tenant_id: str = "") -> IssuedInvoice | None:
    """The invoice that has this number on it, or None; with a tenant: of that tenant alone."""
    series, _, digits = number.rpartition("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS_MAX):
        return None
    asked: dict[str, Parameter] = {"series": series, "number": int(digits)}
    condition = "series = {series:String} AND number = {number:UInt64}"
    if tenant_id:
        condition += " AND tenant_id = {tenant:String}"
        asked["tenant"] = tenant_id
    return next(iter(_issued(reader, condition, asked)), None)


def _issued(reader: Reader, condition: str, parameters: dict[str, Parameter]) -> list[IssuedInvoice]:
    rows = reader.query(
        f"SELECT hex(invoice), version FROM invoices FINAL WHERE {condition} ORDER BY version",  # noqa: S608 - names of ours
        parameters,
        timeout_s=_TIMEOUT_S,
    ).rows
    stored = [(bytes.fromhex(str(invoice)), cast("int", version)) for invoice, version in rows]
    return [IssuedInvoice(entry, Invoice.FromString(entry), version) for entry, version in stored]


def invoice_summaries(reader: Reader, tenant_id: str = "") -> list[InvoiceSummary]:
    """Final invoices, newest first; of one tenant, or all."""
    where = " WHERE tenant_id = {tenant:String}" if tenant_id else ""
    rows = reader.query(
        "SELECT concat(series, '-', toString(number)), tenant_id, toUnixTimestamp64Milli(period_start), "  # noqa: S608 - of ours
        "toUnixTimestamp64Milli(period_end), toUnixTimestamp64Milli(issued), currency, net, total, due, invoice_hash "
        f"FROM tenant_invoices{where} ORDER BY issued DESC, series, number DESC",
        {"tenant": tenant_id} if tenant_id else {},
        timeout_s=_TIMEOUT_S,
    ).rows
    return [
        InvoiceSummary(
            number=str(row[0]),
            tenant_id=str(row[1]),
            period_start_ms=cast("int", row[2]),
            period_end_ms=cast("int", row[3]),
            issued_ms=cast("int", row[4]),
            currency=str(row[5]),
            net_pico=decimal_to_pico(cast("Decimal", row[6])),
            total_pico=decimal_to_pico(cast("Decimal", row[7])),
            due_pico=decimal_to_pico(cast("Decimal", row[8])),
            invoice_hash=str(row[9]),
        )
        for row in rows
    ]


def drawn_invoice(reader: Reader, command_id: str) -> bytes:
    """The stored bytes of what a command drew, a draft or a final invoice; it was applied."""
    rows = reader.query(
        "SELECT hex(record) FROM ledger_records FINAL WHERE (ledger_partition, generation, sequence) IN "
        "(SELECT ledger_partition, generation, sequence FROM commands FINAL WHERE command_id = {id:String} AND applied = 1)",
        {"id": command_id},
        timeout_s=_TIMEOUT_S,
    ).rows
    return LedgerRecord.FromString(bytes.fromhex(str(rows[0][0]))).command.invoice
