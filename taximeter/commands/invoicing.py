"""Drawing invoices: drafts, final ones, and what there is."""

from __future__ import annotations

import json as json_text
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from billing.amounts import decimal_text, format_pico, from_amount
from billing.line_parts import from_units
from billing.periods import month_at, month_start_ms, period_start_ms
from billing.v1.command_pb2 import InvoiceFinalization
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_EVEN, ROUNDING_RULE_HALF_UP, Invoice, TaxRate
from serving.documents import DocumentFormat, render
from sinks.engine import Reader
from sinks.invoices import drawn_invoice, invoice_by_number, invoice_summaries, number_text
from sinks.rated_usage import Payer, payers
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer
from taximeter.commands.common import Context, JsonOption, command
from taximeter.commands.invoices import write_document
from taximeter.compose import open_reader
from taximeter.errors import MisuseError, TaximeterError
from taximeter.times import now_ms, parse_month, show_time

__all__ = ["draft_invoice", "finalize_invoices", "list_invoices", "show_invoice"]

_TIMEOUT_S: Final = 60.0
_TAX: Final = re.compile(r"(.{1,200})=(\d{1,3})(?:\.(\d{1,4}))?%?")
# ISO 4217 where the smallest unit is not a hundredth.
_DECIMALS: Final = {
    **dict.fromkeys(
        ("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "VND", "VUV", "XAF", "XOF", "XPF"), 0
    ),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
}


class Rounding(StrEnum):
    """How the net, each tax and what is due are rounded to the currency's smallest unit."""

    HALF_UP = "half-up"
    HALF_EVEN = "half-even"


MonthOption = Annotated[str, typer.Option(help="Which month of the tenant's calendar: 2026-01.")]
PrefixOption = Annotated[str, typer.Option(help="Of the series; numbers count within it.")]
RoundingOption = Annotated[Rounding, typer.Option(help="Halves away from zero, or to the even digit.")]
TaxOption = Annotated[list[str] | None, typer.Option(help="NAME=RATE, like VAT=19%; with a reason where the rate is 0.")]
SellerOption = Annotated[list[str] | None, typer.Option(help="A line of the seller's address; give it for each.")]
BuyerOption = Annotated[list[str] | None, typer.Option(help="A line of the buyer's address; give it for each.")]
NoteOption = Annotated[str, typer.Option(help="Free text: terms of payment, references.")]


@command
def draft_invoice(
    context: Context,
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    month: MonthOption = "",
    prefix: PrefixOption = "INV",
    rounding: RoundingOption = Rounding.HALF_UP,
    tax: TaxOption = None,
    seller: SellerOption = None,
    buyer: BuyerOption = None,
    note: NoteOption = "",
    output: Annotated[Path | None, typer.Option(help="Write it there as a document that says DRAFT.")] = None,
    document: Annotated[DocumentFormat, typer.Option("--format", help="With --output: what to write.")] = DocumentFormat.PDF,
    json: JsonOption = False,
) -> None:
    """Show what a tenant's invoice would be now; without --month: the month that is under way. Nothing changes."""
    terms = _terms(prefix, rounding, tax, seller, buyer, note)
    with open_reader(context.config()) as reader:
        stored = _draw(context, reader, [_payer(reader, tenant)], month, 0, terms, draft=True)[0]
    if output is None:
        _show(context, stored, json=json)
    else:
        write_document(context, "draft", stored, document, output, json=json)


@command
def finalize_invoices(
    context: Context,
    tenant: Annotated[list[str] | None, typer.Argument(help="The tenants.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Every tenant that the month has something of.")] = False,
    month: MonthOption = "",
    prefix: PrefixOption = "INV",
    rounding: RoundingOption = Rounding.HALF_UP,
    tax: TaxOption = None,
    seller: SellerOption = None,
    buyer: BuyerOption = None,
    note: NoteOption = "",
    json: JsonOption = False,
) -> None:
    """Draw final invoices of a month that is over; without --month: the last. They are numbered and never change."""
    terms = _terms(prefix, rounding, tax, seller, buyer, note)
    if bool(tenant) == everyone:
        raise MisuseError("TENANT: name tenants, or give --all")
    with open_reader(context.config()) as reader:
        known = _unbilled(reader, month) if everyone else [_payer(reader, name) for name in tenant or ()]
        drawn = [Invoice.FromString(stored) for stored in _draw(context, reader, known, month, 1, terms, draft=False)]
    if json:
        context.output.json(
            [
                {
                    "invoice": number_text(invoice),
                    "tenant_id": invoice.tenant_id,
                    "currency": invoice.currency,
                    "total": decimal_text(from_amount(invoice.total), invoice.currency_decimals),
                    "due": decimal_text(from_amount(invoice.due), invoice.currency_decimals),
                }
                for invoice in drawn
            ]
        )
        return
    rows = [
        (number_text(invoice), invoice.tenant_id, _money(invoice, invoice.total), _money(invoice, invoice.due))
        for invoice in drawn
    ]
    context.output.table("", ("invoice", "tenant", "total ", "due "), rows, empty="No tenant has anything to invoice.")


@command
def list_invoices(
    context: Context,
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    json: JsonOption = False,
) -> None:
    """List final invoices, newest first."""
    with open_reader(context.config()) as reader:
        found = invoice_summaries(reader, tenant)
    if json:
        context.output.json(
            [
                {
                    "invoice": each.number,
                    "tenant_id": each.tenant_id,
                    "period_start": show_time(each.period_start_ms),
                    "period_end": show_time(each.period_end_ms),
                    "issued": show_time(each.issued_ms),
                    "currency": each.currency,
                    "net": decimal_text(each.net_pico, 2),
                    "total": decimal_text(each.total_pico, 2),
                    "due": decimal_text(each.due_pico, 2),
                    "sha256": each.invoice_hash,
                }
                for each in found
            ]
        )
        return
    rows = [
        (
            each.number,
            each.tenant_id,
            show_time(each.period_start_ms),
            show_time(each.issued_ms),
            format_pico(each.total_pico, each.currency),
            format_pico(each.due_pico, each.currency),
        )
        for each in found
    ]
    context.output.table(
        "", ("invoice", "tenant", "period from", "issued", "total ", "due "), rows, empty="There are no invoices."
    )


@command
def show_invoice(
    context: Context,
    number: Annotated[str, typer.Argument(metavar="NUMBER", help="The number on the invoice, like INV-0007-12.")],
    json: JsonOption = False,
) -> None:
    """Show a final invoice with its lines."""
    with open_reader(context.config()) as reader:
        issued = invoice_by_number(reader, number)
    if issued is None:
        raise TaximeterError(f"invoice {number!r} is not known: `taximeter invoice list` shows the numbers there are")
    _show(context, issued.stored, json=json)


# -- drawing ----------------------------------------------------------------------------------------------------------------


def _draw(
    context: Context,
    reader: Reader,
    known: Sequence[Payer],
    month: str,
    months_back: int,
    terms: dict[str, Any],
    *,
    draft: bool,
) -> list[bytes]:
    """Give the commands, and fetch what each drew."""
    commander = Commander(context.config(), issuer())
    commands = []
    for payer in known:
        said = InvoiceFinalization(
            tenant_id=payer.tenant_id,
            period_start_ms=period_start_ms(payer.calendar, _month(payer, month, months_back)),
            draft=draft,
            currency_decimals=_DECIMALS.get(payer.currency, 2),
            **terms,
        )
        commands.append(commander.invoice(said, command_id=f"invoice-{secrets.token_hex(12)}"))
    commander.give(commands, reader)
    return [drawn_invoice(reader, command.command_id) for command in commands]


def _month(payer: Payer, text: str, back: int) -> int:
    """Which month of the payer's calendar."""
    return parse_month(text) if text else month_at(payer.calendar, now_ms()) - back


def _payer(reader: Reader, tenant_id: str) -> Payer:
    found = payers(reader, tenant_id)
    if not found:
        raise TaximeterError(f"tenant {tenant_id!r} is not known: create it with `taximeter tenant create {tenant_id}`")
    return found[0]


def _unbilled(reader: Reader, month: str) -> list[Payer]:
    """The tenants that used something in a month of their calendar, or in the last, and have no invoice of it."""
    asked = [(payer, _month(payer, month, 1)) for payer in payers(reader)]
    numbers = [number for _, number in asked] or [0]
    rows = reader.query(
        "SELECT tenant_id, toUnixTimestamp64Milli(period_start) FROM uninvoiced_lines GROUP BY 1, 2 "
        # What is in windows that are open still is in no line. No zone's months begin within a quarter of an hour.
        "UNION DISTINCT SELECT tenant_id, toInt64(toUnixTimestamp(toStartOfInterval(minute, INTERVAL 15 MINUTE))) * 1000 "
        "FROM usage_totals WHERE minute >= toDateTime({start:Int64}, 'UTC') - INTERVAL 1 DAY "
        "AND minute < toDateTime({end:Int64}, 'UTC') + INTERVAL 1 DAY GROUP BY 1, 2",
        {
            "start": month_start_ms(min(numbers)) // 1_000,
            "end": month_start_ms(max(numbers) + 1) // 1_000,
        },
        timeout_s=_TIMEOUT_S,
    ).rows
    invoiced = reader.query("SELECT tenant_id, toUnixTimestamp64Milli(period_start) FROM invoices FINAL").rows
    used: dict[str, set[int]] = {}
    for tenant_id, time_ms in rows:
        assert isinstance(time_ms, int)
        used.setdefault(str(tenant_id), set()).add(time_ms)
    found = []
    for payer, number in asked:
        start_ms, end_ms = period_start_ms(payer.calendar, number), period_start_ms(payer.calendar, number + 1)
        uses = any(start_ms <= time_ms < end_ms for time_ms in used.get(payer.tenant_id, ()))
        if uses and (payer.tenant_id, start_ms) not in invoiced:
            found.append(payer)
    return found


def _terms(
    prefix: str, rounding: Rounding, tax: list[str] | None, seller: list[str] | None, buyer: list[str] | None, note: str
) -> dict[str, Any]:
    rule = ROUNDING_RULE_HALF_EVEN if rounding is Rounding.HALF_EVEN else ROUNDING_RULE_HALF_UP
    return {
        "series_prefix": prefix,
        "rounding_rule": rule,
        "taxes": [_tax(text) for text in tax or ()],
        "seller": seller or [],
        "buyer": buyer or [],
        "note": note,
    }


def _tax(text: str) -> TaxRate:
    match = _TAX.fullmatch(text)
    if match is None:
        raise MisuseError(f"--tax {text!r} is no tax: write its name and rate, like VAT=19% or 'reverse charge=0%'")
    name, whole, decimals = match.groups()
    return TaxRate(name=name, rate_millionths=int(whole) * 10_000 + int((decimals or "").ljust(4, "0")))


# -- showing ----------------------------------------------------------------------------------------------------------------


def _show(context: Context, stored: bytes, *, json: bool) -> None:
    if json:
        context.output.json(json_text.loads(render(stored, DocumentFormat.JSON)))
        return
    invoice = Invoice.FromString(stored)
    rows = [
        (
            line.number,
            line.key.project_id or "-",
            line.key.model or "-",
            f"{line.part.quantity_of} {line.part.terms}".rstrip(),
            _day(line.key.period_start_ms) if line.adjustment else "",
            from_units(line.part.units),
            format_pico(line.part.unit_pico) if line.part.unit_pico else "-",
            format_pico(from_amount(line.part.amount), invoice.currency),
        )
        for line in invoice.lines
    ]
    title = f"{number_text(invoice)}: {invoice.tenant_id}" if invoice.number else f"Draft: {invoice.tenant_id}"
    columns = ("line ", "project", "model", "quantity", "adjusts", "units ", "price ", "amount ")
    context.output.table(title, columns, rows, empty=f"{title}: no usage")
    pairs: dict[str, object] = {
        "period": f"{show_time(invoice.period_start_ms)} until {show_time(invoice.period_end_ms)} ({invoice.time_zone})",
        "issued": show_time(invoice.issued_ms),
        "requests": invoice.events,
    }
    if invoice.unrated_events:
        pairs["without a price"] = invoice.unrated_events
    pairs["net, exact"] = format_pico(from_amount(invoice.net_exact), invoice.currency)
    pairs["net"] = _money(invoice, invoice.net)
    for each in invoice.taxes:
        pairs[f"{each.rate.name} {decimal_text(each.rate.rate_millionths * 10**8, 0)} %"] = _money(invoice, each.amount)
    pairs["total"] = _money(invoice, invoice.total)
    for credit in invoice.credits:
        pairs[f"credit {credit.grant_id}"] = format_pico(from_amount(credit.amount), invoice.currency)
    pairs["due"] = _money(invoice, invoice.due)
    context.output.pairs("", pairs)


def _money(invoice: Invoice, amount: Any) -> str:
    return format_pico(from_amount(amount), invoice.currency, invoice.currency_decimals)


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms // 1_000, UTC).strftime("%Y-%m-%d")
