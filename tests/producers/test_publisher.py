"""The publisher, on Tansu and on Apache Kafka."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from billing.identity import partition_of
from billing.limits import BATCH_BYTES_MAX
from billing.v1.account_pb2 import Progress
from billing.v1.usage_pb2 import CountDrift, UsageBatch
from producers.meter import UsageMeter
from producers.publisher import Publisher, PublisherSettings
from taximeter.embedded.broker import TansuBroker, TansuSettings
from tests.producers.support import (
    PARTITIONS,
    LedgerStandIn,
    Topics,
    journaled,
    open_meter,
    read_batches,
    usage_event,
    wait_until,
)
from tests.services.kafka import KafkaCluster
from tests.services.ports import free_port


def record(meter: UsageMeter, first: int, count: int) -> None:
    receipts = {meter.record(usage_event(number)) for number in range(first, first + count)}
    for receipt in receipts:
        receipt.durable(60)


def test_every_event_arrives_in_its_tenants_partition_under_its_number(
    tmp_path: Path, topics: Topics, ledger: LedgerStandIn
) -> None:
    meter = open_meter(tmp_path)
    record(meter, 0, 3_000)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    wait_until(lambda: ledger.requests.total() == 3_000, "all events in Kafka")

    assert set(ledger.requests.values()) == {1}
    for partition, batch in ledger.batches:
        assert batch.schema_version == 1
        assert len(batch.events) <= 1_000
        assert batch.highest_sequence >= batch.first_sequence + len(batch.events) - 1
        for event in batch.events:
            assert partition_of(event.tenant_id, PARTITIONS) == partition
    for partition in range(PARTITIONS):
        assert ledger.covered(meter.journal.producer_id, partition) == meter.journal.highest_sequence(partition)
    assert publisher.close(60)
    assert publisher.metrics()["published"] == 3_000
    meter.close()


def test_the_journal_is_freed_by_the_ledgers_word_and_by_nothing_else(
    tmp_path: Path, topics: Topics, ledger: LedgerStandIn
) -> None:
    meter = open_meter(tmp_path)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    record(meter, 0, 500)
    wait_until(lambda: publisher.metrics()["published"] == 500, "all events acknowledged by Kafka")
    assert sum(len(events) for events in journaled(meter.journal).values()) == 500
    assert meter.metrics()["oldest_unacknowledged_ms"] > 0

    wait_until(lambda: ledger.requests.total() == 500, "all events read")
    ledger.cover(meter.journal.producer_id)
    wait_until(lambda: meter.metrics()["journal_bytes"] == 0, "the journal freed")
    assert publisher.metrics()["covered"] == 500
    assert meter.metrics()["oldest_unacknowledged_ms"] == 0
    publisher.close(60)
    meter.close()


def test_after_a_restart_only_what_the_ledger_does_not_cover_goes_out_again(
    tmp_path: Path, topics: Topics, ledger: LedgerStandIn
) -> None:
    meter = open_meter(tmp_path)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    record(meter, 0, 200)
    assert publisher.close(60)
    meter.close()
    wait_until(lambda: ledger.requests.total() == 200, "all events read")
    ledger.cover(meter.journal.producer_id)

    meter = open_meter(tmp_path)
    record(meter, 200, 100)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    wait_until(lambda: len(ledger.requests) == 300, "the new events")
    assert publisher.close(60)
    meter.close()
    assert set(ledger.requests.values()) == {1}
    for partition in range(PARTITIONS):
        numbers = sorted(ledger.numbers[meter.journal.producer_id, partition])
        assert numbers == list(range(1, len(numbers) + 1))


def test_another_generation_gets_everything_that_is_not_freed(tmp_path: Path, topics: Topics, ledger: LedgerStandIn) -> None:
    meter = open_meter(tmp_path)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    record(meter, 0, 100)
    wait_until(lambda: ledger.requests.total() == 100, "all events read")
    ledger.cover(meter.journal.producer_id, {})
    ledger.generation = b"generation-2"
    # Both words must be heard apart, or there was no change.
    wait_until(lambda: all(d.generation == b"generation-1" for d in publisher._deliveries), "the first generation's word")
    ledger.cover(meter.journal.producer_id, {})
    wait_until(lambda: ledger.requests.total() == 200, "all events again")
    # It counts what it has sent, and is heard before it has counted.
    assert publisher.close(60)
    assert set(ledger.requests.values()) == {2}
    assert publisher.metrics()["resent"] == 100
    meter.close()


def test_what_the_ledger_leaves_uncovered_goes_out_again(tmp_path: Path, topics: Topics, ledger: LedgerStandIn) -> None:
    meter = open_meter(tmp_path)
    publisher = Publisher(meter.journal, topics.publisher_settings(resend_after_s=0.5))
    publisher.start()
    record(meter, 0, 100)
    wait_until(lambda: min(ledger.requests.values(), default=0) >= 2 and len(ledger.requests) == 100, "all events twice")
    ledger.cover(meter.journal.producer_id)
    wait_until(lambda: meter.metrics()["journal_bytes"] == 0, "the journal freed")
    publisher.close(60)
    meter.close()


def test_coverage_of_numbers_that_were_never_assigned_frees_nothing(
    tmp_path: Path, topics: Topics, ledger: LedgerStandIn
) -> None:
    meter = open_meter(tmp_path)
    record(meter, 0, 50)
    ledger.cover(meter.journal.producer_id, dict.fromkeys(range(PARTITIONS), 1_000_000))
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    wait_until(lambda: len(ledger.requests) == 50, "all events in Kafka")
    wait_until(lambda: publisher.metrics()["numbering_conflicts"] == PARTITIONS, "the conflict noticed")
    record(meter, 50, 50)
    wait_until(lambda: len(ledger.requests) == 100, "later events in Kafka")
    assert sum(len(events) for events in journaled(meter.journal).values()) == 100
    publisher.close(60)
    meter.close()


def test_what_the_ledger_has_of_another_frees_nothing_here(tmp_path: Path) -> None:
    """The name of one producer may be another's, and a slash behind it: their keys on usage.progress begin alike."""
    meter = open_meter(tmp_path)
    record(meter, 0, 10)
    journal, partition = meter.journal, partition_of(usage_event(0).tenant_id, PARTITIONS)
    publisher = Publisher(journal, PublisherSettings("127.0.0.1:1", PARTITIONS))
    for producer_id, sequence, covered in ((f"{journal.producer_id}/2", 2, 0), (journal.producer_id, 1, 1)):
        progress = Progress(partition=partition, producer_id=producer_id, covered_sequence=sequence)
        publisher._on_progress(f"producer/{producer_id}/{partition}".encode(), progress.SerializeToString(), partition)
        publisher._take_progress()
        assert publisher.metrics()["covered"] == covered
    meter.close()


