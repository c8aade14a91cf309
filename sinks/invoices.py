"""Final invoices in the database: the stored bytes that the ledger's step drew, never something computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from billing.invoices import AT_THE_CLOSE
from billing.v1.invoice_pb2 import Invoice, InvoiceLine
from sinks.engine import Parameter, Reader

__all__ = ["IssuedInvoice", "invoice_by_number", "invoices_of", "is_of_requests", "number_text"]

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


def number_text(invoice: Invoice) -> str:
    """What stands on the document."""
    return f"{invoice.series}-{invoice.number}"


def is_of_requests(line: InvoiceLine) -> bool:
    """Whether requests were charged this when they came; else it is a correction, or came with the period's close."""
    return not line.key.adjustment_id and line.part.terms != AT_THE_CLOSE


def invoices_of(reader: Reader, tenant_id: str) -> list[IssuedInvoice]:
    """A tenant's final invoices, in the order in which they were drawn."""
    return _issued(reader, "tenant_id = {tenant:String}", {"tenant": tenant_id})


def invoice_by_number(reader: Reader, number: str) -> IssuedInvoice | None:
    """The invoice that has this number on it, or None."""
    series, _, digits = number.rpartition("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS_MAX):
        return None
    asked: dict[str, Parameter] = {"series": series, "number": int(digits)}
    return next(iter(_issued(reader, "series = {series:String} AND number = {number:UInt64}", asked)), None)


def _issued(reader: Reader, condition: str, parameters: dict[str, Parameter]) -> list[IssuedInvoice]:
    rows = reader.query(
        f"SELECT hex(invoice), version FROM invoices FINAL WHERE {condition} ORDER BY version",  # noqa: S608 - names of ours
        parameters,
        timeout_s=_TIMEOUT_S,
    ).rows
    stored = [(bytes.fromhex(str(invoice)), cast("int", version)) for invoice, version in rows]
    return [IssuedInvoice(entry, Invoice.FromString(entry), version) for entry, version in stored]
