"""A month of the Azure trace for 50 tenants in two currencies and two time zones is closed: the sums are equal, to the pico.

Σ invoices = Σ of what the ledger charged = Σ of what ClickHouse says. From the log alone, on an empty disk, the same bytes come
again. What is late after the close, and what is voided then, stands on the next invoices; the difference is zero in sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from billing import replay
from billing.amounts import PICO, from_amount, to_amount
from billing.chain import Chain
from billing.founding import LedgerSettings
from billing.invoice_checks import invoice_problems
from billing.line_parts import Parts, Sum, add_rated
from billing.period_lines import Line, LineKey
from billing.periods import month_of, period_at
from billing.rating import event_parts
from billing.state import LedgerState
from billing.step import CommandInput, UsageInput, step
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import (
    ADJUSTMENT_KIND_VOID,
    SCHEDULE_MODE_GRADUATED,
    SCHEDULE_MODE_VOLUME,
    Adjustment,
    ClassFactor,
    Commitment,
    ContextBand,
    CreditGrant,
    InvoiceFinalization,
    Price,
    PriceBook,
    Schedule,
    SignedCommand,
    TenantUpsert,
    Tier,
    UnitPrice,
)
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP, Invoice, TaxRate
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import (
    OPERATION_CHAT,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_BATCH,
    SERVICE_CLASS_STANDARD,
    UsageEvent,
)
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from stream_processors.local_store import Acknowledged, LocalStore
from taximeter.traces import read_trace, tenant_names
from tests.billing.ledgers import KEYS, Ledger, batch
from tests.taximeter.support import azure_trace

TENANTS = tenant_names(50)
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
MARCH, APRIL, MAY = 1_772_323_200_000, 1_775_001_600_000, 1_777_593_600_000
SHANGHAI = Calendar(time_zone="Asia/Shanghai", from_month=[0], offset_minutes=[480])
# Daylight saving time began on 8 March 2026.
LOS_ANGELES = Calendar(time_zone="America/Los_Angeles", from_month=[0, month_of(APRIL)], offset_minutes=[-8 * 60, -7 * 60])

DOLLARS = PriceBook(
    version=1,
    currency="USD",
    prices=[
        # $0.01 a million, cached at a tenth, batch at half.
        Price(
            model="cheap",
            uncached_input_pico=10_000,
            cache_read_pico=1_000,
            output_pico=40_000,
            class_factors=[ClassFactor(service_class=SERVICE_CLASS_BATCH, factor_millionths=500_000)],
        ),
        Price(
            model="long",
            uncached_input_pico=1_250_000,
            output_pico=10_000_000,
            context_bands=[
                ContextBand(
                    above_tokens=2_000,
                    prices=[
                        UnitPrice(quantity="uncached_input_tokens", unit_pico=2_500_000),
                        UnitPrice(quantity="output_tokens", unit_pico=15_000_000),
                    ],
                )
            ],
        ),
        Price(
            model="tiers",
            uncached_input_pico=150_000,
            schedules=[
                Schedule(
                    quantity="output_tokens",
                    mode=SCHEDULE_MODE_GRADUATED,
                    free_units=1_000,
                    tiers=[Tier(up_to_units=5_000, unit_pico=600_000), Tier(unit_pico=300_000)],
                )
            ],
        ),
    ],
    commitments=[Commitment(tenant_id=TENANTS[0], amount=to_amount(100 * PICO))],
)
YUAN = PriceBook(
    version=1,
    currency="CNY",
    prices=[
        # 0.02 yuan a thousand.
        Price(model="*", uncached_input_pico=20_000_000, output_pico=60_000_000),
        Price(
            model="tiers",
            uncached_input_pico=20_000_000,
            schedules=[
                Schedule(
                    quantity="output_tokens",
                    mode=SCHEDULE_MODE_VOLUME,
                    tiers=[Tier(up_to_units=3_000, unit_pico=60_000_000), Tier(unit_pico=40_000_000)],
                )
            ],
        ),
    ],
)


def in_yuan(tenant_id: str) -> bool:
    return tenant_id[-1] in "13579"


def month_events(rows_max: int) -> Iterator[UsageEvent]:
    """The trace over the whole of March, beginning before it and ending after it."""
    trace = read_trace(azure_trace())
    rows = trace.rows[:: max(1, len(trace.rows) // rows_max)]
    first_ms, last_ms = MARCH - DAY_MS, APRIL + DAY_MS
    for row in rows:
        at_ms = first_ms + row.after_ms * (last_ms - first_ms) // max(rows[-1].after_ms, 1)
        yield UsageEvent(
            request_id=trace.request_id(row, first_ms),
            tenant_id=trace.tenant(row, len(TENANTS)),
            project_id=f"project-{row.number % 2}",
            model=("cheap", "long", "tiers")[row.number % 3],
            operation=OPERATION_CHAT,
            service_class=SERVICE_CLASS_BATCH if row.number % 7 == 0 else SERVICE_CLASS_STANDARD,
            outcome=OUTCOME_COMPLETED,
            started_ms=at_ms,
            ended_ms=at_ms,
            uncached_input_tokens=row.context_tokens,
            cache_read_tokens=row.context_tokens // 3,
            output_tokens=row.generated_tokens,
        )


def opened() -> Ledger:
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    for book in (DOLLARS, YUAN):
        ledger.command(price_book=book)
    for tenant_id in TENANTS:
        currency, calendar = ("CNY", SHANGHAI) if in_yuan(tenant_id) else ("USD", LOS_ANGELES)
        ledger.command(tenant_upsert=TenantUpsert(tenant_id=tenant_id, currency=currency, calendar=calendar))
    grant = CreditGrant(tenant_id=TENANTS[2], currency="USD", amount=to_amount(PICO // 100))
    ledger.command(credit_grant=grant)
    return ledger


def use(ledger: Ledger, events: list[UsageEvent], size: int = 100) -> None:
    for start in range(0, len(events), size):
        part = events[start : start + size]
        ledger.usage(batch(part), max(event.ended_ms for event in part))


def close(ledger: Ledger, at_ms: int, month_ms: int) -> list[Invoice]:
    """Every tenant's invoice of the month in which `month_ms` lies."""
    drawn = []
    for tenant_id in TENANTS:
        account = ledger.state.accounts[tenant_id]
        said = InvoiceFinalization(
            tenant_id=tenant_id,
            period_start_ms=period_at(account.calendar, month_ms).start_ms,
            series_prefix="CN" if in_yuan(tenant_id) else "US",
            rounding_rule=ROUNDING_RULE_HALF_UP,
            currency_decimals=2,
            taxes=[TaxRate(name="VAT", rate_millionths=130_000)] if in_yuan(tenant_id) else [],
        )
        applied = ledger.command(log_time_ms=at_ms, invoice_finalization=said).record.command
        assert applied.applied, applied.refusal
        invoice = Invoice.FromString(applied.invoice)
        assert invoice_problems(invoice) == []
        drawn.append(invoice)
    return drawn


