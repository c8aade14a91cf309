"""The ledger worker on two cores: the step with its disk state, the whole way through Kafka and Faust, the ordinary way beside
it, and a cold replay. Batches of 500 events of 12 tenants and 4 models, about 135 bytes an event; the broker is Tansu.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.measure import Measurement
from billing import replay
from billing.chain import Chain
from billing.commands import sign
from billing.founding import LedgerSettings, found
from billing.state import LedgerState
from billing.step import CommandInput, LedgerKeys, UsageInput, step
from billing.v1.command_pb2 import Command, PriceBook
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_GENERATE,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageBatch,
    UsageEvent,
)
from stream_processors.ledger_app import LedgerApp
from stream_processors.ledger_host import APPLY_RECORDS, LedgerHost
from stream_processors.local_store import Acknowledged, LocalStore
from stream_processors.settings import KafkaSettings, TopicNames, TopicSettings, WorkerSettings
from stream_processors.topics import ApplySettings, apply
from stream_processors.worker import run_worker
from taximeter.embedded.broker import TansuBroker, TansuSettings

BATCH = 500
STEP_BATCHES = 800
STREAM_BATCHES = int(os.environ.get("TAXIMETER_BENCH_BATCHES", "3000"))
ORDINARY_EVENTS = 6_000
TENANTS = [f"tenant-{number}" for number in range(12)]
MODELS = ["smollm2-135m", "model-b", "model-c", "model-d"]
KEYS = LedgerKeys(b"s" * 32, b"c" * 32)
SETTINGS = LedgerSettings(partitions=1, dedupe_key=b"d" * 32)
GENERATION = b"generation-16byt"


def make_batch(first: int, count: int = BATCH) -> bytes:
    """A batch of fresh events that ended now."""
    now_ms = time.time_ns() // 1_000_000
    events = [
        UsageEvent(
            request_id=str(uuid.uuid4()),
            tenant_id=TENANTS[number % 12],
            project_id="default",
            user_id=f"user-{number % 100}",
            api_key_id="key-1",
            model=MODELS[number // 12 % 4],
            operation=OPERATION_GENERATE,
            service_class=SERVICE_CLASS_STANDARD,
            outcome=OUTCOME_COMPLETED,
            count_source=COUNT_SOURCE_BACKEND,
            started_ms=now_ms - 500,
            ended_ms=now_ms,
            uncached_input_tokens=374 + number % 100,
            output_tokens=44,
            context_tokens=400,
            time_to_first_token_ms=30,
            latency_ms=500,
            server_id="gateway-1",
        )
        for number in range(first, first + count)
    ]
    return UsageBatch(
        schema_version=1, producer_id="bench", first_sequence=first + 1, highest_sequence=first + count, events=events
    ).SerializeToString()


def price_book() -> bytes:
    """A signed command with one price for every model."""
    book = PriceBook(version=1, currency="USD", effective_ms=1)
    book.prices.add(model="*", uncached_input_pico=150_000, output_pico=600_000)
    command = Command(schema_version=1, command_id="book-1", issued_ms=time.time_ns() // 1_000_000, price_book=book)
    return sign(command, KEYS.command_key)


def run() -> list[Measurement]:
    """Measure."""
    logging.basicConfig(level=logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="ledger-"))
    try:
        measurements, records = _step(folder)
        measurements += _replay(folder, records)
        return measurements + _through_kafka(folder)
    finally:
        shutil.rmtree(folder)


# --- the step ---


def _step(folder: Path) -> tuple[list[Measurement], list[bytes]]:
    batches = [make_batch(number * BATCH) for number in range(STEP_BATCHES)]
    store = LocalStore(folder / "step", 0)
    state = LedgerState(store.seen)
    record, stored = found(SETTINGS, 0, GENERATION, time.time_ns() // 1_000_000, KEYS.seal_key, "bench")
    replay.apply(state, record, stored)
    store.apply([Acknowledged(record, stored, 0)])
    log = [stored]
    acknowledged: list[Acknowledged] = []
    began, began_cpu = time.perf_counter(), time.process_time()
    for offset, value in enumerate([price_book(), *batches]):
        source = UsageInput("e", offset, value) if offset else CommandInput("c", 0, value)
        result = step(state, source, time.time_ns() // 1_000_000, keys=KEYS, writer="bench")
        log.append(result.stored)
        # As the host does it while more is on its way.
        acknowledged.append(Acknowledged(result.record, result.stored, offset + 1, state.record_hash))
        if len(acknowledged) >= APPLY_RECORDS:
            store.apply(acknowledged)
            acknowledged = []
    store.apply(acknowledged)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    digest = state.digest()
    store.close()
    again = LocalStore(folder / "step", 0)
    loaded = again.load()
    again.close()
    assert loaded is not None
    assert loaded.digest() == digest
    assert sum(account.events for account in state.accounts.values()) == STEP_BATCHES * BATCH
    events = STEP_BATCHES * BATCH
    return [
        Measurement("ledger: step with its disk state", events / cpu_s, "events/s a core", target=">= 200000"),
        Measurement("ledger: the same by the clock, other threads beside it", events / wall_s, "events/s"),
    ], log


def _replay(folder: Path, log: list[bytes]) -> list[Measurement]:
    store = LocalStore(folder / "replay", 0)
    state = LedgerState(store.seen)
    chain = Chain(0, KEYS.seal_key)
    began_cpu = time.process_time()
    pending = []
    for offset, stored in enumerate(log):
        record = chain.accept(stored)
        assert record is not None
        replay.apply(state, record, stored)
        pending.append(Acknowledged(record, stored, offset))
        if len(pending) == 64:
            store.apply(pending)
            pending = []
    store.apply(pending)
    cpu_s = time.process_time() - began_cpu
    store.close()
    events = STEP_BATCHES * BATCH
    return [Measurement("ledger: replay, record by record", events / cpu_s, "events/s a core")]


# --- through Kafka ---


def _through_kafka(folder: Path) -> list[Measurement]:
    broker = TansuBroker(TansuSettings(log_path=folder / "broker.log"))
    broker.start()
    try:
        kafka = KafkaSettings(broker.bootstrap)
        asyncio.run(apply(ApplySettings(kafka, TopicSettings(partitions=1), SETTINGS, KEYS.seal_key)))
        names = TopicNames()
        _send(broker.bootstrap, names.commands, [price_book()])
        _send(broker.bootstrap, names.events, [make_batch(number * BATCH) for number in range(STREAM_BATCHES)])
        warm = _worker({"bootstrap": broker.bootstrap, "folder": str(folder / "worker"), "publish": False})
        cold = _worker({"bootstrap": broker.bootstrap, "folder": str(folder / "cold"), "publish": False})
        ordinary = _ordinary(broker.bootstrap, folder)
        events = STREAM_BATCHES * BATCH
        baseline = "one message an event, Faust tables"
        return [
            Measurement(
                "ledger: through Kafka and Faust",
                events / warm["work_s"],
                "events/s a worker",
                baseline=baseline,
                ratio=events / warm["work_s"] / ordinary,
                target=">= 150000",
            ),
            Measurement("ledger: the same by the worker's CPU", events / warm["work_cpu_s"], "events/s a core"),
            Measurement("ledger: the ordinary way", ordinary, "events/s a worker", baseline=baseline, ratio=1.0),
            Measurement("ledger: cold replay of the log", events / cold["recover_s"], "events/s", target=">= 300000"),
        ]
    finally:
        broker.stop()


def _worker(arguments: dict[str, object]) -> dict[str, float]:
    """Run a worker process until it has taken everything; its figures."""
    command = [sys.executable, "-m", "benchmarks.ledger", "worker", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=300, check=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def work(bootstrap: str, folder: str, publish: bool) -> dict[str, float]:
    """In the worker's process: from the first record to the last, and how long the takeover took."""
    settings = WorkerSettings(
        KafkaSettings(bootstrap), Path(folder), KEYS, publish=publish, session_timeout_s=6.0, heartbeat_interval_s=1.0
    )
    figures: dict[str, float] = {}
    recover = LedgerHost.recover

    async def timed_recover(self: LedgerHost) -> None:
        began = time.perf_counter()
        await recover(self)
        figures["recover_s"] = time.perf_counter() - began

    LedgerHost.recover = timed_recover  # type: ignore[method-assign]

    async def watch(ledger: LedgerApp, stop: asyncio.Event) -> None:
        # Polled: the host is measured as it is, without a hook for measuring.
        while not ledger.hosts or not ledger.hosts[0].state.inputs:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        host = ledger.hosts[0]
        began, began_cpu = time.perf_counter(), time.process_time()
        while host.store.place.position.sequence < STREAM_BATCHES + 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        figures["work_s"], figures["work_cpu_s"] = time.perf_counter() - began, time.process_time() - began_cpu
        stop.set()

    async def main() -> None:
        stop = asyncio.Event()
        tasks: list[asyncio.Future[None]] = []

        def ready(ledger: LedgerApp | None) -> None:
            assert ledger is not None
            tasks.append(asyncio.ensure_future(watch(ledger, stop)))

        await run_worker(settings, stop=stop, ready=ready)

    asyncio.run(main())
    return figures


# --- the ordinary way ---


def _ordinary(bootstrap: str, folder: Path) -> float:
    """Events a second of `benchmarks.ordinary`: JSON messages, one an event, counted into Faust tables."""
    topic = "ordinary.events"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])[topic].result(20)
    batch = UsageBatch.FromString(make_batch(0, ORDINARY_EVENTS))
    _send(
        bootstrap,
        topic,
        [
            json.dumps(
                {
                    "request_id": event.request_id,
                    "tenant_id": event.tenant_id,
                    "model": event.model,
                    "input_tokens": event.uncached_input_tokens,
                    "output_tokens": event.output_tokens,
                }
            ).encode()
            for event in batch.events
        ],
    )
    command = [sys.executable, "-m", "benchmarks.ordinary", bootstrap, topic, str(ORDINARY_EVENTS), str(folder / "ordinary")]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=300, check=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _send(bootstrap: str, topic: str, values: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "queue.buffering.max.kbytes": 1 << 20})
    for value in values:
        producer.produce(topic, value=value, partition=0)
    assert producer.flush(120) == 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(work(**json.loads(sys.argv[2]))))
        sys.exit(0)
    for measurement in run():
        print(measurement)
