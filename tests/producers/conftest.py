"""Topics and a stand-in for the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from taximeter.embedded.broker import TansuBroker
from tests.producers.support import LedgerStandIn, Topics


@pytest.fixture
def patient_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal waits for its file for as long as a test holds that, though the machine stand still meanwhile."""
    monkeypatch.setattr("producers.journal_store._BUSY_TIMEOUT_MS", 600_000)


@pytest.fixture
def topics(bootstrap: str, unique_name: Callable[[str], str]) -> Topics:
    """usage.events and usage.progress, on each broker in turn."""
    topics = Topics(bootstrap, unique_name("usage.events"), unique_name("usage.progress"))
    topics.create()
    return topics


@pytest.fixture
def tansu_topics(tansu: TansuBroker, unique_name: Callable[[str], str]) -> Topics:
    """The same on the embedded broker alone."""
    topics = Topics(tansu.bootstrap, unique_name("usage.events"), unique_name("usage.progress"))
    topics.create()
    return topics


@pytest.fixture
def ledger(topics: Topics) -> Iterator[LedgerStandIn]:
    """What stands in for the ledger on those topics."""
    ledger = LedgerStandIn(topics)
    yield ledger
    ledger.close()
