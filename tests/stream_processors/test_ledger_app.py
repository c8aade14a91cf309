"""The ledger worker on real brokers: every event once, whatever is killed, moved, doubled or damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_processors.local_store import LocalStore
from tests.stream_processors.harness import Ledger, event

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def ledger(bootstrap: str, tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(bootstrap, tmp_path)
    ledger.found()
    yield ledger
    ledger.stop()


def _digests(ledger: Ledger, folder: Path) -> list[str]:
    digests = []
    for partition in range(ledger.partitions):
        store = LocalStore(folder / f"partition-{partition}", partition)
        state = store.load()
        store.close()
        assert state is not None
        digests.append(state.digest())
    return digests


def test_every_event_is_charged_once_and_a_new_disk_comes_to_the_same_state(ledger: Ledger) -> None:
    worker = ledger.worker()
    for _ in range(10):
        ledger.send([event(f"tenant-{i % 7}") for i in range(50)])
    again = list(ledger.sent.values())[:100]
    ledger.wait_charged()
    ledger.send(again)
    ledger.wait(
        lambda: sum(log.state.accounts[t].duplicates for log in ledger.logs() for t in log.state.accounts) == 100, "duplicates"
    )
    ledger.assert_exact()
    worker.stop(10)
    assert worker.exit_code == 0, worker.log_tail()
    logs = ledger.logs()
    assert [log.ignored for log in logs] == [0, 0]
    assert _digests(ledger, ledger.folder / "one") == [log.state.digest() for log in logs]

    fresh = ledger.worker("fresh")
    ledger.send([event("tenant-1")])
    ledger.wait_charged()
    fresh.stop(10)
    assert fresh.exit_code == 0, fresh.log_tail()
    assert _digests(ledger, ledger.folder / "fresh") == [log.state.digest() for log in ledger.logs()]
