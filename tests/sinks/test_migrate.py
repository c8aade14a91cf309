"""Migrations: a dry run changes nothing, a repeat changes nothing, a foreign or edited schema is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sinks.engine import Kind
from sinks.engines.chdb import ChdbEngine
from sinks.errors import EngineUnavailable, SchemaError
from sinks.migrate import load_migrations, migrate, pending
from sinks.tables import ALL_TABLES

TYPES = {
    Kind.TEXT: {"String", "LowCardinality(String)"},
    Kind.BYTES: {"String"},
    Kind.UINT8: {"UInt8"},
    Kind.UINT32: {"UInt32"},
    Kind.UINT64: {"UInt64"},
    Kind.INT32: {"Int32"},
    Kind.INT64: {"Int64"},
    Kind.PICO: {"Decimal(38, 12)"},
    Kind.MILLIS: {"DateTime64(3, 'UTC')"},
    Kind.SECONDS: {"DateTime('UTC')"},
    Kind.TEXTS: {"Array(String)", "Array(LowCardinality(String))"},
    Kind.UINT64S: {"Array(UInt64)"},
    Kind.INT64S: {"Array(Int64)"},
}


@pytest.fixture
def empty(chdb_folder: Path, unique_name: Callable[[str], str]) -> Iterator[ChdbEngine]:
    engine = ChdbEngine(chdb_folder, unique_name("migrate").replace("-", "_"))
    yield engine
    engine.close()


def test_dry_run_then_once_then_nothing(empty: ChdbEngine) -> None:
    planned = migrate(empty, dry_run=True)
    assert [str(migration) for migration in planned] == [
        "0001_tables",
        "0002_views",
        "0003_price_terms",
        "0004_price_version_of_totals",
        "0005_invoices",
        "0006_credit_budgets_leases",
        "0007_adjustments",
        "0008_day_totals",
        "0009_alert_life",
        "0010_stated_days",
        "0011_erasures",
        "0012_minutes_in_time",
    ]
    assert empty.query("SELECT name FROM system.tables WHERE database = currentDatabase()").rows == []
    # A crash half-way through the first: some of its statements have run, and run again.
    for statement in planned[0].statements[:3]:
        empty.execute(statement)
    assert migrate(empty) == planned
    assert migrate(empty) == []
    edited = [replace(planned[0], checksum="0"), *planned[1:]]
    with pytest.raises(SchemaError, match="was edited after it was applied"):
        pending(empty, edited)
    with pytest.raises(SchemaError, match="upgrade"):
        pending(empty, planned[:1])


def test_the_writer_knows_every_column_of_its_tables(engine: ChdbEngine) -> None:
    for table in ALL_TABLES:
        rows = engine.query(
            "SELECT name, type, comment FROM system.columns WHERE database = currentDatabase() AND table = {table:String} "
            "ORDER BY position",
            {"table": table.name},
        ).rows
        assert [name for name, _, _ in rows] == list(table.columns), table.name
        for name, kind, _comment in rows:
            assert kind in TYPES[table.columns[str(name)]], (table.name, name)
    [[uncommented]] = engine.query(
        "SELECT countIf(comment = '') FROM system.tables WHERE database = currentDatabase() AND name != 'schema_migrations'"
    ).rows
    assert uncommented == 0


def test_no_partition_key_separates_duplicates(engine: ChdbEngine) -> None:
    """A partition key other than a function of the sorting key would keep two rows of one key apart for good."""
    rows = engine.query(
        "SELECT name, partition_key, sorting_key, engine FROM system.tables "
        "WHERE database = currentDatabase() AND engine NOT IN ('View', 'MaterializedView')"
    ).rows
    assert {engine_name for *_, engine_name in rows} == {"ReplacingMergeTree"}
    assert {(name, key) for name, key, _, _ in rows if key} == {
        ("usage_totals", "toYear(minute)"),
        ("usage_by_minute", "toYear(minute)"),
    }
    assert {str(sorting) for name, _, sorting, _ in rows if name == "usage_events"} == {"tenant_id, request_id"}


def test_a_misnumbered_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0002_second.sql").write_text("SELECT 1;")
    with pytest.raises(SchemaError, match="0001_"):
        load_migrations(tmp_path)


def test_a_query_has_the_threads_that_the_engine_was_given(engine: ChdbEngine) -> None:
    assert engine.query("SELECT getSetting('max_threads')").rows == [(1,)]


def test_a_folder_belongs_to_one_process(engine: ChdbEngine, chdb_folder: Path, tmp_path: Path) -> None:
    code = f"from pathlib import Path; from sinks.engines.chdb import ChdbEngine; ChdbEngine(Path({str(chdb_folder)!r}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 1
    assert EngineUnavailable.__name__ in answer.stderr
    assert "another process has this ClickHouse folder open" in answer.stderr
