"""One chDB for all tests of a process, for chDB takes one folder a process; each test finds its tables empty."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from sinks.embedded import LoopbackServer
from sinks.engines.chdb import ChdbEngine
from sinks.engines.loopback import LoopbackEngine
from sinks.migrate import migrate
from sinks.tables import ALL_TABLES


@pytest.fixture(scope="session")
def chdb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this process's chDB lives."""
    return tmp_path_factory.mktemp("chdb")


@pytest.fixture(scope="session")
def _migrated(chdb_folder: Path) -> Iterator[ChdbEngine]:
    engine = ChdbEngine(chdb_folder, "tests")
    migrate(engine)
    yield engine
    engine.close()


@pytest.fixture
def engine(_migrated: ChdbEngine) -> ChdbEngine:
    """A database with this version's schema and nothing in it."""
    for table in ALL_TABLES:
        _migrated.execute(f"TRUNCATE TABLE {table.name}")
    return _migrated


@pytest.fixture
def loopback(engine: ChdbEngine) -> Iterator[LoopbackEngine]:
    """The same database, asked as another process would."""
    token = secrets.token_urlsafe(32)
    server = LoopbackServer(engine, token).start()
    yield LoopbackEngine(server.url, token)
    server.close()
