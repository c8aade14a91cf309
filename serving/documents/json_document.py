"""An invoice as JSON, for programs. The form is `docs/invoices.md`'s; what it says never changes under one `format`.

Amounts, prices and quantities are decimal strings: no reader loses a digit in a float.
"""

from __future__ import annotations

import hashlib
import json

from billing.amounts import decimal_text, from_amount
from billing.line_parts import from_units
from billing.v1.invoice_pb2 import Invoice, InvoiceLine, RoundingRule
from serving.documents.content import class_name, document_number, kind_name, operation_name, read_invoice, utc

__all__ = ["FORMAT", "to_json"]

FORMAT = "taximeter.invoice/1"


def to_json(stored: bytes) -> bytes:
    """The invoice of these stored bytes. Raises DocumentError."""
    invoice = read_invoice(stored)
    return json.dumps(_values(invoice, stored), ensure_ascii=False, indent=1).encode() + b"\n"


def _values(invoice: Invoice, stored: bytes) -> dict[str, object]:
    return {
        "format": FORMAT,
        "status": "final" if invoice.number else "draft",
        "number": document_number(invoice) or None,
        "series": invoice.series or None,
        "number_in_series": invoice.number or None,
        "sha256": hashlib.sha256(stored).hexdigest(),
        "previous_sha256": invoice.previous_hash.hex() or None,
        "ledger_generation": invoice.position.generation.hex(),
        "ledger_sequence": invoice.position.sequence,
        "tenant_id": invoice.tenant_id,
        "display_name": invoice.display_name,
        "issued": utc(invoice.issued_ms),
        "period": {
            "start": utc(invoice.period_start_ms),
            "end": utc(invoice.period_end_ms),
            "time_zone": invoice.time_zone or "UTC",
        },
        "currency": invoice.currency,
        "currency_decimals": invoice.currency_decimals,
        "rounding_rule": RoundingRule.Name(invoice.rounding_rule).removeprefix("ROUNDING_RULE_").lower(),
        "events": invoice.events,
        "unrated_events": invoice.unrated_events,
        "lines": [_line(line) for line in invoice.lines],
        "usage": decimal_text(from_amount(invoice.usage), 2),
        "adjustments": decimal_text(from_amount(invoice.adjustments), 2),
        "net_exact": decimal_text(from_amount(invoice.net_exact), 2),
        "net": decimal_text(from_amount(invoice.net), 2),
        "taxes": [
            {
                "name": tax.rate.name,
                "rate_millionths": tax.rate.rate_millionths,
                "base": decimal_text(from_amount(tax.base), 2),
                "amount": decimal_text(from_amount(tax.amount), 2),
            }
            for tax in invoice.taxes
        ],
        "total": decimal_text(from_amount(invoice.total), 2),
        "credits": [
            {
                "grant_id": credit.grant_id,
                "kind": kind_name(credit.kind),
                "amount": decimal_text(from_amount(credit.amount), 2),
            }
            for credit in invoice.credits
        ],
        "due": decimal_text(from_amount(invoice.due), 2),
        "seller": list(invoice.seller),
        "buyer": list(invoice.buyer),
        "note": invoice.note,
    }


def _line(line: InvoiceLine) -> dict[str, object]:
    key, part = line.key, line.part
    return {
        "line": line.number,
        "kind": "adjustment" if line.adjustment else "usage",
        "period_start": utc(key.period_start_ms),
        "period_end": utc(key.period_end_ms),
        "project_id": key.project_id,
        "model": key.model,
        "operation": operation_name(key),
        "service_class": class_name(key),
        "price_version": key.price_version or None,
        "adjustment_id": key.adjustment_id or None,
        "events": line.events,
        "quantity_of": part.quantity_of,
        "terms": part.terms,
        "units": str(from_units(part.units)),
        "unit_price": decimal_text(part.unit_pico, 2),
        "price_per_million": decimal_text(part.unit_pico * 1_000_000, 2),
        "amount": decimal_text(from_amount(part.amount), 2),
    }
