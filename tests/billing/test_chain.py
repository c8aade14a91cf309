"""The chain: the first valid record wins, and nothing else does."""

from __future__ import annotations

import pytest

from billing import chain
from billing.founding import found_again
from billing.key_ring import KeyRing
from billing.step import LedgerKeys, TickInput, step
from billing.v1.ledger_pb2 import LedgerRecord
from tests.billing.ledgers import KEYS, NOW_MS, SEAL_KEY, Ledger, batch, tenants_in, usage

A = tenants_in(1)[0]


def reader() -> chain.Chain:
    return chain.Chain(1, KEYS.seal_key)


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    for number in range(3):
        made.usage(batch([usage(f"r{number}", A)]))
    return made


def test_a_reader_takes_each_record_once(ledger: Ledger) -> None:
    place = reader()
    doubled = [stored for stored in ledger.stored for _ in range(2)]
    assert [place.accept(stored) is not None for stored in doubled] == [True, False] * len(ledger.stored)
    assert place.ignored == len(ledger.stored)
    assert (place.sequence, place.record_hash) == (ledger.state.sequence, ledger.state.record_hash)


def test_what_a_zombie_writes_changes_nothing(ledger: Ledger) -> None:
    zombie = Ledger()
    zombie.stored = list(ledger.stored[:2])
    zombie.price()
    forks = [zombie.usage(batch([usage(f"z{number}", A)])).stored for number in range(4)]
    place = reader()
    for stored in ledger.stored[:3]:
        assert place.accept(stored) is not None
    # Its records have the right key and the right numbers, but name another past.
    assert [place.accept(fork) for fork in forks] == [None] * 4
    assert [place.accept(stored) is not None for stored in ledger.stored[3:]] == [True] * len(ledger.stored[3:])


def forgeries(last: bytes) -> dict[str, bytes]:
    """What somebody writes who knows everything but the key: the right links, and no seal that holds."""
    record = LedgerRecord.FromString(last)
    record.ClearField("seal")
    record.totals[0].output_tokens += 1
    unsealed = record.SerializeToString()
    return {
        "another key": chain.seal(record, b"x" * 32),
        "no seal": unsealed,
        "the real one's seal": unsealed + last[-35:],
        "a changed byte": last[:-1] + bytes([last[-1] ^ 1]),
        "no record": b"\xff" * 40,
        "another version": chain.seal(LedgerRecord(schema_version=9, partition=1), b"x" * 32),
    }


def test_a_forged_next_record_is_refused_and_the_real_one_is_followed(ledger: Ledger) -> None:
    place = reader()
    *before, last = ledger.stored
    for stored in before:
        place.accept(stored)
    for name, forged in forgeries(last).items():
        assert place.accept(forged) is None, name
        assert "somebody else wrote it" in place.refusal, name
    assert place.refused == place.ignored == len(forgeries(last))
    assert not chain.sealed_with(last, b"x" * 32)
    assert place.accept(last) is not None
    assert (place.refusal, place.sequence) == ("", ledger.state.sequence)


def test_without_the_key_a_forgery_is_not_known(ledger: Ledger) -> None:
    """The negative control: it is the seal that refuses it, and nothing else would."""
    place = chain.Chain(1, None)
    *before, last = ledger.stored
    for stored in before:
        place.accept(stored)
    assert place.accept(forgeries(last)["another key"]) is not None


def test_a_record_that_was_built_on_is_damaged_and_not_forged(ledger: Ledger) -> None:
    place = reader()
    *before, damaged, last = ledger.stored
    for stored in before:
        place.accept(stored)
    assert place.accept(damaged[:-1] + bytes([damaged[-1] ^ 1])) is None
    with pytest.raises(chain.UnreadableRecord, match="it was damaged"):
        place.accept(last)


def test_keys_change_and_every_record_is_believed_by_its_own(ledger: Ledger) -> None:
    old, new = KEYS.seal_key, KeyRing({"2": b"t" * 32, "": SEAL_KEY})
    before = len(ledger.stored)
    source = TickInput()
    rotated = LedgerKeys(new, KEYS.command_key)
    stored = [*ledger.stored, step(ledger.state, source, NOW_MS, keys=rotated, writer="test").stored]
    place = chain.Chain(1, new)
    assert [place.accept(each) is not None for each in stored] == [True] * (before + 1)
    assert LedgerRecord.FromString(stored[-1]).seal_key_id == "2"
    behind = chain.Chain(1, old)
    for each in stored[:-1]:
        behind.accept(each)
    with pytest.raises(chain.UnreadableRecord, match="the key '2', which is not here"):
        behind.accept(stored[-1])
    warned = chain.Chain(1, KeyRing({"": SEAL_KEY, "2": None}))
    for each in stored[:-1]:
        warned.accept(each)
    assert warned.accept(stored[-1]) is None
    assert warned.refused == 1


def test_a_changed_token_breaks_the_seal(ledger: Ledger) -> None:
    record = ledger.usage(batch([usage("more", A)])).record
    record.totals[0].output_tokens -= 1
    body = record.SerializeToString()
    assert not chain.sealed_with(body + ledger.stored[-1][-35:], SEAL_KEY)


def test_a_missing_record_is_never_skipped(ledger: Ledger) -> None:
    place = reader()
    place.accept(ledger.stored[0])
    assert place.accept(ledger.stored[2]) is None
    assert place.sequence == 0


def test_a_new_generation_is_taken_only_where_the_old_one_ended(ledger: Ledger) -> None:
    at_the_end, behind = reader(), reader()
    for stored in ledger.stored:
        at_the_end.accept(stored)
    for stored in ledger.stored[:-1]:
        behind.accept(stored)
    _, founding = found_again(ledger.state, b"h" * 16, NOW_MS, KEYS.seal_key, "test")
    assert at_the_end.accept(founding) is not None
    assert behind.accept(founding) is None
    assert reader().accept(founding) is not None


def test_a_record_of_another_version_stops_the_reader(ledger: Ledger) -> None:
    place = reader()
    for stored in ledger.stored:
        place.accept(stored)
    record = ledger.usage(batch([usage("more", A)])).record
    record.schema_version = 2
    with pytest.raises(chain.UnreadableRecord, match="schema version 2"):
        place.accept(chain.seal(record, KEYS.seal_key))
