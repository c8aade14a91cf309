"""What periods came to and the invoices that were drawn from it, computed again from the windows of `sinks.recompute`.

Pure. Windows are summed in the order in which the records let them go; an invoice is drawn again from the lines that this
gives, from the credit and the prices that the audit has come to by itself, and must be the stored one to the byte.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from billing import line_parts
from billing.credit import Credits, Funds
from billing.invoice_step import series_name
from billing.invoices import Issue, Payer, closing, draw, net_pico
from billing.limits import WINDOW_PARTS_HARD_MAX
from billing.line_parts import Parts
from billing.period_lines import KEPT_MS, Line, LineKey, PeriodLines
from billing.periods import Period, period_at
from billing.prices import PriceBooks
from billing.quantities import Quantities
from billing.rating import flat_parts
from billing.state import SeriesHead
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import InvoiceFinalization
from billing.v1.invoice_pb2 import PeriodLine
from billing.v1.ledger_pb2 import LedgerRecord
from billing.windows import MINUTE_MS, Key

__all__ = ["AccountSum", "ExpectedInvoice", "RecomputedLines", "WindowSum"]


class AccountSum(Funds, Protocol):
    """An account as the audit adds it up."""

    currency: str
    display_name: str
    calendar: Calendar


class WindowSum(Protocol):
    """A window as the audit adds it up."""

    currency: str
    events: int
    refused_events: int
    unrated_events: int
    tokens: list[int]
    parts: Parts

    @property
    def units(self) -> Mapping[str, int]:
        """Named units."""
        ...


@dataclass(frozen=True, slots=True)
class ExpectedInvoice:
    """A final invoice and what its row must say."""

    tenant_id: str
    series: str
    number: int
    stored: bytes


class RecomputedLines:
    """The lines, invoices and series of one partition."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.lines = PeriodLines()
        self._invoiced_through_ms: dict[str, int] = {}
        self.series: dict[str, SeriesHead] = {}
        # Final invoices and lines that they took, since they were last taken from here.
        self.invoices: list[ExpectedInvoice] = []
        self.invoiced: list[PeriodLine] = []

    def fold(
        self, lines: PeriodLines, key: Key, window: WindowSum, calendar: Calendar, books: PriceBooks, record: LedgerRecord
    ) -> None:
        """Add what a window came to, as `record` lets it go."""
        line = lines.line(
            LineKey(
                key.tenant_id,
                period_at(calendar, key.minute * MINUTE_MS),
                window.currency,
                key.project_id,
                key.model,
                key.operation,
                key.service_class,
                key.price_version,
            ),
            record.generation,
            record.sequence,
        )
        line.events += window.events
        line.refused_events += window.refused_events
        line.unrated_events += window.unrated_events
        rate = books.rate_of_version(
            window.currency, key.price_version, key.model, key.operation, key.service_class, key.tenant_id
        )
        parts = window.parts
        if rate is not None and rate.terms is None:
            parts = {}
            line_parts.add_rated(parts, flat_parts(window.tokens, window.units, rate), WINDOW_PARTS_HARD_MAX)
        line.add_parts(parts)

    def expected(self, record: LedgerRecord) -> list[PeriodLine]:
        """The lines that `record` must state."""
        if record.WhichOneof("source") == "founding":
            self.lines.take_touched()
            return [line.to_line() for line in self.lines]
        return self.lines.take_touched()

    def forget(self, log_time_ms: int) -> None:
        """As a tick does."""
        self.lines.forget(log_time_ms - KEPT_MS, lambda tenant_id: self._invoiced_through_ms.get(tenant_id, 0))

    def take_stated(self, record: LedgerRecord) -> None:
        """Begin with what a founding record carries on."""
        for line in record.lines:
            self.lines.set(line)
        self._invoiced_through_ms = {account.tenant_id: account.invoiced_through_ms for account in record.accounts}
        for series in record.invoice_series:
            self.series[series.series] = SeriesHead(series.number, series.head_hash)

    def draw(
        self,
        said: InvoiceFinalization,
        account: AccountSum,
        books: PriceBooks,
        quantities: Quantities,
        credits_known: Credits,
        open_windows: Sequence[tuple[Key, WindowSum]],
        record: LedgerRecord,
        stated: LedgerRecord,
    ) -> bytes:
        """The invoice that `record` must have drawn; what it must state of credit goes to `stated`.

        `open_windows`: the tenant's that are open still, of the period and earlier ones. For a final invoice they are summed
        already: the record lets them go.
        """
        period = period_at(account.calendar, said.period_start_ms)
        payer = Payer(said.tenant_id, account.display_name, account.currency, account.calendar.time_zone)
        lines = self.lines
        if said.draft:
            account = copy.copy(account)
            lines = PeriodLines()
            for line in self.lines.of(said.tenant_id):
                lines.set(line.to_line())
            for key, window in open_windows:
                self.fold(lines, key, window, account.calendar, books, record)
        for each in closing(books, quantities.items(), payer, period, _up_to(lines, said.tenant_id, period)):
            lines.line(each.key, record.generation, record.sequence).add_parts({each.part: each.value})
            account.spend_pico += each.value.amount_pico
        taken = _up_to(lines, said.tenant_id, period)
        name = series_name(said.series_prefix, self.partition)
        head = self.series.get(name, SeriesHead(0, b""))
        number = head.number + 1
        paid = credits_known.invoice(said.tenant_id, account, net_pico(taken), f"{name}-{number}", stated, draft=said.draft)
        place = (record.log_time_ms, record.generation, record.sequence)
        issue = Issue(name, 0, b"", *place) if said.draft else Issue(name, number, head.hash, *place)
        stored = draw(said, payer, period, taken, paid, issue).SerializeToString(deterministic=True)
        if not said.draft:
            self._invoiced_through_ms[said.tenant_id] = period.end_ms
            self.series[name] = SeriesHead(number, hashlib.sha256(stored).digest())
            self.invoices.append(ExpectedInvoice(said.tenant_id, name, number, stored))
            self.invoiced += [line.to_line() for line in taken]
            self.lines.remove([line.key for line in taken])
        return stored


def _up_to(lines: PeriodLines, tenant_id: str, period: Period) -> list[Line]:
    return [line for line in lines.of(tenant_id) if line.key.period.start_ms <= period.start_ms]
