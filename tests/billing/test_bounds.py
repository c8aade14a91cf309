"""What a hostile or broken producer sends makes no record outgrow its bound and no sum outgrow its field; found by fuzzing."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest

from billing import windows
from billing.amounts import PICO, to_amount
from billing.identity import partition_of
from billing.limits import (
    ALERTS_MAX,
    BATCH_BYTES_MAX,
    BATCH_EVENTS_MAX,
    CREDIT_TENANTS_MAX,
    ID_CHARS_MAX,
    QUANTITY_MAX,
    RECORD_BYTES_MAX,
    RELEASED_BYTES_MAX,
    WINDOW_UNITS_MAX,
)
from billing.state import DAY_MS
from billing.v1.account_pb2 import ACCOUNT_STATUS_SUSPENDED, Calendar, Plan
from billing.v1.command_pb2 import CreditGrant, TenantUpsert
from billing.v1.usage_pb2 import UnitQuantity, UsageEvent
from billing.validation import TOKEN_FIELDS
from sinks.recompute import Recomputed
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage

TENANT = tenants_in(1)[0]
MINUTE_MS = 60_000
# Four bytes each in UTF-8.
WIDE = "𐍈"


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.price()
    made.tenant(TENANT)
    return made


def agreed(ledger: Ledger) -> None:
    """A replay and the audit come to what the step says."""
    assert ledger.replayed().digest() == ledger.state.digest()
    recomputed = Recomputed(ledger.state.partition)
    reader = ledger.records()
    for record in reader:
        recomputed.take(record)
    assert recomputed.findings == []


def test_a_minute_of_the_largest_quantities_does_not_end_the_burst_rule(ledger: Ledger) -> None:
    largest = dict.fromkeys(TOKEN_FIELDS, QUANTITY_MAX)
    for number in range(70):
        events = [usage(f"{number}-{i}", TENANT, **largest) for i in range(BATCH_EVENTS_MAX)]
        ledger.usage(batch(events))
    ledger.usage(batch([usage("next", TENANT, ended_ms=NOW_MS + MINUTE_MS)]), NOW_MS + MINUTE_MS)
    assert ledger.state.accounts[TENANT].baseline_tokens_x256 < 2**64
    assert ledger.replayed().digest() == ledger.state.digest()


def _with_units(number: int, count: int) -> list[UsageEvent]:
    def units(i: int) -> list[UnitQuantity]:
        return [UnitQuantity(unit=f"u-{number}-{i}-{k}", quantity=1) for k in range(8)]

    return [usage(f"{number}-{i}", TENANT, units=units(i)) for i in range(count)]


def test_units_do_not_gather_in_a_window_without_end(ledger: Ledger) -> None:
    sizes = [len(ledger.usage(batch(_with_units(number, 300))).stored) for number in range(6)]
    assert max(sizes) < 1.2 * sizes[0]
    plain = ledger.usage(batch([usage("plain", TENANT)]))
    assert len(plain.stored) < 4_000
    assert len(ledger.state.windows) == 1
    agreed(ledger)


def test_a_full_window_is_followed_by_another_and_nothing_is_lost(ledger: Ledger) -> None:
    with mock.patch.object(windows, "WINDOW_EVENTS_MAX", 3):
        totals: dict[int, tuple[int, int]] = {}
        for number in range(5):
            result = ledger.usage(batch([usage(f"{number}-{i}", TENANT) for i in range(2)]))
            totals.update({t.key.opened_sequence: (t.events, t.output_tokens) for t in result.record.totals})
    assert sorted(totals.values()) == [(2, 20), (4, 40), (4, 40)]
    assert WINDOW_UNITS_MAX > 0
    agreed(ledger)


def test_the_record_of_a_batch_that_alarms_about_everyone_stays_in_its_bound() -> None:
    ledger = Ledger()
    names = (f"{WIDE * 200}{number}" for number in range(10**6))
    events: list[UsageEvent] = []
    size = 0
    for number, tenant_id in enumerate(name for name in names if partition_of(name, 4) == 1):
        event = usage(
            f"{number}", tenant_id, model=f"{number}", uncached_input_tokens=QUANTITY_MAX, ended_ms=NOW_MS + 10 * MINUTE_MS
        )
        size += event.ByteSize() + 4
        if size > BATCH_BYTES_MAX - 1_000 or len(events) == BATCH_EVENTS_MAX:
            break
        events.append(event)
    result = ledger.usage(batch(events))
    assert len(result.record.alerts) == ALERTS_MAX
    assert len(result.stored) <= RECORD_BYTES_MAX
    # Who was not named this time is named with the next usage.
    again = ledger.usage(batch([usage("again", events[-1].tenant_id)]))
    assert {alert.tenant_id for alert in again.record.alerts} == {events[-1].tenant_id}
    while released := ledger.tick(NOW_MS + 60 * MINUTE_MS).record.released:
        assert sum(len((key.tenant_id + key.project_id + key.model).encode()) for key in released) <= RELEASED_BYTES_MAX
    assert not ledger.state.windows
    assert ledger.replayed().digest() == ledger.state.digest()


@pytest.mark.parametrize("plan", [Plan(plan_id="x" * 3_000), Plan.FromString(b"\xfa\x3f\x80\x20" + b"x" * 4_096)])
def test_a_plan_that_every_record_would_carry_is_bounded(ledger: Ledger, plan: Plan) -> None:
    before = ledger.state.accounts[TENANT].currency
    other = tenants_in(1)[1]
    result = ledger.command(tenant_upsert=TenantUpsert(tenant_id=other, currency="EUR", plan=plan))
    assert result.record.command.refusal.startswith("plan, display_name, calendar: ")
    assert other not in ledger.state.accounts
    assert ledger.state.accounts[TENANT].currency == before


def test_a_name_or_a_calendar_is_bounded_with_the_plan_and_a_tenant_can_be_suspended_all_the_same(ledger: Ledger) -> None:
    [other] = tenants_in(1, 2)[1:]
    ledger.tenant(other, Plan(plan_id="x" * 1_500))
    calendar = Calendar(time_zone="Europe/Berlin", from_month=range(200), offset_minutes=[60, 120] * 100)
    for terms in ({"display_name": WIDE * ID_CHARS_MAX}, {"calendar": calendar, "display_name": "x" * ID_CHARS_MAX}):
        refusal = ledger.command(tenant_upsert=TenantUpsert(tenant_id=other, **terms)).record.command.refusal
        assert refusal.startswith("plan, display_name, calendar: ")
        assert ledger.state.accounts[other].display_name == ""
    # It has outgrown the bound, which rules that hold for everybody may do.
    ledger.state.accounts[other].plan = Plan(plan_id="x" * 2_048)
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=other, status=ACCOUNT_STATUS_SUSPENDED))
    assert ledger.state.accounts[other].status == ACCOUNT_STATUS_SUSPENDED


def test_a_month_that_ends_for_many_tenants_takes_more_than_one_record() -> None:
    """A record that states what ended also states the accounts: four thousand of them were too much for the broker."""
    ledger = Ledger()
    ledger.price()
    tenants = tenants_in(1, 2 * CREDIT_TENANTS_MAX + 50)
    for tenant_id in tenants:
        ledger.tenant(tenant_id, Plan(plan_id="x" * 2_000))
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(PICO), currency="USD"))
    later_ms = NOW_MS + 40 * DAY_MS
    records = [ledger.tick(later_ms) for _ in range(3)]
    ended = [[state.tenant_id for state in result.record.credits] for result in records]
    assert [len(group) for group in ended] == [CREDIT_TENANTS_MAX, CREDIT_TENANTS_MAX, 50]
    assert sorted(itertools.chain(*ended)) == sorted(tenants)
    assert [len(result.record.accounts) for result in records] == [len(group) for group in ended]
    assert max(len(result.stored) for result in records) < 300_000
    assert not ledger.tick(later_ms).record.credits
    agreed(ledger)


def test_a_currency_that_changes_within_the_minute_leaves_no_window_behind() -> None:
    ledger = Ledger()
    ledger.usage(batch([usage("r1", TENANT)]))
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=TENANT, currency="EUR"))
    result = ledger.usage(batch([usage("r2", TENANT)]))
    assert [key.opened_sequence for key in result.record.released] == [1]
    assert [total.key.opened_sequence for total in result.record.totals] == [3]
    agreed(ledger)


def test_a_full_batch_in_the_wrong_partition_is_sent_on_in_batches_that_are_taken(ledger: Ledger) -> None:
    """Found on Apache Kafka: the mark of a forwarded batch made it two bytes too large, and all of it was refused."""
    [elsewhere] = tenants_in(2, 1)
    events = [usage(f"{number}", elsewhere) for number in range(100)]
    events[0].region = "x" * 100
    room = BATCH_BYTES_MAX - len(batch(events))
    # Nobody knows the field; whoever sends it may.
    events[0].MergeFromString(b"\xfa\x3f" + _varint(room - 6) + b"x" * (room - 6))
    full = batch(events)
    assert len(full) == BATCH_BYTES_MAX
    forwards = ledger.usage(full).forwards
    assert [forward.partition for forward in forwards] == [2, 2]
    there = Ledger(2)
    for forward in forwards:
        assert len(forward.value) <= BATCH_BYTES_MAX
        there.usage(forward.value)
    assert there.state.accounts[elsewhere].events == 100


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])
