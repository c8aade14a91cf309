"""Leases: the parts of tenants' balances that gateways may spend without asking. Granted here, in the ledger, and nowhere else.

What nobody holds is credit (and credit limit) less spend less what is leased; a grant is never more than that. A holder counts
in totals since its epoch (its start) began, and so does the ledger, so neither a lost nor a repeated message makes the two
disagree: granted - charged is what the holder may still have promised. Usage that comes through the holder turns what was
leased into spend. What a holder of an earlier start still held is free again when the ledger has all of that start's usage,
which its numbering tells; or when an operator retires the holder.

A request is applied once: its holder counts its requests, over all tenants, and a number that is not above the last is refused,
also when the lease that it was for is gone. The last number is known for as long as a request with it would not be refused for
its age.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from billing.accounts import AccountState
from billing.amounts import from_amount, to_amount
from billing.commands import CommandRefused
from billing.limits import ID_CHARS_MAX, LEASE_HOLDERS_MAX
from billing.v1.account_pb2 import ACCOUNT_STATUS_ACTIVE, BILLING_MODE_POSTPAID, Lease, LedgerPosition
from billing.v1.command_pb2 import LeaseRequest

LEASE_DURATION_MS_MAX = 3_600_000
# Beyond it an amount is a unit mistake: 10^12 currency units.
_WANTED_PICO_MAX = 10**24


@dataclass(slots=True)
class LeaseState:
    """One epoch of one holder, for one tenant."""

    tenant_id: str
    holder_id: str
    epoch: int
    request_number: int = 0
    granted_pico: int = 0
    charged_pico: int = 0
    expires_ms: int = 0
    ended: bool = False
    last_sequence: int = 0
    gone: bool = False

    @property
    def remaining_pico(self) -> int:
        """What its holder may have promised to usage that the ledger has not seen."""
        return 0 if self.gone else max(0, self.granted_pico - self.charged_pico)

    def to_lease(self, generation: bytes, sequence: int, covered_sequence: int = 0) -> Lease:
        """The contract form, with the record that states it; in an answer also how far the holder's events are charged."""
        return Lease(
            tenant_id=self.tenant_id,
            holder_id=self.holder_id,
            epoch=self.epoch,
            request_number=self.request_number,
            granted=to_amount(self.granted_pico),
            charged=to_amount(self.charged_pico),
            expires_ms=self.expires_ms,
            ended=self.ended,
            last_sequence=self.last_sequence,
            gone=self.gone,
            version=LedgerPosition(generation=generation, sequence=sequence),
            covered_sequence=covered_sequence,
        )

    @classmethod
    def from_lease(cls, lease: Lease) -> LeaseState:
        """The state that `lease` states."""
        return cls(
            tenant_id=lease.tenant_id,
            holder_id=lease.holder_id,
            epoch=lease.epoch,
            request_number=lease.request_number,
            granted_pico=from_amount(lease.granted),
            charged_pico=from_amount(lease.charged),
            expires_ms=lease.expires_ms,
            ended=lease.ended,
            last_sequence=lease.last_sequence,
            gone=lease.gone,
        )


class Asked(NamedTuple):
    """The last request of a holder that was applied, and when."""

    epoch: int
    request_number: int
    log_time_ms: int


