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
from collections.abc import Iterator, Mapping

from billing.amounts import from_amount, to_amount
from billing.commands import CommandRefused
from billing.grants import NEVER_MS, Grant, read_grant
from billing.limits import CREDIT_BYTES_MAX, CREDIT_TENANTS_MAX, GRANTS_KEPT_MAX, GRANTS_LIVE_MAX
from billing.periods import period_at
from billing.tenant_credit import Funds, Part, TenantCredit
from billing.v1.command_pb2 import CreditGrant
from billing.v1.invoice_pb2 import CREDIT_KIND_CORRECTION, CreditApplied
from billing.v1.ledger_pb2 import CreditState, LedgerRecord

__all__ = ["KEPT_MS", "Credits", "Funds"]

# How long a grant that is used up or expired is known: as long a repeat of it is harmless, and a correction finds it.
KEPT_MS = 400 * 86_400_000


class Credits:
    """The credit of all tenants of a partition. Each method states what it changed in `record`, but for the account itself."""

    def __init__(self) -> None:
        # The log time of the next record that has to call `advance`.
        self.next_ms = NEVER_MS
        self._tenants: dict[str, TenantCredit] = {}
        # When something is to be done, by tenant; and the same in order, with entries that hold no longer.
        self._due_ms: dict[str, int] = {}
        self._schedule: list[tuple[int, str]] = []

    def advance(self, accounts: Mapping[str, Funds], record: LedgerRecord) -> None:
        """Before anything else of a record: let go of what has expired, and close periods that are over.

        At most about CREDIT_BYTES_MAX of it, of CREDIT_TENANTS_MAX tenants; what is left comes with the next record.
        """
        room, tenants = CREDIT_BYTES_MAX, 0
        while self.next_ms <= record.log_time_ms and room > 0 and tenants < CREDIT_TENANTS_MAX:
            tenants += 1
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
        grant = read_grant(said, command_id, now_ms)
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
        taken: list[Part] = []
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
        credit = self._tenants.setdefault(state.tenant_id, TenantCredit(state.tenant_id))
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

    def _begin(self, tenant_id: str, account: Funds, now_ms: int, *, keep: bool = True) -> TenantCredit:
        credit = TenantCredit(tenant_id, period_end_ms=period_at(account.calendar, now_ms).end_ms)
        credit.allocate(account, now_ms)
        if keep:
            self._tenants[tenant_id] = credit
        return credit

    @staticmethod
    def _catch_up(credit: TenantCredit, account: Funds, record: LedgerRecord) -> None:
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

    def _state(self, credit: TenantCredit, record: LedgerRecord) -> None:
        record.credits.append(credit.to_state(credit.changed, record.log_time_ms))
        credit.changed.clear()
        self._reschedule(credit)

    def _reschedule(self, credit: TenantCredit) -> None:
        due_ms = credit.next_ms()
        if self._due_ms.get(credit.tenant_id, NEVER_MS) != due_ms:
            self._due_ms[credit.tenant_id] = due_ms
            if due_ms != NEVER_MS:
                heapq.heappush(self._schedule, (due_ms, credit.tenant_id))
        while self._schedule and self._due_ms[self._schedule[0][1]] != self._schedule[0][0]:
            heapq.heappop(self._schedule)
        self.next_ms = self._schedule[0][0] if self._schedule else NEVER_MS


def _copies(credit: TenantCredit, account: Funds) -> tuple[TenantCredit, Funds]:
    """To try something with."""
    return copy.deepcopy(credit), copy.copy(account)


def _next_number(credit: TenantCredit) -> int:
    return max((grant.number for grant in credit.grants.values()), default=0) + 1
