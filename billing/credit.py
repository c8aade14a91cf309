"""Credit: which grant paid for a tenant's spend, what is left of each, and what expired. Exact, pure, by log time.

Promise: what was granted is what was used, expired and is left, of every grant and at every record; and what is left of all
grants is the balance, or the balance is below zero and nothing is left. Spend is set against grants lazily: on a grant, an
expiry, an invoice, and at the end of each period of the tenant's calendar, so usage pays nothing for it and a month's figures
are its own. Grants are used by priority, promotional before others, what expires sooner, what came first. What no grant covers
is owed, and the next grant pays that first.

When log time passes a grant's expiry, what is left of it leaves the balance in that record, before anything else of the record.
Gateways may hold leases on it then: they may spend as much as was leased at that moment beyond the balance, until those leases
end, and get no more meanwhile.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from billing.amounts import from_amount, to_amount
from billing.commands import CommandRefused
from billing.limits import (
    CREDIT_BYTES_MAX,
    CREDIT_NAME_BYTES_MAX,
    GRANTS_KEPT_MAX,
    GRANTS_LIVE_MAX,
    ID_CHARS_MAX,
    TIME_MS_MAX,
    UNINVOICED_PARTS_MAX,
)
from billing.periods import period_at
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import CreditGrant
from billing.v1.invoice_pb2 import (
    CREDIT_KIND_CORRECTION,
    CREDIT_KIND_PAID,
    CREDIT_KIND_PROMOTIONAL,
    CREDIT_KIND_UNSPECIFIED,
    CreditApplied,
    CreditKind,
)
from billing.v1.ledger_pb2 import CreditState, GrantState, LedgerRecord, SpentPart

# How long a grant that is used up or expired is known: as long a repeat of it is harmless, and a correction finds it.
KEPT_MS = 400 * 86_400_000
# Of parts that were put together because there were too many.
SEVERAL = "(several grants)"
NEVER_MS = TIME_MS_MAX + 1
_AMOUNT_PICO_MAX = 10**30


class Funds(Protocol):
    """The part of an account that credit changes or looks at."""

    credit_pico: int
    spend_pico: int
    calendar: Calendar


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


@dataclass(slots=True)
class _Part:
    """Spend that no invoice has, and the grant that paid for it; "": none did."""

    grant_id: str
    kind: CreditKind.ValueType
    pico: int


@dataclass(slots=True)
class _TenantCredit:
    """The credit of one tenant. What its methods change is in `changed` until it is stated."""

    tenant_id: str
    grants: dict[str, Grant] = field(default_factory=dict)
    allocated_pico: int = 0
    # Spend on invoices that no grant has paid.
    due_pico: int = 0
    # Oldest first. A part below zero is the last one, and is nobody's.
    parts: list[_Part] = field(default_factory=list)
    period_end_ms: int = 0
    changed: set[str] = field(default_factory=set)

    def live(self) -> list[Grant]:
        """Grants with something left, in the order in which they are used."""
        return sorted([grant for grant in self.grants.values() if grant.left_pico], key=Grant.order)

    def next_ms(self) -> int:
        """The log time at which something is to be done; NEVER_MS: nothing is."""
        times_ms = [grant.expires_ms or NEVER_MS for grant in self.grants.values() if grant.left_pico]
        return min(*times_ms, self.period_end_ms) if times_ms else NEVER_MS

    # -- spend against grants --------------------------------------------------------------------------------------------

    def allocate(self, account: Funds, now_ms: int) -> None:
        """Set all spend so far against grants."""
        more_pico = account.spend_pico - self.allocated_pico
        self.allocated_pico = account.spend_pico
        if more_pico > 0:
            self._add("", CREDIT_KIND_UNSPECIFIED, more_pico)
        elif more_pico < 0:
            self._take_back(-more_pico, account, now_ms)
        self._pay(self.live(), now_ms)

    def _pay(self, grants: Iterable[Grant], now_ms: int) -> None:
        """Let `grants` pay for what nothing has paid: what stands on invoices, then the oldest spend."""
        owed_pico = self.due_pico + sum(part.pico for part in self.parts if not part.grant_id)
        for grant in grants:
            if owed_pico <= 0:
                break
            pays_pico = min(grant.left_pico, owed_pico)
            owed_pico -= pays_pico
            self._use_grant(grant, pays_pico, now_ms)
            invoiced_pico = min(pays_pico, self.due_pico)
            self.due_pico -= invoiced_pico
            self._name_parts(grant, pays_pico - invoiced_pico)

    def _name_parts(self, grant: Grant, pico: int) -> None:
        """`grant` pays for the oldest `pico` of the parts that are nobody's."""
        parts, self.parts = self.parts, []
        for part in parts:
            paid_pico = min(part.pico, pico) if not part.grant_id and pico else 0
            pico -= paid_pico
            for each in (_Part(grant.grant_id, grant.kind, paid_pico), replace(part, pico=part.pico - paid_pico)):
                if each.pico:
                    self._add(each.grant_id, each.kind, each.pico)

    def _use_grant(self, grant: Grant, pico: int, now_ms: int) -> None:
        grant.used_pico += pico
        grant.ended_ms = 0 if grant.left_pico else now_ms
        self.changed.add(grant.grant_id)

    def _take_back(self, pico: int, account: Funds, now_ms: int) -> None:
        """A correction made spend smaller: the latest is taken back first, and returns to the grant that paid for it."""
        while pico and self.parts and self.parts[-1].pico > 0:
            part = self.parts[-1]
            grant = self.grants.get(part.grant_id)
            if part.grant_id and grant is None:
                # It is forgotten: what comes back is nobody's.
                break
            taken = min(part.pico, pico)
            if grant is not None:
                self._use_grant(grant, -taken, now_ms)
                if grant.expires_by(now_ms):
                    # As if it had not been used: it would have expired.
                    self._expire_grant(grant, account, now_ms)
            self._add(part.grant_id, part.kind, -taken)
            pico -= taken
        if pico:
            self._add("", CREDIT_KIND_UNSPECIFIED, -pico)

    def expire(self, account: Funds, through_ms: int, now_ms: int) -> None:
        """What is left of grants that expire by `through_ms` is credit no more."""
        for grant in self.live():
            if grant.expires_by(through_ms):
                self._expire_grant(grant, account, now_ms)

    def forfeit(self, account: Funds, now_ms: int, *, paid_too: bool) -> None:
        """What is left of promotional credit, or of all, is credit no more."""
        for grant in self.live():
            if paid_too or grant.kind == CREDIT_KIND_PROMOTIONAL:
                self._expire_grant(grant, account, now_ms)

    def _expire_grant(self, grant: Grant, account: Funds, now_ms: int) -> None:
        account.credit_pico -= grant.left_pico
        grant.expired_pico += grant.left_pico
        grant.ended_ms = now_ms
        self.changed.add(grant.grant_id)

    def add_grant(self, grant: Grant, account: Funds) -> None:
        """Take a new grant, which pays first for what nothing has paid. All spend is allocated."""
        self.grants[grant.grant_id] = grant
        self.changed.add(grant.grant_id)
        account.credit_pico += grant.amount_pico
        self._pay([grant], grant.granted_ms)

    # -- spend that no invoice has ----------------------------------------------------------------------------------------

    def take_invoiced(self, pico: int) -> list[_Part]:
        """Take `pico` from the front of what no invoice has: which grants paid for it. What none did is due."""
        taken: list[_Part] = []
        while pico and self.parts and self.parts[0].pico > 0:
            part = self.parts[0]
            pays = min(part.pico, pico)
            pico -= pays
            part.pico -= pays
            if not part.pico:
                del self.parts[0]
            if part.grant_id:
                taken.append(_Part(part.grant_id, part.kind, pays))
            else:
                self.due_pico += pays
        if pico:
            self.due_pico += pico
            self._add("", CREDIT_KIND_UNSPECIFIED, -pico)
        return taken

    def add_owed(self, pico: int) -> None:
        """Spend that stands on no line of usage: nobody's, until a grant pays for it."""
        self._add("", CREDIT_KIND_UNSPECIFIED, pico)

    def _add(self, grant_id: str, kind: CreditKind.ValueType, pico: int) -> None:
        """Add to the last part if it is of the same grant, else begin another."""
        if self.parts and self.parts[-1].grant_id == grant_id:
            self.parts[-1].pico += pico
            if not self.parts[-1].pico:
                del self.parts[-1]
        else:
            self.parts.append(_Part(grant_id, kind, pico))
            self._bound_parts()

    def _bound_parts(self) -> None:
        """Whoever draws no invoices gathers no parts without end: the oldest are put together."""
        place = 0
        while len(self.parts) > UNINVOICED_PARTS_MAX and place + 1 < len(self.parts):
            first, second = self.parts[place : place + 2]
            if not first.grant_id or not second.grant_id:
                place += 1
                continue
            kind = first.kind if first.kind == second.kind else CREDIT_KIND_UNSPECIFIED
            self.parts[place : place + 2] = [_Part(SEVERAL, kind, first.pico + second.pico)]

    # -- contract form ----------------------------------------------------------------------------------------------------

    def to_state(self, names: set[str], at_ms: int) -> CreditState:
        """All but the grants, and the grants `names`."""
        grants = sorted((self.grants[name] for name in names), key=lambda grant: grant.number)
        return CreditState(
            tenant_id=self.tenant_id,
            grants=[grant.to_state() for grant in grants],
            allocated=to_amount(self.allocated_pico),
            uninvoiced=[SpentPart(grant_id=part.grant_id, amount=to_amount(part.pico), kind=part.kind) for part in self.parts],
            due=to_amount(self.due_pico),
            at_ms=at_ms,
            period_end_ms=self.period_end_ms,
        )

    def set(self, state: CreditState) -> None:
        """Take what a record states."""
        for grant in map(Grant.from_state, state.grants):
            self.grants[grant.grant_id] = grant
        if state.HasField("allocated"):
            self.allocated_pico = from_amount(state.allocated)
            self.due_pico = from_amount(state.due)
            self.parts = [_Part(part.grant_id, part.kind, from_amount(part.amount)) for part in state.uninvoiced]
            self.period_end_ms = state.period_end_ms


