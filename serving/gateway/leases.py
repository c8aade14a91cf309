"""What this gateway holds of its tenants' balances: reserve the worst case before a request is forwarded, settle what it cost.

Promise: what this gateway has promised to requests, settled or running, is never more than the ledger has granted it, and a
lease is not used after it may have expired: it is counted on the monotonic clock from before it was asked for, less a guard. A
reservation is decided in memory; only when what is at hand does not suffice does a request wait, for at most `wait_ms`, while
the ledger is asked. Asking ahead, before it runs dry, keeps that rare.

How much to keep at hand learns from use: it doubles when requests had to wait and nobody else wants the money, halves when
little of it was used, and falls to one request when the balance has nothing free: then what is left goes where it is used.

Belongs to one event loop. `billing.leases` is the other side.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from billing.amounts import from_amount, to_amount
from billing.identity import partition_of
from billing.v1.command_pb2 import LeaseRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from billing.v1.account_pb2 import Lease
    from serving.gateway.settings import LeaseSettings

__all__ = ["LeaseKeeper", "Reservation"]

_REACH_START = 4
_REACH_MAX = 1_024
# An answer that has not come by then was lost: the next request may be sent.
_ANSWER_TIMEOUT_S = 1.0
_ANSWERS_KEPT_S = 60.0
_RETRY_S = 0.1
_SHORT_S = 1.0
_IDLE_S = 0.2


class Reservation:
    """Money set aside for one request. `settle` it once, with what the request cost."""

    __slots__ = ("_holding", "_keeper", "pico")

    def __init__(self, keeper: LeaseKeeper, holding: _Holding, pico: int) -> None:
        self._keeper = keeper
        self._holding: _Holding | None = holding
        self.pico = pico

    def extend(self, pico: int) -> bool:
        """Set aside `pico` in all; False if what is at hand does not suffice, and then nothing has changed."""
        holding = self._holding
        if holding is None or not self._keeper.take(holding, pico - self.pico):
            return False
        self.pico = pico
        return True

    def settle(self, cost_pico: int) -> None:
        """The request is over and cost this, which may be more than was set aside; later calls change nothing."""
        holding, self._holding = self._holding, None
        if holding is not None:
            self._keeper.settle(holding, self.pico, cost_pico)


@dataclass(slots=True)
class _Asked:
    at: float
    wanted_pico: int
    duration_ms: int


@dataclass(slots=True, eq=False)
class _Holding:
    """One tenant's lease, in totals since this process began (or since the lease was given back for good)."""

    tenant_id: str
    granted_pico: int = 0
    # What requests cost and what is set aside for those that run; of this the latter alone; and how many run.
    promised_pico: int = 0
    reserved_pico: int = 0
    running: int = 0
    charged_pico: int = 0
    valid_until: float = 0.0
    number: int = 0
    answered: int = 0
    asked: dict[int, _Asked] = field(default_factory=dict)
    # Of the last request to the ledger.
    asked_at: float = -math.inf
    wanted_pico: int = 0
    # How many requests of the largest recent size are kept at hand; that size, the largest and all since the last renewal.
    reach: int = _REACH_START
    request_pico: int = 0
    largest_pico: int = 0
    used_pico: int = 0
    used_at: float = 0.0
    # The ledger had no more to give: nothing is asked ahead before then. And whether the balance has nothing free.
    short_until: float = 0.0
    scarce: bool = False
    # Given back for good; nothing is reserved until the ledger has answered.
    closing: bool = False
    waiting: deque[tuple[int, asyncio.Future[Reservation]]] = field(default_factory=deque)
    retry: asyncio.TimerHandle | None = None

    @property
    def at_hand_pico(self) -> int:
        return self.granted_pico - self.promised_pico


