"""The step: once per request, exact, nothing vanishes, and a replay gives the same state."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing import replay
from billing.amounts import from_amount
from billing.founding import LedgerSettings, found_again
from billing.identity import dedupe_key
from billing.leases import LeaseState
from billing.limits import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, QUANTITY_MAX, RECORD_BYTES_MAX, SETTLED_LEASES_MAX
from billing.state import DAY_MS, MemorySeenKeys
from billing.step import InputWentBack, UsageInput, step
from billing.v1 import ledger_pb2 as ledger
from billing.v1 import usage_pb2 as u
from billing.v1.command_pb2 import Price
from tests.billing.ledgers import KEYS, NOW_MS, PRICES, Ledger, batch, tenants_in, usage

A, B, C = tenants_in(1)
ELSEWHERE = tenants_in(2, 1)[0]
HOUR_MS = 3_600_000


@pytest.fixture
def priced() -> Ledger:
    made = Ledger()
    made.price()
    for tenant_id in (A, B, C):
        made.tenant(tenant_id)
    return made


def test_one_event_is_counted_rated_and_charged(priced: Ledger) -> None:
    record = priced.usage(batch([usage("r1", A)])).record
    assert list(record.usage.cost_pico_low) == [100 * 10_000 + 10 * 40_000]
    assert list(record.usage.price_versions) == [1]
    (total,) = record.totals
    assert (total.events, total.uncached_input_tokens, total.output_tokens) == (1, 100, 10)
    (account,) = record.accounts
    assert from_amount(account.spend) == from_amount(total.cost) == 1_400_000


def test_the_same_event_again_is_a_duplicate_however_it_comes(priced: Ledger) -> None:
    first = batch([usage("r1", A), usage("r2", A), usage("r1", A)])
    record = priced.usage(first).record
    assert [(d.index, d.reason) for d in record.usage.dropped] == [(2, ledger.DROP_REASON_DUPLICATE)]
    again = priced.usage(first, NOW_MS + HOUR_MS).record
    assert again.usage.duplicates == 3
    assert not again.totals
    assert from_amount(again.accounts[0].spend) == 2 * 1_400_000


def test_a_retry_with_another_time_or_count_is_a_conflict_and_never_charged(priced: Ledger) -> None:
    priced.usage(batch([usage("r1", A)]))
    for fields in ({"ended_ms": NOW_MS + 1}, {"output_tokens": 11}):
        record = priced.usage(batch([usage("r1", A, **fields)])).record
        (dropped,) = record.usage.dropped
        assert dropped.reason == ledger.DROP_REASON_CONFLICT
        assert from_amount(dropped.would_have_cost) == 1_000_000 + 40_000 * fields.get("output_tokens", 10)
    assert priced.state.accounts[A].spend_pico == 1_400_000
    assert priced.state.accounts[A].conflicts == 2


def test_the_same_request_id_of_two_tenants_is_two_requests(priced: Ledger) -> None:
    assert priced.usage(batch([usage("r1", A), usage("r1", B)])).record.usage.duplicates == 0


def test_no_delimiter_collides() -> None:
    assert dedupe_key(b"k", "ab", "c") != dedupe_key(b"k", "a", "bc")


def test_a_key_lives_for_the_whole_horizon_and_then_the_event_is_too_old(priced: Ledger) -> None:
    value = batch([usage("r1", A)])
    priced.usage(value)
    priced.tick(NOW_MS + 35 * DAY_MS)
    assert priced.usage(value, NOW_MS + 35 * DAY_MS).record.usage.duplicates == 1
    priced.tick(NOW_MS + 37 * DAY_MS)
    assert isinstance(priced.state.seen, MemorySeenKeys)
    assert not priced.state.seen.days
    (dropped,) = priced.usage(value, NOW_MS + 37 * DAY_MS).record.usage.dropped
    assert dropped.reason == ledger.DROP_REASON_TOO_OLD
    assert "backfill" in dropped.detail
    backfill = batch([usage("r1", A, backfill=True)])
    assert not priced.usage(backfill, NOW_MS + 37 * DAY_MS).record.usage.dropped


def test_a_backfill_is_remembered_from_when_it_was_seen(priced: Ledger) -> None:
    value = batch([usage("r1", A, started_ms=1, ended_ms=NOW_MS - 60 * DAY_MS, backfill=True)])
    assert not priced.usage(value).record.usage.dropped
    later = NOW_MS + 34 * DAY_MS
    priced.tick(later)
    assert priced.usage(value, later).record.usage.duplicates == 1


def test_each_event_names_the_version_that_rated_it(priced: Ledger) -> None:
    assert priced.price(
        [Price(model="smollm2", output_pico=50_000)], version=2, effective_ms=NOW_MS - 30_000
    ).record.command.applied
    events = [usage("new", A), usage("old", A, ended_ms=NOW_MS - 30_001, started_ms=1), usage("none", A, model="other")]
    record = priced.usage(batch(events)).record
    assert list(record.usage.price_versions) == [2, 1, 0]
    assert list(record.usage.cost_pico_low) == [500_000, 1_400_000, 0]


def test_a_released_window_is_gone_after_a_replay_too(priced: Ledger) -> None:
    priced.usage(batch([usage("r1", A)]))
    assert priced.tick(NOW_MS + 20 * 60_000).record.released
    assert priced.replayed().digest() == priced.state.digest()
    assert not priced.state.windows


def test_what_a_conflict_would_have_cost_counts_every_class_and_unit(priced: Ledger) -> None:
    priced.usage(batch([usage("r1", A)]))
    other = usage("r1", A, audio_output_tokens=3, reasoning_tokens=2, units=[u.UnitQuantity(unit="characters", quantity=5)])
    (dropped,) = priced.usage(batch([other])).record.usage.dropped
    assert from_amount(dropped.would_have_cost) == 1_400_000 + 3 * 7 + 2 * 40_003 + 5 * 13


def test_future_usage_is_remembered_until_its_own_time_plus_the_horizon(priced: Ledger) -> None:
    value = batch([usage("r1", A, ended_ms=NOW_MS + 23 * HOUR_MS)])
    assert not priced.usage(value).record.usage.dropped
    late = NOW_MS + 35 * DAY_MS + 22 * HOUR_MS
    priced.tick(late)
    assert priced.usage(value, late).record.usage.duplicates == 1


def test_usage_beyond_the_future_bound_is_refused(priced: Ledger) -> None:
    (dropped,) = priced.usage(batch([usage("r1", A, ended_ms=NOW_MS + 25 * HOUR_MS)])).record.usage.dropped
    assert dropped.reason == ledger.DROP_REASON_TOO_FAR_IN_FUTURE


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"request_id": ""}, "request_id"),
        ({"tenant_id": ""}, "tenant_id"),
        ({"model": ""}, "model"),
        ({"model": "m" * 257}, "model"),
        ({"user_id": "u" * 257}, "user_id"),
        ({"started_ms": 0}, "started_ms"),
        ({"ended_ms": -1}, "ended_ms"),
        ({"started_ms": NOW_MS + 1}, "started_ms"),
        ({"ended_ms": NOW_MS * 1000}, "ended_ms"),
        ({"output_tokens": 2**64 - 5}, "output_tokens"),
        ({"reasoning_tokens": QUANTITY_MAX + 1}, "reasoning_tokens"),
        ({"units": [u.UnitQuantity(unit="characters", quantity=QUANTITY_MAX + 1)]}, "characters"),
        ({"units": [u.UnitQuantity(unit="x", quantity=1)] * 2}, "units"),
        ({"attributes": {"k": "v" * 300}}, "attributes"),
    ],
)
def test_an_invalid_event_is_dropped_with_its_field_and_the_others_count(
    priced: Ledger, fields: dict[str, Any], name: str
) -> None:
    bad = usage("bad", A)
    for key, value in fields.items():
        if key == "units":
            bad.units.extend(value)
        elif key == "attributes":
            bad.attributes.update(value)
        else:
            setattr(bad, key, value)
    record = priced.usage(batch([usage("good", A), bad])).record
    (dropped,) = record.usage.dropped
    assert (dropped.index, dropped.reason) == (1, ledger.DROP_REASON_INVALID)
    assert name in dropped.detail
    assert record.totals[0].events == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\xff\xff", "cannot be decoded"),
        (b"x" * (BATCH_BYTES_MAX + 1), "at most"),
        (u.UsageBatch(schema_version=2).SerializeToString(), "schema_version: 2"),
        (batch([usage(f"r{n}", A) for n in range(BATCH_EVENTS_MAX + 1)]), "at most 1000"),
    ],
)
def test_a_message_that_cannot_be_used_becomes_a_record_that_says_so(priced: Ledger, value: bytes, reason: str) -> None:
    record = priced.usage(value).record
    assert reason in record.rejected.reason
    assert record.rejected.payload_bytes == len(value)
    assert not record.totals
    assert not priced.usage(batch([usage("next", A)])).record.usage.dropped


def test_an_event_in_the_wrong_partition_is_sent_on_once_with_its_bytes(priced: Ledger) -> None:
    event = usage("r1", ELSEWHERE)
    result = priced.usage(batch([usage("r2", A), event]))
    (forward,) = result.forwards
    assert forward.partition == 2
    sent_on = u.UsageBatch.FromString(forward.value)
    assert (sent_on.forwarded, list(sent_on.events)) == (True, [event])
    assert ELSEWHERE not in priced.state.accounts

    home = Ledger(partition=2)
    assert home.usage(forward.value).record.usage.duplicates == 0
    # The same event straight from its producer is then the same event: the bytes are those that came.
    assert home.usage(batch([event])).record.usage.duplicates == 1
    (dropped,) = priced.usage(forward.value).record.usage.dropped
    assert dropped.reason == ledger.DROP_REASON_INVALID


def test_unpriced_usage_is_kept_and_refused_usage_is_free(priced: Ledger) -> None:
    rejected = usage("r2", A, outcome=u.OUTCOME_REJECTED, refusal_reason=u.REFUSAL_REASON_PROMPT_TOO_LARGE)
    record = priced.usage(batch([usage("r1", A, model="other"), rejected])).record
    assert list(record.usage.cost_pico_low) == [0, 0]
    by_model = {total.key.model: total for total in record.totals}
    assert by_model["other"].unrated_events == 1
    assert (by_model["smollm2"].refused_events, by_model["smollm2"].uncached_input_tokens) == (1, 0)
    assert priced.state.accounts[A].spend_pico == 0


def test_a_cost_beyond_64_bits_is_exact() -> None:
    made = Ledger()
    made.price([Price(model="big", output_pico=10**15)])
    made.tenant(A)
    record = made.usage(batch([usage("r1", A, model="big", output_tokens=QUANTITY_MAX), usage("r2", A, model="big")])).record
    costs = [low + (high << 64) for low, high in zip(record.usage.cost_pico_low, record.usage.cost_pico_high, strict=True)]
    assert costs == [QUANTITY_MAX * 10**15, 10 * 10**15]
    assert made.state.accounts[A].spend_pico == sum(costs) > 2**63


def test_a_window_is_let_go_and_a_late_event_opens_a_new_one(priced: Ledger) -> None:
    first = priced.usage(batch([usage("r1", A)])).record.totals[0]
    lateness_ms = priced.settings.window_lateness_ms
    assert not priced.tick(NOW_MS + lateness_ms - 60_000).record.released
    assert [key.minute for key in priced.tick(NOW_MS + lateness_ms + 120_000).record.released] == [first.key.minute]
    late = priced.usage(batch([usage("r2", A)]), NOW_MS + lateness_ms + 130_000).record.totals[0]
    assert late.events == 1
    assert late.key.opened_sequence > first.key.opened_sequence


def test_an_input_that_was_taken_is_refused(priced: Ledger) -> None:
    priced.usage(batch([usage("r1", A)]))
    with pytest.raises(InputWentBack, match="offset 0"):
        step(priced.state, UsageInput("usage.events", 0, b""), NOW_MS, keys=KEYS, writer="test")


def test_log_time_never_goes_back(priced: Ledger) -> None:
    priced.tick(NOW_MS + 5_000)
    assert priced.usage(batch([usage("r1", A)]), NOW_MS - 99_000).record.log_time_ms == NOW_MS + 5_000


def test_the_largest_record_is_under_the_bound() -> None:
    made = Ledger(settings=LedgerSettings(partitions=1, dedupe_key=b"k" * 32), partition=0)
    made.price([Price(model="*", output_pico=10**15)])
    long = "é" * 60
    events = [
        usage(
            f"{long}{n}", f"{long}t{n}", model=f"{long}{n}", project_id=f"{long}{n}", started_ms=1, ended_ms=NOW_MS - 60_000 * n
        )
        for n in range(BATCH_EVENTS_MAX)
    ]
    # Two epochs of one gateway hold money of every tenant: one lets go, as far as a record has room, the other is charged.
    for event in events:
        for epoch in (1, 2):
            lease = LeaseState(event.tenant_id, "p" * 256, epoch, granted_pico=10**24, ended=epoch == 1)
            made.state.leases.put(lease)
    value = batch(events, producer_id="p" * 256, first=1, highest=BATCH_EVENTS_MAX)
    assert len(value) <= BATCH_BYTES_MAX
    result = made.usage(value)
    assert len(result.record.totals) == BATCH_EVENTS_MAX
    assert len(result.record.leases) == BATCH_EVENTS_MAX + SETTLED_LEASES_MAX
    assert len(result.stored) < RECORD_BYTES_MAX
    # What is left of it goes with the records that follow.
    number, left = BATCH_EVENTS_MAX + 1, BATCH_EVENTS_MAX - SETTLED_LEASES_MAX
    while left > 0:
        following = batch([usage(f"r{number}", events[0].tenant_id)], producer_id="p" * 256, first=number, highest=number)
        gone = [lease for lease in made.usage(following).record.leases if lease.gone]
        assert len(gone) == SETTLED_LEASES_MAX
        number, left = number + 1, left - len(gone)
    assert sum(lease.epoch == 1 for lease in made.state.leases) == 0


def test_a_founding_on_old_state_forgets_nothing_that_was_charged(priced: Ledger) -> None:
    value = batch([usage("r1", A)], producer_id="p", first=1, highest=1)
    priced.usage(value)
    spend = priced.state.accounts[A].spend_pico
    record, stored = found_again(priced.state, b"h" * 16, NOW_MS + 1, KEYS.seal_key, "test")
    assert record.founding.predecessor.sequence == priced.state.sequence
    replay.apply(priced.state, record, stored)
    result = step(priced.state, UsageInput("usage.events", 0, value), NOW_MS + 2, keys=KEYS, writer="test")
    assert (result.record.sequence, result.record.usage.duplicates) == (1, 1)
    assert priced.state.accounts[A].spend_pico == spend
    assert [account.tenant_id for account in record.accounts] == sorted([A, B, C])


# -- against an independent reading of the rules ------------------------------------------------------------------------

PRICE = {
    "uncached_input_tokens": Fraction(10_000),
    "output_tokens": Fraction(40_000),
    "cache_read_tokens": Fraction(1_001),
    "reasoning_tokens": Fraction(40_003),
    "audio_output_tokens": Fraction(7),
}

events_strategy = st.lists(
    st.builds(
        usage,
        request_id=st.sampled_from([f"r{n}" for n in range(12)]),
        tenant_id=st.sampled_from([A, B, C, ELSEWHERE]),
        model=st.sampled_from(["smollm2", "unpriced"]),
        project_id=st.sampled_from(["", "p1", "p" * 300]),
        outcome=st.sampled_from([u.OUTCOME_COMPLETED, u.OUTCOME_CANCELLED, u.OUTCOME_REJECTED, u.OUTCOME_BACKEND_ERROR]),
        ended_ms=st.integers(NOW_MS - 36 * DAY_MS, NOW_MS + 2 * DAY_MS) | st.integers(NOW_MS - 200_000, NOW_MS),
        started_ms=st.just(NOW_MS - 36 * DAY_MS),
        uncached_input_tokens=st.integers(0, 5_000) | st.just(QUANTITY_MAX + 1),
        output_tokens=st.integers(0, 5_000),
        cache_read_tokens=st.integers(0, 5_000),
        reasoning_tokens=st.sampled_from([0, 0, 7]),
        audio_output_tokens=st.sampled_from([0, 0, 0, 5]),
        units=st.sampled_from([[], [u.UnitQuantity(unit="characters", quantity=3)]]),
        backfill=st.booleans(),
    ),
    max_size=8,
)


def expected_charges(batches: list[list[u.UsageEvent]]) -> tuple[dict[tuple[str, str], u.UsageEvent], Counter[str]]:
    """What the rules say, one event at a time, with nothing of the step's code but the contract."""
    charged: dict[tuple[str, str], u.UsageEvent] = {}
    seen: Counter[str] = Counter()
    for events in batches:
        for event in events:
            identity = (event.tenant_id, event.request_id)
            invalid = event.uncached_input_tokens > QUANTITY_MAX or len(event.project_id) > 256
            if identity in charged and charged[identity] == event:
                seen["duplicate"] += 1
            elif invalid:
                seen["invalid"] += 1
            elif event.tenant_id == ELSEWHERE:
                seen["forwarded"] += 1
            elif identity in charged:
                seen["conflict"] += 1
            elif event.ended_ms > NOW_MS + DAY_MS:
                seen["future"] += 1
            elif event.ended_ms < NOW_MS - 35 * DAY_MS and not event.backfill:
                seen["old"] += 1
            else:
                charged[identity] = event
    return charged, seen