class Credits:
    """The credit of all tenants of a partition. Each method states what it changed in `record`, but for the account itself."""

    def __init__(self) -> None:
        # The log time of the next record that has to call `advance`.
        self.next_ms = NEVER_MS
        self._tenants: dict[str, _TenantCredit] = {}
        # When something is to be done, by tenant; and the same in order, with entries that hold no longer.
        self._due_ms: dict[str, int] = {}
        self._schedule: list[tuple[int, str]] = []

    def advance(self, accounts: Mapping[str, Funds], record: LedgerRecord) -> None:
        """Before anything else of a record: let go of what has expired, and close periods that are over.

        At most about CREDIT_BYTES_MAX of it; what is left comes with the next record.
        """
        room = CREDIT_BYTES_MAX
        while self.next_ms <= record.log_time_ms and room > 0:
            tenant_id = self._schedule[0][1]
            stated = len(record.credits)
            self._catch_up(self._tenants[tenant_id], accounts[tenant_id], record)
            self._reschedule(self._tenants[tenant_id])
            room -= sum(state.ByteSize() for state in record.credits[stated:])

    def grant(self, tenant_id: str, account: Funds, said: CreditGrant, command_id: str, record: LedgerRecord) -> str:
        """Take a grant; the caller has checked the tenant and the currency. Returns what there is to say about it.

        Raises CommandRefused where it cannot be taken, or where its name is another grant's.
        """
        now_ms = record.log_time_ms
        grant = _read_grant(said, command_id, now_ms)
        credit = self._tenants.get(tenant_id)
        known = credit.grants.get(grant.grant_id) if credit else None
        if known is not None:
            if known.says() != grant.says():
                raise CommandRefused(
                    f"grant_id: {grant.grant_id} was granted before with another amount, kind, priority, expiry or reference; "
                    "give each grant a name of its own"
                )
            return f"grant_id: {grant.grant_id} was granted before; a repeat changes nothing"
        if grant.expires_by(now_ms):
            raise CommandRefused(f"expires_ms: {grant.expires_ms} is over at log time {now_ms}; name a time to come")
        if credit is not None:
            if len(credit.grants) >= GRANTS_KEPT_MAX:
                raise CommandRefused(f"tenant_id: {tenant_id} had {GRANTS_KEPT_MAX} grants in 400 days; grant more at once")
            if len(credit.live()) >= GRANTS_LIVE_MAX:
                later, (copied, funds) = LedgerRecord(log_time_ms=now_ms), _copies(credit, account)
                self._catch_up(copied, funds, later)
                copied.allocate(funds, now_ms)
                if len(copied.live()) >= GRANTS_LIVE_MAX:
                    raise CommandRefused(
                        f"tenant_id: {tenant_id} has {GRANTS_LIVE_MAX} grants with something left; "
                        "let one be used up, and grant more at once"
                    )
            self._catch_up(credit, account, record)
            credit.allocate(account, now_ms)
        credit = credit or self._begin(tenant_id, account, now_ms)
        grant.number = _next_number(credit)
        credit.add_grant(grant, account)
        self._state(credit, record)
        return ""

    def invoice(
        self, tenant_id: str, account: Funds, net_pico: int, correction_id: str, record: LedgerRecord, *, draft: bool = False
    ) -> list[CreditApplied]:
        """An invoice takes `net_pico` of what no invoice has: which credit pays for it. The rest is due.

        Below zero, the amount becomes a grant named `correction_id`; spend is raised by as much, so that the balance stays. A
        draft changes nothing and states nothing.
        """
        now_ms = record.log_time_ms
        credit = self._tenants.get(tenant_id) or self._begin(tenant_id, account, now_ms, keep=not draft)
        if draft:
            record, (credit, account) = LedgerRecord(log_time_ms=now_ms), _copies(credit, account)
        self._catch_up(credit, account, record)
        credit.allocate(account, now_ms)
        taken: list[_Part] = []
        if net_pico >= 0:
            taken = credit.take_invoiced(net_pico)
        else:
            account.spend_pico -= net_pico
            credit.allocated_pico = account.spend_pico
            credit.add_owed(-net_pico)
            number = _next_number(credit)
            while correction_id in credit.grants:
                # Whoever grants chooses names, that of a future invoice too.
                correction_id += "+"
            credit.add_grant(Grant(correction_id, CREDIT_KIND_CORRECTION, -net_pico, now_ms, number), account)
        if not draft:
            self._state(credit, record)
        applied: dict[str, CreditApplied] = {}
        for part in taken:
            entry = applied.setdefault(part.grant_id, CreditApplied(grant_id=part.grant_id, kind=part.kind))
            entry.amount.CopyFrom(to_amount(from_amount(entry.amount) + part.pico))
        return list(applied.values())

    def correct(self, tenant_id: str, account: Funds, record: LedgerRecord) -> None:
        """A correction has changed the account's spend: what it gives back returns to the grants that paid, or expires."""
        credit = self._tenants.get(tenant_id)
        if credit is not None:
            self._catch_up(credit, account, record)
            credit.allocate(account, record.log_time_ms)
            self._state(credit, record)

    def forfeit(self, tenant_id: str, account: Funds, record: LedgerRecord, *, paid_too: bool) -> int:
        """The tenant is closed: what is left of promotional credit, or of all, expires now. Returns how much that is."""
        credit = self._tenants.get(tenant_id)
        if credit is None:
            return 0
        before_pico = account.credit_pico
        self._catch_up(credit, account, record)
        credit.allocate(account, record.log_time_ms)
        credit.forfeit(account, record.log_time_ms, paid_too=paid_too)
        self._state(credit, record)
        return before_pico - account.credit_pico

    def knows(self, tenant_id: str) -> bool:
        """Whether the tenant was ever granted anything, or invoiced."""
        return tenant_id in self._tenants

    # -- what is kept -----------------------------------------------------------------------------------------------------

    def set(self, state: CreditState) -> None:
        """Take what a record states. A local store states each grant by itself, and then the tenant without grants."""
        credit = self._tenants.setdefault(state.tenant_id, _TenantCredit(state.tenant_id))
        credit.set(state)
        if state.HasField("allocated"):
            self._reschedule(credit)

    def all(self, at_ms: int = 0) -> Iterator[CreditState]:
        """Every tenant's, in a stated order, all of its grants with it."""
        for tenant_id in sorted(self._tenants):
            credit = self._tenants[tenant_id]
            yield credit.to_state(set(credit.grants), at_ms)

    def forget(self, before_ms: int) -> None:
        """Let go of grants of which nothing is left since before then."""
        for credit in self._tenants.values():
            for grant in [grant for grant in credit.grants.values() if 0 < grant.ended_ms < before_ms]:
                del credit.grants[grant.grant_id]

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _begin(self, tenant_id: str, account: Funds, now_ms: int, *, keep: bool = True) -> _TenantCredit:
        credit = _TenantCredit(tenant_id, period_end_ms=period_at(account.calendar, now_ms).end_ms)
        credit.allocate(account, now_ms)
        if keep:
            self._tenants[tenant_id] = credit
        return credit

    @staticmethod
    def _catch_up(credit: _TenantCredit, account: Funds, record: LedgerRecord) -> None:
        now_ms = record.log_time_ms
        if credit.period_end_ms <= now_ms:
            end_ms = credit.period_end_ms
            credit.allocate(account, now_ms)
            credit.expire(account, end_ms, now_ms)
            credit.period_end_ms = period_at(account.calendar, now_ms).end_ms
            record.credits.append(credit.to_state(credit.changed, end_ms - 1))
            credit.changed.clear()
        if any(grant.left_pico and grant.expires_by(now_ms) for grant in credit.grants.values()):
            credit.allocate(account, now_ms)
            credit.expire(account, now_ms, now_ms)
            record.credits.append(credit.to_state(credit.changed, now_ms))
            credit.changed.clear()

    def _state(self, credit: _TenantCredit, record: LedgerRecord) -> None:
        record.credits.append(credit.to_state(credit.changed, record.log_time_ms))
        credit.changed.clear()
        self._reschedule(credit)

    def _reschedule(self, credit: _TenantCredit) -> None:
        due_ms = credit.next_ms()
        if self._due_ms.get(credit.tenant_id, NEVER_MS) != due_ms:
            self._due_ms[credit.tenant_id] = due_ms
            if due_ms != NEVER_MS:
                heapq.heappush(self._schedule, (due_ms, credit.tenant_id))
        while self._schedule and self._due_ms[self._schedule[0][1]] != self._schedule[0][0]:
            heapq.heappop(self._schedule)
        self.next_ms = self._schedule[0][0] if self._schedule else NEVER_MS


def _copies(credit: _TenantCredit, account: Funds) -> tuple[_TenantCredit, Funds]:
    """To try something with."""
    return copy.deepcopy(credit), copy.copy(account)


def _next_number(credit: _TenantCredit) -> int:
    return max((grant.number for grant in credit.grants.values()), default=0) + 1


def _read_grant(said: CreditGrant, command_id: str, now_ms: int) -> Grant:
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
