"""One database for all of these tests of a process; each test finds its tables empty."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.amounts import to_amount
from billing.v1.command_pb2 import CreditGrant
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from sinks.embedded import LoopbackServer
from sinks.engines.chdb import ChdbEngine
from sinks.engines.loopback import LoopbackEngine
from sinks.migrate import migrate
from tests.billing.ledgers import NOW_MS, Ledger, batch, tenants_in, usage
from tests.sinks.emptying import empty_tables

HOUR_MS = 3_600_000


@pytest.fixture(scope="session")
def _migrated(chdb_folder: Path) -> Iterator[ChdbEngine]:
    engine = ChdbEngine(chdb_folder, "tests", threads=1)
    migrate(engine)
    yield engine
    engine.close()


@pytest.fixture
def engine(_migrated: ChdbEngine) -> ChdbEngine:
    """A database with this version's schema and nothing in it."""
    empty_tables(_migrated)
    return _migrated


@pytest.fixture
def loopback(engine: ChdbEngine) -> Iterator[LoopbackEngine]:
    """The same database, asked as another process would."""
    token = secrets.token_urlsafe(32)
    server = LoopbackServer(engine, token).start()
    yield LoopbackEngine(server.url, token)
    server.close()


@pytest.fixture
def ledger() -> Ledger:
    """Everything that the audit looks at: windows let go and opened again, duplicates, conflicts, free and unrated usage."""
    one, two = tenants_in(1)[:2]
    ledger = Ledger()
    ledger.price()
    for tenant_id in (one, two):
        ledger.tenant(tenant_id)
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(10**12), currency="USD"))
    first = batch([usage(f"a{number}", one, output_tokens=number) for number in range(20)], "p", 1, 20)
    ledger.usage(first)
    ledger.usage(first)
    ledger.usage(batch([usage("a1", one, output_tokens=999), usage("b1", two), usage("bad", two, model="")], "p", 21, 23))
    ledger.usage(batch([usage("free", two, outcome=OUTCOME_REJECTED), usage("odd", two, model="unpriced")]))
    ledger.usage(batch([usage("units", two, units=[UnitQuantity(unit="characters", quantity=7)])]))
    ledger.tick(NOW_MS + HOUR_MS)
    # Late usage: the window was let go, so a second one opens for the same minute.
    ledger.usage(batch([usage("late", one)]), NOW_MS + HOUR_MS)
    return ledger
