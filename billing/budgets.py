"""Budgets: how much a tenant, a project or a user may spend in a period of the tenant's calendar.

Promise: a budget's spend is the cost of what was charged to it since its period began (usage that ended before that is the
business of the period before); each threshold warns once a period, in the record that reaches it; and the record whose log
time passes the period's end begins the next one. A budget is a brake, not a bound: gateways refuse when they have seen that it
is used up, and what is under way by then is charged. Corrections do not move it.

Tenants without budgets pay nothing for this; users are looked at only where a user of the tenant has a budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from billing.amounts import format_pico, from_amount, set_amount
from billing.commands import CommandRefused
from billing.limits import (
    BUDGET_ALERTS_MAX,
    BUDGET_NAME_BYTES_MAX,
    BUDGET_THRESHOLDS_MAX,
    BUDGETS_MAX,
    CREDIT_BYTES_MAX,
    ID_CHARS_MAX,
    TIME_MS_MAX,
)
from billing.periods import period_at
from billing.v1.account_pb2 import BudgetState, Calendar, LedgerPosition
from billing.v1.alert_pb2 import ALERT_RULE_BUDGET, ALERT_STATE_RESOLVED, SEVERITY_CRITICAL, SEVERITY_WARNING, Alert
from billing.v1.command_pb2 import BudgetUpsert
from billing.v1.ledger_pb2 import LedgerRecord

WHOLE = 1_000_000
_THRESHOLD_MAX = 10 * WHOLE
_AMOUNT_PICO_MAX = 10**30
_NEVER_MS = TIME_MS_MAX + 1
_FIGURE_MAX = 2**63 - 1


class Place(NamedTuple):
    """What a budget is of; both empty: the whole tenant."""

    project_id: str
    user_id: str

    def __str__(self) -> str:
        return f"project {self.project_id}" if self.project_id else f"user {self.user_id}"


class Charge(NamedTuple):
    """Usage that was charged."""

    tenant_id: str
    project_id: str
    user_id: str
    ended_ms: int
    cost_pico: int


class Budgeted(Protocol):
    """The part of an account that a budget looks at."""

    currency: str
    calendar: Calendar


_TENANT = Place("", "")


class Budgets:
    """The budgets of all tenants of a partition, each in its contract form, which is what is stated."""

    def __init__(self) -> None:
        # The log time of the next record that has to call `advance`.
        self.next_ms = _NEVER_MS
        self._of: dict[str, dict[Place, BudgetState]] = {}
        self._with_users: set[str] = set()
        # Ends of periods in order, with entries that hold no longer.
        self._ends: list[tuple[int, str, Place]] = []

    @property
    def tenants(self) -> Mapping[str, object]:
        """By tenant, those that have any."""
        return self._of

    def find(self, tenant_id: str, project_id: str, user_id: str) -> BudgetState | None:
        """The budget of that place; not to be changed."""
        return self._of.get(tenant_id, {}).get(Place(project_id, user_id))

    def needs_users(self, tenant_id: str) -> bool:
        """Whether `charge` looks at users of the tenant."""
        return tenant_id in self._with_users

    def upsert(self, said: BudgetUpsert, account: Budgeted, record: LedgerRecord) -> bool:
        """Set a budget; the caller has checked the tenant. A new one counts from now on. False: there was none to end.

        Raises CommandRefused.
        """
        place = _read_place(said)
        amount_pico = _read_amount(said)
        known = self._of.get(said.tenant_id, {}).get(place)
        if not amount_pico:
            if known is None:
                return False
            known.gone = True
            _resolve(known, record)
            self._state(known, record)
            self._drop(said.tenant_id, place)
            return True
        if known is None and len(self._of.get(said.tenant_id, ())) >= BUDGETS_MAX:
            raise CommandRefused(f"tenant_id: {said.tenant_id} has {BUDGETS_MAX} budgets; end some before")
        budget = BudgetState(tenant_id=said.tenant_id, project_id=place.project_id, user_id=place.user_id)
        if known is not None:
            budget.CopyFrom(known)
        if budget.period_end_ms <= record.log_time_ms:
            _begin_period(budget, account, record.log_time_ms)
        set_amount(budget.amount, amount_pico)
        budget.threshold_millionths[:] = sorted(set(said.threshold_millionths))
        budget.hard_stop = said.hard_stop
        # What was passed before is not told again; what this very change makes pass is.
        if budget.warned and not _reached(budget):
            _resolve(budget, record)
        budget.warned = min(budget.warned, len(_reached(budget)))
        _judge(budget, account.currency, record)
        self._put(budget)
        self._state(budget, record)
        return True

    def advance(self, accounts: Mapping[str, Budgeted], record: LedgerRecord) -> None:
        """Begin new periods, before anything else of a record: at most about CREDIT_BYTES_MAX; more comes with the next."""
        room = CREDIT_BYTES_MAX
        while self.next_ms <= record.log_time_ms and room > 0:
            _, tenant_id, place = self._ends[0]
            budget = self._of[tenant_id][place]
            self._roll(budget, accounts[tenant_id], record.log_time_ms)
            self._state(budget, record)
            room -= budget.ByteSize()

    def charge(self, charges: Iterable[Charge], accounts: Mapping[str, Budgeted], record: LedgerRecord) -> None:
        """Count what was charged to tenants that have budgets, warn, and state each that changed, in a stated order."""
        added: dict[tuple[str, Place], int] = {}
        for tenant_id, project_id, user_id, ended_ms, cost_pico in charges:
            budgets = self._of[tenant_id]
            places = {_TENANT, Place(project_id, ""), Place("", user_id)}
            for place in places:
                budget = budgets.get(place)
                if budget is None or not cost_pico:
                    continue
                key = tenant_id, place
                if budget.period_end_ms <= record.log_time_ms:
                    # It waits for `advance`.
                    self._roll(budget, accounts[tenant_id], record.log_time_ms)
                    added.setdefault(key, 0)
                if ended_ms >= budget.period_start_ms:
                    added[key] = added.get(key, 0) + cost_pico
        alerts_left = BUDGET_ALERTS_MAX
        for tenant_id, place in sorted(added):
            budget = self._of[tenant_id][place]
            set_amount(budget.spend, from_amount(budget.spend) + added[tenant_id, place])
            alerts_left -= _judge(budget, accounts[tenant_id].currency, record, alerts_left)
            self._state(budget, record)

    def set(self, stated: BudgetState) -> None:
        """Take what a record states."""
        if stated.gone:
            self._drop(stated.tenant_id, Place(stated.project_id, stated.user_id))
            return
        budget = BudgetState()
        budget.CopyFrom(stated)
        self._put(budget)

    def all(self, generation: bytes = b"", sequence: int = 0) -> Iterator[BudgetState]:
        """Every budget, in a stated order, as the record at that position states it."""
        for tenant_id in sorted(self._of):
            for place in sorted(self._of[tenant_id]):
                budget = BudgetState()
                budget.CopyFrom(self._of[tenant_id][place])
                budget.version.CopyFrom(LedgerPosition(generation=generation, sequence=sequence))
                yield budget

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _put(self, budget: BudgetState) -> None:
        place = Place(budget.project_id, budget.user_id)
        known = self._of.setdefault(budget.tenant_id, {}).get(place)
        self._of[budget.tenant_id][place] = budget
        if place.user_id:
            self._with_users.add(budget.tenant_id)
        if known is None or known.period_end_ms != budget.period_end_ms:
            self._schedule(budget)

    def _drop(self, tenant_id: str, place: Place) -> None:
        budgets = self._of.get(tenant_id, {})
        budgets.pop(place, None)
        if not any(other.user_id for other in budgets):
            self._with_users.discard(tenant_id)
        if not budgets:
            self._of.pop(tenant_id, None)
        self._settle_schedule()

    def _roll(self, budget: BudgetState, account: Budgeted, now_ms: int) -> None:
        _begin_period(budget, account, now_ms)
        self._schedule(budget)

    def _schedule(self, budget: BudgetState) -> None:
        heapq.heappush(self._ends, (budget.period_end_ms, budget.tenant_id, Place(budget.project_id, budget.user_id)))
        self._settle_schedule()

    def _settle_schedule(self) -> None:
        while self._ends:
            end_ms, tenant_id, place = self._ends[0]
            budget = self._of.get(tenant_id, {}).get(place)
            if budget is not None and budget.period_end_ms == end_ms:
                break
            heapq.heappop(self._ends)
        self.next_ms = self._ends[0][0] if self._ends else _NEVER_MS

    @staticmethod
    def _state(budget: BudgetState, record: LedgerRecord) -> None:
        budget.version.generation = record.generation
        budget.version.sequence = record.sequence
        record.budgets.append(budget)


def _begin_period(budget: BudgetState, account: Budgeted, now_ms: int) -> None:
    budget.period_start_ms, budget.period_end_ms = period_at(account.calendar, now_ms)
    set_amount(budget.spend, 0)
    budget.warned = 0
    budget.used_up = False


def _reached(budget: BudgetState) -> list[int]:
    """The thresholds that the spend has reached."""
    amount_pico, spend_pico = from_amount(budget.amount), from_amount(budget.spend)
    return [threshold for threshold in budget.threshold_millionths if spend_pico * WHOLE >= amount_pico * threshold]


def _judge(budget: BudgetState, currency: str, record: LedgerRecord, alerts_max: int = BUDGET_ALERTS_MAX) -> int:
    """Warn of each threshold that was newly reached, at most so many; note whether it is used up. Returns how many warned."""
    budget.used_up = from_amount(budget.spend) >= from_amount(budget.amount)
    new = _reached(budget)[budget.warned :][:alerts_max]
    record.alerts.extend(_alert(budget, threshold, currency) for threshold in new)
    budget.warned += len(new)
    return len(new)


def _resolve(budget: BudgetState, record: LedgerRecord) -> None:
    """What was told of it in this period holds no longer."""
    if budget.warned:
        record.alerts.add(
            rule=ALERT_RULE_BUDGET,
            state=ALERT_STATE_RESOLVED,
            tenant_id=budget.tenant_id,
            subject=_subject(budget),
            summary=f"the budget of {_whose(budget)} was changed or ended",
            labels={"project_id": budget.project_id, "user_id": budget.user_id},
        )


def _whose(budget: BudgetState) -> str:
    subject = _subject(budget)
    return f"{subject} of tenant {budget.tenant_id}" if subject else f"tenant {budget.tenant_id}"


def _subject(budget: BudgetState) -> str:
    place = Place(budget.project_id, budget.user_id)
    return str(place) if any(place) else ""


def _alert(budget: BudgetState, threshold: int, currency: str) -> Alert:
    amount_pico, spend_pico = from_amount(budget.amount), from_amount(budget.spend)
    used = spend_pico * 100 // amount_pico
    stops = ", and gateways refuse what comes until the period ends" if budget.used_up and budget.hard_stop else ""
    return Alert(
        rule=ALERT_RULE_BUDGET,
        severity=SEVERITY_CRITICAL if budget.used_up else SEVERITY_WARNING,
        tenant_id=budget.tenant_id,
        subject=_subject(budget),
        # The next period begins without it.
        resolves_ms=budget.period_end_ms,
        summary=f"the budget of {_whose(budget)} is used to {used} %: {format_pico(spend_pico, currency)} of "
        f"{format_pico(amount_pico, currency)}{stops}",
        # In millionths of the currency: an int64 of pico ends at nine million units.
        figures={
            "threshold_millionths": threshold,
            "spend_micros": min(spend_pico // 1_000_000, _FIGURE_MAX),
            "amount_micros": min(amount_pico // 1_000_000, _FIGURE_MAX),
            "period_start_ms": budget.period_start_ms,
            "period_end_ms": budget.period_end_ms,
        },
        labels={"currency": currency, "project_id": budget.project_id, "user_id": budget.user_id},
    )


def _read_place(said: BudgetUpsert) -> Place:
    if said.project_id and said.user_id:
        raise CommandRefused("project_id, user_id: a budget is of one of them, or of the whole tenant; leave one empty")
    if max(len(said.project_id), len(said.user_id)) > ID_CHARS_MAX:
        raise CommandRefused(f"project_id, user_id: give at most {ID_CHARS_MAX} characters")
    names_bytes = len((said.tenant_id + said.project_id + said.user_id).encode())
    if names_bytes > BUDGET_NAME_BYTES_MAX:
        raise CommandRefused(
            f"tenant_id, project_id, user_id: {names_bytes} bytes; give at most {BUDGET_NAME_BYTES_MAX} in all"
        )
    return Place(said.project_id, said.user_id)


def _read_amount(said: BudgetUpsert) -> int:
    amount_pico = from_amount(said.amount)
    if not 0 <= amount_pico <= _AMOUNT_PICO_MAX:
        raise CommandRefused(f"amount: {amount_pico} pico; give 0 to 10^18 units, 0 ends the budget")
    if len(said.threshold_millionths) > BUDGET_THRESHOLDS_MAX:
        raise CommandRefused(f"threshold_millionths: {len(said.threshold_millionths)}; give at most {BUDGET_THRESHOLDS_MAX}")
    for threshold in said.threshold_millionths:
        if not 0 < threshold <= _THRESHOLD_MAX:
            raise CommandRefused(f"threshold_millionths: {threshold}; give 1 to {_THRESHOLD_MAX}: 800000 is 80 %")
    return amount_pico
