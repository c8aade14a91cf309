"""Leases: many gateways, one balance, and never more promised than there is, whoever dies and whatever is repeated."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing import commands
from billing.amounts import PICO, from_amount, to_amount
from billing.limits import SETTLED_LEASES_MAX
from billing.state import DAY_MS
from billing.v1.account_pb2 import ACCOUNT_STATUS_SUSPENDED, BILLING_MODE_POSTPAID, Lease, Plan
from billing.v1.command_pb2 import Command, CreditGrant, LeaseRequest, LeaseRetirement, TenantUpsert
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageEvent
from sinks.recompute import Recomputed
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

A, B = tenants_in(1, 2)
LEASE_KEY = commands.lease_key(KEYS.command_key)
# What one event of `usage` costs at the prices of `ledgers`.
EVENT_PICO = 100 * 10_000 + 10 * 40_000


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(A)
    made.command(credit_grant=CreditGrant(tenant_id=A, amount=to_amount(10 * PICO), currency="USD"))
    return made


def ask(
    ledger: Ledger, number: int, wanted_pico: int, holder: str = "gw-1", log_time_ms: int = NOW_MS, **more: int
) -> LedgerRecord:
    fields = {"epoch": 1, "duration_ms": 10_000, "previous_sequence": 0} | more
    request = LeaseRequest(tenant_id=A, holder_id=holder, request_number=number, wanted=to_amount(wanted_pico), **fields)
    return ledger.command(log_time_ms, LEASE_KEY, command_id=f"{holder}-{number}", lease_request=request).record


def lasting(record: LedgerRecord) -> Lease:
    """The lease that the request asked for; in the record it stands last."""
    return record.leases[-1]


def spend(ledger: Ledger, holder: str, first: int, count: int = 1, tenant: str = A) -> LedgerRecord:
    events = [usage(f"{holder}-{first + i}", tenant) for i in range(count)]
    return ledger.usage(batch(events, holder, first, first + count - 1)).record


def findings(records: list[bytes]) -> list[str]:
    """What the audit says of these records."""
    recomputed = Recomputed(1)
    for stored in records:
        recomputed.take(LedgerRecord.FromString(stored))
    return [finding.kind for finding in recomputed.findings]


def leased(ledger: Ledger) -> int:
    """What the account says is leased, which is always the sum over the leases, and the same after a replay."""
    assert ledger.replayed().digest() == ledger.state.digest()
    assert findings(ledger.stored) == []
    account = ledger.state.accounts[A]
    assert account.leased_pico == sum(lease.remaining_pico for lease in ledger.state.leases if lease.tenant_id == A)
    return account.leased_pico


def test_gateways_together_never_hold_more_than_the_balance(ledger: Ledger) -> None:
    assert from_amount(lasting(ask(ledger, 1, 6 * PICO, "gw-1")).granted) == 6 * PICO
    second = ask(ledger, 1, 6 * PICO, "gw-2")
    assert from_amount(lasting(second).granted) == 4 * PICO
    assert "no more is free" in second.command.outcome
    assert from_amount(lasting(ask(ledger, 1, PICO, "gw-3")).granted) == 0
    assert leased(ledger) == 10 * PICO


def test_what_is_given_back_is_free_for_the_next(ledger: Ledger) -> None:
    ask(ledger, 1, 10 * PICO, "gw-1")
    ask(ledger, 2, PICO, "gw-1")
    assert from_amount(lasting(ask(ledger, 1, 20 * PICO, "gw-2")).granted) == 9 * PICO
    assert leased(ledger) == 10 * PICO


def test_usage_turns_what_was_leased_into_spend(ledger: Ledger) -> None:
    ask(ledger, 1, 10 * PICO)
    record = spend(ledger, "gw-1", 1, 3)
    assert from_amount(record.leases[0].charged) == 3 * EVENT_PICO
    assert leased(ledger) == 10 * PICO - 3 * EVENT_PICO
    assert ledger.state.accounts[A].spend_pico == 3 * EVENT_PICO
    # Nothing was ever free in between.
    assert from_amount(lasting(ask(ledger, 1, PICO, "gw-2")).granted) == 0


def test_what_is_charged_cannot_be_given_back(ledger: Ledger) -> None:
    ask(ledger, 1, PICO)
    spend(ledger, "gw-1", 1, 2)
    assert from_amount(lasting(ask(ledger, 2, 0)).granted) == 2 * EVENT_PICO
    assert leased(ledger) == 0


def test_a_lease_given_back_for_good_is_gone(ledger: Ledger) -> None:
    ask(ledger, 1, PICO)
    assert lasting(ask(ledger, 2, 0, duration_ms=0)).gone
    assert list(ledger.state.leases) == []
    assert leased(ledger) == 0


@pytest.mark.parametrize("number", [1, 2])
def test_a_repeated_or_overtaken_request_changes_nothing(ledger: Ledger, number: int) -> None:
    ask(ledger, 2, PICO)
    record = ask(ledger, number, 5 * PICO)
    assert not record.command.applied
    assert "request_number" in record.command.refusal
    assert leased(ledger) == PICO


def signed_request(number: int, issued_ms: int = NOW_MS) -> bytes:
    """A gateway's request for all of the balance, as it stands in the topic."""
    request = LeaseRequest(
        tenant_id=A, holder_id="gw-1", epoch=1, request_number=number, wanted=to_amount(10 * PICO), duration_ms=10_000
    )
    command = Command(schema_version=1, command_id=f"gw-1/1/{number}", issued_ms=issued_ms, lease_request=request)
    return commands.sign(command, LEASE_KEY)


