"""What one partition must hold, computed again from its ledger records: every event's cost, every window, every account.

Pure: it takes records in order and says where a record contradicts the ones before it. It keeps what the ledger keeps: open
windows and accounts; a window that was let go leaves here too, with what it must stand at in ClickHouse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

from billing import credit
from billing.amounts import from_amount
from billing.budgets import Budgets, Charge
from billing.commands import CommandRefused
from billing.leases import LeaseState
from billing.ledger_rules import changed, rules_of
from billing.limits import ID_CHARS_MAX, WINDOW_PARTS_HARD_MAX
from billing.line_parts import Parts, add_rated, from_line_parts
from billing.period_lines import line_key_of
from billing.periods import period_at
from billing.prices import PriceBooks
from billing.quantities import KEPT_MS, Quantities
from billing.rating import FREE_OUTCOMES, event_cost_pico, token_quantities, unit_quantities
from billing.schedules import Part
from billing.state import CORRECTED_KEPT_MS, Corrected
from billing.v1.account_pb2 import ACCOUNT_STATUS_CLOSED, Account, BudgetState, Calendar
from billing.v1.command_pb2 import Command, InvoiceFinalization, RulesChange
from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_DUPLICATE,
    LedgerRecord,
    LedgerRules,
    UsageApplied,
    WindowTotal,
)
from billing.v1.usage_pb2 import UsageBatch, UsageEvent
from billing.windows import MINUTE_MS, Key, key_of
from sinks.recompute_lines import RecomputedLines

__all__ = ["ExpectedAccount", "ExpectedEvent", "ExpectedWindow", "Finding", "Recomputed", "WindowId"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference. `kind` is one of a fixed set, for programs; the rest is for people."""

    kind: str
    partition: int
    # What is different: a record, a request, a window, an account.
    subject: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"partition {self.partition}: {self.kind}: {self.subject}: expected {self.expected}, found {self.found}"


class WindowId(NamedTuple):
    """A window's full key."""

    key: Key
    generation: bytes
    opened_sequence: int

    def __str__(self) -> str:
        key = self.key
        return (
            f"window {key.tenant_id}/{key.project_id}/{key.model}/{key.operation}/{key.service_class} minute {key.minute}, "
            f"price version {key.price_version}, opened by {self.generation.hex()[:12]}:{self.opened_sequence}"
        )


@dataclass(slots=True)
class ExpectedWindow:
    """What a window adds up to."""

    currency: str
    events: int = 0
    refused_events: int = 0
    unrated_events: int = 0
    tokens: list[int] = field(default_factory=lambda: [0] * 8)
    units: Counter[str] = field(default_factory=Counter)
    cost_pico: int = 0
    # Where its price has terms.
    parts: Parts = field(default_factory=dict)

    def values(self) -> dict[str, object]:
        """By name, to compare and to show."""
        return {
            "events": self.events,
            "refused_events": self.refused_events,
            "unrated_events": self.unrated_events,
            "tokens": tuple(self.tokens),
            "units": {unit: quantity for unit, quantity in sorted(self.units.items()) if quantity},
            "cost_pico": self.cost_pico,
            "parts": self.parts,
        }


@dataclass(slots=True)
class ExpectedAccount:
    """What an account adds up to."""

    currency: str
    credit_pico: int = 0
    spend_pico: int = 0
    events: int = 0
    duplicates: int = 0
    conflicts: int = 0
    unrated_events: int = 0
    calendar: Calendar = field(default_factory=Calendar)
    display_name: str = ""

    def values(self) -> dict[str, object]:
        """By name, to compare and to show."""
        return {
            "credit_pico": self.credit_pico,
            "spend_pico": self.spend_pico,
            "events": self.events,
            "duplicates": self.duplicates,
            "conflicts": self.conflicts,
            "unrated_events": self.unrated_events,
        }


@dataclass(frozen=True, slots=True)
class ExpectedEvent:
    """An accepted event, and what its row must say."""

    event: UsageEvent
    generation: bytes
    sequence: int
    index: int
    cost_pico: int
    price_version: int


