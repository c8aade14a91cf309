"""The chain: the first valid record wins, and nothing else does."""

from __future__ import annotations

import pytest

from billing import chain
from billing.founding import found_again
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

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


def test_a_damaged_or_forged_next_record_stops_the_reader(ledger: Ledger) -> None:
    place = reader()
    for stored in ledger.stored[:-1]:
        place.accept(stored)
    last = ledger.stored[-1]
    with pytest.raises(chain.UnreadableRecord, match="seal"):
        place.accept(last[:-1] + bytes([last[-1] ^ 1]))
    with pytest.raises(chain.UnreadableRecord, match="no ledger record"):
        place.accept(b"\xff" * 40)
    assert not chain.sealed_with(last, b"x" * 32)
    assert place.accept(last) is not None


def test_a_changed_token_breaks_the_seal(ledger: Ledger) -> None:
    record = ledger.usage(batch([usage("more", A)])).record
    record.totals[0].output_tokens -= 1
    body = record.SerializeToString()
    assert not chain.sealed_with(body + ledger.stored[-1][-35:], KEYS.seal_key)


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