class Leases:
    """All leases of one partition. Whoever changes one keeps the account's `leased_pico` equal to the sum of what remains."""

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        # Holder, tenant, epochs: those that are over before the one that lasts.
        self._held: dict[str, dict[str, list[LeaseState]]] = {}
        # Holder to the tenants of which an epoch is over and not yet gone.
        self._ended: dict[str, set[str]] = {}

    def __iter__(self) -> Iterator[LeaseState]:
        """Every lease, in one order."""
        for holder_id in sorted(self._held):
            for tenant_id in sorted(self._held[holder_id]):
                yield from self._held[holder_id][tenant_id]

    def held_by(self, holder_id: str) -> dict[str, list[LeaseState]]:
        """What `holder_id` holds, by tenant, an epoch each, oldest first; not to be changed."""
        return self._held.get(holder_id, {})

    def put(self, lease: LeaseState) -> None:
        """Set what a record states."""
        tenants = self._held.setdefault(lease.holder_id, {})
        epochs = [known for known in tenants.get(lease.tenant_id, ()) if known.epoch != lease.epoch]
        if not lease.gone:
            epochs = sorted([*epochs, lease], key=lambda each: each.epoch)
        if epochs:
            tenants[lease.tenant_id] = epochs
        else:
            tenants.pop(lease.tenant_id, None)
            if not tenants:
                del self._held[lease.holder_id]
        if any(each.ended for each in epochs):
            self._ended.setdefault(lease.holder_id, set()).add(lease.tenant_id)
        elif lease.holder_id in self._ended:
            self._ended[lease.holder_id].discard(lease.tenant_id)
            if not self._ended[lease.holder_id]:
                del self._ended[lease.holder_id]

    # -- what changes them ----------------------------------------------------------------------------------------------

    def answer(
        self, request: LeaseRequest, account: AccountState, covered_sequence: int, log_time_ms: int
    ) -> tuple[list[LeaseState], str]:
        """Grant, extend, shrink or end a lease: what changed, and in words what was not granted ("" if all was).

        `covered_sequence` is how far the ledger has the holder's events without a gap. Raises CommandRefused; then nothing has
        changed.
        """
        self._check(request, account)
        self._check_number(request)
        epochs = self.held_by(request.holder_id).get(request.tenant_id, [])
        lasting = epochs[-1] if epochs else None
        changed: list[LeaseState] = []
        if lasting is not None and request.epoch > lasting.epoch:
            changed += self._end(epochs, request.previous_sequence, covered_sequence, account)
            lasting = None
        if lasting is None:
            if request.holder_id not in self._held and len(self._held) >= LEASE_HOLDERS_MAX:
                raise CommandRefused(f"holder_id: {LEASE_HOLDERS_MAX} gateways hold leases already; retire those that are gone")
            lasting = LeaseState(request.tenant_id, request.holder_id, request.epoch)
        refusal = self._grant(lasting, request, account, log_time_ms)
        self.put(lasting)
        self.note(request, log_time_ms)
        return [*changed, lasting], refusal

    def note(self, request: LeaseRequest, log_time_ms: int) -> None:
        """`request` was applied then: no other one of its holder with its number, or a lower one, ever is."""
        self.asked[request.holder_id] = Asked(request.epoch, request.request_number, log_time_ms)

    def forget(self, before_ms: int) -> None:
        """Let go of what was asked before: a repeat of it is refused for its age."""
        for holder_id in [holder_id for holder_id, asked in self.asked.items() if asked.log_time_ms < before_ms]:
            del self.asked[holder_id]

    def _check_number(self, request: LeaseRequest) -> None:
        last = self.asked.get(request.holder_id)
        if last is None or request.epoch > last.epoch:
            return
        if request.epoch < last.epoch:
            raise CommandRefused(f"epoch: {request.epoch} is over, {last.epoch} has begun; ask from the process that runs")
        if request.request_number <= last.request_number:
            raise CommandRefused(
                f"request_number: {request.request_number} is not above the holder's last, {last.request_number}; a repeat "
                "changes nothing"
            )

    @staticmethod
    def _check(request: LeaseRequest, account: AccountState) -> None:
        if not 0 < len(request.holder_id.encode()) <= ID_CHARS_MAX:
            raise CommandRefused(f"holder_id: needs 1 to {ID_CHARS_MAX} bytes: the producer ID of the gateway's journal")
        if request.epoch < 1 or request.request_number < 1:
            raise CommandRefused(f"epoch, request_number: {request.epoch}, {request.request_number}; both are counted from 1")
        wanted_pico = from_amount(request.wanted)
        if not 0 <= wanted_pico <= _WANTED_PICO_MAX:
            raise CommandRefused(f"wanted: {wanted_pico} pico; ask for 0 to {_WANTED_PICO_MAX}")
        if request.duration_ms > LEASE_DURATION_MS_MAX:
            raise CommandRefused(f"duration_ms: {request.duration_ms}; ask for at most {LEASE_DURATION_MS_MAX} and renew")
        if account.status != ACCOUNT_STATUS_ACTIVE and request.duration_ms:
            raise CommandRefused(f"tenant_id: {request.tenant_id} is not active; nothing is leased to it")

    def _end(
        self, epochs: Sequence[LeaseState], last_sequence: int, covered_sequence: int, account: AccountState
    ) -> list[LeaseState]:
        """Earlier epochs: over, and gone if the ledger has all of their events."""
        changed = []
        for lease in list(epochs):
            if not lease.ended:
                lease.ended = True
                lease.last_sequence = last_sequence
            elif lease.last_sequence > covered_sequence:
                continue
            if lease.last_sequence <= covered_sequence:
                self._let_go(lease, account)
            else:
                self.put(lease)
            changed.append(lease)
        return changed

    @staticmethod
    def _grant(lease: LeaseState, request: LeaseRequest, account: AccountState, log_time_ms: int) -> str:
        remaining_before = lease.remaining_pico
        wanted_pico = from_amount(request.wanted)
        more_pico = wanted_pico - lease.granted_pico
        refusal = ""
        if more_pico > 0:
            free_pico = free_to_lease_pico(account)
            if free_pico is not None and more_pico > free_pico:
                more_pico = max(0, free_pico)
                refusal = f"wanted: {wanted_pico} pico; {lease.granted_pico + more_pico} are granted, no more is free"
            lease.granted_pico += more_pico
        else:
            # What is charged already cannot be given back.
            lease.granted_pico = max(wanted_pico, min(lease.charged_pico, lease.granted_pico))
        lease.request_number = request.request_number
        lease.expires_ms = log_time_ms + request.duration_ms
        lease.gone = not request.duration_ms and lease.remaining_pico == 0
        account.leased_pico += lease.remaining_pico - remaining_before
        return refusal

    def _let_go(self, lease: LeaseState, account: AccountState) -> None:
        account.leased_pico -= lease.remaining_pico
        lease.gone = True
        self.put(lease)

    @staticmethod
    def charge(epochs: Sequence[LeaseState], account: AccountState, costs: Iterable[tuple[int, int]]) -> list[LeaseState]:
        """Usage of the holder of `epochs` was charged: pairs of its number and its cost. Which leases changed."""
        changed: list[LeaseState] = []
        for sequence, cost_pico in costs:
            # The first epoch that was not over when the event was numbered; after the last one's end: an event of nobody's.
            lease = next((each for each in epochs if not each.ended or sequence <= each.last_sequence), None)
            if lease is None or not cost_pico:
                continue
            remaining_before = lease.remaining_pico
            lease.charged_pico += cost_pico
            account.leased_pico += lease.remaining_pico - remaining_before
            if lease not in changed:
                changed.append(lease)
        return changed

    def settle(
        self, holder_id: str, covered_sequence: int, accounts: dict[str, AccountState], leases_max: int
    ) -> list[LeaseState]:
        """Let go of the holder's ended epochs whose events the ledger has all of: of about `leases_max` at most."""
        done: list[LeaseState] = []
        for tenant_id in sorted(self._ended.get(holder_id, ())):
            if len(done) >= leases_max:
                break
            epochs = self._held[holder_id][tenant_id]
            done += [lease for lease in epochs if lease.ended and lease.last_sequence <= covered_sequence]
        for lease in done:
            self._let_go(lease, accounts[lease.tenant_id])
        return done

    def retire(
        self, holder_id: str, unexpired: bool, accounts: dict[str, AccountState], log_time_ms: int, leases_max: int
    ) -> tuple[list[LeaseState], dict[str, int]]:
        """An operator gives up on `holder_id`: what is let go, at most `leases_max`, and how much that is by currency.

        Raises CommandRefused while a lease of it has not expired and `unexpired` is not set.
        """
        leases = [lease for epochs in self.held_by(holder_id).values() for lease in epochs]
        latest_ms = max((lease.expires_ms for lease in leases if not lease.ended), default=0)
        if latest_ms > log_time_ms and not unexpired:
            raise CommandRefused(
                f"holder_id: {holder_id} has leases for another {latest_ms - log_time_ms} ms; wait, or retire it unexpired if "
                "it is known to be gone"
            )
        bound_pico: dict[str, int] = {}
        for lease in leases[:leases_max]:
            account = accounts[lease.tenant_id]
            bound_pico[account.currency] = bound_pico.get(account.currency, 0) + lease.remaining_pico
            self._let_go(lease, account)
        return leases[:leases_max], bound_pico


def free_to_lease_pico(account: AccountState) -> int | None:
    """What nobody holds of the tenant's money: None is without limit; below 0, usage came that nobody held money for."""
    limit_pico = 0
    if account.plan.billing_mode == BILLING_MODE_POSTPAID:
        limit_pico = from_amount(account.plan.credit_limit)
        if not limit_pico:
            return None
    return account.credit_pico + limit_pico - account.spend_pico - account.leased_pico
