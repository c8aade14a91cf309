"""Lines of periods: what was charged is in them or in an open window, once, in parts that multiply, whatever let windows go."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from billing import period_lines, replay
from billing.amounts import from_amount
from billing.chain import Chain
from billing.founding import found_again
from billing.limits import LINE_PARTS_MAX, LINES_MAX, RECORD_BYTES_MAX, WINDOW_PARTS_HARD_MAX, WINDOW_PARTS_MAX
from billing.line_parts import OTHER, PartKey, Parts, Sum, add
from billing.period_lines import OTHER_NAME, Line
from billing.periods import Period
from billing.release import window_parts
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    ClassFactor,
    ContextBand,
    Price,
    Schedule,
    TenantUpsert,
    Tier,
    UnitPrice,
)
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from billing.validation import TOKEN_FIELDS
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

ONE, TWO = tenants_in(1)[:2]
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
NOVEMBER = Period(1_761_955_200_000, 1_764_547_200_000)


def came_to(state: LedgerState, tenant_id: str) -> int:
    """Lines and open windows of a tenant; each window's and line's parts multiply and sum on the way."""
    total = 0
    for line in state.lines.of(tenant_id):
        total += line.cost_pico
    for window in state.windows.values():
        if window.key.tenant_id == tenant_id:
            parts = window_parts(state, window)
            assert sum(part.amount_pico for part in parts.values()) == window.cost_pico
            assert all(key.unit_pico * part.units == part.amount_pico for key, part in parts.items() if key.unit_pico)
            total += window.cost_pico
    return total


def settled(ledger: Ledger, log_time_ms: int) -> None:
    """Let every window go."""
    while ledger.state.windows:
        ledger.tick(log_time_ms)


def line_of(state: LedgerState, tenant_id: str) -> Line:
    [line] = state.lines.of(tenant_id)
    return line


def test_a_window_that_is_let_go_is_in_a_line_of_its_period() -> None:
    ledger = Ledger()
    ledger.price()
    ledger.tenant(ONE)
    ledger.usage(batch([usage("r1", ONE), usage("r2", ONE, outcome=OUTCOME_REJECTED), usage("r3", ONE, cache_read_tokens=3)]))
    assert not list(ledger.state.lines)
    result = ledger.tick(NOW_MS + HOUR_MS)
    [stated] = result.record.lines
    assert stated.key.opened_sequence == result.record.sequence
    assert stated.key.price_version == 1
    line = line_of(ledger.state, ONE)
    assert line.key.period == NOVEMBER
    assert (line.events, line.refused_events, line.unrated_events) == (3, 1, 0)
    assert line.parts == {
        PartKey("cache_read_tokens", "", 1_001): Sum(3, 3_003),
        PartKey("output_tokens", "", 40_000): Sum(20, 800_000),
        PartKey("uncached_input_tokens", "", 10_000): Sum(200, 2_000_000),
    }
    # Late usage of the same minute opens another window, and goes to the same line.
    ledger.usage(batch([usage("late", ONE)]), NOW_MS + 2 * HOUR_MS)
    settled(ledger, NOW_MS + 3 * HOUR_MS)
    assert line_of(ledger.state, ONE).events == 4
    assert came_to(ledger.state, ONE) == ledger.state.accounts[ONE].spend_pico
    assert ledger.replayed().digest() == ledger.state.digest()


def test_what_a_replay_knows_of_windows_does_not_grow_with_the_log() -> None:
    """It never asks which are due: whatever was touched again would have stayed under its earlier minute, too."""
    ledger = Ledger()
    for number in range(10):
        begins_ms = NOW_MS + number * HOUR_MS
        for again in range(4):
            at_ms = begins_ms + again * 2 * MINUTE_MS
            ledger.usage(batch([usage(f"r{number}-{again}", ONE, started_ms=begins_ms, ended_ms=begins_ms)]), at_ms)
    for state in (ledger.state, ledger.replayed()):
        assert len(state.windows) == sum(map(len, state._release.values())) == 1


def test_a_minute_in_which_prices_change_has_a_window_for_each_version() -> None:
    ledger = Ledger()
    ledger.price()
    change_ms = NOW_MS // MINUTE_MS * MINUTE_MS + 30_000
    ledger.price([Price(model="smollm2", uncached_input_pico=20_000)], version=2, effective_ms=change_ms)
    events = [usage(f"r{second}", ONE, ended_ms=change_ms + (second - 30) * 1_000) for second in (40, 10, 50, 20, 59)]
    ledger.usage(batch(events), NOW_MS + MINUTE_MS)
    assert {window.key.price_version: window.events for window in ledger.state.windows.values()} == {1: 2, 2: 3}
    settled(ledger, NOW_MS + HOUR_MS)
    assert [(line.key.price_version, line.cost_pico) for line in ledger.state.lines.of(ONE)] == [(1, 2_800_000), (2, 6_000_000)]
    assert ledger.replayed().digest() == ledger.state.digest()


def test_the_period_is_that_of_the_tenants_calendar() -> None:
    ledger = Ledger()
    ledger.price()
    shanghai = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=ONE, currency="USD", calendar=shanghai))
    # 23:30 in UTC on the last of November is December in Shanghai.
    late_ms = NOVEMBER.end_ms - 30 * MINUTE_MS
    ledger.usage(
        batch([usage(f"r-{tenant_id}", tenant_id, started_ms=late_ms, ended_ms=late_ms) for tenant_id in (ONE, TWO)]), late_ms
    )
    settled(ledger, late_ms + HOUR_MS)
    assert line_of(ledger.state, ONE).key.period.start_ms == NOVEMBER.end_ms - 8 * HOUR_MS
    assert line_of(ledger.state, TWO).key.period == NOVEMBER


TERMS = (
    # Long context dearer, cached at a tenth, batch at half, $0.01 a million.
    Price(
        model="long",
        uncached_input_pico=10_000,
        cache_read_pico=1_000,
        output_pico=40_000,
        context_bands=[
            ContextBand(
                above_tokens=200_000,
                prices=[
                    UnitPrice(quantity="uncached_input_tokens", unit_pico=20_000),
                    UnitPrice(quantity="output_tokens", unit_pico=60_000),
                ],
            )
        ],
        minimum_pico=300_000,
        class_factors=[ClassFactor(service_class=3, factor_millionths=500_000)],
    ),
    Price(
        model="tiers",
        uncached_input_pico=7,
        unit_pico={"requests": 1_000_000},
        schedules=[
            Schedule(
                quantity="output_tokens",
                mode=SCHEDULE_MODE_GRADUATED,
                free_units=25,
                tiers=[Tier(up_to_units=100, unit_pico=20_000_000), Tier(unit_pico=10_000_000)],
            )
        ],
    ),
    Price(model="flat", uncached_input_pico=10_000, output_pico=40_000, unit_pico={"characters": 13}),
)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_charged_is_in_a_line_or_in_an_open_window(seed: int) -> None:
    chance = random.Random(seed)
    ledger = Ledger()
    ledger.price(TERMS)
    ledger.tenant(ONE)
    now_ms = NOW_MS
    for number in range(60):
        now_ms += chance.choice((1_000, MINUTE_MS, 20 * MINUTE_MS, DAY_MS))
        events = []
        for index in range(chance.randrange(1, 6)):
            ended_ms = now_ms - chance.choice((0, 0, 0, MINUTE_MS, HOUR_MS, 3 * DAY_MS))
            events.append(
                usage(
                    f"{seed}-{number}-{index}",
                    chance.choice((ONE, TWO)),
                    model=chance.choice(("long", "tiers", "flat", "unpriced")),
                    service_class=chance.choice((1, 3)),
                    started_ms=ended_ms,
                    ended_ms=ended_ms,
                    uncached_input_tokens=chance.choice((0, 3, 300_000)),
                    output_tokens=chance.randrange(60),
                    units=[UnitQuantity(unit=chance.choice(("requests", "characters", "odd")), quantity=2)],
                )
            )
        ledger.usage(batch(events), now_ms)
        for tenant_id, account in ledger.state.accounts.items():
            assert came_to(ledger.state, tenant_id) == account.spend_pico
    terms = {key.terms for line in ledger.state.lines for key in line.parts}
    assert {"", "free", "tier 1", "tier 2", "context over 200,000 tokens", "up to the least price of a request"} <= terms
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_sum_that_left_out_a_window_would_be_seen() -> None:
    with mock.patch.object(Line, "add_parts"), pytest.raises(AssertionError):
        test_whatever_is_charged_is_in_a_line_or_in_an_open_window(0)


def test_a_founding_carries_lines_on_and_sums_what_was_open() -> None:
    ledger = Ledger()
    ledger.price(TERMS)
    ledger.usage(batch([usage("r1", ONE, model="tiers"), usage("r2", TWO, model="flat")]))
    settled(ledger, NOW_MS + HOUR_MS)
    ledger.usage(batch([usage("r3", ONE, model="tiers"), usage("r4", ONE, model="long")]), NOW_MS + 2 * HOUR_MS)
    spend = {tenant_id: account.spend_pico for tenant_id, account in ledger.state.accounts.items()}
    record, stored = found_again(ledger.state, b"h" * 16, NOW_MS + 3 * HOUR_MS, KEYS.seal_key, "test")
    # Who knew the old log, and who knows the new one alone.
    old, new = ledger.replayed(), LedgerState(MemorySeenKeys())
    for state in (old, new):
        replay.apply(state, record, stored)
        assert {tenant_id: came_to(state, tenant_id) for tenant_id in spend} == spend
        assert not state.windows
    assert Chain(1, KEYS.seal_key).accept(stored) is not None
    opened = {(line.opened_generation, line.opened_sequence) for line in old.lines}
    assert opened == {(b"g" * 16, 3), (b"h" * 16, 0)}


def test_names_that_a_producer_makes_up_do_not_gather() -> None:
    ledger = Ledger()
    ledger.price([Price(model="*", uncached_input_pico=10_000, output_pico=40_000)])
    for start in range(0, LINES_MAX + 500, 500):
        ledger.usage(batch([usage(f"r{n}", ONE, model=f"model-{n}") for n in range(start, start + 500)]))
    settled(ledger, NOW_MS + HOUR_MS)
    lines = ledger.state.lines.of(ONE)
    assert len(lines) == LINES_MAX + 1
    assert [line.events for line in lines if line.key.model == OTHER_NAME] == [500]
    assert came_to(ledger.state, ONE) == ledger.state.accounts[ONE].spend_pico
    assert max(len(record.lines) for record in ledger.records()) > 500
    assert max(map(len, ledger.stored)) < RECORD_BYTES_MAX / 2
    assert ledger.replayed().digest() == ledger.state.digest()


def test_long_names_are_summed_sooner() -> None:
    ledger = Ledger()
    ledger.price([Price(model="*", output_pico=40_000)])
    ledger.usage(batch([usage(f"r{n}", ONE, model=f"{n}".rjust(256, "𐍈")) for n in range(400)]))
    settled(ledger, NOW_MS + HOUR_MS)
    lines = ledger.state.lines.of(ONE)
    assert 100 < len(lines) < 300
    assert sum(line.events for line in lines) == 400
    assert ledger.replayed().digest() == ledger.state.digest()


def test_a_window_of_many_prices_is_followed_by_another() -> None:
    bands = [
        ContextBand(above_tokens=n, prices=[UnitPrice(quantity=name, unit_pico=n + 1) for name in TOKEN_FIELDS])
        for n in range(10, 90, 10)
    ]
    ledger = Ledger()
    ledger.price([Price(model="*", context_bands=bands)])
    tokens = dict.fromkeys(TOKEN_FIELDS, 1)
    for number in range(0, 40, 8):
        # Eight classes at a band's prices each.
        events = [usage(f"r{n}", ONE, context_tokens=20 * (n % 8) // 2 + 11, **tokens) for n in range(number, number + 8)]
        ledger.usage(batch(events[:2]), NOW_MS)
        ledger.usage(batch(events[2:]), NOW_MS)
        for window in ledger.state.windows.values():
            assert len(window.parts) <= WINDOW_PARTS_HARD_MAX
    assert any(len(total.parts) > WINDOW_PARTS_MAX for record in ledger.records() for total in record.totals)
    settled(ledger, NOW_MS + HOUR_MS)
    line = line_of(ledger.state, ONE)
    assert len(line.parts) <= LINE_PARTS_MAX
    assert line.cost_pico == ledger.state.accounts[ONE].spend_pico
    assert ledger.replayed().digest() == ledger.state.digest()


def test_parts_beyond_the_bound_are_summed() -> None:
    parts: Parts = {}
    for price in range(1, 100):
        add(parts, PartKey("output_tokens", "", price), 2, 2 * price, 8)
    assert len(parts) == 8
    assert parts[OTHER].units == 2 * (99 - 7)
    assert sum(part.amount_pico for part in parts.values()) == sum(2 * price for price in range(1, 100))


def test_a_period_that_nobody_invoices_is_let_go_in_the_end() -> None:
    ledger = Ledger()
    ledger.price()
    ledger.usage(batch([usage("r1", ONE)]))
    settled(ledger, NOW_MS + HOUR_MS)
    ledger.tick(NOVEMBER.end_ms + period_lines.KEPT_MS)
    assert len(list(ledger.state.lines)) == 1
    ledger.tick(NOVEMBER.end_ms + period_lines.KEPT_MS + 2 * DAY_MS)
    assert not list(ledger.state.lines)
    assert ledger.replayed().digest() == ledger.state.digest()


def test_amounts_in_records_are_what_the_lines_hold() -> None:
    ledger = Ledger()
    ledger.price()
    ledger.usage(batch([usage("r1", ONE, uncached_input_tokens=2**40), usage("r2", ONE, uncached_input_tokens=2**40)]))
    result = ledger.tick(NOW_MS + HOUR_MS)
    [stated] = result.record.lines
    assert from_amount(stated.cost) == sum(from_amount(part.amount) for part in stated.parts) == 2**41 * 10_000 + 800_000
