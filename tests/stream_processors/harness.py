"""A ledger on a real broker: send usage, run workers, read the log, compare with what was sent."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition

from billing import replay
from billing.chain import Chain
from billing.founding import LedgerSettings
from billing.identity import partition_of
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_GENERATE,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageBatch,
    UsageEvent,
)
from stream_processors.kafka_ports import MESSAGE_BYTES_MAX
from stream_processors.settings import KafkaSettings, TopicNames, TopicSettings
from stream_processors.topics import ApplySettings, Change, apply
from taximeter.embedded.process import Child
from tests.stream_processors import worker_main
from tests.stream_processors.forked import ForkedChild, can_fork
from tests.stream_processors.worker_main import SEAL_KEY

ROOT = Path(__file__).parents[2]
DEDUPE_KEY = b"dedupe!!" * 4
# Bounds for a machine that stands still for seconds now and then; nothing is to be measured with them.
TIMEOUT_S = 120.0
STOP_GRACE_S = 120.0
# Garbage is collected when all is imported, as in `taximeter worker`.
WORKER = """
import gc, json, sys
gc.disable()
from tests.stream_processors.worker_main import main
gc.freeze()
gc.enable()
sys.exit(main(**json.loads(sys.argv[1])))
"""


def event(tenant_id: str, request_id: str = "", *, input_tokens: int = 100, output_tokens: int = 10) -> UsageEvent:
    now_ms = int(time.time() * 1000)
    return UsageEvent(
        request_id=request_id or str(uuid.uuid4()),
        tenant_id=tenant_id,
        project_id="default",
        model="model-a",
        operation=OPERATION_GENERATE,
        service_class=SERVICE_CLASS_STANDARD,
        outcome=OUTCOME_COMPLETED,
        count_source=COUNT_SOURCE_BACKEND,
        started_ms=now_ms - 500,
        ended_ms=now_ms,
        uncached_input_tokens=input_tokens,
        output_tokens=output_tokens,
    )


@dataclass
class PartitionLog:
    """What a reader makes of one partition: the accepted records and the state that they lead to."""

    records: list[LedgerRecord]
    ignored: int
    state: LedgerState
    charged: Counter[str]


@dataclass
class Ledger:
    """One ledger under its own prefix of topic names."""

    bootstrap: str
    folder: Path
    partitions: int = 2
    quick_sessions: bool = False
    prefix: str = field(default_factory=lambda: f"t{uuid.uuid4().hex[:8]}.")
    sent: dict[str, UsageEvent] = field(default_factory=dict)
    workers: list[Child] = field(default_factory=list)
    producers: dict[str, Producer] = field(default_factory=dict)
    consumers: dict[str, Consumer] = field(default_factory=dict)

    @property
    def names(self) -> TopicNames:
        return TopicNames(self.prefix)

    def apply_settings(self, state_folder: Path | None = None) -> ApplySettings:
        return ApplySettings(
            kafka=KafkaSettings(self.bootstrap),
            topics=TopicSettings(partitions=self.partitions),
            ledger=LedgerSettings(partitions=self.partitions, dedupe_key=DEDUPE_KEY),
            seal_key=SEAL_KEY,
            names=self.names,
            state_folder=state_folder,
        )

    def found(self, state_folder: Path | None = None) -> list[Change]:
        return asyncio.run(apply(self.apply_settings(state_folder)))

    def worker(self, name: str = "one", *, folder: Path | None = None, tree: Path = ROOT, **more: object) -> Child:
        """`tree`: where its code is."""
        arguments = {
            # Tansu answers a join after half the session; Apache Kafka takes no session under 6 s.
            **({"session_timeout_s": 3.0, "heartbeat_interval_s": 0.5} if self.quick_sessions else {}),
            "bootstrap": self.bootstrap,
            "prefix": self.prefix,
            "folder": str(folder or self.folder / name),
            **more,
        }
        log_path = self.folder / f"{name}.log"
        if tree == ROOT and can_fork():
            child: Child = ForkedChild(f"worker {name}", worker_main.main, arguments, log_path=log_path)
        else:
            command = [sys.executable, "-c", WORKER, json.dumps(arguments)]
            child = Child(f"worker {name}", command, log_path=log_path, cwd=tree)
        child.start()
        self.workers.append(child)
        return child

    def stop(self) -> None:
        for child in self.workers:
            child.kill9()
        for consumer in self.consumers.values():
            consumer.close()
        self.consumers.clear()

    def send(self, events: Sequence[UsageEvent], *, partition: int | None = None) -> None:
        """One batch for each partition that these events' tenants live in, or all into the partition given."""
        groups: dict[int, list[UsageEvent]] = {}
        for one in events:
            groups.setdefault(partition_of(one.tenant_id, self.partitions) if partition is None else partition, []).append(one)
            self.sent.setdefault(one.request_id, one)
        for number, group in groups.items():
            self.send_bytes(UsageBatch(schema_version=1, events=group).SerializeToString(), number)

    def send_bytes(
        self, value: bytes, partition: int, topic: str | None = None, *, key: bytes | None = None, time_ms: int = 0
    ) -> None:
        # One for all: an idempotent producer takes half a second for its first message.
        producer = self.producers.get(self.bootstrap)
        if producer is None:
            producer = self.producers[self.bootstrap] = Producer(
                {"bootstrap.servers": self.bootstrap, "enable.idempotence": True, "message.max.bytes": MESSAGE_BYTES_MAX}
            )
        problems: list[object] = []
        producer.produce(
            topic or self.names.events,
            value=value,
            key=key,
            partition=partition,
            timestamp=time_ms,
            on_delivery=lambda error, _: problems.append(error),
        )
        assert producer.flush(TIMEOUT_S) == 0
        assert problems == [None]

    def read(self, topic: str, partition: int) -> list[bytes]:
        """Every value in one partition of a topic."""
        # One for all: tests look many times a second, and a consumer of its own for each look costs more than what is read.
        consumer = self.consumers.get(self.bootstrap)
        if consumer is None:
            consumer = self.consumers[self.bootstrap] = Consumer(
                {
                    "bootstrap.servers": self.bootstrap,
                    "group.id": "test-reader",
                    "enable.auto.commit": False,
                    "enable.partition.eof": True,
                    "auto.offset.reset": "error",
                    "fetch.wait.max.ms": 10,
                    "fetch.queue.backoff.ms": 5,
                    "fetch.message.max.bytes": MESSAGE_BYTES_MAX,
                    # Some tests start the broker again.
                    "reconnect.backoff.max.ms": 200,
                }
            )
        # Assigned before it knows the leader, librdkafka starts to fetch half a second later.
        consumer.list_topics(topic, TIMEOUT_S)
        beginning = TopicPartition(topic, partition, OFFSET_BEGINNING)
        consumer.assign([beginning])
        values: list[bytes] = []
        problem: KafkaError | None = None
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while time.monotonic() < deadline:
                for message in consumer.consume(1, 0.2) + consumer.consume(1000, 0):
                    error = message.error()
                    if error is None:
                        values.append(bytes(message.value() or b""))
                    elif error.code() == KafkaError._PARTITION_EOF:
                        return values
                    else:
                        # Its beginning was deleted since the last look: librdkafka stops there until it is told anew.
                        problem = error
                        values.clear()
                        consumer.unassign()
                        consumer.assign([beginning])
                        break
        finally:
            consumer.unassign()
        raise AssertionError(f"{topic}[{partition}]: its end was not found in {TIMEOUT_S:g} s ({problem})")

    def log(self, partition: int) -> PartitionLog:
        chain = Chain(partition, SEAL_KEY)
        state = LedgerState(MemorySeenKeys())
        records = []
        charged: Counter[str] = Counter()
        for stored in self.read(self.names.ledger, partition):
            record = chain.accept(stored)
            if record is None:
                continue
            replay.apply(state, record, stored)
            records.append(record)
            charged.update(charged_in(record))
        return PartitionLog(records, chain.ignored, state, charged)

    def logs(self) -> list[PartitionLog]:
        return [self.log(partition) for partition in range(self.partitions)]

    def charged(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for log in self.logs():
            total += log.charged
        return total

    def assert_exact(self) -> None:
        """Every event that was sent is charged once, per tenant and class of token."""
        logs = self.logs()
        charged: Counter[str] = Counter()
        tokens: Counter[tuple[str, str]] = Counter()
        for log in logs:
            charged += log.charged
            # A ledger that was founded again has let its windows go, and opens others of the same minute.
            windows = {
                (r.generation, total.key.SerializeToString(deterministic=True)): total
                for r in log.records
                for total in r.totals
            }
            for total in windows.values():
                tokens[total.key.tenant_id, "input"] += total.uncached_input_tokens
                tokens[total.key.tenant_id, "output"] += total.output_tokens
        assert charged == Counter(dict.fromkeys(self.sent, 1))
        expected: Counter[tuple[str, str]] = Counter()
        for one in self.sent.values():
            expected[one.tenant_id, "input"] += one.uncached_input_tokens
            expected[one.tenant_id, "output"] += one.output_tokens
        assert tokens == expected

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
        began = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                tails = "\n".join(child.log_tail(40) for child in self.workers[-2:])
                raise AssertionError(f"{what} did not come in {timeout_s:g} s\n{tails}")
            # Most conditions read whole logs: what takes long is looked at less often.
            time.sleep(min(max(waited_s / 8, 0.2), 1.0))

    def wait_charged(self, timeout_s: float = 180.0, *, revived: Iterable[Child] = ()) -> None:
        """`revived`: who is started again when it ends for a reason, as its supervisor does."""

        def charged() -> bool:
            for worker in revived:
                if not worker.alive:
                    assert worker.exit_code == worker_main.REFUSED, worker.log_tail()
                    worker.start()
            return len(self.charged()) >= len(self.sent)

        self.wait(charged, f"{len(self.sent)} charges", timeout_s)


def finish(worker: Child) -> None:
    """Stop it as an operator does: it settles, writes its state and leaves the group."""
    worker.stop(STOP_GRACE_S)
    assert worker.exit_code == 0, worker.log_tail()


def charged_in(record: LedgerRecord) -> list[str]:
    """The request IDs that a record charges."""
    if record.WhichOneof("source") != "usage":
        return []
    dropped = {entry.index for entry in record.usage.dropped}
    batch = UsageBatch.FromString(record.usage.batch)
    return [one.request_id for index, one in enumerate(batch.events) if index not in dropped]
