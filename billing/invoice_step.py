"""What the command that draws an invoice does to the state.

A final invoice takes the tenant's lines of the period and of earlier ones, once: they are let go. It lets the tenant's open
windows of those periods go first, adds what the close adds, and lets credit pay. Its bytes stand in the record, its hash is
what the next of its series names. A draft shows the same and changes nothing.
"""

from __future__ import annotations

import copy
import hashlib

from billing.accounts import AccountState
from billing.commands import CommandRefused
from billing.invoices import Issue, Payer, closing, draw, net_pico, terms_problem
from billing.limits import (
    LINE_PART_BYTES,
    LINE_PARTS_MAX,
    LINES_BYTES_MAX,
    RELEASED_BYTES_MAX,
    RELEASED_WINDOWS_MAX,
    TIME_MS_MAX,
)
from billing.period_lines import Line, LineKey, PeriodLines
from billing.periods import Period, period_at
from billing.release import fold, line_key, release
from billing.state import DAY_MS, LedgerState, SeriesHead
from billing.v1.command_pb2 import InvoiceFinalization
from billing.v1.ledger_pb2 import InvoiceSeries, LedgerRecord
from billing.windows import MINUTE_MS, Window

__all__ = ["finalize", "series_name"]


def series_name(prefix: str, partition: int) -> str:
    """The series of a ledger partition: numbers need no word between partitions."""
    return f"{prefix}-{partition:04d}"


def finalize(state: LedgerState, account: AccountState, said: InvoiceFinalization, record: LedgerRecord) -> bytes:
    """The stored bytes of the invoice that `said` asks for. Raises CommandRefused, and then nothing has changed."""
    if problem := terms_problem(said):
        raise CommandRefused(problem)
    if not -DAY_MS <= said.period_start_ms <= TIME_MS_MAX:
        raise CommandRefused(f"period_start_ms: {said.period_start_ms} is no Unix time in ms; name a month's beginning")
    period = period_at(account.calendar, said.period_start_ms)
    if period.start_ms != said.period_start_ms:
        raise CommandRefused(
            f"period_start_ms: {said.period_start_ms} is within the period that begins at {period.start_ms}; name its beginning"
        )
    windows = _open_windows(state, account.tenant_id, period)
    if not said.draft:
        _check_turn(state, account, period, windows, record.log_time_ms)
        _check_room(state, windows)
    else:
        # What the close adds is spend in a draft too, so that the same credit pays for it.
        account = copy.copy(account)
    lines = _gather(state, account, period, windows, record, draft=said.draft)
    name = series_name(said.series_prefix, state.partition)
    head = state.series.get(name, SeriesHead(0, b""))
    paid = state.credits.invoice(
        account.tenant_id, account, net_pico(lines), f"{name}-{head.number + 1}", record, draft=said.draft
    )
    issue = Issue(
        series=name,
        number=0 if said.draft else head.number + 1,
        previous_hash=b"" if said.draft else head.hash,
        log_time_ms=record.log_time_ms,
        generation=record.generation,
        sequence=record.sequence,
    )
    stored = draw(said, payer_of(account), period, lines, paid, issue).SerializeToString(deterministic=True)
    if not said.draft:
        record.invoiced.extend(line.to_key() for line in lines)
        state.lines.remove(line.key for line in lines)
        account.invoiced_through_ms = period.end_ms
        state.series[name] = SeriesHead(head.number + 1, hashlib.sha256(stored).digest())
        record.invoice_series.append(InvoiceSeries(series=name, number=head.number + 1, head_hash=state.series[name].hash))
    return stored


def payer_of(account: AccountState) -> Payer:
    """The account as an invoice names it."""
    return Payer(account.tenant_id, account.display_name, account.currency, account.calendar.time_zone)


def _open_windows(state: LedgerState, tenant_id: str, period: Period) -> list[Window]:
    keys = sorted(key for key in state.windows if key.tenant_id == tenant_id and key.minute * MINUTE_MS < period.end_ms)
    return [state.windows[key] for key in keys]


def _check_turn(state: LedgerState, account: AccountState, period: Period, windows: list[Window], log_time_ms: int) -> None:
    """Periods are invoiced when they are over, once, in their order."""
    tenant_id, through_ms = account.tenant_id, account.invoiced_through_ms
    if log_time_ms < period.end_ms:
        raise CommandRefused(
            f"period_start_ms: the period ends at {period.end_ms}, log time is {log_time_ms}; draw a draft until it is over"
        )
    if period.start_ms < through_ms:
        raise CommandRefused(
            f"period_start_ms: the periods of tenant {tenant_id} up to {through_ms} are invoiced; what came since stands on "
            "the next invoice"
        )
    keys = [line.key for line in state.lines.of(tenant_id)] + [line_key(state, window) for window in windows]
    earlier = [key.period.start_ms for key in keys if through_ms <= key.period.start_ms < period.start_ms]
    start_ms = through_ms or period.start_ms
    while start_ms < period.start_ms:
        book = state.books.book_at(account.currency, start_ms)
        earlier += [start_ms for entry in (book.commitments if book else ()) if entry.tenant_id == tenant_id]
        start_ms = period_at(account.calendar, start_ms).end_ms
    if earlier:
        raise CommandRefused(
            f"period_start_ms: the period of tenant {tenant_id} that begins at {min(earlier)} comes first; invoice it before"
        )


def _check_room(state: LedgerState, windows: list[Window]) -> None:
    """What lets many windows go at once would not fit into a record."""
    sizes: dict[LineKey, int] = {}
    for window in windows:
        key = line_key(state, window)
        sizes[key] = key.names_bytes + LINE_PART_BYTES * LINE_PARTS_MAX // 4
    names_bytes = sum(line_key(state, window).names_bytes for window in windows)
    if len(windows) > RELEASED_WINDOWS_MAX or names_bytes > RELEASED_BYTES_MAX or sum(sizes.values()) > LINES_BYTES_MAX:
        lateness_ms = state.settings.window_lateness_ms
        raise CommandRefused(
            f"tenant_id: {len(windows)} windows of the period are open still, too many for one record; try again when no usage "
            f"of it has come for {lateness_ms // 60_000 + 1} minutes"
        )


def _gather(
    state: LedgerState, account: AccountState, period: Period, windows: list[Window], record: LedgerRecord, *, draft: bool
) -> list[Line]:
    """Everything that the invoice takes, what the close adds included. A draft gathers in a copy."""
    if draft:
        lines = PeriodLines()
        for line in state.lines.of(account.tenant_id):
            lines.set(line.to_line())
        for window in windows:
            fold(state, lines, window, record.generation, record.sequence)
    else:
        lines = state.lines
        for window in windows:
            release(state, window, record)
        state.remove_windows([window.key for window in windows])

    def taken() -> list[Line]:
        return [line for line in lines.of(account.tenant_id) if line.key.period.start_ms <= period.start_ms]

    for each in closing(state.books, state.quantities.items(), payer_of(account), period, taken()):
        line = lines.line(each.key, record.generation, record.sequence)
        line.add_parts({each.part: each.value})
        account.spend_pico += each.value.amount_pico
    return taken()
