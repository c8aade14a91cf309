"""Many gateways, one balance, in virtual time: nobody is refused while the ledger has had the money free for all of the wait.

The keepers of leases are real, and so is the ledger's step. Between them is a network as slow as the test says: requests and
usage go to the ledger in order, and what it says comes to each gateway in order. Many more requests come at once than can be
paid for at the same time; each costs half of what is set aside for it, and together they use up the balance.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import pytest

from billing import commands
from billing.amounts import to_amount
from billing.leases import free_to_lease_pico
from billing.v1.account_pb2 import Lease
from billing.v1.command_pb2 import CreditGrant, LeaseRequest
from billing.v1.ledger_pb2 import LedgerRecord
from serving.gateway.leases import LeaseKeeper
from serving.gateway.settings import LeaseSettings
from tests.billing.ledgers import KEYS, NOW_MS, PARTITIONS, Ledger, batch, tenants_in, usage
from tests.simulation.loop import SimLoop

A = tenants_in(1, 1)[0]
LEASE_KEY = commands.lease_key(KEYS.command_key)
COST_PICO = 100 * 10_000 + 10 * 40_000
WORST_PICO = 2 * COST_PICO
SETTINGS = LeaseSettings(bootstrap="", key=LEASE_KEY, wait_ms=2_000, duration_ms=5_000, guard_ms=2_000)
SENT_EVERY_S = 0.05

T = TypeVar("T")


class Line(Generic[T]):
    """Messages that arrive in the order in which they were sent, each some time later."""

    def __init__(self, delay_s: Callable[[], float], arrive: Callable[[T], None]) -> None:
        self._delay_s = delay_s
        self._arrive = arrive
        self._messages: asyncio.Queue[tuple[float, T]] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def send(self, message: T) -> None:
        self._messages.put_nowait((asyncio.get_running_loop().time() + self._delay_s(), message))

    async def _run(self) -> None:
        while True:
            at, message = await self._messages.get()
            await asyncio.sleep(at - asyncio.get_running_loop().time())
            self._arrive(message)


@dataclass(frozen=True)
class Usage:
    """A batch of a gateway's journal."""

    holder_id: str
    first: int
    last: int


@dataclass(frozen=True)
class Said:
    """What a gateway hears of a record: the leases that it states, and what nobody holds (None: the account is as it was)."""

    leases: Sequence[Lease]
    free_pico: int | None