REASONS = {
    ledger.DROP_REASON_DUPLICATE: "duplicate",
    ledger.DROP_REASON_INVALID: "invalid",
    ledger.DROP_REASON_FORWARDED: "forwarded",
    ledger.DROP_REASON_CONFLICT: "conflict",
    ledger.DROP_REASON_TOO_FAR_IN_FUTURE: "future",
    ledger.DROP_REASON_TOO_OLD: "old",
}


@given(st.lists(events_strategy, max_size=5))
@settings(deadline=None)
def test_the_step_agrees_with_the_rules_read_one_event_at_a_time(batches: list[list[u.UsageEvent]]) -> None:
    made = Ledger()
    made.price()
    records = [made.usage(batch(events)).record for events in batches]
    charged, seen = expected_charges(batches)
    assert Counter(REASONS[d.reason] for record in records for d in record.usage.dropped) == seen
    for tenant_id in (A, B, C):
        mine = [event for (tenant, _), event in charged.items() if tenant == tenant_id]
        spend = sum(
            price
            for event in mine
            if event.model == "smollm2" and event.outcome in (u.OUTCOME_COMPLETED, u.OUTCOME_CANCELLED)
            for price in [
                *(PRICE[name] * getattr(event, name) for name in PRICE),
                *(Fraction(13) * unit.quantity for unit in event.units),
            ]
        )
        account = made.state.accounts.get(tenant_id)
        assert (account.spend_pico if account else 0) == spend
        assert (account.events if account else 0) == len(mine)
    latest: dict[Any, ledger.WindowTotal] = {}
    for record in records:
        for total in record.totals:
            latest[total.key.SerializeToString(deterministic=True)] = total
    paid = [e for e in charged.values() if e.outcome in (u.OUTCOME_COMPLETED, u.OUTCOME_CANCELLED)]
    assert sum(t.events for t in latest.values()) == len(charged)
    assert sum(t.uncached_input_tokens for t in latest.values()) == sum(e.uncached_input_tokens for e in paid)
    assert sum(t.reasoning_tokens for t in latest.values()) == sum(e.reasoning_tokens for e in paid)
    assert sum(t.units.get("characters", 0) for t in latest.values()) == sum(e.units[0].quantity for e in paid if e.units)
    costs = sum(low for record in records for low in record.usage.cost_pico_low)
    assert costs == sum(from_amount(t.cost) for t in latest.values())
    assert made.replayed().digest() == made.state.digest()


@given(st.lists(events_strategy, min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_any_batching_charges_the_same(batches: list[list[u.UsageEvent]], rng: random.Random) -> None:
    events = [event for events in batches for event in events]
    whole, split = Ledger(), Ledger()
    whole.price(PRICES)
    split.price(PRICES)
    whole.usage(batch(events))
    while events:
        size = rng.randint(1, len(events))
        split.usage(batch(events[:size]))
        events = events[size:]
    spends = [{t: (a.spend_pico, a.events) for t, a in made.state.accounts.items()} for made in (whole, split)]
    assert spends[0] == spends[1]