def void(ledger: Ledger, event: UsageEvent) -> None:
    """Take back what an event with a flat price was charged."""
    account = ledger.state.accounts[event.tenant_id]
    rate = ledger.state.books.rate(
        account.currency, event.ended_ms, event.model, event.operation, event.service_class, event.tenant_id
    )
    assert rate is not None
    assert rate.terms is None
    charged: Parts = {}
    add_rated(charged, event_parts(event, rate, {}), 32)
    command_id = f"void-{event.request_id}"
    period = period_at(account.calendar, event.ended_ms)
    key = LineKey(
        event.tenant_id,
        period,
        account.currency,
        event.project_id,
        event.model,
        event.operation,
        event.service_class,
        rate.version,
        command_id,
    )
    line = Line(key, b"", 0)
    line.add_parts({name: Sum(-part.units, -part.amount_pico) for name, part in charged.items()})
    said = Adjustment(
        tenant_id=event.tenant_id,
        kind=ADJUSTMENT_KIND_VOID,
        currency=account.currency,
        lines=[line.to_line()],
        corrected_request_ids=[event.request_id],
    )
    applied = ledger.command(
        log_time_ms=APRIL + 3 * DAY_MS, command_id=command_id, issuer="ann", reason="counted wrongly", adjustment=said
    ).record.command
    assert applied.applied, applied.refusal