class Market:
    """The ledger and the topics around it."""

    def __init__(self, delay_s: Callable[[], float], credit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._delay_s = delay_s
        self.ledger = Ledger()
        self.ledger.price()
        self.ledger.tenant(A)
        self.ledger.command(credit_grant=CreditGrant(tenant_id=A, amount=to_amount(credit * WORST_PICO), currency="USD"))
        self.free_at_s, self.free_pico = [0.0], [credit * WORST_PICO]
        self.to_ledger: Line[LeaseRequest | Usage] = Line(delay_s, self._take)
        self.gateways: list[Gateway] = []
        self.refused_at_s: list[float] = []
        self.requests_taken = 0

    def join(self, gateway: Gateway) -> None:
        self.gateways.append(gateway)

    def _take(self, message: LeaseRequest | Usage) -> None:
        log_time_ms = NOW_MS + int(self._loop.time() * 1_000)
        if isinstance(message, Usage):
            numbers = range(message.first, message.last + 1)
            events = [usage(f"{message.holder_id}-{number}", A) for number in numbers]
            value = batch(events, message.holder_id, message.first, message.last)
            record = self.ledger.usage(value, log_time_ms).record
        else:
            self.requests_taken += 1
            command_id = f"{message.holder_id}/{message.request_number}"
            record = self.ledger.command(log_time_ms, LEASE_KEY, command_id=command_id, lease_request=message).record
            assert record.command.applied, record.command.refusal
        self._tell(record)

    def _tell(self, record: LedgerRecord) -> None:
        free_pico = free_to_lease_pico(self.ledger.state.accounts[A])
        assert free_pico is not None
        assert free_pico >= 0, "more is leased than there is"
        self.free_at_s.append(self._loop.time())
        self.free_pico.append(free_pico)
        said = Said(list(record.leases), free_pico if record.accounts else None)
        for gateway in self.gateways:
            gateway.inbox.send(said)

    def refused_too_early(self) -> list[float]:
        """When somebody was refused, though for all the time that a request waits there was enough free for it."""
        early = []
        for at_s in self.refused_at_s:
            first = max(bisect_right(self.free_at_s, at_s - SETTINGS.wait_ms / 1_000) - 1, 0)
            if min(self.free_pico[first : bisect_right(self.free_at_s, at_s)]) >= WORST_PICO:
                early.append(at_s)
        return early


class Gateway:
    """A keeper of leases, its requests, and a journal whose usage goes to the ledger now and then."""

    def __init__(self, market: Market, holder_id: str, delay_s: Callable[[], float], runs_s: Callable[[], float]) -> None:
        self._market = market
        self._holder_id = holder_id
        self._runs_s = runs_s
        self._written = self._sent = 0
        loop = asyncio.get_running_loop()
        self.keeper = LeaseKeeper(SETTINGS, holder_id, 1, PARTITIONS, lambda _: self._written, market.to_ledger.send, loop.time)
        self.inbox = Line(delay_s, self._hear)
        self.served = 0
        market.join(self)
        self.keeper.start()
        self._publisher = loop.create_task(self._publish())

    def _hear(self, said: Said) -> None:
        for lease in said.leases:
            self.keeper.on_lease(lease)
        if said.free_pico is not None:
            self.keeper.on_account(A, said.free_pico)

    async def serve(self) -> None:
        reservation = await self.keeper.reserve(A, WORST_PICO)
        if reservation is None:
            self._market.refused_at_s.append(asyncio.get_running_loop().time())
            return
        await asyncio.sleep(self._runs_s())
        self._written += 1
        reservation.settle(COST_PICO)
        self.served += 1

    async def _publish(self) -> None:
        while True:
            await asyncio.sleep(SENT_EVERY_S)
            if self._written > self._sent:
                self._market.to_ledger.send(Usage(self._holder_id, self._sent + 1, self._written))
                self._sent = self._written


def run(seed: int, hop_s: tuple[float, float], *, gateways: int = 8, credit: int = 200, rounds: int = 3) -> Market:
    """Twice as many requests at once as the balance pays for in the worst case, again and again until it is used up."""
    chance = random.Random(seed)
    loop = SimLoop(chance, steps_max=2_000_000)

    def delay_s() -> float:
        return chance.uniform(*hop_s)

    async def main() -> Market:
        market = Market(delay_s, credit)
        them = [Gateway(market, f"gw-{number}", delay_s, lambda: chance.uniform(0.05, 0.6)) for number in range(gateways)]
        for _ in range(rounds):
            async with asyncio.TaskGroup() as group:
                for number in range(2 * credit // rounds + gateways):
                    group.create_task(them[number % gateways].serve())
        return market

    try:
        return loop.run_until_complete(main())
    finally:
        loop.dispose()


@pytest.mark.parametrize("hop_s", [(0.002, 0.02), (0.1, 0.6)], ids=["quick", "slow"])
@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_refused_while_the_ledger_has_the_money_free(seed: int, hop_s: tuple[float, float]) -> None:
    market = run(seed, hop_s)
    assert sum(gateway.served for gateway in market.gateways) > 300, "the balance was used"
    assert market.refused_too_early() == []


def test_who_waits_for_what_is_not_there_does_not_flood_the_ledger() -> None:
    loop = SimLoop(random.Random(1), steps_max=100_000)

    async def main() -> Market:
        market = Market(lambda: 0.005, credit=1)
        holds, waits = (Gateway(market, f"gw-{number}", lambda: 0.005, lambda: 10.0) for number in range(2))
        running = loop.create_task(holds.serve())
        await asyncio.sleep(1)
        before = market.requests_taken
        await waits.serve()
        assert len(market.refused_at_s) == 1
        # Every tenth of a second in two seconds; each answer takes a hundredth.
        assert 15 < market.requests_taken - before < 25
        running.cancel()
        return market

    try:
        assert loop.run_until_complete(main()).refused_too_early() == []
    finally:
        loop.dispose()
