"""What stands in an invoice's documents, as plain texts: the one place where figures become what people read.

Promise: a pure function of the invoice's stored bytes, so every document of one invoice says the same, today and in ten years;
no clock, no locale, no table of time zones. No figure is rounded here: an amount has the decimals that it has. Texts that came
from outside keep their letters; what would control how others are read (line breaks, overrides of direction) is shown as its
code. An invoice whose figures do not follow from one another gets no document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError

from billing.amounts import PICO, decimal_text, from_amount
from billing.invoice_checks import credits_pico, invoice_problem
from billing.line_parts import from_units
from billing.periods import month_of, month_start_ms
from billing.v1.invoice_pb2 import (
    ROUNDING_RULE_HALF_UP,
    CreditKind,
    Invoice,
    InvoiceLine,
    PeriodLineKey,
)
from billing.v1.usage_pb2 import Operation, ServiceClass

__all__ = [
    "Content",
    "DocumentError",
    "Group",
    "Line",
    "Money",
    "Row",
    "class_name",
    "content_of",
    "document_number",
    "kind_name",
    "operation_name",
    "per_units",
    "plain",
    "read_invoice",
    "utc",
]

_MINUTE_MS = 60_000
_DAY_MINUTES = 24 * 60
_DECIMALS = 12
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
# C0 and C1 controls, and what overrides, embeds or isolates a direction.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_NAMES = {
    "uncached_input_tokens": "Input tokens",
    "cache_read_tokens": "Cached input, read",
    "cache_write_tokens": "Cached input, written",
    "output_tokens": "Output tokens",
    "reasoning_tokens": "Reasoning tokens",
    "image_input_tokens": "Image input tokens",
    "audio_input_tokens": "Audio input tokens",
    "audio_output_tokens": "Audio output tokens",
    "characters": "Characters",
    "audio_ms": "Audio, milliseconds",
    "image_steps": "Image steps",
    "requests": "Requests",
}
# What a price is stated for: tokens, and every unit that is not here, by the million.
_PER = {"requests": (1, "request"), "image_steps": (1, "step"), "audio_ms": (_MINUTE_MS, "minute")}
_MILLION = (1_000_000, "1M")


class DocumentError(Exception):
    """No document can be made: the message says of which invoice, and why."""


@dataclass(frozen=True, slots=True)
class Money:
    """An exact amount in two parts: to the currency's smallest unit, and the digits beyond it."""

    head: str
    tail: str = ""

    @property
    def text(self) -> str:
        return self.head + self.tail


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the invoice: quantity times price is amount; without a price, the amount alone."""

    number: int
    model: str
    use: str
    quantity_of: str
    terms: str
    units: str
    price: str
    price_per: str
    amount: Money


@dataclass(frozen=True, slots=True)
class Group:
    """Lines that belong together, and what they come to."""

    title: str
    reason: str
    lines: tuple[Line, ...]
    requests: str
    subtotal: Money


@dataclass(frozen=True, slots=True)
class Row:
    """A label and what stands beside it."""

    label: str
    value: str


@dataclass(frozen=True, slots=True)
class Sum:
    """A line of the totals."""

    label: str
    amount: Money
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """Everything that a document says."""

    title: str
    number: str
    draft: bool
    currency: str
    issued_ms: int
    seller: tuple[str, ...]
    buyer: tuple[str, ...]
    facts: tuple[Row, ...]
    projects: tuple[Group, ...]
    adjustments: tuple[Group, ...]
    totals: tuple[Sum, ...]
    remarks: tuple[str, ...]
    note: tuple[str, ...]
    proof: tuple[Row, ...]


def read_invoice(stored: bytes) -> Invoice:
    """The invoice in `stored`. Raises DocumentError for bytes that are none, and where the figures contradict one another."""
    try:
        invoice = Invoice.FromString(stored)
    except DecodeError:
        raise DocumentError(f"{len(stored)} bytes that are no invoice: give the stored bytes of one") from None
    if problem := invoice_problem(invoice):
        raise DocumentError(f"invoice {document_number(invoice) or 'draft'} of tenant {invoice.tenant_id!r}: {problem}")
    return invoice


def document_number(invoice: Invoice) -> str:
    """The number on the document: series and place in it; empty for a draft."""
    return f"{invoice.series}-{invoice.number}" if invoice.number else ""


def content_of(stored: bytes) -> Content:
    """What the documents of `stored` say. Raises DocumentError."""
    invoice = read_invoice(stored)
    draft = not invoice.number
    figures = _Figures(invoice)
    usage = [line for line in invoice.lines if not line.adjustment]
    adjustments = [line for line in invoice.lines if line.adjustment]
    return Content(
        title="Draft invoice" if draft else "Invoice",
        number=plain(document_number(invoice)),
        draft=draft,
        currency=plain(invoice.currency),
        issued_ms=invoice.issued_ms,
        seller=_texts(invoice.seller),
        buyer=_texts(invoice.buyer) or (plain(invoice.display_name or invoice.tenant_id),),
        facts=_facts(invoice),
        projects=tuple(
            figures.group(f"Project {plain(project)}" if project else "Without a project", "", lines)
            for project, lines in _grouped(usage, lambda line: line.key.project_id)
        ),
        adjustments=tuple(
            figures.group(_period(start_ms, end_ms), _reason(adjustment_id), lines)
            for (start_ms, end_ms, adjustment_id), lines in _grouped(adjustments, _adjustment_key)
        ),
        totals=figures.totals(),
        remarks=_remarks(invoice),
        note=_texts(invoice.note.splitlines()),
        proof=_proof(invoice, stored),
    )


# -- figures ----------------------------------------------------------------------------------------------------------------


class _Figures:
    """Amounts of one invoice, all with as many decimals as the one that needs most, so that their points stand in line."""

    def __init__(self, invoice: Invoice) -> None:
        self._invoice = invoice
        exact = [from_amount(line.part.amount) for line in invoice.lines]
        exact += [from_amount(credit.amount) for credit in invoice.credits]
        self._decimals = max([_decimals_of(pico) for pico in exact], default=0)
        self._decimals = max(self._decimals, invoice.currency_decimals)

    def money(self, pico: int) -> Money:
        text = decimal_text(pico, self._decimals, grouped=True).replace("-", "\N{MINUS SIGN}")
        beyond = self._decimals - self._invoice.currency_decimals
        if not beyond:
            return Money(text)
        # A currency without decimals has its point before the digits beyond.
        cut = len(text) - beyond - (0 if self._invoice.currency_decimals else 1)
        return Money(text[:cut], text[cut:])

    def rounded(self, pico: int) -> Money:
        return Money(decimal_text(pico, self._invoice.currency_decimals, grouped=True).replace("-", "\N{MINUS SIGN}"))

    def group(self, title: str, reason: str, lines: Sequence[InvoiceLine]) -> Group:
        requests = _requests(lines)
        return Group(
            title=title,
            reason=reason,
            lines=tuple(map(self._line, lines)),
            requests=f"{requests:,} request{'' if requests == 1 else 's'}" if requests else "",
            subtotal=self.money(sum(from_amount(line.part.amount) for line in lines)),
        )

    def _line(self, line: InvoiceLine) -> Line:
        key, part = line.key, line.part
        units, amount = from_units(part.units), from_amount(part.amount)
        alone = not part.unit_pico and amount != 0
        times, per = per_units(part.quantity_of)
        least = 2 if times > 1 else self._invoice.currency_decimals
        return Line(
            number=line.number,
            model=plain(key.model) or "\N{EN DASH}",
            use=_use(key, with_project=line.adjustment),
            quantity_of=_NAMES.get(part.quantity_of, plain(part.quantity_of).capitalize()),
            terms=plain(part.terms),
            units=f"{units:,}".replace("-", "\N{MINUS SIGN}") if units else "",
            price="" if alone or not units else decimal_text(part.unit_pico * times, least, grouped=True),
            price_per="" if alone or not units else per,
            amount=self.money(amount),
        )

    def totals(self) -> tuple[Sum, ...]:
        invoice, currency = self._invoice, plain(self._invoice.currency)
        found = [Sum("Usage of the period", self.money(from_amount(invoice.usage)))]
        if any(line.adjustment for line in invoice.lines):
            found.append(Sum("Adjustments", self.money(from_amount(invoice.adjustments))))
            found.append(Sum("Usage and adjustments", self.money(from_amount(invoice.net_exact))))
        found.append(Sum("Net, rounded", self.rounded(from_amount(invoice.net))))
        for tax in invoice.taxes:
            rate = f"{decimal_text(tax.rate.rate_millionths * PICO // 10_000, 0)} %"
            label = f"{plain(tax.rate.name)} {rate} of {self.rounded(from_amount(tax.base)).text}"
            found.append(Sum(label, self.rounded(from_amount(tax.amount))))
        found.append(Sum(f"Total {currency}", self.rounded(from_amount(invoice.total)), strong=True))
        for credit in invoice.credits:
            label = f"{kind_name(credit.kind).capitalize()} credit {plain(credit.grant_id)}"
            found.append(Sum(label, self.money(-from_amount(credit.amount))))
        due = from_amount(invoice.due)
        if due < 0:
            found.append(Sum(f"Returned as credit {currency}", self.rounded(-due), strong=True))
        else:
            found.append(Sum(f"Amount due {currency}", self.rounded(due), strong=True))
        return tuple(found)


def per_units(quantity_of: str) -> tuple[int, str]:
    """How many units a price is stated for, and what they are called."""
    return _PER.get(quantity_of, _MILLION)


def _decimals_of(pico: int) -> int:
    return len(f"{abs(pico) % PICO:0{_DECIMALS}d}".rstrip("0"))


# -- texts ------------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """`text` with the characters that control how others are read shown as their codes."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def operation_name(key: PeriodLineKey) -> str:
    return _name(Operation.items(), key.operation, "OPERATION_")


