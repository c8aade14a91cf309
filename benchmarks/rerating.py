"""Rating a month again under another price book: a million requests of 51 tenants in chDB on disk, half of them one tenant's.

Once where both books have flat prices (summed by the database), once where both have tiers, long-context prices and a batch
factor, so that every request is rated by itself twice, in the ledger's order. Nothing is written, as in a dry run. The baseline
is the database's own sum over the same rows.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.measure import Measurement
from billing.founding import LedgerSettings, found
from billing.periods import month_of, month_start_ms
from billing.replay import apply
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.account_pb2 import Account
from billing.v1.command_pb2 import (
    SCHEDULE_MODE_GRADUATED,
    ClassFactor,
    ContextBand,
    Price,
    PriceBook,
    Schedule,
    Tier,
    UnitPrice,
)
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.migrate import migrate
from sinks.price_books import alone
from sinks.rated_usage import Offer, Payer, payers, rated_usage

EVENTS = 1_000_000
TENANTS = 50
TARGET_S = 60
MONTH = 56 * 12
START_MS, END_MS = month_start_ms(MONTH), month_start_ms(MONTH + 1)
# Half of all requests are tenant-0's; versions rise in the order of the ledger.
_FILL = f"""
INSERT INTO usage_events (tenant_id, request_id, project_id, model, operation, service_class, outcome, started, ended,
    uncached_input_tokens, cache_read_tokens, output_tokens, context_tokens, currency, price_version, record_index, version)
SELECT if(number % 2 = 0, 'tenant-0', concat('tenant-', toString(1 + number % {TENANTS}))), lower(hex(sipHash128(number))),
    concat('project-', toString(number % 3)), concat('model-', toString(number % 4)), 'chat',
    if(number % 5 = 0, 'batch', 'standard'), 'completed', ended,
    fromUnixTimestamp64Milli(toInt64({START_MS} + number * 2500)) AS ended, 400 + number % 777, number % 300, 90 + number % 50,
    if(number % 10 = 0, 250000, 700), 'USD', 1, number % 500, bitShiftLeft(toUInt64(1), 40) + intDiv(number, 500)
FROM numbers({EVENTS})
"""


def _book(version: int, *, terms: bool) -> PriceBook:
    price = Price(model="*", uncached_input_pico=100_000 * version, cache_read_pico=10_000 * version)
    if terms:
        tiers = [Tier(up_to_units=10**6, unit_pico=400_000 * version), Tier(unit_pico=300_000)]
        price.schedules.append(Schedule(quantity="output_tokens", mode=SCHEDULE_MODE_GRADUATED, free_units=1_000, tiers=tiers))
        long = [UnitPrice(quantity="uncached_input_tokens", unit_pico=200_000 * version)]
        price.context_bands.append(ContextBand(above_tokens=200_000, prices=long))
        price.class_factors.append(ClassFactor(service_class=3, factor_millionths=500_000))
    else:
        price.output_pico = 400_000 * version
    return PriceBook(version=version, currency="USD", prices=[price])


def _filled(folder: Path) -> ChdbEngine:
    engine = ChdbEngine(folder)
    migrate(engine)
    state = LedgerState(MemorySeenKeys())
    settings = LedgerSettings(partitions=1, dedupe_key=b"d" * 32)
    record, stored = found(settings, 0, b"g" * 16, START_MS, b"s" * 32, "benchmark")
    apply(state, record, stored)
    feed(engine, [stored], b"s" * 32)
    engine.execute(_FILL)
    return engine


def _rate(engine: ChdbEngine, *, terms: bool) -> tuple[float, int]:
    """Seconds, and how many requests were rated, each under both books."""
    offers = Offer(alone(_book(1, terms=terms))), Offer(alone(_book(2, terms=terms)))
    begun = time.perf_counter()
    events = 0
    for number in range(TENANTS + 1):
        payer = Payer(f"tenant-{number}", "USD", Account().calendar)
        before, after = rated_usage(engine, payer, offers, START_MS, END_MS)
        assert before.events == after.events
        assert before.cost_pico < after.cost_pico or not before.events
        events += before.events
    return time.perf_counter() - begun, events


def run() -> list[Measurement]:
    """Seconds for a million requests under two books at once."""
    assert month_of(START_MS) == MONTH
    with tempfile.TemporaryDirectory() as folder:
        engine = _filled(Path(folder))
        assert not payers(engine), "what is measured asks nothing of accounts"
        begun = time.perf_counter()
        engine.query("SELECT tenant_id, sum(output_tokens) FROM usage_events FINAL GROUP BY tenant_id")
        plain_s = time.perf_counter() - begun
        rows = []
        for name, terms in (("flat prices", False), ("tiers and long context", True)):
            seconds, events = _rate(engine, terms=terms)
            assert events == EVENTS, events
            rows.append(
                Measurement(
                    f"re-rating: a million requests, {name}",
                    seconds,
                    "s",
                    "one sum over them by ClickHouse",
                    seconds / plain_s,
                    f"< {TARGET_S}",
                )
            )
        engine.close()
    return rows
