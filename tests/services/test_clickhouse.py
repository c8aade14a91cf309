"""The launcher of a ClickHouse server: the native protocol, exact money, and a crash."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from clickhouse_driver.errors import NetworkError, ServerException

from tests.services import require
from tests.services.clickhouse import MISSING_MESSAGE, ClickHouseServer, server_command

pytestmark = pytest.mark.clickhouse_server

LARGEST = Decimal("99999999999999999999999999.999999999999")
SMALLEST = Decimal("-99999999999999999999999999.999999999999")


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[ClickHouseServer]:
    require(server_command(), MISSING_MESSAGE)
    server = ClickHouseServer(tmp_path)
    server.start()
    yield server
    server.kill9()


@pytest.mark.parametrize("compression", [False, "lz4", "zstd"])
def test_money_of_38_digits_survives_each_compression(clickhouse_server: ClickHouseServer, compression: str | bool) -> None:
    client = clickhouse_server.client(compression=compression)
    try:
        client.execute("DROP TABLE IF EXISTS money")
        client.execute(
            "CREATE TABLE money (k UInt64, version UInt64, amount Decimal(38, 12)) "
            "ENGINE = ReplacingMergeTree(version) ORDER BY k"
        )
        client.execute("INSERT INTO money VALUES", [[1, 1, 2], [1, 2, 1], [Decimal(1), LARGEST, SMALLEST]], columnar=True)
        assert client.execute("SELECT k, amount FROM money FINAL ORDER BY k") == [(1, LARGEST), (2, SMALLEST)]
    finally:
        client.disconnect()


@pytest.mark.chaos
def test_rows_that_were_acknowledged_survive_kill_9(own_server: ClickHouseServer) -> None:
    client = own_server.client()
    client.execute("CREATE TABLE kept (k UInt64) ENGINE = MergeTree ORDER BY k")
    client.execute("INSERT INTO kept VALUES", [(1,), (2,)])
    own_server.kill9()
    with pytest.raises(NetworkError):
        own_server.client(connect_timeout=1).execute("SELECT 1")
    own_server.start()
    client.disconnect()
    assert client.execute("SELECT k FROM kept ORDER BY k") == [(1,), (2,)]
    client.disconnect()


def test_a_wrong_password_is_refused(clickhouse_server: ClickHouseServer) -> None:
    client = clickhouse_server.client(password="wrong")
    with pytest.raises(ServerException, match="Wrong password"):
        client.execute("SELECT 1")
    client.disconnect()
