"""Invoices as documents, and the requests that their lines are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from billing.amounts import decimal_text, format_pico, from_amount
from billing.line_parts import from_units
from serving.documents import DocumentError, DocumentFormat, render
from sinks.engine import Reader
from sinks.explain import Explanation, explain_line
from sinks.invoices import IssuedInvoice, invoice_by_number
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, TaximeterError
from taximeter.files import write_whole
from taximeter.times import show_time

__all__ = ["explain_invoice", "export_invoice", "write_document"]

_PAGE: Final = 100
NumberArgument = Annotated[str, typer.Argument(metavar="NUMBER", help="The number on the invoice, like INV-0007-12.")]


@command
def export_invoice(
    context: Context,
    number: NumberArgument,
    document: Annotated[DocumentFormat, typer.Option("--format", help="What to write.")] = DocumentFormat.PDF,
    output: Annotated[Path | None, typer.Option(help="Where to; without: NUMBER.FORMAT here.")] = None,
    json: JsonOption = False,
) -> None:
    """Write an invoice as JSON, CSV, HTML or PDF: the same bytes whenever it is asked for."""
    with open_reader(context.config()) as reader:
        issued = _issued(reader, number)
    write_document(context, number, issued.stored, document, output or Path(f"{number}.{document}"), json=json)


def write_document(context: Context, name: str, stored: bytes, document: DocumentFormat, path: Path, *, json: bool) -> None:
    """Render an invoice's stored bytes into a file, and say so."""
    try:
        made = render(stored, document)
    except DocumentError as error:
        raise TaximeterError(str(error)) from None
    except ImportError as error:
        raise TaximeterError(
            f"{document} needs {error.name}, which is not installed here: pip install 'taximeter[documents]'"
        ) from None
    write_whole("--output", path, made)
    if json:
        context.output.json({"invoice": name, "format": str(document), "file": str(path), "bytes": len(made)})
    else:
        context.output.say(f"{path}: {len(made):,} bytes")


@command
def explain_invoice(
    context: Context,
    number: NumberArgument,
    line: Annotated[int, typer.Argument(help="The number of the line on it.")],
    offset: Annotated[int, typer.Option(min=0, help="Begin behind so many requests.")] = 0,
    limit: Annotated[int, typer.Option(min=0, help="Show at most so many requests; the sums are of all.")] = _PAGE,
    json: JsonOption = False,
) -> None:
    """Show the requests that a line of an invoice is made of, and that they add up to it."""
    with open_reader(context.config()) as reader:
        issued = _issued(reader, number)
        if not 1 <= line <= len(issued.invoice.lines):
            raise MisuseError(f"LINE {line}: invoice {number} has lines 1 to {len(issued.invoice.lines)}")
        found = explain_line(reader, issued, line, offset=offset, limit=limit)
    if json:
        context.output.json(_values(found))
    else:
        _print(context, found)
    if found.difference:
        raise TaximeterError(f"invoice {number}, line {line}: {found.difference}; run `taximeter audit`")


def _issued(reader: Reader, number: str) -> IssuedInvoice:
    issued = invoice_by_number(reader, number)
    if issued is None:
        raise TaximeterError(f"invoice {number!r} is not known: `taximeter invoice list` shows the numbers there are")
    return issued


def _values(found: Explanation) -> dict[str, object]:
    key, part = found.line.key, found.line.part
    return {
        "invoice": found.issued.number,
        "line": found.line.number,
        "period_start": show_time(key.period_start_ms),
        "period_end": show_time(key.period_end_ms),
        "project_id": key.project_id,
        "model": key.model,
        "quantity_of": part.quantity_of,
        "terms": part.terms,
        "unit_price": decimal_text(part.unit_pico, 2),
        "units": str(from_units(part.units)),
        "amount": decimal_text(from_amount(part.amount), 2),
        "note": found.note,
        "requests": found.requests,
        "requests_units": str(found.units),
        "requests_amount": decimal_text(found.amount_pico, 2),
        "difference": found.difference,
        "page": [
            {
                "request_id": request.request_id,
                "ended": show_time(request.ended_ms),
                "accepted": show_time(request.accepted_ms),
                "units": str(request.units),
                "amount": decimal_text(request.amount_pico, 2),
            }
            for request in found.page
        ],
    }


def _print(context: Context, found: Explanation) -> None:
    key, part, currency = found.line.key, found.line.part, found.issued.invoice.currency
    title = f"{found.issued.number}, line {found.line.number}: {part.quantity_of} {part.terms}".rstrip()
    context.output.pairs(
        title,
        {
            "project": key.project_id or "-",
            "model": key.model or "-",
            "period": f"{show_time(key.period_start_ms)} until {show_time(key.period_end_ms)}",
            "units": from_units(part.units),
            "price of a unit": format_pico(part.unit_pico, currency) if part.unit_pico else "-",
            "amount": format_pico(from_amount(part.amount), currency),
            "requests": found.requests,
            **({"comes from": found.note} if found.note else {}),
        },
    )
    if not found.is_summed:
        return
    rows: list[tuple[object, ...]] = [
        (
            request.request_id,
            show_time(request.ended_ms),
            show_time(request.accepted_ms),
            request.units,
            format_pico(request.amount_pico, currency),
        )
        for request in found.page
    ]
    all_of_it = "all of the correction" if found.note else "sum of all"
    rows.append((all_of_it, "", "", found.units, format_pico(found.amount_pico, currency)))
    context.output.table("", ("request", "ended", "accepted", "units ", "amount "), rows)
    if len(found.page) < found.requests:
        context.output.note(f"{len(found.page):,} of {found.requests:,} requests are shown: --offset and --limit show others")
