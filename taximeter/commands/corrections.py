"""Corrections of what was charged: new entries that say who and why; the original stays.

Promise: each command shows first what it would change, in money and by tenant, and changes nothing; with --apply it gives
exactly that to the ledger, and returns when the ledger has taken it. Given twice, it is applied once.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from billing.amounts import AmountError, parse_decimal_to_pico
from billing.limits import QUANTITY_MAX, UNIT_CHARS_MAX
from billing.periods import month_of, month_start_ms, period_at
from billing.v1.command_pb2 import PriceBook
from billing.validation import TOKEN_FIELDS
from sinks import corrections
from sinks.corrections import Draft
from sinks.engine import Reader
from sinks.price_books import price_books
from sinks.rated_usage import Payer, payers
from sinks.rerating import events_between, month_of_payer
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.config import Config
from taximeter.errors import InputFileError, MisuseError, TaximeterError
from taximeter.price_files import read_price_book
from taximeter.reports import draft_values, print_drafts
from taximeter.times import now_ms, parse_month

__all__ = ["amend", "credit_note", "rerate", "void"]

# Of one adjustment: as many lines at most, should each be of another project and model.
_EVENTS_A_DRAFT: Final = 200
_EVENTS_MAX: Final = 100_000
_DAY_MS: Final = 86_400_000
_CHANGE: Final = re.compile(r"([^=]+)=(\d{1,13})")
TenantArgument = Annotated[str, typer.Argument(help="The tenant.")]
ReasonOption = Annotated[str, typer.Option(help="Why: stands on the entry for ever.")]
ApplyOption = Annotated[bool, typer.Option("--apply", help="Do it; without: only show the difference.")]


@command
def void(
    context: Context,
    tenant: TenantArgument,
    reason: ReasonOption,
    request: Annotated[list[str] | None, typer.Argument(help="Request IDs.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Request IDs, one a line.")] = None,
    apply: ApplyOption = False,
    json: JsonOption = False,
) -> None:
    """Take back what events were charged. The events stay as they were metered."""
    request_ids = list(request or ()) + (_lines(file) if file else [])
    if not 0 < len(request_ids) <= _EVENTS_MAX:
        raise MisuseError(f"REQUEST: {len(request_ids)} request IDs: name 1 to {_EVENTS_MAX:,}, here or in --file")

    def drafts(reader: Reader, config: Config) -> list[Draft]:
        payer, books = _payer(reader, tenant), price_books(reader)
        chunks = [request_ids[begin : begin + _EVENTS_A_DRAFT] for begin in range(0, len(request_ids), _EVENTS_A_DRAFT)]
        return [corrections.void(reader, payer, books, chunk, _remembered_from_ms(config)) for chunk in chunks]

    _correct(context, reason, drafts, apply=apply, json=json)


@command
def amend(
    context: Context,
    tenant: TenantArgument,
    request: Annotated[str, typer.Argument(help="The request ID.")],
    change: Annotated[list[str], typer.Option("--quantity", metavar="NAME=NUMBER", help="What is right; may be repeated.")],
    reason: ReasonOption,
    apply: ApplyOption = False,
    json: JsonOption = False,
) -> None:
    """Charge an event for other quantities than were metered: classes of tokens (output_tokens=12) or named units."""
    changes = dict(map(_change, change))

    def drafts(reader: Reader, config: Config) -> list[Draft]:
        payer, books = _payer(reader, tenant), price_books(reader)
        return [corrections.amend(reader, payer, books, request, changes, _remembered_from_ms(config))]

    _correct(context, reason, drafts, apply=apply, json=json)


@command
def credit_note(
    context: Context,
    tenant: TenantArgument,
    amount: Annotated[str, typer.Argument(help="How much is given back, like 25 or 12.50.")],
    reason: ReasonOption,
    month: Annotated[str, typer.Option(help="The month that it is about: 2026-01; without: this one.")] = "",
    invoice: Annotated[str, typer.Option(help="The invoice that it is about.")] = "",
    apply: ApplyOption = False,
    json: JsonOption = False,
) -> None:
    """Give a tenant an amount back, for a reason; it stands on the next invoice."""
    try:
        amount_pico = parse_decimal_to_pico(amount)
    except AmountError as error:
        raise MisuseError(f"AMOUNT: {error}") from None
    if amount_pico <= 0:
        raise MisuseError(f"AMOUNT {amount!r} gives nothing back: write more than 0")

    def drafts(reader: Reader, config: Config) -> list[Draft]:
        payer = _payer(reader, tenant)
        period = month_of_payer(payer, parse_month(month)) if month else period_at(payer.calendar, now_ms())
        return [corrections.credit_note(reader, payer, amount_pico, period, invoice)]

    _correct(context, reason, drafts, apply=apply, json=json)


@command
def rerate(
    context: Context,
    reason: ReasonOption,
    month: Annotated[str, typer.Option(help="Which month of the tenants' calendars: 2026-01; without: the last.")] = "",
    version: Annotated[int | None, typer.Option(min=1, help="By this version of the price book.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="By the book in this file, in effect or not.")] = None,
    currency: Annotated[str, typer.Option(help="Of --version: only tenants that are billed in it.")] = "USD",
    unrated: Annotated[bool, typer.Option("--unrated", help="Only usage that had no price when it came.")] = False,
    tenant: Annotated[str | None, typer.Option(help="That tenant alone; without: all.")] = None,
    apply: ApplyOption = False,
    json: JsonOption = False,
) -> None:
    """Rate a month again under another price book, or what had no price when it came, and charge the difference."""
    if [version is not None, file is not None, unrated].count(True) != 1:
        raise MisuseError("rerate: say which prices: one of --version, --file and --unrated")
    other = read_price_book(file) if file else version
    number = parse_month(month) if month else None if unrated else month_of(now_ms()) - 1

    def drafts(reader: Reader, config: Config) -> list[Draft]:
        books, found = price_books(reader), []
        if isinstance(other, int) and books.version(currency, other) is None:
            raise TaximeterError(f"version {other} of {currency} is not known here: see `taximeter prices show`")
        wanted = other.currency if isinstance(other, PriceBook) else None if unrated else currency
        chosen = [payer for payer in payers(reader, tenant) if wanted in (None, payer.currency)]
        begin_ms, end_ms = (month_start_ms(number), month_start_ms(number + 1)) if number is not None else (0, now_ms())
        total = sum(events_between(reader, each, begin_ms, end_ms) for each in {payer.currency for payer in chosen})
        with context.output.progress("rating", total or None) as advance:
            for payer in chosen:
                if other is None:
                    periods = corrections.unrated_periods(reader, payer)
                    if number is not None:
                        periods = [period for period in periods if period == month_of_payer(payer, number)]
                    found += [corrections.rate_unrated(reader, payer, period, books, advance) for period in periods]
                    continue
                assert number is not None
                period = month_of_payer(payer, number)
                if period.end_ms > now_ms():
                    raise MisuseError("--month: is not over for every tenant; what it comes to is not known before")
                found.append(corrections.rerate(reader, payer, period, books, other, advance))
        return found

    _correct(context, reason, drafts, apply=apply, json=json)


def _correct(
    context: Context, reason: str, make: Callable[[Reader, Config], Sequence[Draft]], *, apply: bool, json: bool
) -> None:
    """Show what `make` drafts, and apply it where that is asked for."""
    if not reason.strip():
        raise MisuseError("--reason: is empty; it stands on the entry for ever, say why")
    config = context.config()
    commander = Commander(config, issuer()) if apply else None
    with open_reader(config) as reader:
        drafts = make(reader, config)
        adjustments = [entry for draft in drafts for entry in draft.adjustments()]
        if commander is not None:
            # One after the other: a second that the ledger refuses leaves the first as it was shown.
            for command_id, said in adjustments:
                commander.give([commander.adjustment(said, reason, command_id)], reader)
    if json:
        context.output.json(
            {
                "applied": commander is not None,
                "adjustments": [command_id for command_id, _ in adjustments],
                "tenants": [draft_values(draft) for draft in drafts],
            }
        )
        return
    print_drafts(context.output, drafts)
    for note in dict.fromkeys(note for draft in drafts for note in draft.notes):
        context.output.note(note)
    if commander is not None:
        context.output.say(f"applied: {', '.join(command_id for command_id, _ in adjustments) or 'nothing differs'}")
    else:
        context.output.say("nothing was changed: say --apply to do it")


def _payer(reader: Reader, tenant: str) -> Payer:
    found = payers(reader, tenant)
    if not found:
        raise TaximeterError(f"tenant {tenant!r} is not known: see `taximeter balance` for those that are")
    return found[0]


def _remembered_from_ms(config: Config) -> int:
    return now_ms() - config.ledger.dedupe_horizon_days * _DAY_MS


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(f"{path} cannot be read ({error.strerror}): correct the path") from None
    except UnicodeDecodeError:
        raise InputFileError(f"{path} is no UTF-8 text: write request IDs, one a line") from None
    return [line for raw in text.splitlines() if (line := raw.strip())]


def _change(text: str) -> tuple[str, int]:
    match = _CHANGE.fullmatch(text)
    if match is None or int(match[2]) > QUANTITY_MAX or len(match[1]) > UNIT_CHARS_MAX:
        raise MisuseError(
            f"--quantity {text!r}: write NAME=NUMBER, a class of tokens ({', '.join(TOKEN_FIELDS[:2])}, …) or a unit, up to "
            f"{QUANTITY_MAX:,}"
        )
    return match[1], int(match[2])
