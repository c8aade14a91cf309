"""Balance and month-to-date by project and model, asked of 20 million events of 1,000 tenants: p99 over tenants.

chDB holds the minute totals and the accounts as the sink would have written them for the events of a month; the largest of
the tenants has 3 % of the events. What is asked is what `taximeter balance` and `taximeter usage` ask: totals and accounts, no
event. The totals are made in SQL from 20 million numbered events, for the sink itself would take a quarter of an hour. It is
the month's last day; those before it are summed as the sink does now and then, and since then late usage came to every third
day of each hundredth tenant.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Measurement
from sinks import queries
from sinks.day_totals import sum_days
from sinks.engines.chdb import ChdbEngine
from sinks.migrate import migrate

EVENTS = int(os.environ.get("TAXIMETER_BENCH_EVENTS", "20000000"))
TENANTS, DAYS, PROJECTS, MODELS = 1_000, 30, 3, 4
# 2026-03-01, UTC.
MONTH_START_S = 1_772_323_200
ASKED = 400

# One event a number: its tenant (few have most), minute, project, model and tokens follow from the number alone. Hardly two
# meet in a minute of the same names, so each has a window of its own: the most rows that there can be.
_TOTALS = """
INSERT INTO usage_totals (tenant_id, minute, project_id, model, operation, service_class, generation, opened_sequence,
    price_version, events, uncached_input_tokens, output_tokens, cost, currency, sequence, version)
SELECT
    concat('tenant-', toString(toUInt32({tenants} * pow((cityHash64(number, 1) % 1000003) / 1000003, 2)))),
    toDateTime({start} + 86400 * {day} + 60 * (cityHash64(number, 2) % 1440), 'UTC'),
    concat('project-', toString(cityHash64(number, 3) % {projects})),
    concat('model-', toString(cityHash64(number, 4) % {models})),
    'chat', 'standard', 'bench', number, 1, 1,
    200 + cityHash64(number, 5) % 2000 AS input,
    20 + cityHash64(number, 6) % 500 AS output,
    CAST(input * 150000 + output * 600000 AS Decimal(38, 12)) / 1000000000000, 'USD', {version}, {version}
FROM numbers({first}, {count})
"""
_POSITION = f"""
INSERT INTO sink_positions (ledger_partition, generation, sequence, log_time, version)
SELECT 0, 'bench', {DAYS}, toDateTime64({MONTH_START_S + DAYS * 86_400 - 1}, 3), {DAYS}
"""
_LATE = f"""
INSERT INTO usage_totals SELECT * REPLACE ({EVENTS} AS opened_sequence, {DAYS + 1} AS sequence, {DAYS + 1} AS version)
FROM usage_totals WHERE toUInt32(substring(tenant_id, 8)) % 100 = 0 AND toDayOfMonth(minute) % 3 = 0
LIMIT 1 BY tenant_id, toDayOfMonth(minute)
"""
# As the sink states it beside the minutes.
_STATED = """
INSERT INTO usage_days_stated SELECT tenant_id, toStartOfDay(minute), ledger_partition, max(version) FROM usage_totals
GROUP BY tenant_id, toStartOfDay(minute), ledger_partition
"""
_ACCOUNTS = """
INSERT INTO accounts (tenant_id, status, currency, credit, spend, events, version)
SELECT tenant_id, 'active', 'USD', 1000, sum(cost), sum(events), 1 FROM usage_totals GROUP BY tenant_id
"""


def run() -> list[Measurement]:
    """Measure."""
    with tempfile.TemporaryDirectory(prefix="month-") as folder:
        engine = ChdbEngine(Path(folder), "bench")
        try:
            migrate(engine)
            return _measure(engine)
        finally:
            engine.close()


def build(engine: ChdbEngine) -> tuple[float, float, int]:
    """Fill the database; the seconds that it took to make the minutes and to sum the days, and how many sums that gave."""
    began = time.perf_counter()
    for day in range(DAYS):
        count = EVENTS // DAYS
        engine.execute(
            _TOTALS.format(
                tenants=TENANTS,
                start=MONTH_START_S,
                version=day + 1,
                day=day,
                projects=PROJECTS,
                models=MODELS,
                first=day * count,
                count=count,
            )
        )
    engine.execute(_STATED)
    engine.execute(_ACCOUNTS)
    engine.execute(_POSITION)
    built_s = time.perf_counter() - began
    began = time.perf_counter()
    days = sum_days(engine, (0,))
    summed_s = time.perf_counter() - began
    engine.execute(_LATE)
    engine.execute(_STATED)
    return built_s, summed_s, days


def _measure(engine: ChdbEngine) -> list[Measurement]:
    built_s, summed_s, days = build(engine)
    [[rows, events]] = engine.query("SELECT count(), sum(events) FROM usage_totals", timeout_s=120.0).rows
    assert isinstance(rows, int)
    assert isinstance(events, int)
    assert events > EVENTS // DAYS * DAYS
    [*known] = engine.query("SELECT tenant_id FROM accounts FINAL ORDER BY tenant_id").rows
    asked = random.Random(1).choices([str(tenant_id) for [tenant_id] in known], k=ASKED)

    def month_to_date(tenant_id: str) -> None:
        found = queries.usage(engine, tenant_id, ("project", "model"), MONTH_START_S * 1_000)
        assert len(found) <= PROJECTS * MODELS

    def balance(tenant_id: str) -> None:
        [found] = queries.balances(engine, tenant_id)
        assert found.spend_pico > 0

    return [
        Measurement(f"month: minute totals of {EVENTS:,} events", rows, "rows"),
        Measurement("month: to build them", built_s, "s"),
        Measurement("month: totals of days", days, "rows"),
        Measurement("month: to sum 29 days of all tenants at once", summed_s, "s"),
        *_times("balance", balance, asked),
        *_times("month-to-date by project and model", month_to_date, asked),
    ]


def _times(name: str, ask: Callable[[str], None], asked: list[str]) -> list[Measurement]:
    for tenant_id in asked[:20]:
        ask(tenant_id)
    times_ms = []
    for tenant_id in asked:
        began = time.perf_counter()
        ask(tenant_id)
        times_ms.append((time.perf_counter() - began) * 1_000)
    return [
        Measurement(f"month: {name}, median", statistics.median(times_ms), "ms"),
        Measurement(f"month: {name}, p99", statistics.quantiles(times_ms, n=100)[98], "ms", target="< 50"),
    ]
