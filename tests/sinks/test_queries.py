"""What people ask, against rows that came from the ledger; through the process's own engine and over loopback alike."""

from __future__ import annotations

import http.client
import json
import secrets
import threading
from collections import Counter

import pytest

from billing.amounts import to_amount
from billing.v1.account_pb2 import KEY_SCOPE_METER, KEY_SCOPE_READ, ApiKey
from billing.v1.command_pb2 import CreditGrant, KeyUpsert, Price
from billing.v1.usage_pb2 import OUTCOME_BACKEND_ERROR, OUTCOME_REJECTED, UnitQuantity
from sinks import queries
from sinks.embedded import LoopbackServer
from sinks.engine import Reader
from sinks.engines.chdb import ChdbEngine
from sinks.engines.loopback import LoopbackEngine
from sinks.errors import EngineError, EngineUnavailable, ParameterError
from sinks.follow import feed
from sinks.price_books import price_books
from sinks.statement import statement
from tests.billing.ledgers import KEYS, NOW_MS, PRICES, Ledger, batch, tenants_in, usage

ONE, TWO, THREE = tenants_in(1)
MINUTE_MS = 60_000
START_MS = NOW_MS // MINUTE_MS * MINUTE_MS
# More than an int64 of pico holds.
MUCH_PICO = 10**25


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    ledger.price([*PRICES, Price(model="tts-*", unit_pico={"characters": 7})])
    ledger.price([Price(model="*", uncached_input_pico=1)], version=2, effective_ms=START_MS + MINUTE_MS)
    for tenant_id in (ONE, TWO):
        ledger.tenant(tenant_id)
    ledger.command(credit_grant=CreditGrant(tenant_id=ONE, amount=to_amount(MUCH_PICO), currency="USD"), reason="first")
    key = ApiKey(key_id="k1", tenant_id=ONE, secret_hash=b"h" * 32, scopes=[KEY_SCOPE_METER, KEY_SCOPE_READ])
    ledger.command(key_upsert=KeyUpsert(key=key))
    ledger.usage(
        batch(
            [
                usage("r1", ONE, user_id="ann", attributes={"team": "blue", "app": "x"}, region="eu"),
                usage("r2", ONE, user_id="bob", ended_ms=START_MS + MINUTE_MS, output_tokens=3),
                usage("r3", ONE, model="tts-1", operation=7, units=[UnitQuantity(unit="characters", quantity=11)]),
                usage("r4", ONE, outcome=OUTCOME_REJECTED, uncached_input_tokens=9_999),
                usage("r5", ONE, outcome=OUTCOME_BACKEND_ERROR),
                usage("r6", TWO),
            ],
            "p",
            1,
            6,
        )
    )
    conflict = usage("r1", ONE, output_tokens=77)
    ledger.usage(batch([usage("r6", TWO), conflict, usage("", TWO)], "p", 7, 9))
    ledger.usage(b"\xff not a batch")
    return ledger


@pytest.fixture(params=["chdb", "loopback"])
def reader(request: pytest.FixtureRequest, engine: ChdbEngine, ledger: Ledger) -> Reader:
    feed(engine, ledger.stored, KEYS.seal_key)
    chosen: Reader = engine if request.param == "chdb" else request.getfixturevalue("loopback")
    return chosen


def test_balances(reader: Reader) -> None:
    [two, one] = queries.balances(reader)
    assert queries.balances(reader, ONE) == [one]
    assert queries.balances(reader, "nobody") == []
    assert queries.balances(reader, "' OR 1 = 1 --") == []
    spend = 100 * 10_000 + 10 * 40_000 + 100 * 1 + 11 * 7
    assert (one.tenant_id, one.credit_pico, one.spend_pico) == (ONE, MUCH_PICO, spend)
    assert one.balance_pico == MUCH_PICO - spend
    assert (one.events, one.duplicates, one.conflicts) == (5, 0, 1)
    assert (two.events, two.duplicates, two.spend_pico) == (1, 1, 1_400_000)
    assert (one.status, one.currency, one.billing_mode, one.plan_id) == ("active", "USD", "prepaid", "test")


def test_usage_by_every_group(reader: Reader) -> None:
    [total] = queries.usage(reader, ONE, by=())
    assert (total.events, total.refused_events, total.unrated_events) == (5, 2, 0)
    assert total.quantities.uncached_input_tokens == 300
    assert total.quantities.input_tokens == 300
    assert total.quantities.units == {"characters": 11}
    for name in queries.USAGE_BY:
        rows = queries.usage(reader, ONE, by=(name,))
        assert sum(row.events for row in rows) == 5, name
        assert sum(row.cost_pico for row in rows) == total.cost_pico, name
        units: Counter[str] = Counter()
        for row in rows:
            units.update(row.quantities.units)
        assert units == {"characters": 11}, name
        assert sum(row.quantities.uncached_input_tokens for row in rows) == 300, name
    users = {row.group: row.events for row in queries.usage(reader, ONE, by=("user",))}
    assert users == {("",): 3, ("ann",): 1, ("bob",): 1}
    minutes = queries.usage(reader, ONE, by=("minute", "model"), start_ms=START_MS + MINUTE_MS)
    assert [(row.events, row.cost_pico) for row in minutes] == [(1, 100)]
    assert queries.usage(reader, by=("tenant",))[0].group == (min(ONE, TWO),)
    assert len(queries.usage(reader, by=("tenant",), limit=1, offset=1)) == 1
    with pytest.raises(ParameterError, match="choose each"):
        queries.usage(reader, by=("1; DROP TABLE accounts",))
    with pytest.raises(ParameterError, match="name the tenant"):
        queries.usage(reader, by=("user",))
    with pytest.raises(ParameterError, match="whole minutes"):
        queries.usage(reader, start_ms=1)