def class_name(key: PeriodLineKey) -> str:
    return _name(ServiceClass.items(), key.service_class, "SERVICE_CLASS_")


def kind_name(kind: int) -> str:
    return _name(CreditKind.items(), kind, "CREDIT_KIND_")


def utc(at_ms: int) -> str:
    """2026-11-01T00:00:00Z, with milliseconds where there are any."""
    month = month_of(at_ms)
    days, in_day_ms = divmod(at_ms - month_start_ms(month), 86_400_000)
    seconds, millis = divmod(in_day_ms, 1_000)
    beyond = f".{millis:03d}" if millis else ""
    return (
        f"{1970 + month // 12:04d}-{month % 12 + 1:02d}-{days + 1:02d}"
        f"T{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{beyond}Z"
    )


def _minute(at_ms: int) -> str:
    return utc(at_ms)[:16].replace("T", " ")


def _name(enum: Iterable[tuple[str, int]], number: int, prefix: str) -> str:
    if not number:
        return ""
    return next((name.removeprefix(prefix).lower() for name, value in enum if value == number), f"unknown_{number}")


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(plain(text) for text in texts)


def _use(key: PeriodLineKey, *, with_project: bool) -> str:
    shown = [operation_name(key).replace("_", " "), class_name(key).replace("_", " ")]
    if with_project and key.project_id:
        shown.insert(0, f"project {plain(key.project_id)}")
    return ", ".join(text for text in shown if text)


