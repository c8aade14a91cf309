"""Commands: signed, once, refused with a reason, and the same after a replay."""

from __future__ import annotations

from typing import Any

import pytest

from billing import commands
from billing.amounts import PICO, to_amount
from billing.key_ring import KeyRing
from billing.state import DAY_MS
from billing.step import CommandInput, LedgerKeys, step
from billing.v1.account_pb2 import ACCOUNT_STATUS_SUSPENDED, Amount, ApiKey, Plan
from billing.v1.alert_pb2 import ALERT_RULE_STALE_COMMAND, ALERT_RULE_UNSIGNED_COMMAND
from billing.v1.command_pb2 import Command, CreditGrant, KeyUpsert, Price, PriceBook, SignedCommand, TenantUpsert
from billing.v1.usage_pb2 import OUTCOME_REJECTED
from tests.billing.ledgers import COMMAND_KEY, KEYS, NOW_MS, SEAL_KEY, Ledger, batch, tenants_in, usage

A, B = tenants_in(1, 2)
ELSEWHERE = tenants_in(2, 1)[0]


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.tenant(A)
    return made


def grant(tenant_id: str = A, pico: int = 5 * PICO, currency: str = "USD") -> CreditGrant:
    return CreditGrant(tenant_id=tenant_id, amount=to_amount(pico), currency=currency)


def key(**fields: Any) -> KeyUpsert:
    return KeyUpsert(key=ApiKey(**({"key_id": "k1", "tenant_id": A, "secret_hash": b"h" * 32} | fields)))


def test_a_command_from_a_clock_that_runs_ahead_counts_once_for_as_long_as_its_age_allows_it(ledger: Ledger) -> None:
    """Its ID was forgotten a horizon after it came, and it was young enough for a few minutes more."""
    horizon_ms = ledger.settings.dedupe_horizon_ms
    came_ms = NOW_MS // DAY_MS * DAY_MS + DAY_MS - 60_000
    issued_ms = came_ms + 5 * 60_000
    command = Command(schema_version=1, command_id="g1", issued_ms=issued_ms, credit_grant=grant(pico=PICO))
    value = commands.sign(command, COMMAND_KEY)
    assert ledger.raw_command(value, came_ms).record.command.applied
    # The first moment of a day, in which IDs are let go.
    ledger.tick(came_ms + horizon_ms + 60_000)
    assert "applied before" in ledger.raw_command(value, came_ms + horizon_ms + 61_000).record.command.refusal
    assert ledger.replayed().digest() == ledger.state.digest()
    ledger.tick(issued_ms + horizon_ms + DAY_MS)
    assert "g1" not in ledger.state.commands
    refusal = ledger.raw_command(value, issued_ms + horizon_ms + DAY_MS).record.command.refusal
    assert refusal.startswith(f"issued_ms: {issued_ms} is ")


def test_a_grant_counts_once_however_often_it_comes(ledger: Ledger) -> None:
    assert ledger.command(command_id="g1", credit_grant=grant()).record.command.applied
    again = ledger.command(command_id="g1", credit_grant=grant()).record
    assert not again.command.applied
    assert "applied before" in again.command.refusal
    assert ledger.state.accounts[A].balance_pico == 5 * PICO
    assert ledger.replayed().digest() == ledger.state.digest()


@pytest.mark.parametrize(
    ("action", "names"),
    [
        ({"credit_grant": grant(pico=0)}, "amount"),
        ({"credit_grant": grant(pico=-1)}, "amount"),
        ({"credit_grant": grant(pico=10**31)}, "amount"),
        ({"credit_grant": grant(currency="EUR")}, "currency"),
        ({"credit_grant": grant(tenant_id=B)}, "create the tenant"),
        ({"credit_grant": grant(tenant_id=ELSEWHERE)}, "lives in partition 2"),
        ({"credit_grant": grant(tenant_id="")}, "tenant_id"),
        ({"key_upsert": key(secret_hash=b"short")}, "secret_hash"),
        ({"key_upsert": key(key_id="")}, "key_id"),
        ({"key_upsert": key(tenant_id=B)}, "create the tenant"),
        ({"price_book": PriceBook(version=2, currency="USD", prices=[Price(model="m")])}, "version: 2"),
        ({"price_book": PriceBook(version=1, currency="USD")}, "prices: 0"),
        *(
            ({"tenant_upsert": TenantUpsert(tenant_id=A, plan=plan)}, names)
            for plan, names in (
                (Plan(credit_limit=to_amount(10**30 + 1)), "credit_limit: 1000000000000000000000000000001 pico"),
                (Plan(credit_limit=to_amount(-1)), "credit_limit: -1 pico"),
                # More than an alert can say, which would end the step of whoever is refused.
                (Plan(prompt_tokens_max=2**63), "prompt_tokens_max: 9223372036854775808; give at most"),
            )
        ),
        ({}, "action"),
    ],
)
def test_a_refused_command_says_why_and_changes_nothing(ledger: Ledger, action: dict[str, Any], names: str) -> None:
    before = {t: a.to_account(b"", 0, 0).SerializeToString() for t, a in ledger.state.accounts.items()}
    record = ledger.command(**action).record
    assert not record.command.applied
    assert names in record.command.refusal
    assert not record.accounts
    assert before == {t: a.to_account(b"", 0, 0).SerializeToString() for t, a in ledger.state.accounts.items()}