def test_events_and_rejected(reader: Reader, ledger: Ledger) -> None:
    [event] = queries.events(reader, ONE, ["r1", "r6"])
    assert (event.request_id, event.user_id, event.cost_pico, event.price_version) == ("r1", "ann", 1_400_000, 1)
    assert (event.outcome, event.operation, event.sequence, event.record_index) == ("completed", "generate", 7, 0)
    assert [event.request_id for event in queries.events(reader, ONE, limit=2)] == ["r1", "r3"]
    assert reader.query("SELECT attribute_names, attribute_values FROM usage_events WHERE request_id = 'r1'").rows == [
        (["app", "team"], ["x", "blue"])
    ]
    by_reason = {row.reason: row for row in queries.rejected(reader)}
    assert set(by_reason) == {"conflict", "invalid", "undecodable"}
    conflict = by_reason["conflict"]
    assert conflict.payload == usage("r1", ONE, output_tokens=77).SerializeToString(deterministic=True)
    assert conflict.would_have_cost_pico == 100 * 10_000 + 77 * 40_000
    assert (conflict.topic, conflict.offset, conflict.record_index) == ("usage.events", 1, 1)
    assert by_reason["undecodable"].payload == b"\xff not a batch"
    assert "request_id" in by_reason["invalid"].detail
    assert [row.reason for row in queries.rejected(reader, ONE)] == ["conflict"]


def test_alerts_after_a_position(reader: Reader) -> None:
    everything = queries.alerts(reader)
    assert {alert.rule for alert in everything} >= {"conflict"}
    [conflict] = [alert for alert in everything if alert.rule == "conflict"]
    assert conflict.tenant_id == ONE
    assert conflict.request_ids == ("r1",)
    assert queries.alerts(reader, ONE, after={1: conflict.version}) == []
    assert conflict in queries.alerts(reader, ONE, after={1: conflict.version - 1})
    assert queries.alerts(reader, since_ms=NOW_MS + 1) == []


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_more_rows_than_one_answer_has_are_all_there(reader: Reader, at_once: int) -> None:
    for tenant_id, by in ((None, ("tenant", "model")), (None, ()), (None, ("tenant", "minute")), (ONE, ("user",))):
        every = queries.usage(reader, tenant_id, by)
        assert queries.all_usage(reader, tenant_id, by, 0, queries.TIME_MS_MAX, at_once=at_once) == every
    told = queries.alerts(reader)
    assert told
    assert queries.all_alerts(reader, None, 0, {}, at_once=at_once) == told


def test_statement_is_quantity_times_price(reader: Reader) -> None:
    account = statement(reader, ONE, START_MS, START_MS + 10 * MINUTE_MS)
    assert account is not None
    assert [(line.model, line.quantity_of, line.quantity, line.price_pico) for line in account.lines] == [
        ("smollm2", "uncached_input_tokens", 100, 10_000),
        ("smollm2", "output_tokens", 10, 40_000),
        ("smollm2", "uncached_input_tokens", 100, 1),
        ("smollm2", "output_tokens", 3, 0),
        ("tts-1", "uncached_input_tokens", 100, 0),
        ("tts-1", "output_tokens", 10, 0),
        ("tts-1", "characters", 11, 7),
    ]
    assert all(line.amount_pico == line.quantity * line.price_pico for line in account.lines)
    [balance] = queries.balances(reader, ONE)
    assert (account.opening_pico, account.credited_pico, account.charged_pico) == (0, MUCH_PICO, balance.spend_pico)
    assert account.closing_pico == balance.balance_pico
    assert [(line.reason, line.amount_pico) for line in account.credits] == [("first", MUCH_PICO)]
    assert (account.events, account.free_events, account.unrated_events) == (5, 2, 0)
    later = statement(reader, ONE, START_MS + MINUTE_MS, START_MS + 2 * MINUTE_MS)
    assert later is not None
    assert later.closing_pico == balance.balance_pico
    assert later.opening_pico == MUCH_PICO - (1_400_000 + 77)
    assert statement(reader, "nobody", 0, MINUTE_MS) is None
    assert [book.version for book in price_books(reader).all()] == [1, 2]


