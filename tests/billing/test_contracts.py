"""An older version beside a newer one: fields that it does not know do no harm, and are not lost."""

from __future__ import annotations

from billing import chain, replay
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import RawUsageBatch, UsageBatch
from tests.billing.ledgers import KEYS, Ledger, tenants_in, usage

[TENANT, *_] = tenants_in(1)
# Field 500, a text, which no version has yet.
NEWER = b"\xa2\x1f\x05newer"


def from_newer_producer(request_id: str) -> bytes:
    """A batch with a field more in itself and in its event."""
    head = UsageBatch(schema_version=1, producer_id="p", first_sequence=1, highest_sequence=1).SerializeToString() + NEWER
    return head + RawUsageBatch(events=[usage(request_id, TENANT).SerializeToString() + NEWER]).SerializeToString()


def test_fields_of_a_newer_producer_survive() -> None:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(TENANT)
    value = from_newer_producer("r1")
    ledger.usage(value)
    again = ledger.usage(value)
    assert ledger.state.accounts[TENANT].events == 1
    assert again.record.usage.duplicates == 1
    kept = LedgerRecord.FromString(ledger.stored[-2]).usage.batch
    assert kept == value
    assert [raw.count(NEWER) for raw in RawUsageBatch.FromString(kept).events] == [1]


def test_a_record_of_a_newer_worker_is_read_and_its_seal_holds() -> None:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(TENANT)
    record = LedgerRecord.FromString(ledger.tick(ledger.state.log_time_ms + 1).stored)
    record.ClearField("seal")
    newer = LedgerRecord.FromString(record.SerializeToString() + NEWER)
    stored = chain.seal(newer, KEYS.seal_key)
    ledger.stored[-1] = stored
    state = ledger.replayed()
    assert state.sequence == newer.sequence
    assert state.record_hash == chain.record_hash(stored)
    reader = chain.Chain(1, KEYS.seal_key, newer.generation, newer.sequence - 1, newer.previous_hash)
    accepted = reader.accept(stored)
    assert accepted is not None
    assert NEWER in accepted.SerializeToString()
    before = state.digest()
    replay.apply(state, accepted, stored)
    assert state.digest() == before
