"""The audit says nothing about a database that is right, and names what was changed in one that is not."""

from __future__ import annotations

import pytest

from billing.amounts import to_amount
from billing.v1.command_pb2 import CreditGrant
from billing.v1.usage_pb2 import OUTCOME_REJECTED, UnitQuantity
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.engines.loopback import LoopbackEngine
from sinks.follow import feed
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

ONE, TWO, _ = tenants_in(1)
HOUR_MS = 3_600_000


@pytest.fixture
def ledger() -> Ledger:
    """Everything that the audit looks at: windows let go and opened again, duplicates, conflicts, free and unrated usage."""
    ledger = Ledger()
    ledger.price()
    for tenant_id in (ONE, TWO):
        ledger.tenant(tenant_id)
        ledger.command(credit_grant=CreditGrant(tenant_id=tenant_id, amount=to_amount(10**12), currency="USD"))
    first = batch([usage(f"a{number}", ONE, output_tokens=number) for number in range(20)], "p", 1, 20)
    ledger.usage(first)
    ledger.usage(first)
    ledger.usage(batch([usage("a1", ONE, output_tokens=999), usage("b1", TWO), usage("bad", TWO, model="")], "p", 21, 23))
    ledger.usage(batch([usage("free", TWO, outcome=OUTCOME_REJECTED), usage("odd", TWO, model="unpriced")]))
    ledger.usage(batch([usage("units", TWO, units=[UnitQuantity(unit="characters", quantity=7)])]))
    ledger.tick(NOW_MS + HOUR_MS)
    # Late usage: the window was let go, so a second one opens for the same minute.
    ledger.usage(batch([usage("late", ONE)]), NOW_MS + HOUR_MS)
    return ledger


def test_a_right_database_is_clean(engine: ChdbEngine, loopback: LoopbackEngine, ledger: Ledger) -> None:
    feed(engine, ledger.stored, KEYS.seal_key)
    report = audit(loopback, KEYS.seal_key)
    assert report.findings == []
    assert report.clean
    assert (report.records, report.events, report.accounts) == (len(ledger.stored), 25, 2)
    assert report.windows == 4


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("ALTER TABLE usage_events DELETE WHERE request_id = 'a3'", "event_missing"),
        ("ALTER TABLE usage_events UPDATE output_tokens = output_tokens + 1 WHERE request_id = 'a3'", "event_differs"),
        ("ALTER TABLE usage_events UPDATE cost = cost + 0.000000000001 WHERE request_id = 'a3'", "event_differs"),
        ("ALTER TABLE usage_events UPDATE sequence = 3 WHERE request_id = 'a3'", "charged_twice"),
        (
            "INSERT INTO usage_events SELECT * REPLACE ('made-up' AS request_id) FROM usage_events AS e "
            "WHERE e.request_id = 'a3'",
            "event_unknown",
        ),
        (f"ALTER TABLE usage_totals DELETE WHERE tenant_id = '{ONE}' AND events = 1", "window_missing"),
        (f"ALTER TABLE usage_totals UPDATE cost = cost * 2 WHERE tenant_id = '{ONE}'", "window_differs"),
        (
            "INSERT INTO usage_totals SELECT * REPLACE (opened_sequence + 1 AS opened_sequence) FROM usage_totals LIMIT 1",
            "window_unknown",
        ),
        (f"ALTER TABLE accounts UPDATE spend = spend - 1 WHERE tenant_id = '{TWO}'", "account_differs"),
        (f"ALTER TABLE accounts DELETE WHERE tenant_id = '{TWO}'", "account_missing"),
        ("INSERT INTO accounts SELECT * REPLACE ('nobody' AS tenant_id) FROM accounts LIMIT 1", "account_unknown"),
        ("ALTER TABLE ledger_records DELETE WHERE sequence = 6", "link_broken"),
        ("ALTER TABLE ledger_records UPDATE record = concat(record, 'x') WHERE sequence = 6", "hash_differs"),
        ("ALTER TABLE ledger_records UPDATE record_hash = '' WHERE sequence = 6", "hash_differs"),
        ("ALTER TABLE sink_positions UPDATE record_hash = 'ff' WHERE 1", "position_differs"),
    ],
)
def test_each_change_is_named(engine: ChdbEngine, ledger: Ledger, change: str, kind: str) -> None:
    feed(engine, ledger.stored, KEYS.seal_key)
    engine.execute(f"{change}{' SETTINGS mutations_sync = 2' if change.startswith('ALTER') else ''}")
    kinds = {finding.kind for finding in audit(engine, KEYS.seal_key).findings}
    assert kind in kinds, kinds


def test_a_forged_record_is_named(engine: ChdbEngine, ledger: Ledger) -> None:
    feed(engine, ledger.stored, None)
    [finding] = [finding for finding in audit(engine, b"another key" * 3).findings if finding.kind == "record_unreadable"]
    assert "seal" in finding.found
