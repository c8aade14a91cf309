"""A database made anew of a restored ledger: balances, usage and invoices are what they were, to the byte; it is proved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.founding import LedgerSettings
from sinks import queries
from sinks.anchors import append_heads, read_anchors
from sinks.audit import audit
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.invoices import invoices_of
from sinks.settings import SinkSettings
from stream_processors import ledger_restore
from stream_processors.ledger_backup import take
from stream_processors.settings import KafkaSettings, TopicSettings
from stream_processors.topics import ApplySettings
from taximeter.embedded.broker import TansuBroker, TansuSettings
from tests.billing.ledgers import NOW_MS, PARTITIONS, SEAL_KEY, Ledger
from tests.sinks.emptying import empty_tables
from tests.sinks.test_invoices import ONE, TWO, invoiced_ledger
from tests.sinks.test_loop import WAIT_S, running
from tests.stream_processors.ledger_port import TOPIC, LedgerPort


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster that has nothing."""
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "empty.log"))
    broker.start()
    yield broker.bootstrap
    broker.stop()


def told(engine: ChdbEngine) -> tuple[object, ...]:
    """What people are told, without the places of records."""
    balances = [
        (each.tenant_id, each.currency, each.credit_pico, each.spend_pico, each.events) for each in queries.balances(engine)
    ]
    invoices = [each.stored for tenant_id in (ONE, TWO) for each in invoices_of(engine, tenant_id)]
    usage = engine.query("SELECT tenant_id, request_id, cost FROM usage_events FINAL ORDER BY 1, 2").rows
    return balances, invoices, queries.totals(engine), usage


def test_a_restored_ledger_gives_the_same_balances_and_invoices(engine: ChdbEngine, empty: str, tmp_path: Path) -> None:
    invoiced = invoiced_ledger()
    port = LedgerPort([Ledger(0), invoiced, Ledger(2), Ledger(3)])
    feed(engine, invoiced.stored, SEAL_KEY)
    append_heads(tmp_path / "anchors", engine, SEAL_KEY, NOW_MS)
    before = told(engine)
    asyncio.run(take(port, TOPIC, PARTITIONS, SEAL_KEY, tmp_path / "backup", NOW_MS))

    empty_tables(engine)
    settings = ApplySettings(
        kafka=KafkaSettings(empty),
        topics=TopicSettings(partitions=PARTITIONS),
        ledger=LedgerSettings(partitions=PARTITIONS, dedupe_key=b"k" * 32),
        seal_key=SEAL_KEY,
    )
    asyncio.run(ledger_restore.restore(settings, tmp_path / "backup", inputs_kept=False, on_record=lambda *_: None))
    with running(SinkSettings(empty, seal_key=SEAL_KEY, linger_ms=20), engine):
        deadline = time.monotonic() + WAIT_S
        while [each.ledger_offset for each in queries.freshness(engine)] != [len(stored) for stored in port.stored]:
            assert time.monotonic() < deadline, queries.freshness(engine)
            time.sleep(0.1)
    assert told(engine) == before
    report = audit(engine, SEAL_KEY, anchors=read_anchors(tmp_path / "anchors", SEAL_KEY))
    assert report.findings == []
    assert (report.invoices, report.anchors) == (3, 1)