def test_what_a_recount_has_found_is_told_again_and_again_beside_the_busiest_traffic(tmp_path: Path, topics: Topics) -> None:
    meter = open_meter(tmp_path)
    # The partition of its own name never is without a batch for as long as a heartbeat.
    tenant_id = next(name for name in map(str, range(1_000)) if partition_of(name, PARTITIONS) == home_of(meter))
    drift = CountDrift(model="small", samples=20, backend_tokens=1_050, tokenizer_tokens=1_000)
    publisher = Publisher(meter.journal, topics.publisher_settings(heartbeat_s=0.2), lambda: [drift])
    publisher.start()
    enough = threading.Event()

    def be_busy() -> None:
        for number in itertools.count():
            meter.record(usage_event(number, tenant_id=tenant_id)).durable(60)
            if enough.wait(0.01):
                return

    def told(batches: list[UsageBatch]) -> bool:
        return sum(list(batch.count_drifts) == [drift] for batch in batches) >= 3 and events_in(batches) > 3

    def events_in(batches: list[UsageBatch]) -> int:
        return sum(len(batch.events) for batch in batches)

    busy = threading.Thread(target=be_busy)
    busy.start()
    try:
        batches = read_batches(topics, told)
    finally:
        enough.set()
        busy.join(60)
    assert not any(batch.events for batch in batches if batch.count_drifts)
    publisher.close(60)
    meter.close()


