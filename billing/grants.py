"""One grant of credit: what it is worth, in which order grants are used, and what a command that asks for one must say."""

from __future__ import annotations

from dataclasses import dataclass

from billing.amounts import from_amount, to_amount
from billing.commands import CommandRefused
from billing.limits import CREDIT_NAME_BYTES_MAX, ID_CHARS_MAX, TIME_MS_MAX
from billing.v1.command_pb2 import CreditGrant
from billing.v1.invoice_pb2 import CREDIT_KIND_PAID, CREDIT_KIND_PROMOTIONAL, CreditKind
from billing.v1.ledger_pb2 import GrantState

__all__ = ["NEVER_MS", "SEVERAL", "Grant", "read_grant"]

# Of parts of spend that were put together because there were too many.
SEVERAL = "(several grants)"
NEVER_MS = TIME_MS_MAX + 1
_AMOUNT_PICO_MAX = 10**30


@dataclass(slots=True)
class Grant:
    """One grant: amount = used + expired + left."""

    grant_id: str
    kind: CreditKind.ValueType
    amount_pico: int
    granted_ms: int
    number: int
    priority: int = 0
    expires_ms: int = 0
    reference: str = ""
    used_pico: int = 0
    expired_pico: int = 0
    ended_ms: int = 0

    @property
    def left_pico(self) -> int:
        """What can still be used."""
        return self.amount_pico - self.used_pico - self.expired_pico

    def expires_by(self, time_ms: int) -> bool:
        """Whether it is no credit any more at `time_ms`."""
        return 0 < self.expires_ms <= time_ms

    def order(self) -> tuple[int, bool, int, int]:
        """Grants are used in the order of this."""
        return self.priority, self.kind != CREDIT_KIND_PROMOTIONAL, self.expires_ms or NEVER_MS, self.number

    def says(self) -> tuple[object, ...]:
        """What a repeat must say too."""
        return self.amount_pico, self.kind, self.priority, self.expires_ms, self.reference

    def to_state(self) -> GrantState:
        """The contract form."""
        return GrantState(
            grant_id=self.grant_id,
            kind=self.kind,
            priority=self.priority,
            granted_ms=self.granted_ms,
            expires_ms=self.expires_ms,
            amount=to_amount(self.amount_pico),
            used=to_amount(self.used_pico),
            expired=to_amount(self.expired_pico),
            reference=self.reference,
            number=self.number,
            ended_ms=self.ended_ms,
        )

    @classmethod
    def from_state(cls, state: GrantState) -> Grant:
        """The grant that `state` states."""
        return cls(
            grant_id=state.grant_id,
            kind=state.kind,
            amount_pico=from_amount(state.amount),
            granted_ms=state.granted_ms,
            number=state.number,
            priority=state.priority,
            expires_ms=state.expires_ms,
            reference=state.reference,
            used_pico=from_amount(state.used),
            expired_pico=from_amount(state.expired),
            ended_ms=state.ended_ms,
        )


def read_grant(said: CreditGrant, command_id: str, now_ms: int) -> Grant:
    """The grant that a command asks for; its number is the caller's. Raises CommandRefused."""
    amount_pico = from_amount(said.amount)
    if amount_pico <= 0:
        raise CommandRefused(f"amount: {amount_pico} pico; grant more than nothing")
    if amount_pico > _AMOUNT_PICO_MAX:
        raise CommandRefused(f"amount: {amount_pico} pico is over 10^18 {said.currency}; check the unit")
    grant_id = said.grant_id or command_id
    if len(grant_id) > ID_CHARS_MAX or len(grant_id.encode()) > CREDIT_NAME_BYTES_MAX or grant_id == SEVERAL:
        raise CommandRefused(f"grant_id: {grant_id[:32]!r}; give a name of its own of at most {CREDIT_NAME_BYTES_MAX} bytes")
    if len(said.reference.encode()) > CREDIT_NAME_BYTES_MAX:
        raise CommandRefused(f"reference: {said.reference[:32]!r}…; give at most {CREDIT_NAME_BYTES_MAX} bytes")
    if said.kind not in CreditKind.values():
        raise CommandRefused(f"kind: {said.kind} is not known here; upgrade the workers first")
    if not 0 <= said.expires_ms <= TIME_MS_MAX:
        raise CommandRefused(f"expires_ms: {said.expires_ms}; give Unix time in milliseconds, or 0 for never")
    return Grant(
        grant_id=grant_id,
        kind=said.kind or CREDIT_KIND_PAID,
        amount_pico=amount_pico,
        granted_ms=now_ms,
        number=0,
        priority=said.priority,
        expires_ms=said.expires_ms,
        reference=said.reference,
    )
