"""Who was erased is known again by the seal key alone, is in nothing that is left of a record, and no number of it changes."""

from __future__ import annotations

import secrets

import pytest

from billing.chain import Chain, is_redaction, redaction
from billing.erasures import Erasures, user_digests
from billing.key_places import ADDRESS_ATTRIBUTE
from billing.key_ring import KeyRing
from billing.v1.account_pb2 import ApiKey
from billing.v1.command_pb2 import KeyUpsert, UserErasure
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch
from tests.billing.ledgers import KEYS, SEAL_KEY, Ledger, batch, tenants_in, usage

ONE, TWO = tenants_in(1)[:2]
USER = "maria.muster@example.org"
PSEUDONYM = "erased-" + "5a" * 16


def erasure(tenant_id: str = ONE, user_id: str = USER, **fields: object) -> UserErasure:
    values = {"user_digest": user_digests(SEAL_KEY, tenant_id, user_id)[0], "pseudonym": PSEUDONYM, **fields}
    return UserErasure(tenant_id=tenant_id, **values)  # type: ignore[arg-type]


def key(key_id: str, tenant_id: str = ONE, user_id: str = USER) -> KeyUpsert:
    return KeyUpsert(key=ApiKey(key_id=key_id, tenant_id=tenant_id, user_id=user_id, secret_hash=b"h" * 32))


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(ONE)
    made.tenant(TWO)
    return made


@pytest.fixture
def erasures() -> Erasures:
    known = Erasures(SEAL_KEY)
    known.add(ONE, user_digests(SEAL_KEY, ONE, USER)[0], PSEUDONYM, ["k1"])
    return known


def test_the_ledger_gives_the_users_keys_to_the_pseudonym_and_keeps_the_id_nowhere(ledger: Ledger) -> None:
    ledger.command(key_upsert=key("k1"))
    ledger.command(key_upsert=key("k2", user_id="frank"))
    record = ledger.command(user_erasure=erasure(key_ids=["k1"]), issuer="ann", reason="asked to").record
    assert record.command.applied
    assert [(stated.key_id, stated.user_id) for stated in record.keys] == [("k1", PSEUDONYM)]
    assert ledger.state.keys["k2"].user_id == "frank"
    assert USER.encode() not in ledger.stored[-1]
    assert ledger.replayed().digest() == ledger.state.digest()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (erasure(user_digest=USER.encode()), "user_digest"),
        (erasure(pseudonym=USER), "pseudonym"),
        (erasure(key_ids=["of two"]), "key_ids"),
        (erasure(key_ids=["nobody's"]), "key_ids"),
        (erasure(tenant_id="tenant-nobody"), "tenant_id"),
        (erasure(key_ids=[f"k{number}" for number in range(501)]), "key_ids"),
    ],
)
def test_an_erasure_that_names_what_it_must_not_is_refused(ledger: Ledger, said: UserErasure, why: str) -> None:
    ledger.command(key_upsert=key("of two", TWO))
    before = ledger.state.digest()
    record = ledger.command(user_erasure=said).record
    assert record.command.refusal.startswith(f"{why}:")
    assert not record.keys
    assert ledger.state.keys["of two"].user_id == USER
    assert before != ledger.state.digest(), "the position moves"


def test_a_forged_erasure_is_refused_and_told(ledger: Ledger) -> None:
    record = ledger.command(user_erasure=erasure(), key=b"x" * 32).record
    assert record.command.refusal.startswith("signature:")
    assert record.alerts
    assert not Erasures(SEAL_KEY).take(record)


def test_numbers_stay_and_nothing_that_a_guess_could_be_tested_against_is_left(ledger: Ledger, erasures: Erasures) -> None:
    attributes = {ADDRESS_ATTRIBUTE: "203.0.113.9", "team": "blue"}
    mine = usage("r1", ONE, user_id=USER, client_request_id="trace-of-maria", attributes=attributes)
    events = [mine, usage("r2", ONE, user_id="frank", client_request_id="c2"), usage("r3", TWO, user_id=USER)]
    original = ledger.usage(batch(events)).record
    left = erasures.redact(ledger.stored[-1])
    assert left is not None
    found = UsageBatch.FromString(left.usage.batch).events
    assert [event.user_id for event in found] == [PSEUDONYM, "frank", USER]
    assert [event.client_request_id for event in found] == ["", "c2", ""]
    assert not found[0].attributes
    assert list(left.erased) == [PSEUDONYM]
    assert not left.seal
    kept = b"".join(entry.entries for entry in left.usage.remembered)
    assert {kept[end - 8 : end] for end in range(24, len(kept) + 1, 24)} == {bytes(8)}
    # All else is as it was.
    original.usage.batch, left.usage.batch = b"", b""
    del left.erased[:]
    for entries, same in zip(left.usage.remembered, original.usage.remembered, strict=True):
        assert entries.entries[:16] == same.entries[:16]
        entries.entries = same.entries
    original.ClearField("seal")
    assert left == original