def _local_month(boundary_ms: int) -> tuple[int, int]:
    """The month that begins at `boundary_ms` somewhere on earth, and how many minutes that place is ahead of UTC."""
    month = month_of(boundary_ms)
    behind = (boundary_ms - month_start_ms(month)) // _MINUTE_MS
    ahead = (month_start_ms(month + 1) - boundary_ms) // _MINUTE_MS
    return (month, -behind) if behind <= ahead else (month + 1, ahead)


def _offset(minutes: int) -> str:
    if not minutes:
        return "UTC"
    hours, rest = divmod(abs(minutes), 60)
    return f"UTC{'-' if minutes < 0 else '+'}{hours:02d}:{rest:02d}"


def _period(start_ms: int, end_ms: int) -> str:
    """What people call a period: "November 2026"."""
    first, last = _local_month(start_ms)[0], _local_month(end_ms)[0] - 1
    names = [f"{_MONTHS[month % 12]} {1970 + month // 12}" for month in (first, last)]
    return names[0] if first >= last else " to ".join(names)


def _facts(invoice: Invoice) -> tuple[Row, ...]:
    start_ms, end_ms = invoice.period_start_ms, invoice.period_end_ms
    offsets = dict.fromkeys(_offset(_local_month(at_ms)[1]) for at_ms in (start_ms, end_ms))
    zone = plain(invoice.time_zone) or "UTC"
    shown = " then ".join(offsets)
    return (
        Row("Invoice number", plain(document_number(invoice)) or "none: a draft"),
        Row("Drawn" if not invoice.number else "Issued", f"{_minute(invoice.issued_ms)} UTC"),
        Row("Period", _period(start_ms, end_ms)),
        Row("Time zone", zone if shown == zone else f"{zone} ({shown})"),
        Row("Period in UTC", f"{_minute(start_ms)} until {_minute(end_ms)}"),
        Row("Customer", plain(invoice.tenant_id)),
        Row("Requests", f"{invoice.events:,}"),
        Row("Currency", plain(invoice.currency)),
    )


