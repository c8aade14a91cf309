"""One database for the API's tests of a process, emptied where a test wants its own world."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from billing.amounts import to_amount
from billing.v1.account_pb2 import Calendar
from billing.v1.command_pb2 import BudgetUpsert, CreditGrant, InvoiceFinalization, Price, ProjectUpsert, TenantUpsert
from billing.v1.invoice_pb2 import ROUNDING_RULE_HALF_UP
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from sinks.engines.chdb import ChdbEngine
from sinks.migrate import migrate
from tests.billing.ledgers import NOW_MS, PRICES, Ledger, batch, tenants_in, usage
from tests.serving.api.worlds import World
from tests.sinks.emptying import empty_tables

A, B, C = tenants_in(1)
BERLIN = Calendar(time_zone="Europe/Berlin", from_month=[0], offset_minutes=[60])
DAY_MS = 86_400_000


@pytest.fixture(scope="session")
def api_engine(chdb_folder: Path) -> Iterator[ChdbEngine]:
    engine = ChdbEngine(chdb_folder, "api", threads=1)
    migrate(engine)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def empty_engine(api_engine: ChdbEngine) -> Callable[[], ChdbEngine]:
    """The database with nothing in it."""

    def empty() -> ChdbEngine:
        empty_tables(api_engine)
        return api_engine

    return empty


def small_ledger() -> Ledger:
    """Two tenants with everything that the API tells of: usage of two days, credit, a budget, alerts, invoices, own prices."""
    ledger = Ledger()
    own = Price(model="private", uncached_input_pico=1, tenant_id=A)
    ledger.price([*PRICES, own, Price(model="tts", unit_pico={"characters": 7})])
    ledger.command(tenant_upsert=TenantUpsert(tenant_id=A, display_name="Acme", currency="USD", calendar=BERLIN))
    ledger.tenant(B)
    for tenant_id in (A, B):
        grant = CreditGrant(tenant_id=tenant_id, amount=to_amount(5 * 10**12), currency="USD", grant_id="first")
        ledger.command(credit_grant=grant)
    ledger.command(project_upsert=ProjectUpsert(tenant_id=A, project_id="search", display_name="Search"))
    ledger.command(budget_upsert=BudgetUpsert(tenant_id=A, project_id="search", amount=to_amount(10**12)))
    events = [usage(f"a{number}", A, user_id="ann", project_id="search") for number in range(5)]
    events += [
        usage("late", A, ended_ms=NOW_MS - DAY_MS, started_ms=NOW_MS - DAY_MS, user_id="bob"),
        usage("speech", A, model="tts", units=[UnitQuantity(unit="characters", quantity=11)]),
        usage("no", A, outcome=OUTCOME_REJECTED),
        usage("b0", B),
    ]
    ledger.usage(batch(events, "p", 1, len(events)))
    ledger.usage(batch([usage("huge", A, uncached_input_tokens=10_000_000), usage("odd", B, model="unpriced")], "p", 10, 11))
    # The month is over: its invoice.
    later_ms = NOW_MS + 10 * DAY_MS
    for tenant_id, start_ms in ((A, 1_761_951_600_000), (B, 1_761_955_200_000)):
        said = InvoiceFinalization(
            tenant_id=tenant_id,
            period_start_ms=start_ms,
            series_prefix="INV",
            rounding_rule=ROUNDING_RULE_HALF_UP,
            currency_decimals=2,
        )
        drawn = ledger.command(later_ms, invoice_finalization=said).record.command
        assert drawn.applied, drawn.refusal
    return ledger


@pytest.fixture(scope="module")
def world(empty_engine: Callable[[], ChdbEngine]) -> Iterator[World]:
    """A world of the module's own."""
    made = World(empty_engine(), small_ledger())
    yield made
    made.calls.close()


@pytest.fixture
async def operator(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's client."""
    async with world.client(world.key("", "read", "admin")) as client:
        yield client


@pytest.fixture
async def tenant(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """B's client, which may only read."""
    async with world.client(world.key(B, "read")) as client:
        yield client