def test_a_user_of_another_name_tenant_or_seal_key_is_left_alone(ledger: Ledger, erasures: Erasures) -> None:
    ledger.usage(batch([usage("r1", ONE, user_id=USER.upper()), usage("r2", ONE), usage("r3", TWO, user_id=USER)]))
    assert erasures.redact(ledger.stored[-1]) is None
    others = Erasures(b"another" * 5)
    others.add(ONE, user_digests(SEAL_KEY, ONE, USER)[0], PSEUDONYM, [])
    assert others.pseudonym_of(ONE, USER) is None
    assert user_digests(SEAL_KEY, ONE, USER) != user_digests(SEAL_KEY, TWO, USER)
    # The tenant's length stands before its name: no other pair has the same digest.
    assert user_digests(SEAL_KEY, "a", "bc") != user_digests(SEAL_KEY, "ab", "c")


def test_an_erasure_outlives_the_seal_key_under_which_it_was_made() -> None:
    old, new = KeyRing({"": SEAL_KEY}), KeyRing({"new": b"n" * 32, "": SEAL_KEY})
    erasures = Erasures(new)
    erasures.add(ONE, user_digests(old, ONE, USER)[0], PSEUDONYM, [])
    assert erasures.pseudonym_of(ONE, USER) == PSEUDONYM


def test_where_the_users_keys_were_used_from_goes_too(erasures: Erasures) -> None:
    record = LedgerRecord(partition=1)
    for key_id in ("k1", "k2"):
        record.key_places.add(tenant_id=ONE, key_id=key_id, hour=1, places=["203.0.113.9"])
        record.alerts.add(tenant_id=ONE, labels={"key_id": key_id, "places": "203.0.113.9"})
    record.alerts.add(tenant_id=ONE, subject=f"user {USER}", summary=f"user {USER} of", labels={"user_id": USER})
    left = erasures.redact(record.SerializeToString())
    assert left is not None
    assert [list(places.places) for places in left.key_places] == [[], ["203.0.113.9"]]
    assert [alert.labels["places"] for alert in left.alerts[:2]] == ["", "203.0.113.9"]
    assert left.alerts[2].subject == f"user {PSEUDONYM}"
    assert USER not in str(left)


def test_a_chain_goes_on_over_what_is_left_and_over_nothing_else(ledger: Ledger, erasures: Erasures) -> None:
    ledger.usage(batch([usage("r1", ONE, user_id=USER)]))
    ledger.usage(batch([usage("r2", ONE)]))
    before, chain = Chain(1, KEYS.seal_key), Chain(1, KEYS.seal_key)
    for stored in ledger.stored[:-2]:
        assert before.accept(stored)
        assert chain.accept(stored)
    last = before.accept(ledger.stored[-2])
    left = erasures.redact(ledger.stored[-2])
    assert last is not None
    assert left is not None
    redacted = left.SerializeToString()
    mark = redaction(before.record_hash, redacted, KEYS.seal_key)
    assert is_redaction(mark, before.record_hash, redacted, KEYS.seal_key)
    for content, hash_, made in (
        (redacted, before.record_hash, secrets.token_bytes(32)),
        (redacted + b"\x50\x01", before.record_hash, mark),
        (redacted, secrets.token_bytes(32), mark),
        (redacted, before.record_hash, redaction(before.record_hash, redacted, b"x" * 32)),
    ):
        assert chain.accept_redacted(content, hash_, made) is None
        assert "not marked" in chain.refusal
    assert chain.accept(redacted) is None, "it has no seal"
    assert chain.accept_redacted(redacted, before.record_hash, mark) is not None
    assert chain.accept(ledger.stored[-1]) is not None
    assert chain.record_hash == ledger.state.record_hash
