"""The credit of one tenant: its grants, and its spend by the grant that paid for it. `billing.credit` holds all tenants'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from billing.amounts import from_amount, to_amount
from billing.grants import NEVER_MS, SEVERAL, Grant
from billing.limits import UNINVOICED_PARTS_MAX
from billing.v1.account_pb2 import Calendar
from billing.v1.invoice_pb2 import CREDIT_KIND_PROMOTIONAL, CREDIT_KIND_UNSPECIFIED, CreditKind
from billing.v1.ledger_pb2 import CreditState, SpentPart

__all__ = ["Funds", "Part", "TenantCredit"]


class Funds(Protocol):
    """The part of an account that credit changes or looks at."""

    credit_pico: int
    spend_pico: int
    calendar: Calendar


@dataclass(slots=True)
class Part:
    """Spend that no invoice has, and the grant that paid for it; "": none did."""

    grant_id: str
    kind: CreditKind.ValueType
    pico: int


@dataclass(slots=True)
class TenantCredit:
    """The credit of one tenant. What its methods change is in `changed` until it is stated."""

    tenant_id: str
    grants: dict[str, Grant] = field(default_factory=dict)
    allocated_pico: int = 0
    # Spend on invoices that no grant has paid.
    due_pico: int = 0
    # Oldest first. A part below zero is the last one, and is nobody's.
    parts: list[Part] = field(default_factory=list)
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
            for each in (Part(grant.grant_id, grant.kind, paid_pico), replace(part, pico=part.pico - paid_pico)):
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

    def take_invoiced(self, pico: int) -> list[Part]:
        """Take `pico` from the front of what no invoice has: which grants paid for it. What none did is due."""
        taken: list[Part] = []
        while pico and self.parts and self.parts[0].pico > 0:
            part = self.parts[0]
            pays = min(part.pico, pico)
            pico -= pays
            part.pico -= pays
            if not part.pico:
                del self.parts[0]
            if part.grant_id:
                taken.append(Part(part.grant_id, part.kind, pays))
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
            self.parts.append(Part(grant_id, kind, pico))
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
            self.parts[place : place + 2] = [Part(SEVERAL, kind, first.pico + second.pico)]

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
            self.parts = [Part(part.grant_id, part.kind, from_amount(part.amount)) for part in state.uninvoiced]
            self.period_end_ms = state.period_end_ms
