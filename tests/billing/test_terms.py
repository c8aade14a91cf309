"""Tiers, allowances, context and class prices in the ledger: stated in records, replayed, kept on disk, proved by the audit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from billing.amounts import from_amount, to_amount
from billing.periods import Period, month_of, month_start_ms, period_at, same_through
from billing.price_checks import book_problems
from billing.prices import PriceBooks
from billing.settlement import commitment
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_PACKAGE,
    SCHEDULE_MODE_VOLUME,
    ClassFactor,
    Commitment,
    ContextBand,
    Price,
    PriceBook,
    Schedule,
    TenantUpsert,
    Tier,
    UnitPrice,
)
from billing.v1.usage_pb2 import SERVICE_CLASS_BATCH
from sinks.recompute import Recomputed
from stream_processors.local_store import Acknowledged, LocalStore
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage

if TYPE_CHECKING:
    from pathlib import Path

A, B = tenants_in(1, 2)
DAY_MS = 86_400_000
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
GRADUATED = Schedule(
    quantity="output_tokens",
    mode=SCHEDULE_MODE_GRADUATED,
    free_units=5,
    tiers=[Tier(up_to_units=20, unit_pico=10), Tier(unit_pico=4)],
)
PRICES = (
    Price(
        model="smollm2",
        uncached_input_pico=2,
        schedules=[GRADUATED],
        context_bands=[ContextBand(above_tokens=1_000, prices=[UnitPrice(quantity="output_tokens", unit_pico=100)])],
        class_factors=[ClassFactor(service_class=SERVICE_CLASS_BATCH, factor_millionths=500_000)],
    ),
    Price(model="smollm2", tenant_id=B, output_pico=1, minimum_pico=50),
)


def ledger(currency: str = "USD") -> Ledger:
    made = Ledger()
    made.command(price_book=PriceBook(version=1, currency=currency, prices=PRICES))
    made.command(tenant_upsert=TenantUpsert(tenant_id=A, currency=currency, calendar=SHANGHAI))
    made.command(tenant_upsert=TenantUpsert(tenant_id=B, currency=currency))
    return made


def used(request_id: str, tenant_id: str = A, output: int = 10, **fields: object) -> bytes:
    return batch([usage(request_id, tenant_id, uncached_input_tokens=0, output_tokens=output, **fields)])


def test_each_unit_pays_its_tier_and_the_record_states_the_counter() -> None:
    made = ledger()
    costs = []
    for number in range(4):
        record = made.usage(used(f"r{number}")).record
        costs.append(record.usage.cost_pico_low[0])
        [stated] = record.quantities
        assert (stated.tenant_id, stated.price_version, stated.price_line) == (A, 1, 1)
        assert [(entry.quantity, entry.units) for entry in stated.units] == [("output_tokens", 10 * (number + 1))]
    # 5 free and 5 at 10; 10 at 10; 5 at 10 and 5 at 4; 10 at 4.
    assert costs == [50, 100, 70, 40]
    assert made.state.accounts[A].spend_pico == 260
    assert made.replayed().digest() == made.state.digest()


def test_long_context_and_batch_have_their_prices_and_counters_of_their_own() -> None:
    made = ledger()
    long = made.usage(used("long", context_tokens=1_001)).record
    assert list(long.usage.cost_pico_low) == [1_000]
    assert not long.quantities
    half = made.usage(used("half", service_class=SERVICE_CLASS_BATCH)).record
    assert list(half.usage.cost_pico_low) == [25]
    assert list(made.usage(used("whole")).record.usage.cost_pico_low) == [50]
    # A tenant's own line wins, and its minimum lifts a small request.
    assert list(made.usage(used("own", B)).record.usage.cost_pico_low) == [50]
    assert list(made.usage(used("own-large", B, output=70)).record.usage.cost_pico_low) == [70]


def test_one_batch_or_many_charge_the_same_across_minutes_and_projects() -> None:
    events = [
        usage(f"r{n}", A, uncached_input_tokens=0, output_tokens=7, project_id=f"p{n % 3}", ended_ms=NOW_MS - n % 2 * 60_000,
              started_ms=NOW_MS - 120_000)
        for n in range(9)
    ]  # fmt: skip
    whole, single = ledger("CNY"), ledger("CNY")
    record = whole.usage(batch(events)).record
    for event in reversed(events):
        single.usage(batch([event]))
    assert whole.state.accounts[A].spend_pico == single.state.accounts[A].spend_pico == sum(record.usage.cost_pico_low)
    assert sum(from_amount(total.cost) for total in record.totals) == whole.state.accounts[A].spend_pico
    assert list(whole.state.quantities.all()) == list(single.state.quantities.all())


def test_a_month_begins_at_the_tenants_midnight() -> None:
    made = ledger()
    month = month_of(NOW_MS)
    start_ms = month_start_ms(month + 1) - 8 * 3_600_000
    for number, ended_ms in enumerate((start_ms - 1, start_ms)):
        record = made.usage(used(f"r{number}", started_ms=ended_ms, ended_ms=ended_ms), ended_ms).record
        assert list(record.usage.cost_pico_low) == [50]
        assert (record.quantities[0].period_end_ms == start_ms) == (number == 0)
    assert made.replayed().digest() == made.state.digest()


def test_a_period_that_has_begun_keeps_its_bounds() -> None:
    made = ledger()
    made.usage(used("r"))
    refused = made.command(tenant_upsert=TenantUpsert(tenant_id=A, calendar=Calendar(time_zone="UTC"))).record.command
    assert "has usage" in refused.refusal
    later = month_of(NOW_MS) + 2
    moved = Calendar(time_zone="UTC", from_month=[0, later], offset_minutes=[480, 0])
    assert made.command(tenant_upsert=TenantUpsert(tenant_id=A, calendar=moved)).record.command.applied
    assert made.state.accounts[A].calendar == moved
    assert same_through(SHANGHAI, moved, later - 1) is False
    assert made.replayed().digest() == made.state.digest()


def test_a_period_that_has_begun_before_utcs_month_keeps_its_bounds() -> None:
    """In Shanghai the month has begun; its tiers would have begun again within it."""
    made = ledger()
    month = month_of(NOW_MS) + 1
    at_ms = month_start_ms(month) - 3_600_000
    made.usage(used("r", ended_ms=at_ms), at_ms)
    moved = Calendar(time_zone="UTC", from_month=[0, month + 1], offset_minutes=[480, 0])
    assert "has usage" in made.command(at_ms, tenant_upsert=TenantUpsert(tenant_id=A, calendar=moved)).record.command.refusal


def test_the_audit_rates_the_same_and_names_a_counter_that_was_changed() -> None:
    made = ledger()
    events = [usage(f"r{n}", A, output_tokens=7, project_id=f"p{n % 3}") for n in range(9)]
    made.usage(batch(events))
    changed = made.usage(used("last")).record
    for wrong in (False, True):
        recomputed = Recomputed(made.state.partition)
        for record in made.records()[:-1]:
            recomputed.take(record)
        if wrong:
            changed.quantities[0].units[0].units += 1
        recomputed.take(changed)
        assert [finding.kind for finding in recomputed.findings] == (["quantities_differ"] if wrong else [])


def test_a_restart_keeps_the_counters_and_a_year_lets_them_go(tmp_path: Path) -> None:
    made = ledger()
    for number in range(3):
        made.usage(used(f"r{number}"))
    store = LocalStore(tmp_path, made.state.partition)
    records = zip(made.records(), made.stored, strict=True)
    store.apply([Acknowledged(record, stored, offset) for offset, (record, stored) in enumerate(records)])
    loaded = store.load()
    assert loaded is not None
    assert list(loaded.quantities.all()) == list(made.state.quantities.all())
    assert loaded.digest(with_memory=False) == made.state.digest(with_memory=False)
    made.tick(NOW_MS + 500 * DAY_MS)
    assert not list(made.state.quantities.all())
    store.apply([Acknowledged(made.records()[-1], made.stored[-1], 99)])
    again = store.load()
    assert again is not None
    assert not list(again.quantities.all())
    store.close()


def test_committed_spend_is_what_the_periods_first_book_says() -> None:
    books = PriceBooks(
        [
            PriceBook(
                version=1,
                currency="CNY",
                prices=PRICES,
                commitments=[Commitment(tenant_id=A, amount=to_amount(10**15))],
            )
        ]
    )
    period = period_at(SHANGHAI, NOW_MS)
    missing = commitment(books, A, "CNY", period, 10**15 - 7)
    assert missing is not None
    assert missing.amount_pico == 7
    assert commitment(books, A, "CNY", period, 10**15) is None
    assert commitment(books, B, "CNY", period, 0) is None
    assert commitment(books, A, "CNY", Period(-1, 0), 0) is None


@pytest.mark.parametrize(
    ("price", "names"),
    [
        (Price(model="m", output_pico=1, schedules=[GRADUATED]), "has a flat price too"),
        (Price(model="m", minimum_pico=1, schedules=[GRADUATED]), "depend on the order"),
        (Price(model="m", schedules=[GRADUATED, GRADUATED]), "has a schedule already"),
        (Price(model="m", output_pico=3, class_factors=[ClassFactor(service_class=3, factor_millionths=500_000)]), "no whole"),
        (
            Price(model="m", service_class=2, class_factors=[ClassFactor(service_class=3, factor_millionths=10**6)]),
            "never apply",
        ),
        (
            Price(
                model="m",
                schedules=[
                    Schedule(
                        quantity="output_tokens",
                        mode=SCHEDULE_MODE_VOLUME,
                        tiers=[Tier(up_to_units=5, unit_pico=2), Tier(up_to_units=5, unit_pico=1), Tier(up_to_units=9)],
                    )
                ],
            ),
            "leaves a gap",
        ),
        (Price(model="m", schedules=[Schedule(quantity="x", mode=SCHEDULE_MODE_PACKAGE)]), "package_units: 0"),
        (Price(model="m", context_bands=[ContextBand(above_tokens=0)]), "above_tokens: 0"),
    ],
)
def test_a_book_that_would_not_be_exact_is_refused(price: Price, names: str) -> None:
    [*problems] = book_problems(PriceBook(version=1, currency="USD", prices=[price]))
    assert any(names in problem for problem in problems), problems
    assert all(problem.startswith("prices[1].") for problem in problems)
