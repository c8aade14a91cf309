"""One tenant's account: what it was granted, what it spent, its plan, and what the abuse rules remember of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from billing.amounts import from_amount, set_amount
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_UNKNOWN,
    Account,
    Calendar,
    Plan,
    Restriction,
)

# What few records change: stated again only when one of it did.
_STEADY = attrgetter(
    "status",
    "currency",
    "display_name",
    "credit_pico",
    "leased_pico",
    "duplicates",
    "conflicts",
    "unrated_events",
    "invoiced_through_ms",
    "status_ms",
)
_STEADY_ABUSE_NAMES = (
    "minute",
    "minute_cancelled",
    "minute_refused",
    "baseline_tokens_x256",
    "baseline_requests_x256",
    "baseline_prompt_x256",
    "baseline_cost_pico",
    "baseline_minutes",
    "duplicate_minute",
    "minute_duplicates",
    "minute_conflicts",
)
_STEADY_ABUSE = attrgetter(*_STEADY_ABUSE_NAMES)


@dataclass(slots=True)
class AccountState:
    """The account as the step holds it: plain integers, mutable. `to_account` is its contract form."""

    tenant_id: str
    currency: str
    plan: Plan
    status: int = ACCOUNT_STATUS_UNKNOWN
    display_name: str = ""
    credit_pico: int = 0
    spend_pico: int = 0
    events: int = 0
    duplicates: int = 0
    conflicts: int = 0
    unrated_events: int = 0
    # What gateways hold of the balance: the sum of what remains of their leases.
    leased_pico: int = 0
    calendar: Calendar = field(default_factory=Calendar)
    # What the abuse rules remember: see AbuseState.
    minute: int = 0
    minute_tokens: int = 0
    minute_requests: int = 0
    minute_prompt_tokens: int = 0
    minute_cost_pico: int = 0
    minute_cancelled: int = 0
    minute_refused: int = 0
    baseline_tokens_x256: int = 0
    baseline_requests_x256: int = 0
    baseline_prompt_x256: int = 0
    baseline_cost_pico: int = 0
    baseline_minutes: int = 0
    duplicate_minute: int = 0
    minute_duplicates: int = 0
    minute_conflicts: int = 0
    # Periods that ended by then are invoiced.
    invoiced_through_ms: int = 0
    # Log time since when the status is what it is.
    status_ms: int = 0
    # What rules do at present, and what has expired since it was last stated.
    restrictions: list[Restriction] = field(default_factory=list)
    # The contract form as last stated, filled again at each statement: building it anew costs ten times as much.
    _account: Account | None = field(default=None, repr=False, compare=False)
    _stated_plan: Plan | None = field(default=None, repr=False, compare=False)
    _stated_calendar: Calendar | None = field(default=None, repr=False, compare=False)
    _stated_steady: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    _stated_steady_abuse: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    @property
    def balance_pico(self) -> int:
        """What is left: credit less spend."""
        return self.credit_pico - self.spend_pico

    def to_account(self, generation: bytes, sequence: int, log_time_ms: int) -> Account:
        """The absolute state, with the record that states it. Valid until the next call."""
        account = self._account
        if account is None or self._stated_plan is not self.plan or self._stated_calendar is not self.calendar:
            account = self._account = Account(tenant_id=self.tenant_id, plan=self.plan)
            if self.calendar.ByteSize():
                account.calendar.CopyFrom(self.calendar)
            self._stated_plan = self.plan
            self._stated_calendar = self.calendar
            self._stated_steady = self._stated_steady_abuse = ()
        steady = _STEADY(self)
        if steady != self._stated_steady:
            self._stated_steady = steady
            account.status = self.status  # type: ignore[assignment]
            account.currency = self.currency
            account.display_name = self.display_name
            set_amount(account.credit, self.credit_pico)
            set_amount(account.leased, self.leased_pico)
            account.duplicates = self.duplicates
            account.conflicts = self.conflicts
            account.unrated_events = self.unrated_events
            account.invoiced_through_ms = self.invoiced_through_ms
            account.status_ms = self.status_ms
        set_amount(account.spend, self.spend_pico)
        account.events = self.events
        account.version.generation = generation
        account.version.sequence = sequence
        account.log_time_ms = log_time_ms
        if self.restrictions or account.restrictions:
            self.restrictions = [held for held in self.restrictions if held.until_ms > log_time_ms]
            del account.restrictions[:]
            account.restrictions.extend(self.restrictions)
        abuse = account.abuse
        steady = _STEADY_ABUSE(self)
        if steady != self._stated_steady_abuse:
            self._stated_steady_abuse = steady
            for name, value in zip(_STEADY_ABUSE_NAMES, steady, strict=True):
                setattr(abuse, name, value)
        abuse.minute_tokens = self.minute_tokens
        abuse.minute_requests = self.minute_requests
        abuse.minute_prompt_tokens = self.minute_prompt_tokens
        abuse.minute_cost_pico = self.minute_cost_pico
        return account

    @classmethod
    def from_account(cls, account: Account) -> AccountState:
        """The state that `account` states."""
        abuse = account.abuse
        return cls(
            tenant_id=account.tenant_id,
            currency=account.currency,
            plan=account.plan,
            status=account.status,
            display_name=account.display_name,
            calendar=account.calendar,
            credit_pico=from_amount(account.credit),
            spend_pico=from_amount(account.spend),
            leased_pico=from_amount(account.leased),
            events=account.events,
            duplicates=account.duplicates,
            conflicts=account.conflicts,
            unrated_events=account.unrated_events,
            minute=abuse.minute,
            minute_tokens=abuse.minute_tokens,
            minute_requests=abuse.minute_requests,
            minute_prompt_tokens=abuse.minute_prompt_tokens,
            minute_cost_pico=abuse.minute_cost_pico,
            minute_cancelled=abuse.minute_cancelled,
            minute_refused=abuse.minute_refused,
            baseline_tokens_x256=abuse.baseline_tokens_x256,
            baseline_requests_x256=abuse.baseline_requests_x256,
            baseline_prompt_x256=abuse.baseline_prompt_x256,
            baseline_cost_pico=abuse.baseline_cost_pico,
            baseline_minutes=abuse.baseline_minutes,
            duplicate_minute=abuse.duplicate_minute,
            minute_duplicates=abuse.minute_duplicates,
            minute_conflicts=abuse.minute_conflicts,
            invoiced_through_ms=account.invoiced_through_ms,
            status_ms=account.status_ms,
            restrictions=list(account.restrictions),
        )
