"""Services that many tests share, started once a session on first use; a test that kills one starts its own."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taximeter.embedded.broker import TansuBroker, TansuSettings
from taximeter.embedded.process import free_port as find_free_port
from tests.services import require
from tests.services.clickhouse import MISSING_MESSAGE, ClickHouseServer, server_command
from tests.services.kafka import KafkaCluster, KafkaUnavailableError, kafka_libs


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a port on loopback that nobody listens on."""
    return find_free_port


@pytest.fixture
def unique_name() -> Callable[[str], str]:
    """A function that makes `prefix` into a name that no other test uses: topics and databases outlive a test."""
    return lambda prefix: f"{prefix}-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TansuBroker]:
    """The embedded broker."""
    broker = TansuBroker(TansuSettings(log_path=tmp_path_factory.mktemp("tansu") / "broker.log"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="session")
def apache_kafka_libs() -> Path:
    """The folder of Apache Kafka's jars."""
    try:
        return kafka_libs()
    except KafkaUnavailableError as error:
        require(False, str(error))
        raise


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory: pytest.TempPathFactory, apache_kafka_libs: Path) -> Iterator[KafkaCluster]:
    """One node of Apache Kafka 4."""
    cluster = KafkaCluster(tmp_path_factory.mktemp("kafka"), apache_kafka_libs)
    cluster.start()
    yield cluster
    cluster.close()


@pytest.fixture(params=["tansu", pytest.param("apache_kafka", marks=pytest.mark.apache_kafka)])
def bootstrap(request: pytest.FixtureRequest) -> str:
    """The address of each broker in turn: what must hold on both takes this fixture."""
    broker: TansuBroker | KafkaCluster = request.getfixturevalue(request.param)
    return broker.bootstrap


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    """A ClickHouse server with the native protocol."""
    require(server_command(), MISSING_MESSAGE)
    server = ClickHouseServer(tmp_path_factory.mktemp("clickhouse"))
    server.start()
    yield server
    server.stop()