def sums(invoices: list[Invoice]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for invoice in invoices:
        found[invoice.tenant_id] += from_amount(invoice.net_exact)
    return found


def still_to_come(ledger: Ledger) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for line in ledger.state.lines:
        found[line.key.tenant_id] += line.cost_pico
    for key, window in ledger.state.windows.items():
        found[key.tenant_id] += window.cost_pico
    return found


def rebuilt(stored: list[bytes], through: int, folder: Path) -> LedgerState:
    """The state after that record, from the log alone, on an empty disk."""
    store = LocalStore(folder, 0)
    chain = Chain(0, KEYS.seal_key)
    state = LedgerState(store.seen)
    for each in stored[: through + 1]:
        record = chain.accept(each)
        assert record is not None
        replay.apply(state, record, each)
        store.apply([Acknowledged(record, each, 0)])
    store.close()
    again = LocalStore(folder, 0)
    loaded = again.load()
    assert loaded is not None
    assert loaded.digest(with_memory=False) == state.digest(with_memory=False)
    return loaded


def drawn_again(state: LedgerState, stored: list[bytes], after: int) -> list[bytes]:
    """The records that the step makes of the same inputs."""
    made = []
    for each in stored[after + 1 :]:
        record = LedgerRecord.FromString(each)
        source = record.WhichOneof("source")
        offset = {position.topic: position.offset for position in record.inputs}
        if source == "usage":
            given: UsageInput | CommandInput = UsageInput("usage.events", offset["usage.events"], record.usage.batch)
        else:
            value = SignedCommand(command=record.command.command, signature=record.command.signature).SerializeToString()
            given = CommandInput("billing.commands", offset["billing.commands"], value)
        made.append(step(state, given, record.log_time_ms, keys=KEYS, writer="test").stored)
    return made


@pytest.mark.timeout(900)
def test_a_month_is_closed_to_the_pico_and_comes_again_from_the_log(engine: ChdbEngine, tmp_path: Path) -> None:
    ledger = opened()
    events = list(month_events(rows_max=20_000))
    late = [event for number, event in enumerate(events) if number % 40 == 0 and event.ended_ms < APRIL - DAY_MS]
    names = {event.request_id for event in late}
    use(ledger, [event for event in events if event.request_id not in names])
    before = len(ledger.stored) - 1
    february = close(ledger, APRIL + 2 * DAY_MS, MARCH - DAY_MS)
    march = close(ledger, APRIL + 2 * DAY_MS, MARCH + 5 * DAY_MS)
    assert {line.part.terms for invoice in march for line in invoice.lines} >= {
        "",
        "free",
        "tier 1",
        "context over 2,000 tokens",
        "at the close",
    }
    # Late, after the close.
    late.sort(key=lambda event: event.ended_ms)
    for start in range(0, len(late), 100):
        ledger.usage(batch(late[start : start + 100]), APRIL + 3 * DAY_MS)
    in_time = [event for event in events if event.ended_ms < APRIL - DAY_MS and event.request_id not in names]
    flat = [event for event in in_time if event.model == "cheap"]
    voided = flat[len(flat) // 2 :: 200]
    for event in voided:
        void(ledger, event)
    april = close(ledger, MAY + DAY_MS, APRIL + 5 * DAY_MS)

    spend = {tenant_id: account.spend_pico for tenant_id, account in ledger.state.accounts.items()}
    invoiced = sums([*february, *march, *april])
    assert still_to_come(ledger) == {}
    assert invoiced == spend
    adjusted = [line for invoice in april for line in invoice.lines if line.adjustment]
    assert any(not line.key.adjustment_id for line in adjusted)
    assert len({line.key.adjustment_id for line in adjusted if line.key.adjustment_id}) == len(voided)
    assert all(line.key.period_start_ms < APRIL - DAY_MS for line in adjusted)

    feed(engine, ledger.stored, KEYS.seal_key)
    [*rows] = engine.query("SELECT tenant_id, currency, sum(cost) FROM usage_totals FINAL GROUP BY tenant_id, currency").rows
    metered = {str(tenant_id): cost for tenant_id, _, cost in rows}
    # What the close added and what was voided was never metered.
    closed: dict[str, int] = defaultdict(int)
    for invoice in (*february, *march, *april):
        closed[invoice.tenant_id] += sum(
            from_amount(line.part.amount)
            for line in invoice.lines
            if line.part.terms == "at the close" or line.key.adjustment_id
        )
    in_clickhouse = {tenant_id: int(Decimal(str(metered.get(tenant_id, 0))) * PICO) + closed[tenant_id] for tenant_id in spend}
    assert in_clickhouse == spend
    [*rows] = engine.query("SELECT tenant_id, sum(net_exact) FROM invoices FINAL GROUP BY tenant_id").rows
    assert {str(tenant_id): int(Decimal(str(net)) * PICO) for tenant_id, net in rows} == spend

    again = rebuilt(ledger.stored, before, tmp_path / "empty")
    assert drawn_again(again, ledger.stored, before) == ledger.stored[before + 1 :]

    report = audit(engine, KEYS.seal_key)
    assert report.findings == []
    assert report.invoices == 3 * len(TENANTS)