def test_a_command_with_another_key_is_refused_and_alarmed(ledger: Ledger) -> None:
    record = ledger.command(key=b"x" * 32, credit_grant=grant()).record
    assert not record.command.applied
    assert [alert.rule for alert in record.alerts] == [ALERT_RULE_UNSIGNED_COMMAND]
    assert ledger.state.accounts[A].credit_pico == 0


def test_bytes_that_are_no_command_go_to_rejected(ledger: Ledger) -> None:
    assert "cannot be decoded" in ledger.raw_command(b"\xff\xff").record.rejected.reason
    unsigned = SignedCommand(command=Command(schema_version=1, command_id="x").SerializeToString())
    assert "signature" in ledger.raw_command(unsigned.SerializeToString()).record.command.refusal


def test_a_key_of_another_tenant_is_not_taken_over(ledger: Ledger) -> None:
    ledger.tenant(B)
    assert ledger.command(key_upsert=key()).record.command.applied
    assert "another tenant" in ledger.command(key_upsert=key(tenant_id=B)).record.command.refusal
    assert ledger.state.keys["k1"].tenant_id == A


def test_a_tenant_with_amounts_keeps_its_currency(ledger: Ledger) -> None:
    assert ledger.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="EUR")).record.command.applied
    ledger.command(credit_grant=grant(currency="EUR"))
    refused = ledger.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="USD")).record
    assert "stays its currency" in refused.command.refusal
    suspended = TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_SUSPENDED)
    assert ledger.command(tenant_upsert=suspended).record.accounts[0].status == ACCOUNT_STATUS_SUSPENDED
    assert ledger.state.accounts[A].plan.plan_id == "test"


def test_command_ids_are_forgotten_after_the_horizon_only(ledger: Ledger) -> None:
    ledger.command(command_id="g1", credit_grant=grant())
    ledger.tick(NOW_MS + 35 * 86_400_000)
    assert "g1" in ledger.state.commands
    ledger.tick(NOW_MS + 37 * 86_400_000)
    assert "g1" not in ledger.state.commands
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_window_holds_one_currency(ledger: Ledger) -> None:
    ledger.command(price_book=PriceBook(version=1, currency="EUR", prices=[Price(model="*", output_pico=5)]))
    ledger.usage(batch([usage("free", A, outcome=OUTCOME_REJECTED)]))
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=A, currency="EUR"))
    (total,) = ledger.usage(batch([usage("paid", A)])).record.totals
    assert (total.currency, total.events) == ("EUR", 1)
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_command_that_is_repeated_after_its_id_is_forgotten_is_refused_and_told(ledger: Ledger) -> None:
    """Who kept an old command, that made a key which is revoked since, cannot give it again when its ID is forgotten."""
    horizon_ms = ledger.state.settings.dedupe_horizon_ms
    command = Command(schema_version=1, command_id="old", issued_ms=NOW_MS, tenant_upsert=TenantUpsert(tenant_id=A))
    kept = commands.sign(command, KEYS.command_key)
    assert ledger.raw_command(kept).record.command.applied
    assert "applied before" in ledger.raw_command(kept).record.command.refusal
    later_ms = NOW_MS + horizon_ms + 2 * DAY_MS
    ledger.tick(later_ms)
    assert "old" not in ledger.state.commands
    record = ledger.raw_command(kept).record
    assert record.command.refusal.startswith(f"issued_ms: {NOW_MS} is ")
    assert [alert.rule for alert in record.alerts] == [ALERT_RULE_STALE_COMMAND]


def test_a_command_for_a_time_to_come_is_refused(ledger: Ledger) -> None:
    """Its ID would be forgotten before it is old."""
    ahead_ms = ledger.state.settings.future_reject_ms
    grant = CreditGrant(tenant_id=A, amount=Amount(low=1), currency="USD")
    record = ledger.command(issued_ms=NOW_MS + ahead_ms + 1, credit_grant=grant).record
    assert record.command.refusal.startswith("issued_ms: ")
    assert ledger.command(issued_ms=NOW_MS + ahead_ms, credit_grant=grant).record.command.applied
    assert ledger.command(issued_ms=0, credit_grant=grant).record.command.refusal.startswith("issued_ms: 0 ")


def test_command_keys_change_and_a_revoked_one_signs_nothing(ledger: Ledger) -> None:
    ring = KeyRing({"2": b"n" * 32, "": COMMAND_KEY})
    state = ledger.state
    upsert = TenantUpsert(tenant_id=A)

    def give(command_id: str, signing: KeyRing, known: KeyRing, offset: int) -> str:
        command = Command(schema_version=1, command_id=command_id, issued_ms=NOW_MS, tenant_upsert=upsert)
        source = CommandInput("billing.commands", 1_000 + offset, commands.sign(command, signing))
        return step(state, source, NOW_MS, keys=LedgerKeys(SEAL_KEY, known), writer="test").record.command.refusal

    old_only, new_only = KeyRing({"": COMMAND_KEY}), KeyRing({"2": b"n" * 32, "": None})
    assert give("a", ring, ring, 1) == ""
    assert give("b", old_only, ring, 2) == ""
    assert "key '2', which the workers do not have" in give("c", ring, old_only, 3)
    assert "is revoked" in give("d", old_only, new_only, 4)
    assert "command key's" in give("e", KeyRing({"2": COMMAND_KEY}), ring, 5)