@pytest.mark.parametrize("number", [2, 1], ids=["repeated", "delayed"])
@pytest.mark.parametrize("end", ["given back", "retired", "started again"])
def test_a_request_that_comes_after_its_lease_has_ended_sets_nothing_aside(ledger: Ledger, end: str, number: int) -> None:
    """Whoever has read the topic can write it there again, and nobody would give back what it set aside."""
    assert ledger.raw_command(signed_request(2)).record.command.applied
    if end == "given back":
        assert lasting(ask(ledger, 3, 0, duration_ms=0)).gone
    elif end == "retired":
        ledger.command(lease_retirement=LeaseRetirement(holder_id="gw-1", unexpired=True))
    else:
        assert lasting(ask(ledger, 1, 0, epoch=2, duration_ms=0)).gone
    assert list(ledger.state.leases) == []
    again = ledger.raw_command(signed_request(number)).record
    assert not again.command.applied
    assert "epoch" in again.command.refusal or "request_number" in again.command.refusal
    assert leased(ledger) == 0
    # What the gateway asks for itself is another number.
    assert ask(ledger, 4, PICO, epoch=2).command.applied


def test_a_request_is_known_for_as_long_as_it_is_not_refused_for_its_age(ledger: Ledger) -> None:
    settings = ledger.state.settings
    ahead_ms, horizon_ms = settings.future_reject_ms, settings.dedupe_horizon_ms
    # The gateway's clock runs ahead by as much as is taken.
    assert ledger.raw_command(signed_request(1, NOW_MS + ahead_ms)).record.command.applied
    ask(ledger, 2, 0, duration_ms=0)
    refusals = []
    for day in range(1, (horizon_ms + ahead_ms) // DAY_MS + 3):
        ledger.tick(NOW_MS + day * DAY_MS)
        again = ledger.raw_command(signed_request(1, NOW_MS + ahead_ms), NOW_MS + day * DAY_MS).record.command
        refusals.append(again.refusal.partition(":")[0])
    assert set(refusals) == {"request_number", "issued_ms"}
    assert refusals[-1] == "issued_ms"
    assert ledger.state.leases.asked == {}
    assert leased(ledger) == 0


def test_requests_are_not_remembered_as_commands_are(ledger: Ledger) -> None:
    before = set(ledger.state.commands)
    ask(ledger, 1, PICO)
    assert set(ledger.state.commands) == before
    assert leased(ledger) == PICO


def test_usage_of_others_does_not_touch_a_lease(ledger: Ledger) -> None:
    ask(ledger, 1, PICO)
    spend(ledger, "somebody", 1)
    assert leased(ledger) == PICO


def test_a_restarted_gateway_gets_back_what_it_held_once_its_usage_is_in(ledger: Ledger) -> None:
    ask(ledger, 1, 10 * PICO)
    spend(ledger, "gw-1", 1)
    # It died with numbers 2 and 3 in its journal, and asks again before they are sent.
    record = ask(ledger, 1, PICO, epoch=2, previous_sequence=3)
    assert from_amount(lasting(record).granted) == 0
    assert leased(ledger) == 10 * PICO - EVENT_PICO
    spend(ledger, "gw-1", 2)
    assert leased(ledger) == 10 * PICO - 2 * EVENT_PICO
    spend(ledger, "gw-1", 3)
    assert leased(ledger) == 0
    assert from_amount(lasting(ask(ledger, 2, PICO, epoch=2)).granted) == PICO


def test_a_restarted_gateway_whose_usage_is_in_gets_it_back_at_once(ledger: Ledger) -> None:
    ask(ledger, 1, 10 * PICO)
    spend(ledger, "gw-1", 1)
    assert from_amount(lasting(ask(ledger, 1, 10 * PICO, epoch=2, previous_sequence=1)).granted) == 10 * PICO - EVENT_PICO
    assert leased(ledger) == 10 * PICO - EVENT_PICO


def test_a_batch_of_two_epochs_is_charged_to_each_its_own(ledger: Ledger) -> None:
    ask(ledger, 1, 2 * PICO)
    ask(ledger, 1, 3 * PICO, epoch=2, previous_sequence=2)
    spend(ledger, "gw-1", 2, 3)
    first, second = ledger.state.leases.held_by("gw-1")[A]
    # The first waits for number 1.
    assert (first.charged_pico, second.charged_pico) == (EVENT_PICO, 2 * EVENT_PICO)
    spend(ledger, "gw-1", 1)
    assert [lease.epoch for lease in ledger.state.leases] == [2]
    assert leased(ledger) == 3 * PICO - 2 * EVENT_PICO


def test_a_restarted_gateway_gets_back_of_many_tenants_what_each_record_has_room_for(ledger: Ledger) -> None:
    tenants = tenants_in(1, SETTLED_LEASES_MAX + 20)
    number = itertools.count(1)

    def ask_of(tenant_id: str, epoch: int) -> None:
        request = LeaseRequest(
            tenant_id=tenant_id,
            holder_id="gw-1",
            epoch=epoch,
            request_number=next(number),
            wanted=to_amount(PICO),
            duration_ms=10_000,
            previous_sequence=epoch - 1,
        )
        assert ledger.command(key=LEASE_KEY, command_id=f"{next(number)}", lease_request=request).record.command.applied

    for tenant_id in tenants:
        ledger.tenant(tenant_id)
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(PICO), currency="USD"))
    for epoch in (1, 2):
        for tenant_id in tenants:
            ask_of(tenant_id, epoch)
    assert len(list(ledger.state.leases)) == 2 * len(tenants)
    # The one event that all of them waited for, and then nothing but a sign of life.
    gone = [sum(lease.gone for lease in spend(ledger, "gw-1", 1).leases)]
    gone.append(sum(lease.gone for lease in ledger.usage(batch([], "gw-1", 0, 1)).record.leases))
    assert gone == [SETTLED_LEASES_MAX, 20]
    # What there was beside it is what the second start has.
    assert leased(ledger) == PICO
    assert {ledger.state.accounts[tenant_id].leased_pico for tenant_id in tenants if tenant_id != A} == {0}