_Key = TypeVar("_Key")


def _grouped(lines: Iterable[InvoiceLine], key_of: Callable[[InvoiceLine], _Key]) -> Iterable[tuple[_Key, list[InvoiceLine]]]:
    """Lines of one key together, in the order in which the keys come first."""
    groups: dict[_Key, list[InvoiceLine]] = {}
    for line in lines:
        groups.setdefault(key_of(line), []).append(line)
    return groups.items()


def _requests(lines: Iterable[InvoiceLine]) -> int:
    """How many there are on `lines`: those of one key are parts of the same."""
    return sum({line.key.SerializeToString(deterministic=True): line.events for line in lines}.values())


def _adjustment_key(line: InvoiceLine) -> tuple[int, int, str]:
    return line.key.period_start_ms, line.key.period_end_ms, line.key.adjustment_id


def _reason(adjustment_id: str) -> str:
    if adjustment_id:
        return f"Correction {plain(adjustment_id)}"
    return "Usage of this period that came after its invoice"


def _remarks(invoice: Invoice) -> tuple[str, ...]:
    unit = decimal_text(PICO // 10**invoice.currency_decimals, 0)
    halves = "away from zero" if invoice.rounding_rule == ROUNDING_RULE_HALF_UP else "to the even digit"
    rounding = f"rounded once each, to {unit} {plain(invoice.currency)}, halves {halves}."
    found = [f"Lines, subtotals and credits are exact. The net amount, each tax and the amount due are {rounding}"]
    if any(line.part.quantity_of in _NAMES for line in invoice.lines):
        found.append("Quantity times price is the amount; 1M is one million units.")
    if invoice.unrated_events:
        count = invoice.unrated_events
        found.append(
            f"{count:,} request{'' if count == 1 else 's'} of the period had no price yet and "
            f"{'is' if count == 1 else 'are'} on no line: once priced, a later invoice names them as an adjustment."
        )
    free = invoice.events - invoice.unrated_events - _requests(invoice.lines)
    if free > 0:
        what = "request delivered nothing and is" if free == 1 else "requests delivered nothing and are"
        found.append(f"{free:,} {what} on no line.")
    if any(line.key.period_start_ms < invoice.period_start_ms for line in invoice.lines):
        found.append("Adjustments of earlier periods leave the invoices of those as they are.")
    if credits_pico(invoice):
        found.append("Credit was paid or granted before, and settles this invoice as far as it is shown.")
    return tuple(found)


def _proof(invoice: Invoice, stored: bytes) -> tuple[Row, ...]:
    position = invoice.position
    digest = Row("SHA-256", hashlib.sha256(stored).hexdigest())
    if not invoice.number:
        return (digest, Row("Previous", "a draft stands in no chain"))
    return (
        digest,
        Row("Previous", invoice.previous_hash.hex() or f"none: the first of series {plain(invoice.series)}"),
        Row("Record", f"generation {position.generation.hex()}, sequence {position.sequence}"),
    )
