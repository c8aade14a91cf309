"""Issued invoices, as the ledger's records hold them: the stored bytes, never something computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from billing.invoices import AT_THE_CLOSE
from billing.v1.invoice_pb2 import Invoice, InvoiceLine
from billing.v1.ledger_pb2 import LedgerRecord
from sinks.columns import version_of
from sinks.engine import Reader

__all__ = ["IssuedInvoice", "invoice_by_number", "invoices_of", "is_of_requests", "number_text"]

_TIMEOUT_S = 60.0


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
    return [issued for issued in _issued(reader) if issued.invoice.tenant_id == tenant_id]


def invoice_by_number(reader: Reader, number: str) -> IssuedInvoice | None:
    """The invoice that has this number on it, or None."""
    return next((issued for issued in _issued(reader) if issued.number == number), None)


def _issued(reader: Reader) -> list[IssuedInvoice]:
    rows = reader.query(
        "SELECT generation_ordinal, sequence, hex(record) FROM ledger_records FINAL "
        "WHERE (ledger_partition, generation, sequence) IN (SELECT ledger_partition, generation, sequence "
        "FROM commands FINAL WHERE action = 'invoice_finalization' AND applied = 1) "
        "ORDER BY ledger_partition, generation_ordinal, sequence",
        timeout_s=_TIMEOUT_S,
    ).rows
    found = []
    for ordinal, sequence, record in rows:
        stored = LedgerRecord.FromString(bytes.fromhex(str(record))).command.invoice
        invoice = Invoice.FromString(stored)
        if invoice.number:
            found.append(IssuedInvoice(stored, invoice, version_of(cast("int", ordinal), cast("int", sequence))))
    return found