class Recomputed:
    """One partition, record by record."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.findings: list[Finding] = []
        self.accounts: dict[str, ExpectedAccount] = {}
        self.open: dict[Key, tuple[WindowId, ExpectedWindow]] = {}
        # Let go since they were last taken from here.
        self.closed: list[tuple[WindowId, ExpectedWindow]] = []
        self.events_by_tenant: Counter[str] = Counter()
        self.windows_by_tenant: Counter[str] = Counter()
        # The sum of each tenant's adjustments.
        self.adjusted_by_tenant: Counter[str] = Counter()
        self._corrected: dict[bytes, Corrected] = {}
        self._books = PriceBooks()
        self._quantities = Quantities()
        self._credits = credit.Credits()
        self._budgets = Budgets()
        self.lines = RecomputedLines(partition)
        # What remains of each lease, by tenant, holder and epoch, and in all by tenant.
        self._leases: dict[tuple[str, str, int], int] = {}
        self._leased: Counter[str] = Counter()
        self._default_currency = ""
        self._rules = LedgerRules()
        self._expired_through_day = 0

    def take(self, record: LedgerRecord) -> list[ExpectedEvent]:
        """Apply the next record; returns its accepted events."""
        expected: list[ExpectedEvent] = []
        # What it must state of credit.
        stated = LedgerRecord(log_time_ms=record.log_time_ms, generation=record.generation, sequence=record.sequence)
        # A ledger that is founded again states what there was; time goes on with the record behind it.
        goes_on = not record.HasField("founding")
        if goes_on and self._credits.next_ms <= record.log_time_ms:
            self._credits.advance(self.accounts, stated)
        if goes_on and self._budgets.next_ms <= record.log_time_ms:
            self._budgets.advance(self.accounts, stated)
        opened = {key_of(total.key) for total in record.totals if total.key.opened_sequence == record.sequence}
        followed = {key: self.open.pop(key) for key in opened & self.open.keys()}
        match record.WhichOneof("source"):
            case "founding":
                self._found(record, stated)
            case "usage":
                expected = list(self._usage(record))
                self._compare_quantities(record)
                self._charge_budgets(expected, stated)
            case "command":
                self._command(record, stated)
            case "tick" if record.tick.expired_through_day > self._expired_through_day:
                self._expired_through_day = record.tick.expired_through_day
                self._quantities.forget(record.log_time_ms - KEPT_MS)
                self._credits.forget(record.log_time_ms - credit.KEPT_MS)
                before_ms = record.log_time_ms - CORRECTED_KEPT_MS
                self._corrected = {key: by for key, by in self._corrected.items() if by.corrected_ms >= before_ms}
                self.lines.forget(record.log_time_ms)
        if list(stated.credits) != list(record.credits):
            self._differs("credits_differ", f"record {record.sequence}", str(list(stated.credits)), str(list(record.credits)))
        # Their order is that of names, and an erased user has another since.
        if _unordered(stated.budgets) != _unordered(record.budgets):
            self._differs("budgets_differ", f"record {record.sequence}", str(list(stated.budgets)), str(list(record.budgets)))
        self._compare_totals(record)
        self._release(record, followed)
        self._compare_lines(record)
        for lease in map(LeaseState.from_lease, record.leases):
            place = lease.tenant_id, lease.holder_id, lease.epoch
            self._leased[lease.tenant_id] += lease.remaining_pico - self._leases.pop(place, 0)
            if not lease.gone:
                self._leases[place] = lease.remaining_pico
        self._compare_accounts(record)
        return expected

    def _found(self, record: LedgerRecord, stated: LedgerRecord) -> None:
        founding = record.founding
        self._default_currency = founding.default_currency
        self._rules = rules_of(founding)
        if founding.HasField("predecessor"):
            # Windows were let go with the generation; accounts and price books are carried on.
            for window_id, window in sorted(self.open.values(), key=itemgetter(0)):
                self._close(window_id, window, record)
            self.open.clear()
            if not self.accounts:
                self.accounts = {account.tenant_id: _stated(account) for account in record.accounts}
                for quantities in record.quantities:
                    self._quantities.set(quantities)
                for held in record.credits:
                    self._credits.set(held)
                for budget in record.budgets:
                    self._budgets.set(budget)
                self.lines.take_stated(record)
                for entry in record.corrected:
                    self._corrected[entry.key] = Corrected(entry.adjustment_id, entry.corrected_ms)
            stated.credits.extend(self._credits.all(record.log_time_ms))
            stated.budgets.extend(self._budgets.all(record.generation))
            self._books = PriceBooks(founding.price_books)

    def _usage(self, record: LedgerRecord) -> Iterator[ExpectedEvent]:
        usage = record.usage
        batch = UsageBatch.FromString(usage.batch)
        dropped = {entry.index: entry.reason for entry in usage.dropped}
        for index, reason in dropped.items():
            tenant_id = batch.events[index].tenant_id
            if reason == DROP_REASON_DUPLICATE:
                self._account(tenant_id).duplicates += 1
            elif reason == DROP_REASON_CONFLICT:
                self._account(tenant_id).conflicts += 1
        accepted = [index for index in range(len(batch.events)) if index not in dropped]
        for place, index in enumerate(accepted):
            event = batch.events[index]
            yield self._event(record, event, index, *_stated_cost(usage, place))

    def _event(
        self, record: LedgerRecord, event: UsageEvent, index: int, stated_pico: int, stated_version: int
    ) -> ExpectedEvent:
        account = self._account(event.tenant_id)
        rate = self._books.rate(
            account.currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id
        )
        parts: list[Part] = []
        if rate is None or rate.terms is None or event.outcome in FREE_OUTCOMES:
            cost = event_cost_pico(event, rate, {})
        else:
            parts = self._quantities.take(event, rate, account.currency, account.calendar)
            cost = sum(part.amount_pico for part in parts)
        if cost != stated_pico:
            self._differs(
                "cost_differs",
                f"event {event.tenant_id}/{event.request_id} in record {record.sequence}",
                f"{cost} pico",
                f"{stated_pico} pico",
            )
        free = event.outcome in FREE_OUTCOMES
        unrated = not free and rate is None
        key = Key(
            event.tenant_id,
            event.project_id,
            event.model,
            event.operation,
            event.service_class,
            event.ended_ms // MINUTE_MS,
            rate.version if rate else 0,
        )
        entry = self.open.get(key)
        if entry is None or entry[1].currency != account.currency:
            window_id = WindowId(key, record.generation, record.sequence)
            entry = self.open[key] = (window_id, ExpectedWindow(account.currency))
            self.windows_by_tenant[event.tenant_id] += 1
        window = entry[1]
        window.events += 1
        window.refused_events += free
        window.unrated_events += unrated
        if not free:
            window.tokens = [have + more for have, more in zip(window.tokens, token_quantities(event), strict=True)]
            if event.units:
                window.units.update(unit_quantities(event))
        window.cost_pico += cost
        add_rated(window.parts, parts, WINDOW_PARTS_HARD_MAX)
        account.events += 1
        account.unrated_events += unrated
        account.spend_pico += cost
        self.events_by_tenant[event.tenant_id] += 1
        return ExpectedEvent(event, record.generation, record.sequence, index, stated_pico, stated_version)

    def _command(self, record: LedgerRecord, stated: LedgerRecord) -> None:
        if not record.command.applied:
            return
        command = Command.FromString(record.command.command)
        match command.WhichOneof("action"):
            case "credit_grant":
                grant = command.credit_grant
                account = self._account(grant.tenant_id)
                try:
                    self._credits.grant(grant.tenant_id, account, grant, command.command_id, stated)
                except CommandRefused as refused:
                    self._differs("grant_differs", f"record {record.sequence}", str(refused), "applied")
            case "budget_upsert":
                try:
                    self._budgets.upsert(command.budget_upsert, self._account(command.budget_upsert.tenant_id), stated)
                except CommandRefused as refused:
                    self._differs("budget_differs", f"record {record.sequence}", str(refused), "applied")
            case "tenant_upsert":
                upsert = command.tenant_upsert
                account = self._account(upsert.tenant_id)
                account.currency = upsert.currency or account.currency
                account.display_name = upsert.display_name[:ID_CHARS_MAX] or account.display_name
                if upsert.HasField("calendar"):
                    account.calendar = upsert.calendar
                if upsert.status == ACCOUNT_STATUS_CLOSED:
                    self._credits.forfeit(upsert.tenant_id, account, stated, paid_too=upsert.expire_credit)
            case "adjustment":
                self._adjustment(record, command, stated)
            case "price_book":
                self._books.add(command.price_book)
            case "rules_change":
                self._change_rules(command.rules_change, record)
            case "invoice_finalization":
                self._invoice(command.invoice_finalization, record, stated)

    def _change_rules(self, said: RulesChange, record: LedgerRecord) -> None:
        try:
            self._rules = changed(self._rules, said)
        except CommandRefused as refused:
            self._differs("rules_differ", f"record {record.sequence}", str(refused), "applied")
            return
        if self._rules != record.command.rules:
            self._differs("rules_differ", f"record {record.sequence}", str(self._rules), str(record.command.rules))

    def _invoice(self, said: InvoiceFinalization, record: LedgerRecord, stated: LedgerRecord) -> None:
        account = self._account(said.tenant_id)
        period = period_at(account.calendar, said.period_start_ms)
        own = [
            (key, window)
            for key, (_, window) in sorted(self.open.items())
            if key.tenant_id == said.tenant_id and key.minute * MINUTE_MS < period.end_ms
        ]
        if not said.draft:
            names = {(key_of(key), key.opened_sequence) for key in record.released}
            for key, window in own:
                window_id, _ = self.open.pop(key)
                self._close(window_id, window, record)
                if (key, window_id.opened_sequence) not in names:
                    self._differs("window_not_released", str(window_id), f"let go by record {record.sequence}", "not stated")
        drawn = self.lines.draw(said, account, self._books, self._quantities, self._credits, own, record, stated)
        if drawn != record.command.invoice:
            subject = f"invoice of {said.tenant_id} in record {record.sequence}"
            self._differs("invoice_differs", subject, drawn.hex(), record.command.invoice.hex())

    def _release(self, record: LedgerRecord, followed: dict[Key, tuple[WindowId, ExpectedWindow]]) -> None:
        """Sum what the record lets go, in its order."""
        for stated in record.released:
            key = key_of(stated)
            for held in (followed, self.open):
                if key in held and held[key][0].opened_sequence == stated.opened_sequence:
                    self._close(*held.pop(key), record)
        for window_id, _ in followed.values():
            self._differs("window_not_released", str(window_id), f"let go by record {record.sequence}", "not stated")

    def _close(self, window_id: WindowId, window: ExpectedWindow, record: LedgerRecord) -> None:
        calendar = self._account(window_id.key.tenant_id).calendar
        self.lines.fold(self.lines.lines, window_id.key, window, calendar, self._books, record)
        self.closed.append((window_id, window))

    def _compare_lines(self, record: LedgerRecord) -> None:
        expected = self.lines.expected(record)
        if expected != list(record.lines):
            self._differs("lines_differ", f"record {record.sequence}", str(expected), str(list(record.lines)))

    def _charge_budgets(self, expected: list[ExpectedEvent], stated: LedgerRecord) -> None:
        charges = [
            Charge(event.tenant_id, event.project_id, event.user_id, event.ended_ms, each.cost_pico)
            for each in expected
            if (event := each.event).tenant_id in self._budgets.tenants
        ]
        self._budgets.charge(charges, self.accounts, stated)

    def _adjustment(self, record: LedgerRecord, command: Command, stated: LedgerRecord) -> None:
        said = command.adjustment
        amount = 0
        for line in said.lines:
            parts = from_line_parts(line.parts)
            self.lines.lines.line(line_key_of(line.key), record.generation, record.sequence).add_parts(parts)
            amount += sum(part.amount_pico for part in parts.values())
        account = self._account(said.tenant_id)
        account.spend_pico += amount
        self._credits.correct(said.tenant_id, account, stated)
        self.adjusted_by_tenant[said.tenant_id] += amount
        for request_id, entry in zip(said.corrected_request_ids, record.corrected, strict=True):
            by = self._corrected.setdefault(entry.key, Corrected(command.command_id, record.log_time_ms))
            if by.adjustment_id != command.command_id:
                subject = f"event {said.tenant_id}/{request_id}"
                self._differs("corrected_twice", subject, f"corrected by {by.adjustment_id}", command.command_id)

    def _account(self, tenant_id: str) -> ExpectedAccount:
        account = self.accounts.get(tenant_id)
        if account is None:
            account = self.accounts[tenant_id] = ExpectedAccount(self._default_currency)
        return account

    def _compare_totals(self, record: LedgerRecord) -> None:
        for total in record.totals:
            entry = self.open.get(key_of(total.key))
            stated = WindowId(key_of(total.key), record.generation, total.key.opened_sequence)
            if entry is None or entry[0] != stated:
                self._differs("window_unknown", str(stated), "no such window", f"stated by record {record.sequence}")
                continue
            self._compare("total_differs", f"{stated} in record {record.sequence}", entry[1].values(), _stated_window(total))

    def _compare_quantities(self, record: LedgerRecord) -> None:
        expected = self._quantities.take_moved()
        if expected != list(record.quantities):
            self._differs("quantities_differ", f"record {record.sequence}", str(expected), str(list(record.quantities)))

    def _compare_accounts(self, record: LedgerRecord) -> None:
        for stated in record.accounts:
            expected = self._account(stated.tenant_id)
            subject = f"account {stated.tenant_id} in record {record.sequence}"
            self._compare("account_differs", subject, expected.values(), _stated(stated).values())
            if (leased := from_amount(stated.leased)) != self._leased[stated.tenant_id]:
                self._differs("leased_differs", subject, f"{self._leased[stated.tenant_id]} pico", f"{leased} pico")

    def _compare(self, kind: str, subject: str, expected: dict[str, object], found: dict[str, object]) -> None:
        for name, value in expected.items():
            if found[name] != value:
                self._differs(kind, f"{subject}: {name}", str(value), str(found[name]))

    def _differs(self, kind: str, subject: str, expected: str, found: str) -> None:
        self.findings.append(Finding(kind, self.partition, subject, expected, found))


def _unordered(budgets: Iterable[BudgetState]) -> list[bytes]:
    return sorted(budget.SerializeToString(deterministic=True) for budget in budgets)


def _stated_cost(usage: UsageApplied, place: int) -> tuple[int, int]:
    high = usage.cost_pico_high[place] if usage.cost_pico_high else 0
    versions = usage.price_versions
    return high << 64 | usage.cost_pico_low[place], versions[0] if len(versions) == 1 else versions[place]


def _stated(account: Account) -> ExpectedAccount:
    return ExpectedAccount(
        account.currency,
        from_amount(account.credit),
        from_amount(account.spend),
        account.events,
        account.duplicates,
        account.conflicts,
        account.unrated_events,
        account.calendar,
        account.display_name,
    )


def _stated_window(total: WindowTotal) -> dict[str, object]:
    return ExpectedWindow(
        total.currency,
        total.events,
        total.refused_events,
        total.unrated_events,
        [
            total.uncached_input_tokens,
            total.output_tokens,
            total.cache_read_tokens,
            total.cache_write_tokens,
            total.reasoning_tokens,
            total.image_input_tokens,
            total.audio_input_tokens,
            total.audio_output_tokens,
        ],
        Counter(total.units),
        from_amount(total.cost),
        from_line_parts(total.parts),
    ).values()
