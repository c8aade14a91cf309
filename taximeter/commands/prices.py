"""The price book: checked, shown, compared and applied.

Promise: a book is taken whole or refused whole, and every problem is named with its line and its mend. What would leave models
that are in use without a price is named too, and refused unless it is asked for.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from billing.periods import month_of, month_start_ms
from billing.prices import PriceBooks
from billing.v1.command_pb2 import PriceBook
from sinks import rerating
from sinks.engine import Reader
from sinks.price_books import Unpriced, price_books, unpriced
from sinks.rerating import events_between
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import open_reader
from taximeter.errors import EXIT_WRONG, MisuseError, TaximeterError
from taximeter.price_files import read_price_book
from taximeter.price_terms import Change, changes, file_values, terms
from taximeter.reports import difference_values, print_differences
from taximeter.times import now_ms, parse_month, parse_time_ms, show_month, show_time

__all__ = ["apply", "books_before", "check", "diff", "show", "simulate"]

# How far back usage says that a model is in use.
_IN_USE_MS: Final = 35 * 86_400_000
_TENANTS_NAMED: Final = 3
_FIRST_BOOK_S: Final = 10.0
_FIRST_BOOK_POLL_S: Final = 0.1
FileArgument = Annotated[Path, typer.Argument(help="A price book in TOML or JSON.")]
_TERM_COLUMNS: Final = ("tenant", "model", "operation", "class", "what", "terms")


@dataclass(frozen=True, slots=True)
class _Look:
    """What is wrong with a book as the next version here, and what somebody should know."""

    problems: list[str]
    unpriced: list[Unpriced]
    notes: list[str]


@command
def check(
    context: Context,
    file: FileArgument,
    offline: Annotated[bool, typer.Option("--offline", help="Look at the file alone, not at what is in use.")] = False,
    json: JsonOption = False,
) -> None:
    """Say whether a price book can be applied: its terms, its place in line, and models in use that it has no price for."""
    book = read_price_book(file)
    look = _Look([], [], [])
    if not offline:
        with open_reader(context.config()) as reader:
            look = _look(reader, books_before(reader, book), book)
    if json:
        context.output.json(
            {
                **_named(book),
                "problems": look.problems,
                "unpriced": [entry._asdict() for entry in look.unpriced],
                "notes": look.notes,
            }
        )
    else:
        for note in look.notes:
            context.output.note(note)
        for problem in (*look.problems, *map(_told, look.unpriced)):
            context.output.say(problem)
    if look.problems or look.unpriced:
        raise typer.Exit(EXIT_WRONG)
    if not json:
        context.output.say(f"version {book.version} of {book.currency}: {len(book.prices)} prices, well")


@command
def show(
    context: Context,
    currency: Annotated[str, typer.Option(help="Which currency's book; without: the only one.")] = "",
    at: Annotated[str, typer.Option(help="The version in effect then: 2026-01-31, or 7d for so long ago.")] = "",
    json: JsonOption = False,
) -> None:
    """Show the price book in effect. As JSON it is a file that can be edited and applied."""
    now = now_ms()
    at_ms = parse_time_ms("--at", at, now=now) if at else now
    with open_reader(context.config()) as reader:
        books = price_books(reader)
    currency = currency or _only_currency(books)
    book = books.book_at(currency, at_ms)
    if book is None:
        raise TaximeterError(f"no price book of {currency} is in effect at {show_time(at_ms)}: apply one")
    if json:
        context.output.json(file_values(book))
        return
    context.output.table(
        f"Version {book.version} of {book.currency}, effective {_named(book)['effective']}",
        (*_TERM_COLUMNS, "price "),
        terms(book),
    )


@command
def diff(context: Context, file: FileArgument, json: JsonOption = False) -> None:
    """Show what a price book changes against the version before it."""
    book = read_price_book(file)
    with open_reader(context.config()) as reader:
        books = price_books(reader)
    before = books.version(book.currency, book.version - 1)
    if before is None and book.version > 1:
        raise TaximeterError(
            f"version {book.version - 1} of {book.currency} is not known here: write the next version's number"
        )
    found = changes(before, book)
    if json:
        context.output.json(
            {**_named(book), "changes": [_change_values(change) for change in found]},
        )
        return
    context.output.table(
        f"Version {book.version} of {book.currency} against {f'version {before.version}' if before else 'nothing'}",
        (*_TERM_COLUMNS, "before ", "after "),
        [(*change.term[:-1], change.before or "-", change.after or "-") for change in found],
        empty="No price changes.",
    )


@command
def apply(
    context: Context,
    file: FileArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file, and send nothing.")] = False,
    leave_unpriced: Annotated[
        bool, typer.Option("--leave-unpriced", help="Take it though models in use have no price in it: they are kept unrated.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Give the ledger the next version of the price book. It is validated whole, and takes effect in every partition."""
    book = read_price_book(file)
    if not dry_run:
        config = context.config()
        commander = Commander(config, issuer())
        with open_reader(config) as reader:
            command_id = f"prices-{book.currency}-{book.version}"
            if commander.was_applied(reader, command_id):
                raise TaximeterError(
                    f"version {book.version} of {book.currency} was applied before: "
                    f"a changed book is version {book.version + 1}"
                )
            look = _look(reader, books_before(reader, book), book)
            for note in look.notes:
                context.output.note(note)
            if look.problems:
                raise TaximeterError(f"price book {file}: " + "; ".join(look.problems))
            if look.unpriced and not leave_unpriced:
                raise TaximeterError(
                    f"price book {file}: {'; '.join(map(_told, look.unpriced))}: add a price, or say --leave-unpriced"
                )
            commander.give([commander.prices(book, command_id=command_id)], reader)
    values: dict[str, object] = {**_named(book), "prices": len(book.prices), "applied": not dry_run}
    if json:
        context.output.json(values)
    else:
        context.output.pairs("", values)