def home_of(meter: UsageMeter) -> int:
    """The partition of the producer's own name."""
    return partition_of(meter.journal.producer_id, PARTITIONS)


def test_an_idle_producer_says_how_far_it_has_numbered(tmp_path: Path, topics: Topics) -> None:
    meter = open_meter(tmp_path)
    meter.record(usage_event(0, tenant_id="only")).durable(60)
    busy = partition_of("only", PARTITIONS)
    publisher = Publisher(meter.journal, topics.publisher_settings(heartbeat_s=0.2))
    publisher.start()

    def heartbeats(batches: list[UsageBatch]) -> list[UsageBatch]:
        return [batch for batch in batches if not batch.events]

    batches = read_batches(topics, lambda batches: sum(batch.highest_sequence == 1 for batch in heartbeats(batches)) >= 3)
    assert {batch.producer_id for batch in heartbeats(batches)} == {meter.journal.producer_id}
    # Where nothing was numbered only its own name's partition hears of it, so that its silence is noticed there.
    assert {batch.highest_sequence for batch in heartbeats(batches)} <= {0, 1}
    assert not any(batch.closed for batch in batches)
    assert meter.journal.highest_sequence(busy) == 1
    publisher.close(60)
    meter.close()


def test_large_events_fill_batches_by_bytes(tmp_path: Path, topics: Topics) -> None:
    meter = open_meter(tmp_path)
    for number in range(300):
        event = usage_event(number, tenant_id="verbose")
        event.attributes.update({f"key-{index}": "x" * 240 for index in range(60)})
        meter.record(event).durable(60)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    batches = read_batches(topics, lambda batches: sum(len(batch.events) for batch in batches) == 300)
    sizes = [batch.ByteSize() for batch in batches if batch.events]
    assert len(sizes) > 3
    assert max(sizes) <= BATCH_BYTES_MAX
    assert max(sizes) > BATCH_BYTES_MAX * 0.9
    assert publisher.close(60)
    meter.close()


def test_a_topic_with_another_number_of_partitions_gets_nothing(tmp_path: Path, tansu: TansuBroker) -> None:
    meter = open_meter(tmp_path, partitions=PARTITIONS + 1)
    topics = Topics(tansu.bootstrap, "narrow.events", "narrow.progress")
    topics.create()
    meter.record(usage_event(0)).durable(60)
    settings = PublisherSettings(tansu.bootstrap, PARTITIONS + 1, topics.events, topics.progress)
    publisher = Publisher(meter.journal, settings)
    publisher.start()
    assert not publisher.close(1.0)
    assert publisher.metrics()["published"] == 0
    meter.close()


