"""One tenant's account: what it was granted, what it spent, its plan, and what the abuse rules remember of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from billing.amounts import from_amount, to_amount
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_UNKNOWN,
    AbuseState,
    Account,
    LedgerPosition,
    Plan,
)


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
    minute: int = 0
    minute_tokens: int = 0
    baseline_tokens_x256: int = 0
    baseline_minutes: int = 0
    duplicate_minute: int = 0
    minute_duplicates: int = 0
    raised_ms: dict[int, int] = field(default_factory=dict)

    @property
    def balance_pico(self) -> int:
        """What is left: credit less spend."""
        return self.credit_pico - self.spend_pico

    def to_account(self, generation: bytes, sequence: int, log_time_ms: int) -> Account:
        """The absolute state, with the record that states it."""
        return Account(
            tenant_id=self.tenant_id,
            status=self.status,  # type: ignore[arg-type]
            currency=self.currency,
            plan=self.plan,
            credit=to_amount(self.credit_pico),
            spend=to_amount(self.spend_pico),
            events=self.events,
            duplicates=self.duplicates,
            conflicts=self.conflicts,
            unrated_events=self.unrated_events,
            version=LedgerPosition(generation=generation, sequence=sequence),
            log_time_ms=log_time_ms,
            abuse=AbuseState(
                minute=self.minute,
                minute_tokens=self.minute_tokens,
                baseline_tokens_x256=self.baseline_tokens_x256,
                baseline_minutes=self.baseline_minutes,
                duplicate_minute=self.duplicate_minute,
                minute_duplicates=self.minute_duplicates,
                raised_ms=self.raised_ms,
            ),
            display_name=self.display_name,
        )

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
            credit_pico=from_amount(account.credit),
            spend_pico=from_amount(account.spend),
            events=account.events,
            duplicates=account.duplicates,
            conflicts=account.conflicts,
            unrated_events=account.unrated_events,
            minute=abuse.minute,
            minute_tokens=abuse.minute_tokens,
            baseline_tokens_x256=abuse.baseline_tokens_x256,
            baseline_minutes=abuse.baseline_minutes,
            duplicate_minute=abuse.duplicate_minute,
            minute_duplicates=abuse.minute_duplicates,
            raised_ms=dict(abuse.raised_ms),
        )
