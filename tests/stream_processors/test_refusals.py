"""On Apache Kafka: what must not go on stops and says what to do, and what is repeated changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.v1.usage_pb2 import UsageBatch
from taximeter.embedded.process import Child
from tests.services.kafka import KafkaCluster
from tests.stream_processors.harness import Ledger, event
from tests.stream_processors.worker_main import REFUSED

pytestmark = [pytest.mark.timeout(180), pytest.mark.apache_kafka]


@pytest.fixture
def ledger(apache_kafka: KafkaCluster, tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(apache_kafka.bootstrap, tmp_path)
    ledger.found()
    yield ledger
    ledger.stop()


def refusal(ledger: Ledger, worker: Child) -> str:
    """What a worker says that must end by itself."""
    ledger.wait(lambda: not worker.alive, "the refusal")
    assert worker.exit_code == REFUSED, worker.log_tail()
    return worker.log_tail()


def test_a_worker_whose_clock_is_ahead_writes_nothing_and_another_goes_on(ledger: Ledger) -> None:
    events = [event(f"tenant-{i}") for i in range(20)]
    ledger.send(events)
    ahead = ledger.worker("ahead", publish=False, clock_ahead_ms=365 * 86_400_000)
    said = refusal(ledger, ahead)
    assert "ahead of Kafka's clock" in said
    assert "set this machine's clock" in said
    assert all(len(log.records) == 1 for log in ledger.logs()), "the founding record alone"
    ledger.worker()
    ledger.wait_charged()
    ledger.assert_exact()
    now_ms = time.time_ns() // 1_000_000
    assert all(log.state.log_time_ms <= now_ms for log in ledger.logs())


def test_a_producer_whose_clock_is_wrong_is_heard_and_judged_by_the_ledger(ledger: Ledger) -> None:
    """Its messages are stamped on arrival: neither refused by Kafka for the future, nor deleted at once for the past."""
    now_ms = time.time_ns() // 1_000_000
    ledger.worker()
    for shift_ms in (-400 * 86_400_000, 20 * 3_600_000):
        one = event("tenant-1")
        batch = UsageBatch(schema_version=1, events=[one]).SerializeToString()
        ledger.send_bytes(batch, 0, time_ms=now_ms + shift_ms)
        ledger.sent[one.request_id] = one
    ledger.wait_charged()
    ledger.assert_exact()