def books_before(reader: Reader, book: PriceBook, timeout_s: float = _FIRST_BOOK_S) -> PriceBooks:
    """The books that `book` is to follow.

    An installation of a moment ago has its first one in the ledger before it has it in the database: where one must be there
    and none is, it is waited for.
    """
    deadline_s = time.monotonic() + timeout_s
    if book.version > 1:
        while reader.query("SELECT count() FROM price_books").rows[0][0] == 0 and time.monotonic() < deadline_s:
            time.sleep(_FIRST_BOOK_POLL_S)
    return price_books(reader)


@command
def simulate(
    context: Context,
    file: FileArgument,
    tenant: Annotated[str | None, typer.Option(help="That tenant alone; without: all that are billed in its currency.")] = None,
    month: Annotated[str, typer.Option(help="Which month of the tenants' calendars: 2026-01; without: the last.")] = "",
    json: JsonOption = False,
) -> None:
    """Show what a month would have cost under a price book, by tenant, from the requests that there were."""
    book = read_price_book(file)
    number = parse_month(month) if month else month_of(now_ms()) - 1
    with open_reader(context.config()) as reader:
        # Months of calendars begin within a day of UTC's.
        total = events_between(reader, book.currency, month_start_ms(number), month_start_ms(number + 1))
        with context.output.progress("rating", total or None) as advance:
            found = list(rerating.simulate(reader, book, number, tenant, advance))
    if json:
        context.output.json([difference_values(entry) for entry in found])
    else:
        title = f"{show_month(number)} under version {book.version} of {book.currency}"
        print_differences(context.output, title, found, empty=f"Nobody is billed in {book.currency}.")


def _look(reader: Reader, books: PriceBooks, book: PriceBook) -> _Look:
    notes = []
    before = books.version(book.currency, book.version - 1)
    now = now_ms()
    if before is not None and book.effective_ms < now:
        notes.append(
            f"it takes effect at {show_time(book.effective_ms)}, which is over: usage since then that is rated already keeps "
            "its price"
        )
    return _Look(books.problems(book), unpriced(reader, book, now - _IN_USE_MS), notes)


def _only_currency(books: PriceBooks) -> str:
    currencies = sorted({book.currency for book in books.all()})
    if len(currencies) == 1:
        return currencies[0]
    if not currencies:
        raise TaximeterError("there is no price book: apply one with `taximeter prices apply FILE`")
    raise MisuseError(f"there are books of {', '.join(currencies)}: name one with --currency")


def _named(book: PriceBook) -> dict[str, object]:
    effective = show_time(book.effective_ms) if book.effective_ms else "always"
    return {"version": book.version, "currency": book.currency, "effective": effective}


def _told(entry: Unpriced) -> str:
    tenants = ", ".join(entry.tenant_ids[:_TENANTS_NAMED]) + (" …" if len(entry.tenant_ids) > _TENANTS_NAMED else "")
    return (
        f"no price for {entry.model}, operation {entry.operation}, class {entry.service_class}, which is in use: "
        f"{entry.events:,} requests in 35 days by {tenants}"
    )


def _change_values(change: Change) -> dict[str, str]:
    return {
        "tenant": change.term.tenant_id,
        "model": change.term.model,
        "operation": change.term.operation,
        "service_class": change.term.service_class,
        "what": change.term.what,
        "terms": change.term.terms,
        "before": change.before,
        "after": change.after,
    }
