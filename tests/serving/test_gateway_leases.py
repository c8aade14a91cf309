"""The keeper of leases against the real ledger step: nothing is promised twice, waits are short, idle money goes back.

The loop's time is virtual: how long a request waits is the setting's, and not that of a machine which stands still meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from billing import commands
from billing.accounts import AccountState
from billing.amounts import PICO, to_amount
from billing.leases import free_to_lease_pico
from billing.v1.command_pb2 import CreditGrant, LeaseRequest, LeaseRetirement
from billing.v1.ledger_pb2 import LedgerRecord
from serving.gateway.leases import LeaseKeeper, Reservation
from serving.gateway.settings import LeaseSettings
from tests.billing.ledgers import KEYS, NOW_MS, PARTITIONS, Ledger, batch, tenants_in, usage
from tests.simulation.loop import SimLoop

A = tenants_in(1, 1)[0]
LEASE_KEY = commands.lease_key(KEYS.command_key)
EVENT_PICO = 100 * 10_000 + 10 * 40_000
SETTINGS = LeaseSettings(bootstrap="", key=LEASE_KEY, wait_ms=200, duration_ms=10_000, guard_ms=1_000)


class Clock:
    """The gateways' monotonic clock and the ledger's log time, moved together by hand."""

    def __init__(self) -> None:
        self.s = 1_000.0

    def __call__(self) -> float:
        return self.s

    @property
    def log_time_ms(self) -> int:
        return NOW_MS + int((self.s - 1_000) * 1_000)


class Bank:
    """The ledger and the topics around it: requests go in, leases and accounts come out to every gateway."""

    def __init__(self, credit_pico: int) -> None:
        self.clock = Clock()
        self.ledger = Ledger()
        self.ledger.price()
        self.ledger.tenant(A)
        self.ledger.command(credit_grant=CreditGrant(tenant_id=A, amount=to_amount(credit_pico), currency="USD"))
        self.keepers: list[LeaseKeeper] = []
        # By holder: the last number that its journal has given.
        self.written: dict[str, int] = {}
        # A request is lost when this says so.
        self.loses: Callable[[], bool] = lambda: False
        # A list: answers are kept there until somebody tells them.
        self.delayed: list[LedgerRecord] | None = None
        self._unique = itertools.count()

    def gateway(self, holder_id: str, epoch: int = 1, settings: LeaseSettings = SETTINGS) -> LeaseKeeper:
        keeper = LeaseKeeper(
            settings, holder_id, epoch, PARTITIONS, lambda _: self.written.get(holder_id, 0), self._send, self.clock
        )
        for lease in self.ledger.state.leases:
            keeper.on_lease(lease.to_lease(b"", 0))
        self.keepers.append(keeper)
        return keeper

    def _send(self, request: LeaseRequest) -> None:
        if not self.loses():
            asyncio.get_running_loop().call_soon(self._answer, request)

    def _answer(self, request: LeaseRequest) -> None:
        result = self.ledger.command(
            self.clock.log_time_ms, LEASE_KEY, command_id=f"l{next(self._unique)}", lease_request=request
        )
        if self.delayed is None:
            self.tell(result.record)
        else:
            self.delayed.append(result.record)

    def tell(self, record: LedgerRecord) -> None:
        for keeper in self.keepers:
            for lease in record.leases:
                if not lease.ended:
                    keeper.on_lease(lease)
            keeper.on_account(A, free_to_lease_pico(self.account))

    def charge(self, holder_id: str, first: int, count: int) -> None:
        self.written[holder_id] = max(self.written.get(holder_id, 0), first + count - 1)
        events = [usage(f"{holder_id}-{first + i}", A) for i in range(count)]
        self.tell(self.ledger.usage(batch(events, holder_id, first, first + count - 1), self.clock.log_time_ms).record)

    @property
    def account(self) -> AccountState:
        return self.ledger.state.accounts[A]

    @property
    def leased_pico(self) -> int:
        return self.account.leased_pico


class InOrder(random.Random):
    """Chooses what was ready first, as asyncio's own loops do: a topic keeps the order of its messages."""

    def getrandbits(self, k: int, /) -> int:
        return 0


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test on a loop whose time passes when nothing else is left to do."""

    @functools.wraps(test)
    def run(*args: Any, **fields: Any) -> None:
        loop = SimLoop(InOrder(), steps_max=100_000)
        try:
            loop.run_until_complete(test(*args, **fields))
        finally:
            loop.dispose()

    return run


async def settled() -> None:
    """Let every message arrive."""
    await asyncio.sleep(0.001)


@in_virtual_time
async def test_a_first_request_waits_for_the_ledger_and_the_next_ones_do_not() -> None:
    bank = Bank(10 * PICO)
    gateway = bank.gateway("gw-1")
    assert gateway.try_reserve(A, EVENT_PICO) is None
    assert await gateway.reserve(A, EVENT_PICO) is not None
    assert gateway.try_reserve(A, EVENT_PICO) is not None
    assert gateway.metrics["lease_waits"] == 1


@in_virtual_time
async def test_a_reservation_beyond_the_balance_is_refused_after_the_wait() -> None:
    bank = Bank(3 * EVENT_PICO)
    gateway = bank.gateway("gw-1")
    taken = [await gateway.reserve(A, EVENT_PICO) for _ in range(3)]
    assert all(taken)
    assert await gateway.reserve(A, EVENT_PICO) is None
    assert gateway.metrics["lease_waits_in_vain"] == 1
    # One costs less than the worst case: that pays for another.
    assert taken[0] is not None
    taken[0].settle(0)
    assert await gateway.reserve(A, EVENT_PICO) is not None


@in_virtual_time
async def test_who_waits_is_served_as_soon_as_a_request_settles() -> None:
    bank = Bank(EVENT_PICO)
    gateway = bank.gateway("gw-1")
    first = await gateway.reserve(A, EVENT_PICO)
    assert first is not None
    waiting = asyncio.ensure_future(gateway.reserve(A, EVENT_PICO))
    await settled()
    assert not waiting.done()
    first.settle(0)
    assert await waiting is not None


@in_virtual_time
async def test_a_client_that_goes_away_while_it_waits_holds_nothing() -> None:
    bank = Bank(EVENT_PICO)
    gateway = bank.gateway("gw-1")
    first = await gateway.reserve(A, EVENT_PICO)
    assert first is not None
    waiting = asyncio.ensure_future(gateway.reserve(A, EVENT_PICO))
    await settled()
    first.settle(0)
    # The money is there, and the client is gone in the same moment.
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await gateway.reserve(A, EVENT_PICO) is not None


@in_virtual_time
async def test_a_lease_is_not_used_when_it_may_have_expired() -> None:
    bank = Bank(10 * PICO)
    gateway = bank.gateway("gw-1")
    await gateway.reserve(A, EVENT_PICO)
    bank.loses = lambda: True
    bank.clock.s += 8.9
    assert gateway.at_hand_pico(A) > 0
    bank.clock.s += 0.2
    assert gateway.at_hand_pico(A) == 0
    assert gateway.try_reserve(A, 1) is None


@in_virtual_time
async def test_a_lease_in_use_is_renewed_before_it_expires() -> None:
    bank = Bank(10 * PICO)
    gateway = bank.gateway("gw-1")
    for _ in range(10):
        assert await gateway.reserve(A, EVENT_PICO) is not None
        bank.clock.s += 3
        gateway.look()
        await settled()
    assert gateway.metrics["lease_waits"] == 1


@in_virtual_time
async def test_a_lost_request_is_asked_again() -> None:
    bank = Bank(10 * PICO)
    gateway = bank.gateway("gw-1")
    lost = iter([True, True])
    bank.loses = lambda: next(lost, False)
    assert await gateway.reserve(A, EVENT_PICO) is None
    bank.clock.s += 1.1
    assert await gateway.reserve(A, EVENT_PICO) is None
    bank.clock.s += 1.1
    assert await gateway.reserve(A, EVENT_PICO) is not None


@in_virtual_time
async def test_what_lies_idle_goes_where_it_is_wanted() -> None:
    bank = Bank(6 * EVENT_PICO)
    rich, poor = bank.gateway("gw-1"), bank.gateway("gw-2")
    first = await rich.reserve(A, EVENT_PICO)
    assert first is not None
    assert bank.leased_pico >= 5 * EVENT_PICO
    for _ in range(3):
        assert await poor.reserve(A, EVENT_PICO) is not None
    assert bank.leased_pico <= 6 * EVENT_PICO


@in_virtual_time
async def test_an_idle_lease_is_given_back_for_good_once_all_is_charged() -> None:
    bank = Bank(10 * PICO)
    gateway = bank.gateway("gw-1")
    reservation = await gateway.reserve(A, 2 * EVENT_PICO)
    assert reservation is not None
    reservation.settle(EVENT_PICO)
    bank.clock.s += 11
    gateway.look()
    await settled()
    # Its usage is still on its way: that much stays leased.
    assert bank.leased_pico == EVENT_PICO
    bank.charge("gw-1", 1, 1)
    assert bank.leased_pico == 0
    bank.clock.s += 2
    gateway.look()
    await settled()
    assert list(bank.ledger.state.leases) == []
    assert await gateway.reserve(A, EVENT_PICO) is not None


@pytest.mark.parametrize("renewal_is_answered", [True, False])
@in_virtual_time
async def test_what_is_given_back_is_not_used_whatever_answers_come_late(renewal_is_answered: bool) -> None:
    bank = Bank(4 * EVENT_PICO)
    idle, busy = bank.gateway("gw-1"), bank.gateway("gw-2")
    first = await idle.reserve(A, EVENT_PICO)
    assert first is not None
    # Its bill is in the journal and not in the ledger: that much stays leased, the rest goes back.
    bank.written["gw-1"] = 1
    first.settle(EVENT_PICO)
    late: list[LedgerRecord] = []
    bank.delayed = None if renewal_is_answered else late
    bank.clock.s += 8
    idle.look()
    await settled()
    # The ledger takes it back and lends it to another; the answer is on its way.
    bank.delayed = late
    bank.clock.s += 3
    idle.look()
    await settled()
    bank.delayed = None
    bank.keepers.remove(idle)
    assert all([await busy.reserve(A, EVENT_PICO) for _ in range(3)])
    assert idle.try_reserve(A, EVENT_PICO) is None
    # The answer to the renewal, which was asked for before, brings nothing back.
    for record in late[:-1]:
        for lease in record.leases:
            idle.on_lease(lease)
    assert idle.at_hand_pico(A) == 0
    assert idle.try_reserve(A, EVENT_PICO) is None


@in_virtual_time
async def test_a_restarted_gateway_ends_what_it_left_behind() -> None:
    bank = Bank(3 * EVENT_PICO)
    before = bank.gateway("gw-1")
    for _ in range(3):
        assert await before.reserve(A, EVENT_PICO) is not None
    bank.keepers.clear()
    # One request had been billed to the journal when it died; the two others had not begun.
    bank.written["gw-1"] = 1
    after = bank.gateway("gw-1", epoch=2)
    after.look()
    await settled()
    assert bank.leased_pico == 3 * EVENT_PICO
    bank.charge("gw-1", 1, 1)
    assert bank.leased_pico == 0
    assert await after.reserve(A, EVENT_PICO) is not None
    assert await after.reserve(A, EVENT_PICO) is not None
    assert await after.reserve(A, EVENT_PICO) is None


@in_virtual_time
async def test_a_retired_gateway_that_lives_asks_anew() -> None:
    bank = Bank(3 * EVENT_PICO)
    gateway = bank.gateway("gw-1")
    first = await gateway.reserve(A, EVENT_PICO)
    assert first is not None
    bank.tell(bank.ledger.command(lease_retirement=LeaseRetirement(holder_id="gw-1", unexpired=True)).record)
    assert gateway.at_hand_pico(A) == 0
    # What runs is promised all the same: of three, two are left.
    assert await gateway.reserve(A, 2 * EVENT_PICO) is not None
    assert await gateway.reserve(A, EVENT_PICO) is None


@in_virtual_time
async def test_what_is_granted_after_an_operator_has_retired_the_gateway_goes_back() -> None:
    bank = Bank(10 * PICO)
    gateway = bank.gateway("gw-1")
    first = await gateway.reserve(A, EVENT_PICO)
    assert first is not None
    first.settle(0)
    # Its renewal is on its way when the operator gives it up; of that it hears first.
    bank.clock.s += 8
    bank.delayed = []
    gateway.look()
    bank.tell(bank.ledger.command(lease_retirement=LeaseRetirement(holder_id="gw-1", unexpired=True)).record)
    await settled()
    late, bank.delayed = bank.delayed, None
    assert len(late) == 1
    assert bank.leased_pico > 0
    bank.tell(late[0])
    gateway.look()
    await settled()
    assert bank.leased_pico == 0


@in_virtual_time
async def test_what_was_thought_dearer_than_it_was_is_put_right_by_the_ledger() -> None:
    bank = Bank(10 * EVENT_PICO)
    gateway = bank.gateway("gw-1")
    for number in range(1, 4):
        reservation = await gateway.reserve(A, 2 * EVENT_PICO)
        assert reservation is not None
        # A graduated price: the most that it may cost is settled, the ledger charges half of it.
        reservation.settle(2 * EVENT_PICO)
        bank.charge("gw-1", number, 1)
    bank.clock.s += 6
    gateway.look()
    await settled()
    assert gateway.at_hand_pico(A) + bank.account.spend_pico <= 10 * EVENT_PICO
    assert await gateway.reserve(A, 7 * EVENT_PICO) is not None


@in_virtual_time
async def test_an_idle_lease_that_was_thought_dearer_than_it_was_is_given_back_too() -> None:
    bank = Bank(10 * EVENT_PICO)
    gateway = bank.gateway("gw-1")
    reservation = await gateway.reserve(A, 2 * EVENT_PICO)
    assert reservation is not None
    reservation.settle(2 * EVENT_PICO)
    bank.charge("gw-1", 1, 1)
    for _ in range(12):
        bank.clock.s += 2
        gateway.look()
        await settled()
    assert list(bank.ledger.state.leases) == []
    assert bank.leased_pico == 0


@in_virtual_time
async def test_a_stream_may_take_more_while_there_is_more() -> None:
    bank = Bank(3 * EVENT_PICO)
    gateway = bank.gateway("gw-1")
    reservation = await gateway.reserve(A, EVENT_PICO)
    assert reservation is not None
    assert reservation.extend(3 * EVENT_PICO)
    assert not reservation.extend(4 * EVENT_PICO)
    # Its bill is in the journal, and the ledger has not seen it.
    bank.written["gw-1"] = 1
    reservation.settle(3 * EVENT_PICO)
    reservation.settle(3 * EVENT_PICO)
    assert await gateway.reserve(A, 1) is None


@pytest.mark.parametrize("seed", range(6))
@in_virtual_time
async def test_many_gateways_never_promise_more_than_the_balance(seed: int) -> None:
    chance = random.Random(seed)
    credit = 40
    bank = Bank(credit * EVENT_PICO)
    bank.loses = lambda: chance.random() < 0.1
    settings = LeaseSettings(bootstrap="", key=LEASE_KEY, wait_ms=2, duration_ms=10_000, guard_ms=1_000)
    names = [f"gw-{number}" for number in range(4)]
    epochs = dict.fromkeys(names, 1)
    written = bank.written
    written.update(dict.fromkeys(names, 0))
    charged = dict.fromkeys(names, 0)
    gateways = {name: bank.gateway(name, settings=settings) for name in names}
    running: list[tuple[str, int, Reservation]] = []
    for _ in range(300):
        name = chance.choice(names)
        match chance.choice(
            ["begin", "begin", "end", "charge", "look", "crash"] if chance.random() < 0.2 else ["begin", "end"]
        ):
            case "begin":
                reservation = gateways[name].try_reserve(A, EVENT_PICO) or await gateways[name].reserve(A, EVENT_PICO)
                if reservation is not None:
                    running.append((name, epochs[name], reservation))
            case "end" if running:
                who, epoch, reservation = running.pop(chance.randrange(len(running)))
                costs = chance.random() < 0.7 and epoch == epochs[who]
                written[who] += costs
                reservation.settle(EVENT_PICO if costs else 0)
            case "charge" if written[name] > charged[name]:
                bank.charge(name, charged[name] + 1, written[name] - charged[name])
                charged[name] = written[name]
            case "look":
                bank.clock.s += chance.random() * 4
                for gateway in gateways.values():
                    gateway.look()
            case "crash":
                # What ran is in the journal as interrupted, with its cost so far: here, all of it.
                lost = [entry for entry in running if entry[0] == name and entry[1] == epochs[name]]
                running = [entry for entry in running if entry not in lost]
                written[name] += len(lost)
                epochs[name] += 1
                bank.keepers.remove(gateways[name])
                gateways[name] = bank.gateway(name, epochs[name], settings)
        await settled()
        account = bank.ledger.state.accounts[A]
        waiting = sum(written[who] - charged[who] for who in names)
        promised = waiting + sum(epoch == epochs[who] for who, epoch, _ in running)
        assert account.spend_pico + promised * EVENT_PICO <= credit * EVENT_PICO
        assert account.spend_pico + account.leased_pico <= credit * EVENT_PICO
    assert sum(written.values()) > credit // 2, "it was used"
