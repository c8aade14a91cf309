"""An invoice's lines as CSV (RFC 4180, UTF-8), one row a line: the amounts add up to the exact net.

A text that a spreadsheet would take for a formula has an apostrophe before it: names of projects and models are chosen by those
who are billed, and a file that finance opens must not run what they wrote.
"""

from __future__ import annotations

import csv
import io

from billing.amounts import decimal_text, from_amount
from billing.line_parts import from_units
from serving.documents.content import class_name, document_number, operation_name, read_invoice, utc

__all__ = ["COLUMNS", "safe_cell", "to_csv"]

COLUMNS = (
    "invoice",
    "status",
    "tenant_id",
    "currency",
    "line",
    "kind",
    "period_start",
    "period_end",
    "project_id",
    "model",
    "operation",
    "service_class",
    "price_version",
    "adjustment_id",
    "events",
    "quantity_of",
    "terms",
    "units",
    "unit_price",
    "price_per_million",
    "amount",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def safe_cell(text: str) -> str:
    """`text`, for a cell that no spreadsheet computes."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def to_csv(stored: bytes) -> bytes:
    """The invoice of these stored bytes. Raises DocumentError."""
    invoice = read_invoice(stored)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\r\n")
    rows.writerow(COLUMNS)
    for line in invoice.lines:
        key, part = line.key, line.part
        rows.writerow(
            (
                safe_cell(document_number(invoice)),
                "final" if invoice.number else "draft",
                safe_cell(invoice.tenant_id),
                safe_cell(invoice.currency),
                line.number,
                "adjustment" if line.adjustment else "usage",
                utc(key.period_start_ms),
                utc(key.period_end_ms),
                safe_cell(key.project_id),
                safe_cell(key.model),
                operation_name(key),
                class_name(key),
                key.price_version or "",
                safe_cell(key.adjustment_id),
                line.events,
                safe_cell(part.quantity_of),
                safe_cell(part.terms),
                from_units(part.units),
                decimal_text(part.unit_pico, 2),
                decimal_text(part.unit_pico * 1_000_000, 2),
                decimal_text(from_amount(part.amount), 2),
            )
        )
    return text.getvalue().encode()
