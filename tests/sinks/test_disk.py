"""ClickHouse's disk is full: an insert is refused as something that passes, and the same engine takes it when there is room."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinks.engine import Engine, Kind, Table
from sinks.engines.chdb import ChdbEngine
from sinks.engines.server import ServerEngine, ServerSettings
from sinks.errors import EngineUnavailable
from tests.services import require
from tests.services.clickhouse import MISSING_MESSAGE, ClickHouseServer, server_command
from tests.services.disk import Filler, SmallDiskUnavailableError, small_disk

_TABLE = Table("filled", {"number": Kind.UINT64, "text": Kind.TEXT})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    try:
        with small_disk(tmp_path / "disk", 40) as folder:
            yield folder
    except SmallDiskUnavailableError as error:
        require(False, str(error))


def _fills_up(engine: Engine, disk: Path, leave_bytes: int) -> None:
    engine.execute("CREATE TABLE filled (number UInt64, text String) ENGINE = MergeTree ORDER BY number")

    def insert(first: int, rows: int) -> None:
        engine.insert(_TABLE, {"number": list(range(first, first + rows)), "text": [f"{n:0>100}" for n in range(rows)]})

    def count() -> object:
        return engine.query("SELECT count() FROM filled").rows[0][0]

    insert(0, 10)
    filler = Filler(disk)
    filler.fill(leave_bytes)
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="space"):
            insert(10, 100_000)
    assert count() == 10
    filler.give_back()
    insert(10, 10)
    assert count() == 20


@pytest.mark.chaos
@pytest.mark.clickhouse_server
def test_a_full_disk_under_a_clickhouse_server_passes(disk: Path) -> None:
    require(server_command() is not None, MISSING_MESSAGE)
    server = ClickHouseServer(disk)
    server.start()
    try:
        engine = ServerEngine(ServerSettings(server.host, server.port, "full", server.user, server.password))
        engine.create_database()
        _fills_up(engine, disk, 0)
        engine.close()
    finally:
        server.kill9()


@pytest.mark.chaos
# All of it; or as much as chDB sets aside for the insert, and less than its columns take when they are written.
@pytest.mark.parametrize("leave_bytes", [0, 3 << 20])
@pytest.mark.timeout(900)
def test_a_full_disk_under_chdb_passes(disk: Path, leave_bytes: int) -> None:
    # A process has one chDB, and this one's is the other tests'.
    process = multiprocessing.get_context("spawn").Process(target=_chdb_fills_up, args=(disk, leave_bytes))
    process.start()
    try:
        process.join(240)
        assert process.exitcode == 0
    finally:
        process.kill()


def _chdb_fills_up(disk: Path, leave_bytes: int) -> None:
    engine = ChdbEngine(disk / "chdb")
    _fills_up(engine, disk, leave_bytes)
    engine.close()
