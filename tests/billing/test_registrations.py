"""Who may report usage: without a registration, without its key or for tenants of others a producer is refused, and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from billing import registrations
from billing.founding import LedgerSettings
from billing.key_ring import KeyRing
from billing.registrations import forward_key, producer_key, sign_batch
from billing.v1.account_pb2 import ProducerRegistration
from billing.v1.alert_pb2 import ALERT_RULE_UNREGISTERED_PRODUCER, Alert
from billing.v1.command_pb2 import ProducerUpsert
from billing.v1.ledger_pb2 import DROP_REASON_FOREIGN_TENANT, DROP_REASON_FORWARDED, LedgerRecord
from billing.v1.usage_pb2 import UsageBatch
from tests.billing.agreement import agreed
from tests.billing.ledgers import COMMAND_KEY, NOW_MS, PARTITIONS, SEAL_KEY, Ledger, batch, tenants_in, usage

A, B = tenants_in(1)[:2]
ELSEWHERE = tenants_in(2)[0]
CLOSED = ProducerRegistration(producer_id="*", revoked=True)


def register(ledger: Ledger, *said: ProducerRegistration) -> None:
    for each in said:
        record = ledger.command(producer_upsert=ProducerUpsert(registration=each)).record
        assert record.command.applied, record.command.refusal


def key_of(name: str, number: int = 0) -> bytes:
    key = producer_key(COMMAND_KEY, name, number)
    assert isinstance(key, bytes)
    return key


def signed(name: str, value: bytes, number: int = 0) -> bytes:
    return sign_batch(value, key_of(name, number))


def alerts(record: LedgerRecord) -> list[Alert]:
    return [alert for alert in record.alerts if alert.rule == ALERT_RULE_UNREGISTERED_PRODUCER]


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    for tenant_id in (A, B):
        made.tenant(tenant_id)
    return made


def charged(ledger: Ledger, tenant_id: str = A) -> int:
    return ledger.state.accounts[tenant_id].events


def test_until_somebody_says_who_may_everybody_may(ledger: Ledger) -> None:
    ledger.usage(batch([usage("r1", A)], producer_id="anyone", first=1, highest=1))
    register(ledger, ProducerRegistration(producer_id="gateway-*", all_tenants=True))
    ledger.usage(batch([usage("r2", A)], producer_id="anyone", first=2, highest=2))
    assert charged(ledger) == 2


def test_a_producer_that_is_not_registered_is_refused_told_and_loses_nothing(ledger: Ledger) -> None:
    register(ledger, CLOSED)
    value = batch([usage("r1", A)], producer_id="unknown", first=1, highest=1)
    record = ledger.usage(value).record
    assert "'unknown' is not registered" in record.rejected.reason
    assert record.rejected.payload == value
    [alert] = alerts(record)
    assert alert.labels["producer_id"] == "unknown"
    assert (charged(ledger), "unknown" in ledger.state.producers) == (0, False)
    # Told once in a while, refused always.
    again = ledger.usage(value, NOW_MS + 1).record
    assert (again.HasField("rejected"), alerts(again)) == (True, [])
    later = ledger.usage(value, NOW_MS + ledger.state.settings.alert_cooldown_ms).record
    assert len(alerts(later)) == 1
    # Its numbers were not taken: when it is registered, what its journal sends again is charged.
    register(ledger, ProducerRegistration(producer_id="unknown", all_tenants=True))
    ledger.usage(signed("unknown", value), NOW_MS + 2)
    assert charged(ledger) == 1
    assert ledger.state.producers["unknown"].covered == 1
    assert ledger.replayed().digest() == ledger.state.digest()


@pytest.mark.parametrize("forge", ["no signature", "another producer's", "another number", "changed after it was signed"])
def test_who_only_says_that_it_is_a_registered_producer_is_refused(ledger: Ledger, forge: str) -> None:
    register(ledger, ProducerRegistration(producer_id="gateway-*", all_tenants=True, key_number=3))
    value = batch([usage("r1", A)], producer_id="gateway-1", first=1, highest=1)
    sent = {
        "no signature": value,
        "another producer's": signed("import", value),
        "another number": signed("gateway-*", value, 2),
        "changed after it was signed": signed("gateway-*", value, 3).replace(b"r1", b"r2"),
    }[forge]
    record = ledger.usage(sent).record
    assert record.rejected.reason.startswith("signature: of producer 'gateway-1'")
    assert len(alerts(record)) == 1
    assert charged(ledger) == 0
    ledger.usage(signed("gateway-*", value, 3))
    assert charged(ledger) == 1


def test_without_the_check_a_forged_batch_is_charged(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    register(ledger, ProducerRegistration(producer_id="gateway-*", all_tenants=True))
    monkeypatch.setattr(registrations, "is_signed", lambda *_: True)
    ledger.usage(batch([usage("r1", A)], producer_id="gateway-1", first=1, highest=1))
    assert charged(ledger) == 1


def test_usage_of_a_foreign_tenant_is_refused_event_by_event_kept_and_told(ledger: Ledger) -> None:
    register(ledger, ProducerRegistration(producer_id="ours", tenant_ids=[A]))
    value = batch([usage("r1", A), usage("r2", B), usage("r3", A), usage("r4", ELSEWHERE)], "ours", 1, 4)
    result = ledger.usage(signed("ours", value))
    dropped = [(each.index, each.reason) for each in result.record.usage.dropped]
    assert dropped == [(1, DROP_REASON_FOREIGN_TENANT), (3, DROP_REASON_FOREIGN_TENANT)]
    assert result.forwards == [], "nor is it sent on to where its tenant lives"
    [alert] = alerts(result.record)
    assert (list(alert.request_ids), alert.figures["events"]) == (["r2", "r4"], 2)
    assert (charged(ledger), charged(ledger, B)) == (2, 0)
    assert ledger.state.producers["ours"].covered == 4, "its numbers are taken: the journal is not kept for ever"
    # What was charged to its owner is no duplicate of the other's, and a repeat does not count as one of B's.
    ledger.usage(signed("ours", value))
    assert ledger.state.accounts[B].duplicates == 0
    assert ledger.replayed().digest() == ledger.state.digest()


def test_who_says_that_a_worker_sent_it_on_is_refused_and_what_a_worker_sends_on_is_taken(ledger: Ledger) -> None:
    elsewhere = Ledger(2)
    for each in (ledger, elsewhere):
        register(each, CLOSED, ProducerRegistration(producer_id="ours", all_tenants=True))
    value = batch([usage("r1", ELSEWHERE)], "ours", 1, 1)
    result = ledger.usage(signed("ours", value))
    assert [each.reason for each in result.record.usage.dropped] == [DROP_REASON_FORWARDED]
    [forward] = result.forwards
    pretended = UsageBatch(schema_version=1, forwarded=True, events=[usage("r2", ELSEWHERE)]).SerializeToString()
    assert elsewhere.usage(pretended).record.HasField("rejected")
    assert elsewhere.usage(forward.value[:-1] + b"x").record.HasField("rejected")
    elsewhere.usage(forward.value)
    assert charged(elsewhere, ELSEWHERE) == 1
    assert forward_key(SEAL_KEY) != SEAL_KEY


def test_the_nearest_registration_holds(ledger: Ledger) -> None:
    register(
        ledger,
        ProducerRegistration(producer_id="*", all_tenants=True, unsigned=True),
        ProducerRegistration(producer_id="eu-*", tenant_ids=[A], unsigned=True),
        ProducerRegistration(producer_id="eu-west-1", revoked=True),
    )
    known = ledger.state.registrations
    for producer_id, name in {"": "*", "us-1": "*", "eu-2": "eu-*", "eu-west-1": "eu-west-1", "eu-west-12": "eu-*"}.items():
        found = known.find(producer_id)
        assert found is not None
        assert found.producer_id == name
    assert ledger.usage(batch([usage("r1", A)], "eu-west-1", 1, 1)).record.HasField("rejected")
    ledger.usage(batch([usage("r2", A)], "eu-west-12", 1, 1))
    assert charged(ledger) == 1


def test_a_key_leaks_and_another_number_takes_its_place(ledger: Ledger) -> None:
    register(ledger, ProducerRegistration(producer_id="ours", all_tenants=True))
    register(ledger, ProducerRegistration(producer_id="ours", all_tenants=True, key_number=1))
    value = batch([usage("r1", A)], "ours", 1, 1)
    assert ledger.usage(signed("ours", value)).record.HasField("rejected")
    ledger.usage(signed("ours", value, 1))
    assert charged(ledger) == 1


def test_producers_keys_stay_good_while_the_command_key_changes() -> None:
    ring = KeyRing({"2": b"n" * 32, "": COMMAND_KEY})
    value = sign_batch(b"value", key_of("ours"))
    assert registrations.is_signed(value, producer_key(ring, "ours"))
    assert not registrations.is_signed(value, producer_key(KeyRing({"2": b"n" * 32}), "ours"))


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (ProducerRegistration(all_tenants=True), "producer_id"),
        (ProducerRegistration(producer_id="a*b", all_tenants=True), "producer_id"),
        (ProducerRegistration(producer_id="x" * 257, all_tenants=True), "producer_id"),
        (ProducerRegistration(producer_id="a"), "tenant_ids"),
        (ProducerRegistration(producer_id="a", tenant_ids=[A], all_tenants=True), "tenant_ids"),
        (ProducerRegistration(producer_id="a", tenant_ids=[""]), "tenant_ids"),
        (ProducerRegistration(producer_id="a", tenant_ids=["x" * 250] * 2_100), "tenant_ids"),
    ],
)
def test_a_registration_that_says_nothing_is_refused(ledger: Ledger, said: ProducerRegistration, field: str) -> None:
    record = ledger.command(producer_upsert=ProducerUpsert(registration=said)).record
    assert record.command.refusal.startswith(f"{field}: ")
    assert not ledger.state.registrations


def test_every_reader_knows_who_may_and_a_ledger_founded_closed_is_closed(ledger: Ledger, tmp_path: Path) -> None:
    register(ledger, CLOSED, ProducerRegistration(producer_id="ours", tenant_ids=[A]))
    ledger.usage(batch([usage("r1", A)], "unknown", 1, 1))
    agreed(ledger, tmp_path / "store")
    closed = Ledger(settings=LedgerSettings(PARTITIONS, b"k" * 32, registered_producers_only=True))
    assert closed.usage(batch([usage("r1", A)], "unknown", 1, 1)).record.HasField("rejected")
    agreed(closed, tmp_path / "closed")
