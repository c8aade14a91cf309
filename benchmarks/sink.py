"""The sink on two cores: ledger records to rows in chDB on disk, with and without Kafka before it, the ordinary way beside it
(one INSERT an event), and how long a balance takes. Batches of 500 events of 50 tenants, as the ledger worker writes them;
each table is synced to the disk before the position is written.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
import uuid
from pathlib import Path

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.measure import Measurement
from billing import replay
from billing.amounts import to_amount
from billing.commands import sign
from billing.founding import LedgerSettings, found
from billing.limits import SCHEMA_VERSION
from billing.state import LedgerState, MemorySeenKeys
from billing.step import CommandInput, LedgerKeys, UsageInput, step
from billing.v1.command_pb2 import Command, CreditGrant, Price, PriceBook, TenantUpsert
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_CHAT,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageBatch,
    UsageEvent,
)
from sinks import queries
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.loop import run_sink
from sinks.migrate import migrate
from sinks.parameters import bind
from sinks.settings import SinkSettings
from sinks.status import SinkStatus
from taximeter.embedded.broker import TansuBroker, TansuSettings

BATCH = 500
BATCHES = 600
ORDINARY_EVENTS = 500
BALANCES = 300
TENANTS = [f"tenant-{number}" for number in range(50)]
KEYS = LedgerKeys(b"s" * 32, b"c" * 32)
TIMEOUT_S = 300.0


def _events(batch: int, now_ms: int) -> list[UsageEvent]:
    return [
        UsageEvent(
            request_id=uuid.uuid4().hex,
            tenant_id=TENANTS[(batch + index) % len(TENANTS)],
            project_id=f"project-{index % 3}",
            user_id=f"user-{index % 97}",
            api_key_id=f"key-{index % 50}",
            model=f"model-{index % 4}",
            operation=OPERATION_CHAT,
            service_class=SERVICE_CLASS_STANDARD,
            outcome=OUTCOME_COMPLETED,
            count_source=COUNT_SOURCE_BACKEND,
            started_ms=now_ms - 900,
            ended_ms=now_ms,
            uncached_input_tokens=400 + index,
            output_tokens=90 + index % 50,
            context_tokens=490 + index,
            latency_ms=900,
            server_id="server-1",
        )
        for index in range(BATCH)
    ]


def make_records() -> list[bytes]:
    """A ledger partition as its worker writes it: 50 tenants with credit, then usage that moves on by 20 ms a batch."""
    state = LedgerState(MemorySeenKeys())
    now_ms = time.time_ns() // 1_000_000
    record, stored = found(
        LedgerSettings(partitions=1, dedupe_key=b"d" * 32), 0, uuid.uuid4().bytes, now_ms, KEYS.seal_key, "benchmark"
    )
    replay.apply(state, record, stored)
    records = [stored]
    prices = [Price(model="*", uncached_input_pico=150_000, output_pico=600_000)]
    actions = [Command(price_book=PriceBook(version=1, currency="USD", prices=prices))]
    for tenant_id in TENANTS:
        actions.append(Command(tenant_upsert=TenantUpsert(tenant_id=tenant_id, currency="USD")))
        grant = CreditGrant(tenant_id=tenant_id, amount=to_amount(10**18), currency="USD")
        actions.append(Command(credit_grant=grant))
    for offset, command in enumerate(actions):
        command.schema_version = SCHEMA_VERSION
        command.command_id = f"command-{offset}"
        command.issued_ms = now_ms
        source = CommandInput("billing.commands", offset, sign(command, KEYS.command_key))
        records.append(step(state, source, now_ms, keys=KEYS, writer="benchmark").stored)
    for number in range(BATCHES):
        time_ms = now_ms + 20 * number
        value = UsageBatch(
            schema_version=SCHEMA_VERSION,
            producer_id="benchmark",
            first_sequence=number * BATCH + 1,
            highest_sequence=(number + 1) * BATCH,
            events=_events(number, time_ms),
        ).SerializeToString()
        records.append(step(state, UsageInput("usage.events", number, value), time_ms, keys=KEYS, writer="benchmark").stored)
    return records


def run() -> list[Measurement]:
    """Every line of the sink."""
    records = make_records()
    with tempfile.TemporaryDirectory(prefix="taximeter-bench-") as name:
        folder = Path(name)
        ordinary = _ordinary(folder)
        direct, direct_cpu = _direct(folder, records)
        streamed, latencies_ms = _streamed(folder, records)
    beside = f"one INSERT an event: {ordinary:,.0f}/s"
    return [
        Measurement("sink: record bytes to rows in chDB", direct, "events/s", beside, direct / ordinary, ">= 75000"),
        # What other processes take of the machine is not in this one.
        Measurement("sink: record bytes to rows in chDB, per second of CPU", direct_cpu, "events"),
        Measurement("sink: Kafka to rows in chDB", streamed, "events/s", beside, streamed / ordinary, ">= 75000"),
        Measurement("sink: a balance, p50", statistics.median(latencies_ms), "ms"),
        Measurement("sink: a balance, p99", statistics.quantiles(latencies_ms, n=100)[98], "ms", target="< 1000"),
    ]


def _migrated(folder: Path, database: str) -> ChdbEngine:
    engine = ChdbEngine(folder / "chdb", database)
    migrate(engine)
    return engine


def _ordinary(folder: Path) -> float:
    """What a first version does: one row, one INSERT."""
    engine = _migrated(folder, "ordinary")
    events = _events(0, 1_763_880_000_000)[:ORDINARY_EVENTS]
    statements = [
        bind(
            "INSERT INTO usage_events (tenant_id, request_id, project_id, user_id, model, ended, uncached_input_tokens, "
            "output_tokens) VALUES ({tenant:String}, {request:String}, {project:String}, {user:String}, {model:String}, "
            "fromUnixTimestamp64Milli({ended:Int64}), {input:UInt64}, {output:UInt64})",
            {
                "tenant": event.tenant_id,
                "request": event.request_id,
                "project": event.project_id,
                "user": event.user_id,
                "model": event.model,
                "ended": event.ended_ms,
                "input": event.uncached_input_tokens,
                "output": event.output_tokens,
            },
        )
        for event in events
    ]
    started_s = time.perf_counter()
    for statement in statements:
        engine.execute(statement)
    taken_s = time.perf_counter() - started_s
    engine.close()
    return len(statements) / taken_s


def _direct(folder: Path, records: list[bytes]) -> tuple[float, float]:
    engine = _migrated(folder, "direct")
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    feed(engine, records, KEYS.seal_key)
    taken_s, taken_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    assert queries.totals(engine).events == BATCH * BATCHES
    engine.close()
    return BATCH * BATCHES / taken_s, BATCH * BATCHES / taken_cpu_s


def _streamed(folder: Path, records: list[bytes]) -> tuple[float, list[float]]:
    engine = _migrated(folder, "streamed")
    broker = TansuBroker(TansuSettings(log_path=folder / "broker.log"))
    broker.start()
    try:
        settings = SinkSettings(broker.bootstrap, seal_key=KEYS.seal_key)
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        topics = [NewTopic(topic, 1, 1) for topic in (settings.ledger_topic, settings.progress_topic)]
        for future in admin.create_topics(topics).values():
            future.result(20)
        producer = Producer({"bootstrap.servers": broker.bootstrap, "acks": "all"})
        for stored in records:
            producer.produce(settings.ledger_topic, stored, partition=0)
        assert producer.flush(60) == 0
        stop, status = threading.Event(), SinkStatus()
        sink = threading.Thread(target=run_sink, args=(settings, engine, stop, status))
        started_s = time.perf_counter()
        sink.start()
        try:
            assert status.wait_for({0: len(records) - 1}, TIMEOUT_S)
            taken_s = time.perf_counter() - started_s
        finally:
            stop.set()
            sink.join()
    finally:
        broker.stop()
    totals = queries.totals(engine)
    assert totals.events == BATCH * BATCHES
    assert totals.cost_pico == totals.spend_pico
    latencies_ms = []
    for number in range(BALANCES):
        asked_s = time.perf_counter()
        [balance] = queries.balances(engine, TENANTS[number % len(TENANTS)])
        latencies_ms.append(1000 * (time.perf_counter() - asked_s))
        assert balance.events == BATCH * BATCHES // len(TENANTS)
    engine.close()
    return BATCH * BATCHES / taken_s, latencies_ms
