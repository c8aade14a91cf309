"""clickhouse-driver against a real server over the native protocol: exact values, restarts, kill -9 in the middle, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sinks.engine import Kind, Table
from sinks.engines.chdb import ChdbEngine
from sinks.engines.server import ServerEngine, ServerSettings
from sinks.errors import EngineError, EngineUnavailable
from sinks.follow import feed
from sinks.loop import run_sink
from sinks.status import SinkStatus
from sinks.tables import ACCOUNTS, ALL_TABLES, SINK_POSITIONS, USAGE_EVENTS, USAGE_TOTALS
from sinks.writer import Writer
from taximeter.embedded.broker import TansuBroker
from tests.billing.ledgers import KEYS, Ledger
from tests.producers.support import wait_until
from tests.services.clickhouse import ClickHouseServer
from tests.sinks.old_server import count, create_tables
from tests.sinks.test_loop import PARTITION, WAIT_S, filled, make_topics, produce

pytestmark = pytest.mark.clickhouse_server


def settings_of(server: ClickHouseServer, database: str, **changes: object) -> ServerSettings:
    values: dict[str, object] = {
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "password": server.password,
        "database": database,
        "connect_timeout_s": 30.0,
        "insert_timeout_s": 60.0,
    }
    return ServerSettings(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def server_engine(clickhouse_server: ClickHouseServer, unique_name: Callable[[str], str]) -> Iterator[ServerEngine]:
    engine = ServerEngine(settings_of(clickhouse_server, unique_name("sink").replace("-", "_")))
    engine.create_database()
    create_tables(engine)
    yield engine
    engine.close()


@pytest.mark.parametrize("compression", ["", "lz4", "zstd"])
def test_values_come_back_as_they_went(server_engine: ServerEngine, compression: str) -> None:
    engine = ServerEngine(
        ServerSettings(**{**fields_of(server_engine.settings), "compression": compression})  # type: ignore[arg-type]
    )
    table = Table(
        "exact",
        {
            "t": Kind.TEXT,
            "b": Kind.BYTES,
            "u": Kind.UINT64,
            "p": Kind.PICO,
            "s": Kind.SECONDS,
            "a": Kind.TEXTS,
            "n": Kind.UINT64S,
        },
    )
    engine.execute(
        "CREATE TABLE exact (t String, b String, u UInt64, p Decimal(38, 12), s DateTime('UTC'), a Array(String), "
        "n Array(UInt64)) ENGINE = MergeTree ORDER BY u"
    )
    texts = ["", "'; DROP TABLE exact; --", "日本語 🚕 \\n \t\n\0 {t:String} %(t)s", "x" * 4096]
    pico = [0, 1, -(10**38) + 1, 10**38 - 1]
    columns: dict[str, list[Any]] = {
        "t": texts,
        "b": [b"", bytes(range(256)), b"\xff\xfe", b"\0"],
        "u": [0, 1, 2**63, 2**64 - 1],
        "p": pico,
        "s": [0, 1, 1_763_880_000, 2**32 - 1],
        "a": [[], ["a", "'"], ["日"], [""]],
        "n": [[], [1, 2**64 - 1], [0], [5]],
    }
    assert engine.insert(table, columns) == 4
    assert columns["p"] == pico, "the caller's lists are left alone"
    rows = engine.query("SELECT t, hex(b), u, p, toUInt32(s), a, n FROM exact ORDER BY u").rows
    assert [row[0] for row in rows] == texts
    assert [bytes.fromhex(str(row[1])) for row in rows] == columns["b"]
    assert [row[2] for row in rows] == columns["u"]
    assert [row[3] for row in rows] == [
        Decimal(0),
        Decimal("0.000000000001"),
        Decimal("-99999999999999999999999999.999999999999"),
        Decimal("99999999999999999999999999.999999999999"),
    ]
    assert [row[4] for row in rows] == columns["s"]
    assert [list(row[5]) for row in rows] == columns["a"]  # type: ignore[call-overload]
    assert [list(row[6]) for row in rows] == columns["n"]  # type: ignore[call-overload]
    for text in texts:
        assert engine.query("SELECT t FROM exact WHERE t = {t:String}", {"t": text}).rows == [(text,)]
    engine.close()


def fields_of(settings: ServerSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in ServerSettings.__dataclass_fields__}


def test_a_ledger_is_written_as_on_chdb(server_engine: ServerEngine, engine: ChdbEngine, ledger: Ledger) -> None:
    """The same rows on both engines: every column of every table."""
    for each in (server_engine, engine):
        feed(each, ledger.stored, KEYS.seal_key)
    for table in ALL_TABLES:
        old = server_engine.query(comparable(table, "{name}")).rows
        new = engine.query(comparable(table, "toUnixTimestamp64Milli({name})")).rows
        assert [listed(row) for row in old] == [listed(row) for row in new], table.name
    position = Writer(server_engine).positions()[1]
    assert position.sequence == len(ledger.stored) - 1
    assert position.record_hash == ledger.state.record_hash


def comparable(table: Table, millis: str) -> str:
    """All of a table's rows, in forms that both engines give alike; not when they were written."""
    shown = {Kind.MILLIS: millis, Kind.BYTES: "hex({name})", Kind.SECONDS: "toUInt32({name})"}
    columns = [shown.get(kind, "{name}").format(name=f"`{name}`") for name, kind in table.columns.items() if name != "written"]
    return f"SELECT {', '.join(columns)} FROM {table.name} FINAL ORDER BY {', '.join(columns)}"