@pytest.mark.chaos
def test_a_broker_that_forgot_gets_everything_that_is_not_covered_again(tmp_path: Path) -> None:
    broker = TansuBroker(TansuSettings(tmp_path / "broker.log", port=free_port()))
    broker.start()
    topics = Topics(broker.bootstrap, "usage.events", "usage.progress")
    topics.create()
    meter = open_meter(tmp_path)
    ledger = LedgerStandIn(topics)
    publisher = Publisher(meter.journal, topics.publisher_settings())
    publisher.start()
    record(meter, 0, 400)
    wait_until(lambda: ledger.requests.total() == 400, "all events read")
    covered = {partition: ledger.covered(meter.journal.producer_id, partition) // 2 for partition in range(PARTITIONS)}
    ledger.cover(meter.journal.producer_id, covered)
    wait_until(lambda: publisher.metrics()["covered"] == sum(covered.values()), "half of it covered")
    ledger.close()

    broker.kill9()
    record(meter, 400, 100)
    broker.start()
    topics.create()
    second = LedgerStandIn(topics, b"generation-2")
    wait_until(lambda: len(second.requests) == 500 - sum(covered.values()), "what the ledger did not have")
    assert len(ledger.requests + second.requests) == 500
    # A second loss is found as well.
    second.close()
    broker.kill9()
    broker.start()
    topics.create()
    third = LedgerStandIn(topics, b"generation-2")
    wait_until(lambda: len(third.requests) == 500 - sum(covered.values()), "the same again")
    third.close()
    assert publisher.close(60)
    meter.close()
    broker.stop()


@pytest.mark.chaos
@pytest.mark.apache_kafka
@pytest.mark.timeout(900)
def test_kafka_away_costs_disk_and_nothing_else(tmp_path: Path, apache_kafka_libs: Path) -> None:
    cluster = KafkaCluster(tmp_path / "kafka", apache_kafka_libs)
    cluster.start()
    topics = Topics(cluster.bootstrap, "usage.events", "usage.progress")
    topics.create()
    meter = open_meter(tmp_path)
    publisher = Publisher(meter.journal, topics.publisher_settings(in_flight_bytes_max=200_000, message_timeout_s=5.0))
    publisher.start()
    record(meter, 0, 100)
    wait_until(lambda: publisher.metrics()["published"] == 100, "the first events acknowledged")

    cluster.nodes[0].process.kill9()
    record(meter, 100, 20_000)
    assert publisher.metrics()["unsent"] > 0
    assert publisher.metrics()["in_flight_bytes"] < 1_300_000
    cluster.start()
    ledger = LedgerStandIn(topics)
    wait_until(lambda: len(ledger.requests) == 20_100, "everything in Kafka")
    ledger.cover(meter.journal.producer_id)
    wait_until(lambda: meter.metrics()["journal_bytes"] == 0, "the journal freed")
    assert publisher.close(60)
    ledger.close()
    meter.close()
    cluster.close()


@pytest.mark.chaos
def test_closing_after_kafka_went_away_keeps_what_was_not_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broker = TansuBroker(TansuSettings(tmp_path / "broker.log", port=free_port()))
    broker.start()
    topics = Topics(broker.bootstrap, "usage.events", "usage.progress")
    topics.create()
    meter = open_meter(tmp_path)
    publisher = Publisher(meter.journal, topics.publisher_settings(message_timeout_s=600.0))
    publisher.start()
    record(meter, 0, 10)
    wait_until(lambda: publisher.metrics()["published"] == 10, "the first events acknowledged")
    broker.kill9()
    record(meter, 10, 10)
    wait_until(lambda: "the journal keeps the usage meanwhile" in caplog.text, "the loss of the broker noticed")
    started = time.monotonic()
    assert not publisher.close(0.5)
    assert time.monotonic() - started < 60, "it waits for no message"
    assert len([line for line in caplog.messages if "meanwhile" in line]) == 1
    assert sum(len(events) for events in journaled(meter.journal).values()) == 20
    meter.close()


def test_closing_without_kafka_keeps_what_was_not_sent(tmp_path: Path, free_port: Callable[[], int]) -> None:
    meter = open_meter(tmp_path)
    settings = PublisherSettings(f"127.0.0.1:{free_port()}", PARTITIONS, message_timeout_s=600.0)
    publisher = Publisher(meter.journal, settings)
    publisher.start()
    record(meter, 0, 10)
    started = time.monotonic()
    assert not publisher.close(0.5)
    assert time.monotonic() - started < 60, "it waits for no message"
    meter.close()
    meter = open_meter(tmp_path)
    assert sum(len(events) for events in journaled(meter.journal).values()) == 10
    meter.close()
