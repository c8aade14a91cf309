"""Services that many tests share, started on first use once a session, Apache Kafka once for all processes of the run; a test
that kills one starts its own. And in which order the files come: those that take long first, so that no process of the run is
alone with one in the end.
"""

from __future__ import annotations

import gc
import os
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings

from taximeter.embedded.broker import TansuBroker, TansuSettings
from taximeter.embedded.process import accepts_connections
from tests.services import require
from tests.services.clickhouse import MISSING_MESSAGE, ClickHouseServer, server_command
from tests.services.kafka import QUIET, KafkaCluster, KafkaUnavailableError, SharedKafka, kafka_libs
from tests.services.ports import free_port as find_free_port
from tests.services.shared import SharedService

__all__ = ["LONGEST_FIRST"]

LONGEST_FIRST: Final = (
    "stream_processors/test_ledger_app.py",
    "taximeter/test_kill9.py",
    "taximeter/test_up.py",
    "simulation/test_simulation.py",
    "taximeter/test_gateway_replay.py",
    "stream_processors/test_refusals.py",
    "taximeter/test_demo.py",
    "stream_processors/test_snapshots_kafka.py",
    "deploy/test_newcomer.py",
    "deploy/test_parts_encrypted.py",
    "chaos/test_chaos.py",
    "sinks/test_crash.py",
    "sinks/test_month.py",
    "services/test_kafka.py",
    "stream_processors/test_cut_log.py",
    "taximeter/test_leases.py",
    "taximeter/test_completeness.py",
    "taximeter/test_keys.py",
    "serving/notifier/test_trial.py",
    "serving/test_tokenizers.py",
    "serving/dashboard/test_dashboard.py",
    "stream_processors/test_snapshots.py",
    "stream_processors/test_mixed_versions.py",
    "stream_processors/test_ledger_restore.py",
    "serving/test_model_server.py",
    "serving/test_gateway.py",
    "producers/test_publisher.py",
    "sinks/test_loop.py",
    "sinks/test_audit.py",
    "billing/test_cost_bounds.py",
    "serving/triton/test_triton.py",
    "sinks/test_erasing.py",
    "simulation/test_controls.py",
    "sinks/test_corrections.py",
    "billing/test_rating_property.py",
    "serving/api/test_contract.py",
    "billing/test_ledger_model_controls.py",
    "sinks/test_queries.py",
    "sinks/test_overview.py",
    "sinks/test_explain.py",
    "serving/test_embedding.py",
    "sinks/test_invoices.py",
    "serving/documents/test_documents.py",
    "serving/test_gateway_back_ends.py",
    "producers/test_journal_model.py",
    "billing/test_credit.py",
    "serving/api/test_noninterference.py",
    "serving/test_gateway_crash.py",
    "sinks/test_server.py",
    "sinks/test_day_totals.py",
    "billing/test_ledger_model.py",
)

# The services that this process shares with the others of its run.
_SHARED: Final = pytest.StashKey[list[SharedService]]()

# A machine that is slow for a moment is no finding: no example has a time limit, nor has drawing it. And what a change is held
# to is the same for each run of it: the examples that nobody has seen yet are for `make models`.
settings.register_profile("exploring", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeated", settings.get_profile("exploring"), derandomize=True)
settings.load_profile("repeated")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files keep their tests together and in order; `--no-loadscope-reorder` lets the processes take them in this order."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: neither while tests are collected nor when they run is all of it to be looked at for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """No test of this process is left: no limit of a test runs while it waits for the other processes."""
    for service in session.config.stash.get(_SHARED, []):
        service.leave()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a port on loopback that nobody listens on, nor will."""
    return find_free_port


@pytest.fixture
def unique_name() -> Callable[[str], str]:
    """A function that makes `prefix` into a name that no other test uses: topics and databases outlive a test."""
    return lambda prefix: f"{prefix}-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes of this run have in common, and no other run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def chdb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this process's chDB lives: it takes one folder a process, and a database for whoever wants one."""
    return tmp_path_factory.mktemp("chdb")


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
def apache_kafka(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, shared_folder: Path, apache_kafka_libs: Path
) -> SharedKafka:
    """One node of Apache Kafka 4 for all processes of the run."""

    def start() -> tuple[str, Callable[[], None]]:
        cluster = KafkaCluster(tmp_path_factory.mktemp("kafka"), apache_kafka_libs, settings=QUIET)
        cluster.start()
        return cluster.bootstrap, cluster.close

    def answers(address: str) -> bool:
        host, _, port = address.rpartition(":")
        return accepts_connections(host, int(port))

    service = SharedService(shared_folder / "apache-kafka", answers=answers)
    pytestconfig.stash.setdefault(_SHARED, []).append(service)
    return SharedKafka(service.use(start))


@pytest.fixture(params=["tansu", pytest.param("apache_kafka", marks=pytest.mark.apache_kafka)])
def bootstrap(request: pytest.FixtureRequest) -> str:
    """The address of each broker in turn: what must hold on both takes this fixture."""
    broker: TansuBroker | SharedKafka = request.getfixturevalue(request.param)
    return broker.bootstrap


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    """A ClickHouse server with the native protocol."""
    require(server_command(), MISSING_MESSAGE)
    server = ClickHouseServer(tmp_path_factory.mktemp("clickhouse"))
    server.start()
    yield server
    server.stop()