def listed(row: tuple[object, ...]) -> list[object]:
    return [list(value) if isinstance(value, tuple) else value for value in row]


def test_a_repeated_batch_changes_nothing(server_engine: ServerEngine, ledger: Ledger) -> None:
    feed(server_engine, ledger.stored, KEYS.seal_key)
    once = {table.name: count(server_engine, table) for table in ALL_TABLES}
    server_engine.execute("ALTER TABLE sink_positions DELETE WHERE 1")
    wait_until(lambda: server_engine.query("SELECT count() FROM sink_positions").rows == [(0,)], "the position gone")
    feed(server_engine, ledger.stored, KEYS.seal_key)
    assert {table.name: count(server_engine, table) for table in ALL_TABLES} == once


def test_errors_say_whether_to_try_again(server_engine: ServerEngine, clickhouse_server: ClickHouseServer) -> None:
    with pytest.raises(EngineError, match="code") as refused:
        server_engine.execute("SELECT no_such_column")
    assert not isinstance(refused.value, EngineUnavailable)
    wrong = ServerEngine(settings_of(clickhouse_server, "default", password="wrong"))
    with pytest.raises(EngineError) as denied:
        wrong.query("SELECT 1")
    assert "wrong" not in str(denied.value)
    away = ServerEngine(settings_of(clickhouse_server, "default", port=1, attempts=1))
    with pytest.raises(EngineUnavailable, match="does not answer"):
        away.query("SELECT 1")
    with pytest.raises(EngineError, match=r"readonly|READONLY"):
        server_engine.query("INSERT INTO sink_positions SELECT * FROM sink_positions")
    with pytest.raises(EngineUnavailable):
        server_engine.query("SELECT sleep(2)", timeout_s=0.5)
    assert server_engine.query("SELECT 1").rows == [(1,)]
    server_engine.close()
    with pytest.raises(EngineError, match="closed"):
        server_engine.query("SELECT 1")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_kill9_of_the_server_while_the_sink_writes(
    tmp_path: Path, tansu: TansuBroker, unique_name: Callable[[str], str]
) -> None:
    server = ClickHouseServer(tmp_path / "clickhouse")
    server.start()
    engine = ServerEngine(settings_of(server, "taximeter", attempts=1))
    engine.create_database()
    create_tables(engine)
    settings = make_topics(tansu.bootstrap, unique_name("kill"))
    ledger = filled(40)
    produce(settings, ledger.stored[:10])
    stop, status = threading.Event(), SinkStatus()
    sink = threading.Thread(target=run_sink, args=(settings, engine, stop, status))
    sink.start()
    try:
        assert status.wait_for({PARTITION: 9}, WAIT_S)
        for part in range(3):
            produce(settings, ledger.stored[10 * part + 10 : 10 * part + 20])
            server.kill9()
            server.start()
        produce(settings, ledger.stored[40:])
        assert status.wait_for({PARTITION: ledger.state.sequence}, WAIT_S)
    finally:
        stop.set()
        sink.join(WAIT_S)
    assert count(engine, USAGE_EVENTS) == 400
    assert count(engine, ACCOUNTS) == count(engine, SINK_POSITIONS) == count(engine, USAGE_TOTALS) == 1
    [[events, cost]] = engine.query("SELECT sum(events), sum(cost) FROM usage_totals FINAL").rows
    assert events == 400
    [[spend]] = engine.query("SELECT spend FROM accounts FINAL").rows
    assert spend == cost
    engine.close()
    server.stop()