class LeaseKeeper:
    """All leases of one gateway."""

    def __init__(
        self,
        settings: LeaseSettings,
        holder_id: str,
        epoch: int,
        partitions: int,
        highest_sequence: Callable[[int], int],
        send: Callable[[LeaseRequest], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`highest_sequence(partition)`: the last number that the journal has given to an event there; this epoch begins now.
        `send` hands a request on and returns at once; that it was lost is found out here."""
        self.metrics = {"lease_requests": 0, "lease_waits": 0, "lease_waits_in_vain": 0}
        self._settings = settings
        self._holder_id = holder_id
        self._epoch = epoch
        self._partitions = partitions
        self._highest_sequence = highest_sequence
        self._last_sequences = [highest_sequence(partition) for partition in range(partitions)]
        self._send = send
        self._clock = clock
        self._number = 0
        self._holdings: dict[str, _Holding] = {}
        # Tenants of which the ledger has a lease of this gateway that nothing here counts: mostly of an earlier start.
        self._left_over: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    # -- for requests ---------------------------------------------------------------------------------------------------

    def try_reserve(self, tenant_id: str, pico: int) -> Reservation | None:
        """Set `pico` aside if what is at hand suffices and nobody waits."""
        holding = self._holdings.get(tenant_id)
        if holding is None or holding.waiting or not self.take(holding, pico):
            return None
        holding.running += 1
        return Reservation(self, holding, pico)

    async def reserve(self, tenant_id: str, pico: int) -> Reservation | None:
        """Set `pico` aside, asking the ledger for it if need be; None if it has not granted it in `wait_ms`."""
        reservation = self.try_reserve(tenant_id, pico)
        if reservation is not None:
            return reservation
        holding = self._holdings.get(tenant_id)
        if holding is None:
            holding = self._holdings[tenant_id] = _Holding(tenant_id)
        self.metrics["lease_waits"] += 1
        granted: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        entry = (pico, granted)
        holding.waiting.append(entry)
        holding.used_at = self._clock()
        holding.request_pico = max(holding.request_pico, pico)
        holding.largest_pico = max(holding.largest_pico, pico)
        self._ask_for_waiting(holding)
        try:
            await asyncio.wait([granted], timeout=self._settings.wait_ms / 1_000)
        except asyncio.CancelledError:
            if granted.done():
                granted.result().settle(0)
            else:
                holding.waiting.remove(entry)
            raise
        if granted.done():
            return granted.result()
        holding.waiting.remove(entry)
        self.metrics["lease_waits_in_vain"] += 1
        return None

    def at_hand_pico(self, tenant_id: str) -> int:
        """What may be reserved without asking."""
        holding = self._holdings.get(tenant_id)
        return max(0, holding.at_hand_pico) if holding is not None and self._usable(holding) else 0

    # -- for reservations -----------------------------------------------------------------------------------------------

    def take(self, holding: _Holding, pico: int) -> bool:
        """Promise `pico` more, if the lease has it."""
        if not self._usable(holding) or holding.at_hand_pico < pico:
            return False
        holding.promised_pico += pico
        holding.reserved_pico += pico
        holding.used_pico += pico
        holding.used_at = self._clock()
        if pico > holding.largest_pico:
            holding.largest_pico = pico
            holding.request_pico = max(holding.request_pico, pico)
        if holding.at_hand_pico * 2 < holding.reach * holding.request_pico:
            self._ask_ahead(holding)
        return True

    def settle(self, holding: _Holding, reserved_pico: int, cost_pico: int) -> None:
        """A request of `holding` is over."""
        holding.running -= 1
        holding.promised_pico += cost_pico - reserved_pico
        holding.reserved_pico -= reserved_pico
        if cost_pico > holding.largest_pico:
            # The worst case was not the worst.
            holding.largest_pico = cost_pico
            holding.request_pico = max(holding.request_pico, cost_pico)
        if holding.waiting:
            self._serve_waiting(holding)

    def _usable(self, holding: _Holding) -> bool:
        return not holding.closing and self._clock() < holding.valid_until

    # -- asking ---------------------------------------------------------------------------------------------------------

    def _is_asking(self, holding: _Holding) -> bool:
        """Whether an answer may still come."""
        asked = holding.asked.get(holding.number)
        return asked is not None and self._clock() < asked.at + _ANSWER_TIMEOUT_S

    def _needed_pico(self, holding: _Holding) -> int:
        """What should be at hand: for those who wait, and for the next ones."""
        return sum(pico for pico, _ in holding.waiting) + holding.reach * holding.request_pico

    def _ask_ahead(self, holding: _Holding) -> None:
        if self._clock() >= holding.short_until and not self._is_asking(holding):
            self._ask(holding, self._needed_pico(holding))

    def _ask_for_waiting(self, holding: _Holding) -> None:
        needed_pico = self._needed_pico(holding)
        covered = holding.wanted_pico >= holding.promised_pico + needed_pico
        if self._clock() >= holding.asked_at + _RETRY_S:
            # An answer may take as long as a request may wait: whoever came since does not wait for it to ask.
            if not (covered and self._is_asking(holding)):
                self._ask(holding, needed_pico)
        elif not holding.scarce and not self._is_asking(holding):
            # Where nothing is free, the next answer would say no more than the last one did.
            self._ask(holding, needed_pico)
        if holding.retry is None:
            holding.retry = asyncio.get_running_loop().call_later(_RETRY_S, self._retry, holding)

    def _retry(self, holding: _Holding) -> None:
        holding.retry = None
        if holding.waiting:
            self._serve_waiting(holding)
        elif holding.scarce and holding.at_hand_pico > 0 and self._may_yield(holding):
            if self._clock() - holding.used_at >= _IDLE_S:
                self._ask(holding, 0)
            else:
                holding.retry = asyncio.get_running_loop().call_later(_IDLE_S, self._retry, holding)

    def _ask(self, holding: _Holding, at_hand_pico: int, duration_ms: int | None = None) -> None:
        # One numbering for all tenants: an answer to a lease that was given back is never taken for one to the next.
        self._number += 1
        holding.number = self._number
        wanted_pico = holding.promised_pico + at_hand_pico
        duration_ms = self._settings.duration_ms if duration_ms is None else duration_ms
        now = self._clock()
        while holding.asked and next(iter(holding.asked.values())).at < now - _ANSWERS_KEPT_S:
            del holding.asked[next(iter(holding.asked))]
        holding.asked[holding.number] = _Asked(now, wanted_pico, duration_ms)
        holding.asked_at, holding.wanted_pico = now, wanted_pico
        # Whatever the answer, and if there is none: what is given back is not used from here on.
        holding.granted_pico = min(holding.granted_pico, wanted_pico)
        self._request(holding.tenant_id, holding.number, wanted_pico, duration_ms)

    def _request(self, tenant_id: str, number: int, wanted_pico: int, duration_ms: int) -> None:
        self.metrics["lease_requests"] += 1
        partition = partition_of(tenant_id, self._partitions)
        self._send(
            LeaseRequest(
                tenant_id=tenant_id,
                holder_id=self._holder_id,
                epoch=self._epoch,
                request_number=number,
                wanted=to_amount(wanted_pico),
                duration_ms=duration_ms,
                previous_sequence=self._last_sequences[partition],
            )
        )

    # -- what the ledger says -------------------------------------------------------------------------------------------

    def on_lease(self, lease: Lease) -> None:
        """A lease as the ledger stated it last; anyone's."""
        if lease.holder_id != self._holder_id:
            return
        if lease.epoch < self._epoch:
            if not lease.gone:
                self._left_over.add(lease.tenant_id)
            return
        self._left_over.discard(lease.tenant_id)
        holding = self._holdings.get(lease.tenant_id)
        if holding is None and not lease.gone:
            # Asked for before an operator retired the lease, granted after: nobody here would ever give it back.
            self._left_over.add(lease.tenant_id)
        if holding is None or (lease.request_number != holding.answered and lease.request_number not in holding.asked):
            return
        if lease.gone:
            self._start_over(holding, lease)
        else:
            self._take_answer(holding, lease)
        self._serve_waiting(holding)

    def _take_answer(self, holding: _Holding, lease: Lease) -> None:
        holding.charged_pico = from_amount(lease.charged)
        if lease.request_number == holding.answered:
            return
        if lease.covered_sequence >= self._highest_sequence(partition_of(lease.tenant_id, self._partitions)):
            # The ledger knows what everything cost that has ended; where prices depend on more than the request, we do not.
            holding.promised_pico = min(holding.promised_pico, holding.charged_pico + holding.reserved_pico)
        holding.answered = lease.request_number
        asked = holding.asked.pop(lease.request_number)
        for number in [number for number in holding.asked if number < lease.request_number]:
            del holding.asked[number]
        # Requests that are on their way may have given something back.
        later = [each.wanted_pico for each in holding.asked.values()]
        holding.granted_pico = min([from_amount(lease.granted), *later])
        holding.valid_until = asked.at + max(0, asked.duration_ms - self._settings.guard_ms) / 1_000
        if from_amount(lease.granted) < asked.wanted_pico:
            holding.short_until = self._clock() + _SHORT_S
        holding.closing = False

    def _start_over(self, holding: _Holding, lease: Lease) -> None:
        """The lease is given back, or an operator has retired it: what comes of it goes to the next one."""
        if not holding.waiting and not holding.running:
            del self._holdings[holding.tenant_id]
            return
        holding.promised_pico -= from_amount(lease.charged)
        holding.granted_pico = holding.charged_pico = 0
        holding.valid_until = 0.0
        holding.asked.clear()
        holding.closing = False

    def _serve_waiting(self, holding: _Holding) -> None:
        while holding.waiting:
            pico, future = holding.waiting[0]
            if not self.take(holding, pico):
                break
            holding.waiting.popleft()
            holding.running += 1
            future.set_result(Reservation(self, holding, pico))
        if not holding.waiting:
            return
        if holding.scarce and self._usable(holding) and holding.at_hand_pico > 0 and not self._is_asking(holding):
            # Too little for whoever is next here: gateways that each keep a part of a request would keep it for nobody.
            self._ask(holding, 0)
        self._ask_for_waiting(holding)

    def on_account(self, tenant_id: str, free_pico: int | None) -> None:
        """The tenant's account has changed: `free_pico` is what nobody holds (None: without limit)."""
        holding = self._holdings.get(tenant_id)
        if holding is None or free_pico is None:
            return
        holding.scarce = free_pico <= 0
        if not holding.scarce:
            holding.short_until = 0.0
            if holding.waiting and not self._is_asking(holding):
                self._ask_for_waiting(holding)
            return
        # Someone may be waiting for what lies idle here: most of it goes at once, the rest if it is not used soon.
        holding.reach = 1
        if holding.retry is None:
            holding.retry = asyncio.get_running_loop().call_later(_IDLE_S, self._retry, holding)
        if self._may_yield(holding) and holding.at_hand_pico > 2 * holding.request_pico:
            self._ask(holding, holding.request_pico)

    def _may_yield(self, holding: _Holding) -> bool:
        return not (holding.waiting or holding.closing or self._is_asking(holding))

    # -- by the clock ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Keep leases renewed, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._look_often())

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(self._settings.duration_ms / 8_000)
            self.look()

    def look(self) -> None:
        """Renew what is used, give back what is not, end what an earlier start left."""
        now = self._clock()
        duration_s = self._settings.duration_ms / 1_000
        for tenant_id in sorted(self._left_over - self._holdings.keys()):
            # The answer says that it is over. Until then it is asked again, each time with a new number.
            holding = self._holdings[tenant_id] = _Holding(tenant_id, closing=True)
            self._ask(holding, 0, duration_ms=0)
        for holding in list(self._holdings.values()):
            if self._is_asking(holding) or holding.waiting:
                continue
            if holding.running == 0 and now - holding.used_at > duration_s:
                self._give_back(holding)
            elif holding.valid_until - now < duration_s / 2:
                self._learn(holding)
                self._ask(holding, holding.reach * holding.request_pico)

    @staticmethod
    def _learn(holding: _Holding) -> None:
        kept_pico = holding.reach * holding.request_pico
        if holding.used_pico * 4 < kept_pico:
            holding.reach = max(1, holding.reach // 2)
        elif holding.used_pico > kept_pico:
            holding.reach = min(_REACH_MAX, holding.reach * 2)
        holding.request_pico = max(holding.largest_pico, holding.request_pico // 2)
        holding.largest_pico = holding.used_pico = 0

    def _give_back(self, holding: _Holding) -> None:
        """At once what is at hand, and the lease for good when the ledger has charged all that it paid for."""
        if holding.charged_pico >= holding.promised_pico:
            holding.closing = True
            self._ask(holding, 0, duration_ms=0)
        elif holding.at_hand_pico or holding.valid_until - self._clock() < self._settings.duration_ms / 2_000:
            # Each answer may tell that what was thought to be owed is all charged, and cost less.
            self._ask(holding, 0)

    async def close(self) -> None:
        """Give everything back; what is not charged yet stays leased until the ledger has it and the next start says so."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for holding in self._holdings.values():
            if holding.retry is not None:
                holding.retry.cancel()
            holding.closing = True
            self._ask(holding, 0, duration_ms=0)