def test_an_older_process_of_the_gateway_gets_nothing(ledger: Ledger) -> None:
    ask(ledger, 1, PICO, epoch=2)
    assert "is over" in ask(ledger, 9, PICO, epoch=1).command.refusal


def test_an_operator_retires_a_gateway_and_the_record_states_the_bound(ledger: Ledger) -> None:
    ask(ledger, 1, 3 * PICO)
    spend(ledger, "gw-1", 1)
    retirement = LeaseRetirement(holder_id="gw-1")
    early = ledger.command(NOW_MS + 9_999, lease_retirement=retirement).record.command
    assert "wait" in early.refusal
    late = ledger.command(NOW_MS + 10_000, lease_retirement=retirement).record
    assert late.command.applied
    assert "up to 2.9999986 USD" in late.command.outcome
    assert late.leases[0].gone
    assert leased(ledger) == 0
    # Its journal is found after all: charged to the account, to no lease.
    spend(ledger, "gw-1", 2)
    assert ledger.state.accounts[A].spend_pico == 2 * EVENT_PICO
    assert leased(ledger) == 0


def test_a_gateway_that_is_known_to_be_gone_is_retired_at_once(ledger: Ledger) -> None:
    ask(ledger, 1, 3 * PICO)
    assert ledger.command(lease_retirement=LeaseRetirement(holder_id="gw-1", unexpired=True)).record.command.applied
    assert leased(ledger) == 0


