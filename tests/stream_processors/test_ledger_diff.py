"""A ledger taken again: by the same version it is the same, by another each difference is named, and does not spread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from billing import chain, usage_step
from billing.amounts import to_amount
from billing.commands import lease_key
from billing.key_ring import KeyRing
from billing.step import LedgerKeys
from billing.v1.command_pb2 import CreditGrant, LeaseRequest, TenantUpsert
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors.errors import RefusedToStart
from stream_processors.ledger_diff import LedgerDiff, compare
from stream_processors.settings import TopicNames
from tests.billing import ledgers
from tests.billing.ledgers import COMMAND_KEY, KEYS, NOW_MS, Ledger, batch, tenants_in, usage

DAY_MS = 86_400_000
[TENANT, *_] = tenants_in(1)


class Log:
    """One partition's records as a port."""

    def __init__(self, stored: Sequence[bytes]) -> None:
        self.stored = stored

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self.stored)

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        yield list(enumerate(self.stored))[start:end]


@pytest.fixture
def ledger() -> Ledger:
    """Of each kind of input something, and what is refused of it."""
    ledger = Ledger()
    ledger.price()
    ledger.tenant(TENANT)
    ledger.command(credit_grant=CreditGrant(tenant_id=TENANT, amount=to_amount(10**12), currency="USD"))
    ledger.command(key=b"x" * 32, credit_grant=CreditGrant(tenant_id=TENANT, amount=to_amount(1), currency="USD"))
    for number in range(5):
        ledger.usage(batch([usage(f"{number}-{each}", TENANT) for each in range(3)], "p", 3 * number + 1, 3 * number + 3))
    ledger.usage(batch([usage("0-0", TENANT), usage("0-1", TENANT, output_tokens=7), usage("bad", TENANT, model="")]))
    ledger.usage(b"\xff not a batch")
    ledger.usage(b"\xff" * 100_000)
    ledger.raw_command(b"\xff not a command")
    ledger.tick(NOW_MS + 3_600_000)
    ledger.tick(NOW_MS + 2 * DAY_MS)
    ledger.usage(batch([usage("late", TENANT)], "p", 16, 16), NOW_MS + 2 * DAY_MS)
    return ledger


async def again(stored: Sequence[bytes]) -> LedgerDiff:
    found = LedgerDiff()
    await compare(Log(stored), TopicNames(), 1, KEYS, found)
    return found


async def test_the_same_version_writes_the_same(ledger: Ledger) -> None:
    found = await again(ledger.stored)
    assert found.differences == []
    assert found.records == len(ledger.stored)
    # The long message that was kept in part.
    assert found.skipped == 1


async def test_commands_of_every_key_of_a_ring_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record keeps a command's signature, and not which key made it."""
    ring = KeyRing({"new": b"n" * 32, "": COMMAND_KEY})
    keys = LedgerKeys(KEYS.seal_key, ring)
    monkeypatch.setattr(ledgers, "KEYS", keys)
    ledger = Ledger()
    ledger.command(key=KEYS.command_key, tenant_upsert=TenantUpsert(tenant_id=TENANT))
    ledger.command(key=ring, credit_grant=CreditGrant(tenant_id=TENANT, amount=to_amount(10**12), currency="USD"))
    lease = LeaseRequest(tenant_id=TENANT, holder_id="g", epoch=1, request_number=1, duration_ms=1_000)
    ledger.command(key=lease_key(ring), lease_request=lease)
    ledger.command(key=b"x" * 32, tenant_upsert=TenantUpsert(tenant_id=TENANT))
    assert [record.command.applied for record in ledger.records()[1:]] == [True, True, True, False]
    found = LedgerDiff()
    await compare(Log(ledger.stored), TopicNames(), 1, keys, found)
    assert (found.records, found.differences) == (5, [])


async def test_a_rule_that_is_another_is_named_field_by_field_and_does_not_spread(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = usage_step.apply_usage
    calls = 0

    def dearer(state, value, batch, record, *more):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        forwards = applied(state, value, batch, record, *more)
        if calls == 3:
            state.accounts[TENANT].spend_pico += 1
            record.accounts[0].spend.CopyFrom(to_amount(state.accounts[TENANT].spend_pico))
        return forwards

    monkeypatch.setattr("billing.step.apply_usage", dearer)
    found = await again(ledger.stored)
    [difference] = found.differences
    assert difference.field.startswith("accounts[0].spend.")
    assert int(difference.made) == int(difference.stored) + 1
    assert LedgerRecord.FromString(ledger.stored[difference.sequence]).WhichOneof("source") == "usage"
    assert found.differing_records == 1
    assert found.records == len(ledger.stored)


async def test_what_a_newer_version_wrote_beside_is_told(ledger: Ledger) -> None:
    record = LedgerRecord.FromString(ledger.stored[-1])
    record.ClearField("seal")
    # Field 90, which no version has yet.
    newer = LedgerRecord.FromString(record.SerializeToString() + b"\xd2\x05\x03new")
    found = await again([*ledger.stored[:-1], chain.seal(newer, KEYS.seal_key)])
    assert [each.field for each in found.differences] == ["fields that this version does not know"]


async def test_a_log_without_its_beginning_is_refused(ledger: Ledger) -> None:
    with pytest.raises(RefusedToStart, match="without its founding record"):
        await again(ledger.stored[2:])
