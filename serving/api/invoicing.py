"""Invoices: lists, what stands on one, its documents, and the requests that a line is made of."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import grpc

from billing.amounts import from_amount
from billing.line_parts import from_units
from billing.v1.billing_service_pb2 import (
    ExplainedRequest,
    ExplainInvoiceLineRequest,
    ExplainInvoiceLineResponse,
    GetInvoiceDocumentRequest,
    GetInvoiceDocumentResponse,
    GetInvoiceRequest,
    GetInvoiceResponse,
    InvoiceItem,
    InvoiceSummary,
    ListInvoicesRequest,
    ListInvoicesResponse,
)
from serving.api.errors import ApiError
from serving.api.fields import page_size, to_time
from serving.api.reading import money, page_of
from serving.documents import DocumentError, DocumentFormat, render
from sinks.event_columns import OPERATIONS, SERVICE_CLASSES
from sinks.explain import explain_line
from sinks.invoices import invoice_by_number, invoice_summaries

if TYPE_CHECKING:
    from billing.v1.invoice_pb2 import InvoiceLine
    from serving.api.calls import Call
    from sinks.invoices import InvoiceSummary as Summary
    from sinks.invoices import IssuedInvoice

__all__ = ["CONTENT_TYPES", "explain_invoice_line", "get_invoice", "get_invoice_document", "invoice_summary", "list_invoices"]

CONTENT_TYPES: Final = {
    DocumentFormat.JSON: "application/json",
    DocumentFormat.CSV: "text/csv; charset=utf-8",
    DocumentFormat.HTML: "text/html; charset=utf-8",
    DocumentFormat.PDF: "application/pdf",
}


def list_invoices(call: Call, request: ListInvoicesRequest) -> ListInvoicesResponse:
    """Final invoices, newest first."""
    rows = invoice_summaries(call.reader, call.principal.tenant_or_all(request.tenant_id) or "")
    page, token = page_of(call, request, rows, lambda row: row.number)
    return ListInvoicesResponse(
        invoices=map(invoice_summary, page),
        next_page_token=token,
    )


def invoice_summary(row: Summary) -> InvoiceSummary:
    """An invoice for a list."""
    return InvoiceSummary(
        number=row.number,
        tenant_id=row.tenant_id,
        period_start=to_time(row.period_start_ms),
        period_end=to_time(row.period_end_ms),
        issued=to_time(row.issued_ms),
        currency=row.currency,
        net=money(row.net_pico),
        total=money(row.total_pico),
        due=money(row.due_pico),
        sha256=row.invoice_hash.lower(),
    )


def get_invoice(call: Call, request: GetInvoiceRequest) -> GetInvoiceResponse:
    """What stands on an invoice, and its stored bytes."""
    issued = _issued(call, request.number)
    invoice = issued.invoice
    return GetInvoiceResponse(
        summary=InvoiceSummary(
            number=issued.number,
            tenant_id=invoice.tenant_id,
            period_start=to_time(invoice.period_start_ms),
            period_end=to_time(invoice.period_end_ms),
            issued=to_time(invoice.issued_ms),
            currency=invoice.currency,
            net=money(from_amount(invoice.net)),
            total=money(from_amount(invoice.total)),
            due=money(from_amount(invoice.due)),
            sha256=hashlib.sha256(issued.stored).hexdigest(),
        ),
        lines=map(_item, invoice.lines),
        stored=issued.stored,
    )


def get_invoice_document(call: Call, request: GetInvoiceDocumentRequest) -> GetInvoiceDocumentResponse:
    """An invoice as a document: the same bytes whenever it is asked for."""
    issued = _issued(call, request.number)
    document = DocumentFormat(request.format or DocumentFormat.PDF)
    try:
        content = render(issued.stored, document)
    except DocumentError as error:
        raise ApiError(grpc.StatusCode.INTERNAL, str(error)) from error
    return GetInvoiceDocumentResponse(content_type=CONTENT_TYPES[document], content=content)


def explain_invoice_line(call: Call, request: ExplainInvoiceLineRequest) -> ExplainInvoiceLineResponse:
    """The requests that a line is made of, and that they add up to it."""
    issued = _issued(call, request.number)
    lines = issued.invoice.lines
    if request.line > len(lines):
        raise ApiError.unknown(f"of invoice {request.number}, line", str(request.line))
    # A finished invoice does not change, so a count of rows is a place in it.
    place = call.tokens.open(call.principal, request, "page_token", 1)
    offset, size = 0 if place is None else int(place[0]), page_size(request.page_size)
    found = explain_line(call.reader, issued, request.line, offset=offset, limit=size)
    response = ExplainInvoiceLineResponse(
        item=_item(found.line),
        note=found.note,
        requests=found.requests,
        units=str(found.units),
        amount=money(found.amount_pico),
        difference=found.difference,
        page=[
            ExplainedRequest(
                request_id=entry.request_id,
                ended=to_time(entry.ended_ms),
                accepted=to_time(entry.accepted_ms),
                units=str(entry.units),
                amount=money(entry.amount_pico),
            )
            for entry in found.page
        ],
    )
    if offset + len(found.page) < found.requests:
        response.next_page_token = call.tokens.seal(call.principal, request, [str(offset + len(found.page))])
    return response


def _issued(call: Call, number: str) -> IssuedInvoice:
    """The invoice, if the caller may see it. Raises ApiError."""
    issued = invoice_by_number(call.reader, number, call.principal.tenant_id)
    if issued is None:
        raise ApiError.unknown("invoice", number)
    return issued


def _item(line: InvoiceLine) -> InvoiceItem:
    key, part = line.key, line.part
    return InvoiceItem(
        line=line.number,
        period_start=to_time(key.period_start_ms),
        period_end=to_time(key.period_end_ms),
        project_id=key.project_id,
        model=key.model,
        operation=OPERATIONS[key.operation] if key.operation else "",
        service_class=SERVICE_CLASSES[key.service_class] if key.service_class else "",
        quantity_of=part.quantity_of,
        terms=part.terms,
        units=str(from_units(part.units)),
        unit_price=money(part.unit_pico),
        amount=money(from_amount(part.amount)),
        requests=line.events,
        adjustment=line.adjustment,
        price_version=key.price_version,
    )