def test_postpaid_leases_from_the_credit_limit(ledger: Ledger) -> None:
    ledger.tenant(A, Plan(billing_mode=BILLING_MODE_POSTPAID, credit_limit=to_amount(2 * PICO)))
    assert from_amount(lasting(ask(ledger, 1, 20 * PICO)).granted) == 12 * PICO
    ledger.tenant(A, Plan(billing_mode=BILLING_MODE_POSTPAID))
    assert from_amount(lasting(ask(ledger, 2, 500 * PICO)).granted) == 500 * PICO


def test_nothing_is_leased_to_a_suspended_tenant_and_what_is_held_can_be_given_back(ledger: Ledger) -> None:
    ask(ledger, 1, PICO)
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=A, status=ACCOUNT_STATUS_SUSPENDED))
    assert "not active" in ask(ledger, 2, 2 * PICO).command.refusal
    assert lasting(ask(ledger, 3, 0, duration_ms=0)).gone
    assert leased(ledger) == 0


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"holder_id": ""}, "holder_id"),
        ({"holder_id": "𐍈" * 65}, "holder_id"),
        ({"epoch": 0}, "epoch"),
        ({"request_number": 0}, "request_number"),
        ({"wanted": to_amount(-1)}, "wanted"),
        ({"wanted": to_amount(10**25)}, "wanted"),
        ({"duration_ms": 3_600_001}, "duration_ms"),
        ({"tenant_id": B}, "create the tenant"),
    ],
)
def test_a_bad_request_says_why_and_changes_nothing(ledger: Ledger, fields: dict[str, object], names: str) -> None:
    good = {"tenant_id": A, "holder_id": "gw", "epoch": 1, "request_number": 1, "wanted": to_amount(1), "duration_ms": 1}
    record = ledger.command(key=LEASE_KEY, lease_request=LeaseRequest(**(good | fields))).record  # type: ignore[arg-type]
    assert names in record.command.refusal
    assert leased(ledger) == 0


def test_the_lease_key_opens_nothing_else(ledger: Ledger) -> None:
    record = ledger.command(key=LEASE_KEY, credit_grant=CreditGrant(tenant_id=A, amount=to_amount(PICO), currency="USD")).record
    assert "lease key does not sign" in record.command.refusal
    assert ledger.state.accounts[A].credit_pico == 10 * PICO
    assert len(record.alerts) == 1