def test_totals_freshness_keys_and_commands(reader: Reader, ledger: Ledger) -> None:
    totals = queries.totals(reader)
    assert (totals.events, totals.refused_events, totals.duplicates, totals.conflicts) == (6, 2, 1, 1)
    assert totals.cost_pico == totals.spend_pico
    assert totals.credit_pico == {"USD": MUCH_PICO}
    [fresh] = queries.freshness(reader)
    assert (fresh.partition, fresh.sequence) == (1, ledger.state.sequence)
    assert fresh.log_time_ms == ledger.state.log_time_ms
    assert reader.query("SELECT key_id, tenant_id, scopes, revoked FROM api_keys").rows == [("k1", ONE, ["meter", "read"], 0)]
    assert reader.query("SELECT action, count(), min(applied) FROM commands GROUP BY action ORDER BY action").rows == [
        ("credit_grant", 1, 1),
        ("key_upsert", 1, 1),
        ("price_book", 2, 1),
        ("tenant_upsert", 2, 1),
    ]
    assert reader.query("SELECT producer_id, covered_sequence, highest_sequence FROM producer_marks").rows == [("p", 9, 9)]


def test_views_for_analysts(reader: Reader) -> None:
    assert reader.query("SELECT tenant_id, balance = credit - spend FROM tenant_balances ORDER BY tenant_id").rows == [
        (tenant_id, 1) for tenant_id in sorted((ONE, TWO))
    ]
    by_day = reader.query("SELECT sum(events), sum(cost), sum(units['characters']) FROM tenant_usage_daily").rows
    by_minute = reader.query("SELECT sum(events), sum(cost), sum(units['characters']) FROM tenant_usage_minutes").rows
    assert by_day == by_minute
    assert by_day[0][0] == 6
    assert by_day[0][2] == 11
    assert reader.query("SELECT count() FROM usage_events_current").rows == [(6,)]
    for view in ("alerts_recent", "rejected_recent", "producers_incomplete", "ledger_freshness"):
        assert reader.query(f"SELECT * FROM {view}").names


def test_no_secret_of_a_key_is_in_any_table_for_people(engine: ChdbEngine, ledger: Ledger) -> None:
    feed(engine, ledger.stored, KEYS.seal_key)
    for [table] in engine.query(
        "SELECT name FROM system.tables WHERE database = currentDatabase() AND name != 'ledger_records'"
    ).rows:
        for row in engine.query(f"SELECT * FROM {table}").rows:
            assert "h" * 32 not in str(row), table
            assert (b"h" * 32).hex() not in str(row), table


def test_loopback_refuses_what_it_must(engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # However late the engine's own bound comes, it is what is told.
    monkeypatch.setattr("sinks.engines.loopback._MARGIN_S", 60.0)
    token = secrets.token_urlsafe(32)
    server = LoopbackServer(engine, token, status=lambda: {"well": True}).start()
    port = int(server.url.rpartition(":")[2])
    good = LoopbackEngine(server.url, token)
    try:
        with pytest.raises(EngineError, match="token"):
            LoopbackEngine(server.url, "x" * 32).query("SELECT 1")
        for writes in ("DROP TABLE accounts", "INSERT INTO accounts SELECT * FROM accounts", "SET readonly = 0"):
            with pytest.raises(EngineError):
                good.query(writes)
        with pytest.raises(EngineUnavailable, match="TIMEOUT_EXCEEDED"):
            good.query("SELECT sleepEachRow(0.2) FROM numbers(30) SETTINGS max_block_size = 1", timeout_s=0.5)
        assert "accounts" in str(good.query("SHOW TABLES LIKE 'accounts'").rows)
        for method, path, body, status in (
            ("GET", "/status", b"", 200),
            ("GET", "/other", b"", 404),
            ("POST", "/other", b"", 404),
            ("POST", "/query", b"not json", 400),
            ("POST", "/query", b'{"sql": "SELECT 1", "timeout_s": 1e9}', 400),
            ("POST", "/query", None, 413),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"Authorization": f"Bearer {token}"}
            # It is refused by its announced length: whether the bytes that follow still find an open socket is chance.
            connection.request(method, path, body, headers | ({"Content-Length": "1000001"} if body is None else {}))
            response = connection.getresponse()
            assert response.status == status, (method, path)
            answer = response.read()
            connection.close()
            if path == "/status":
                assert json.loads(answer) == {"well": True}
        assert token not in repr(good)
    finally:
        server.close()
    with pytest.raises(EngineUnavailable, match="is it running"):
        good.query("SELECT 1")
    with pytest.raises(EngineError, match=r"127\.0\.0\.1"):
        LoopbackEngine("http://example.com:80", token)


def test_an_answer_of_too_many_rows_is_refused(engine: ChdbEngine) -> None:
    with pytest.raises(EngineError, match="TOO_MANY_ROWS"):
        engine.query("SELECT number FROM numbers(1000001)")
    assert engine.query("SELECT count() FROM numbers(1000001)").rows == [(1_000_001,)]


def test_queries_run_beside_one_another(engine: ChdbEngine) -> None:
    def is_overtaken() -> bool:
        slow = threading.Thread(target=lambda: engine.query("SELECT sleep(1)"))
        slow.start()
        assert engine.query("SELECT 1").rows == [(1,)]
        overtaken = slow.is_alive()
        slow.join()
        return overtaken

    # A machine may be so busy that the short one is not even begun meanwhile; not each time.
    assert any(is_overtaken() for _ in range(30))
