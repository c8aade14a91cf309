"""The audit says nothing about a database that is right, and names what was changed in one that is not."""

from __future__ import annotations

import json
from contextlib import closing

import pytest
from typer.testing import CliRunner

from billing.v1.command_pb2 import Price, PriceBook, TenantUpsert
from billing.v1.usage_pb2 import OUTCOME_REJECTED
from sinks.audit import audit
from sinks.day_totals import DAY_S, sum_days
from sinks.embedded import LoopbackServer
from sinks.engines.chdb import ChdbEngine
from sinks.engines.loopback import LoopbackEngine
from sinks.follow import feed
from taximeter.cli import application
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

ONE, TWO = tenants_in(1)[:2]
TOKEN = "t" * 32


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
            "INSERT INTO usage_events SELECT * REPLACE ('new' AS request_id) FROM usage_events AS e WHERE e.request_id = 'a3'",
            "event_unknown",
        ),
        (f"ALTER TABLE usage_totals DELETE WHERE tenant_id = '{ONE}' AND events = 1", "window_missing"),
        (f"ALTER TABLE usage_totals UPDATE cost = cost * 2 WHERE tenant_id = '{ONE}'", "window_differs"),
        (
            "INSERT INTO usage_totals SELECT * REPLACE (opened_sequence + 1 AS opened_sequence) FROM usage_totals LIMIT 1",
            "window_unknown",
        ),
        (f"ALTER TABLE usage_by_minute DELETE WHERE tenant_id = '{ONE}' AND events = 1", "minute_missing"),
        (f"ALTER TABLE usage_by_minute UPDATE cost = cost * 2 WHERE tenant_id = '{ONE}'", "minute_differs"),
        (f"ALTER TABLE usage_by_minute UPDATE input_tokens_all = 1 WHERE tenant_id = '{ONE}'", "minute_differs"),
        (f"ALTER TABLE usage_by_minute UPDATE gpu_ms = 1 WHERE tenant_id = '{TWO}'", "minute_differs"),
        (
            "INSERT INTO usage_by_minute SELECT * REPLACE (price_version + 9 AS price_version) FROM usage_by_minute LIMIT 1",
            "minute_unknown",
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


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE usage_days UPDATE cost = cost + 1 WHERE tenant_id = '{one}' SETTINGS mutations_sync = 2",
        "ALTER TABLE usage_days DELETE WHERE tenant_id = '{one}' SETTINGS mutations_sync = 2",
        "INSERT INTO usage_days SELECT * REPLACE ('other' AS project_id) FROM usage_days WHERE tenant_id = '{two}'",
    ],
)
def test_a_changed_day_is_named_while_readers_trust_it(engine: ChdbEngine, ledger: Ledger, change: str) -> None:
    ledger.tick(NOW_MS + 2 * DAY_S * 1_000)
    feed(engine, ledger.stored, KEYS.seal_key)
    assert sum_days(engine, [1])
    assert audit(engine, KEYS.seal_key).findings == []
    engine.execute(change.format(one=ONE, two=TWO))
    findings = audit(engine, KEYS.seal_key).findings
    assert {finding.kind for finding in findings} == {"day_differs"}
    # Late usage of both tenants: the sums of that day are believed by nobody any more.
    ledger.usage(batch([usage("later", ONE), usage("latest", TWO)]), NOW_MS + 2 * DAY_S * 1_000)
    feed(engine, ledger.stored, KEYS.seal_key)
    assert audit(engine, KEYS.seal_key).findings == []


def test_the_command_names_a_minute_that_was_changed_and_fails(engine: ChdbEngine, ledger: Ledger) -> None:
    feed(engine, ledger.stored, KEYS.seal_key)
    server = LoopbackServer(engine, TOKEN).start()
    values = {
        "clickhouse.loopback_port": server.url.rpartition(":")[2],
        "clickhouse.loopback_token": TOKEN,
        "ledger.seal_key": "s" * 32,
        "ledger.command_key": "c" * 32,
    }
    asks = ["audit", "--json", *(word for name, value in values.items() for word in ("--set", f"{name}={value}"))]
    with closing(server):
        clean = CliRunner().invoke(application(), asks)
        assert (clean.exit_code, json.loads(clean.stdout)["findings"]) == (0, [])
        engine.execute(f"ALTER TABLE usage_by_minute UPDATE events = 7 WHERE tenant_id = '{TWO}' SETTINGS mutations_sync = 2")
        found = CliRunner().invoke(application(), asks)
    assert found.exit_code == 1
    assert {(each["kind"], each["found"]) for each in json.loads(found.stdout)["findings"]} == {("minute_differs", "7")}


def test_a_tenant_that_changes_its_currency_is_clean(engine: ChdbEngine) -> None:
    changing = Ledger()
    changing.tenant(ONE)
    book = PriceBook(version=1, currency="EUR", prices=[Price(model="*", output_pico=5)])
    changing.command(price_book=book)
    changing.usage(batch([usage("free", ONE, outcome=OUTCOME_REJECTED)]))
    changing.command(tenant_upsert=TenantUpsert(tenant_id=ONE, currency="EUR"))
    changing.usage(batch([usage("paid", ONE)]))
    feed(engine, changing.stored, KEYS.seal_key)
    assert audit(engine, KEYS.seal_key).findings == []
    rows = engine.query("SELECT currency, sum(events) FROM usage_totals FINAL GROUP BY currency ORDER BY currency").rows
    assert [tuple(row) for row in rows] == [("EUR", 1), ("USD", 1)]


def test_events_that_are_looked_up_by_several_queries_are_all_compared(
    engine: ChdbEngine, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sinks.audit._PAGE_RECORDS", 2)
    monkeypatch.setattr("sinks.audit._EVENTS_PER_QUERY", 7)
    monkeypatch.setattr("sinks.audit._ID_BYTES_PER_QUERY", 40)
    feed(engine, ledger.stored, KEYS.seal_key)
    report = audit(engine, KEYS.seal_key)
    assert report.clean
    assert report.events == 25
    requests = [str(row[0]) for row in engine.query("SELECT request_id FROM usage_events FINAL").rows]
    engine.execute("ALTER TABLE usage_events DELETE WHERE 1 SETTINGS mutations_sync = 2")
    missing = [finding for finding in audit(engine, KEYS.seal_key).findings if finding.kind == "event_missing"]
    assert sorted(finding.subject.rpartition("/")[2] for finding in missing) == sorted(requests)


def test_ids_that_grow_when_they_are_written_fit_into_a_query(engine: ChdbEngine) -> None:
    long = Ledger()
    long.tenant(ONE)
    long.usage(batch([usage("'" * 250 + f"{number:03d}", ONE) for number in range(450)]))
    feed(engine, long.stored, KEYS.seal_key)
    report = audit(engine, KEYS.seal_key)
    assert report.findings == []
    assert report.events == 450


def test_a_forged_record_is_named(engine: ChdbEngine, ledger: Ledger) -> None:
    feed(engine, ledger.stored, None)
    [finding] = [finding for finding in audit(engine, b"another key" * 3).findings if finding.kind == "record_unreadable"]
    assert "seal" in finding.found