def test_the_audit_names_an_account_that_hides_what_is_leased(ledger: Ledger) -> None:
    ask(ledger, 1, PICO)
    record = LedgerRecord.FromString(ledger.stored[-1])
    record.accounts[0].leased.CopyFrom(to_amount(PICO - 1))
    assert findings([*ledger.stored[:-1], record.SerializeToString()]) == ["leased_differs"]


class Gateway:
    """A holder as it should be: it promises only what it was granted and has not promised yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.epoch = 0
        self.sequence = 0
        self.journal: list[UsageEvent] = []
        self.journal_first = 1
        self.start()

    def start(self) -> None:
        """What was promised by the start before is in the journal."""
        self.epoch += 1
        self.number = 0
        self.granted = 0
        self.promised = 0
        self.previous_sequence = self.sequence

    def request(self, at_hand: int) -> LeaseRequest:
        self.number += 1
        wanted = self.promised + at_hand
        # From here on it lives with the less.
        self.granted = min(self.granted, wanted)
        return LeaseRequest(
            tenant_id=A,
            holder_id=self.name,
            epoch=self.epoch,
            request_number=self.number,
            wanted=to_amount(wanted),
            duration_ms=1_000,
            previous_sequence=self.previous_sequence,
        )

    def infer(self) -> bool:
        """One request, if what it holds pays for it."""
        if self.promised + EVENT_PICO > self.granted:
            return False
        self.promised += EVENT_PICO
        self.sequence += 1
        self.journal.append(usage(f"{self.name}-{self.sequence}", A))
        return True


_ACTIONS = st.tuples(
    st.integers(0, 2), st.sampled_from(["ask", "infer", "infer", "infer", "send", "crash", "again"]), st.integers(0, 4)
)


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(_ACTIONS, min_size=10, max_size=80), credit=st.integers(0, 12))
def test_obedient_gateways_never_overspend_whatever_dies(actions: list[tuple[int, str, int]], credit: int) -> None:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(A)
    if credit:
        ledger.command(credit_grant=CreditGrant(tenant_id=A, amount=to_amount(credit * EVENT_PICO), currency="USD"))
    gateways = [Gateway(f"gw-{i}") for i in range(3)]
    last: list[LeaseRequest | None] = [None] * 3
    unique = itertools.count()
    inferences = 0

    def tell(gateway: Gateway, request: LeaseRequest) -> None:
        record = ledger.command(key=LEASE_KEY, command_id=f"x{next(unique)}", lease_request=request).record
        for lease in record.leases:
            if lease.holder_id == gateway.name and lease.epoch == gateway.epoch and not lease.ended:
                gateway.granted = from_amount(lease.granted)

    def send(gateway: Gateway) -> None:
        if gateway.journal:
            ledger.usage(batch(gateway.journal, gateway.name, gateway.journal_first, gateway.sequence))
            gateway.journal_first = gateway.sequence + 1
            gateway.journal = []

    for who, action, size in actions:
        gateway = gateways[who]
        if action == "ask":
            last[who] = request = gateway.request(size * EVENT_PICO)
            tell(gateway, request)
        elif action == "again" and (repeat := last[who]) is not None:
            record = ledger.command(key=LEASE_KEY, command_id=f"x{next(unique)}", lease_request=repeat).record
            assert not record.command.applied
        elif action == "infer":
            inferences += gateway.infer()
        elif action == "send":
            send(gateway)
        elif action == "crash":
            gateway.start()
        account = ledger.state.accounts[A]
        waiting = sum(len(each.journal) for each in gateways) * EVENT_PICO
        # What was promised is held: whatever is in a journal has its money put aside.
        assert account.leased_pico >= waiting
        assert account.spend_pico + account.leased_pico <= account.credit_pico
    for gateway in gateways:
        send(gateway)
        gateway.start()
        tell(gateway, gateway.request(0))
    assert leased(ledger) == 0
    assert ledger.state.accounts[A].spend_pico == inferences * EVENT_PICO <= credit * EVENT_PICO
