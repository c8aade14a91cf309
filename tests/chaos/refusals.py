"""Input that the ledger must refuse, among usage that it must charge: all that was taken in is billed, or told as rejected.

Whoever sends here is no producer of ours: it writes to the input topic itself, and Kafka acknowledges whatever it writes. The
ledger says of each such input, or of single events of a batch, that it refused it, and usage.rejected tells the same with the
reason; the rest of the batch is charged. usage.rejected may tell twice (a publisher that died), never less and nothing else.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from confluent_kafka import KafkaError, Message, Producer

from billing.identity import partition_of
from billing.limits import BATCH_BYTES_MAX, BATCH_EVENTS_MAX, QUANTITY_MAX
from billing.v1.rejected_pb2 import RejectedInput
from billing.v1.usage_pb2 import UsageBatch, UsageEvent
from stream_processors.kafka_ports import MESSAGE_BYTES_MAX
from taximeter import compose
from tests.chaos.faults import Fault
from tests.chaos.history import Attempt, Outcome, Receipt
from tests.chaos.installation import PARTITIONS, PRICES_PICO, KafkaInstallation
from tests.chaos.producer import event_of
from tests.chaos.reading import NotReadableError, Place, TopicReader

__all__ = ["PoisonedInput", "Refusing"]

_TOLD_TIMEOUT_S: Final = 120.0
_DAY_MS: Final = 86_400_000
_INPUTS: Final = 200
# Of the events of a mixed batch.
_MIXED: Final = 5


class Refusing(Fault):
    """A fault whose refusals are held against usage.rejected."""

    def refused(self) -> set[str]:
        """Wait until every refusal that the ledger states is told; the requests among them."""
        self._stated: set[Place] = set().union(*(seen.rejected for seen in self.world.records))
        self._told: dict[Place, RejectedInput] = {}
        deadline = time.monotonic() + _TOLD_TIMEOUT_S
        while True:
            self._look()
            if self._stated <= self._told.keys() or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return {told.request_id for place, told in self._told.items() if place in self._stated and told.request_id}

    def _look(self) -> None:
        config = self.world.installation.config
        reader = self.world.readers.get("rejected")
        if reader is None:
            topic = compose.topic_names(config).rejected
            reader = self.world.readers["rejected"] = TopicReader(config.kafka.bootstrap, topic, config.ledger.partitions)

        def take(_: int, value: bytes) -> None:
            told = RejectedInput.FromString(value)
            self._told[told.topic, told.partition, told.offset, told.index] = told

        try:
            reader.read(take)
        except NotReadableError:
            return

    def violations(self) -> list[str]:
        # What an earlier trial's publisher repeats after its death is of that trial's inputs.
        first: dict[int, int] = {}
        for _, partition, offset, _ in self._stated:
            first[partition] = min(offset, first.get(partition, offset))
        told = {place for place in self._told if place[2] >= first.get(place[1], place[2] + 1)}
        return (
            [f"{place} was refused by the ledger, and usage.rejected does not tell it" for place in sorted(self._stated - told)]
            + [f"{place} is told on usage.rejected, and the ledger did not refuse it" for place in sorted(told - self._stated)]
            + [f"{place} was refused without a reason" for place in sorted(told) if not self._told[place].reason]
        )


class PoisonedInput(Refusing):
    """Garbage, oversized batches, too many events, unknown versions, and batches of which some events are impossible."""

    name = "poisoned-input"
    place = "input"
    checks = "I1, I3, I10"
    nightly = 10
    setup = KafkaInstallation
    hold_s = (0.0, 0.3)

    def inject(self) -> None:
        config = self.world.installation.config
        self._topic = compose.topic_names(config).events
        self._wanted: set[Place] = set()
        self._kinds: Counter[str] = Counter()
        self._sent_events = 0
        producer = Producer(
            {
                "bootstrap.servers": config.kafka.bootstrap,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.max.bytes": MESSAGE_BYTES_MAX,
                "log_level": 0,
            }
        )
        ways = self._ways()
        problems: list[str] = []
        for number in range(_INPUTS):
            kind, make = ways[number % len(ways)]
            self._kinds[kind] += 1
            make(producer, f"poison-{os.getpid()}-{time.time_ns()}-{number}", problems)
            producer.poll(0)
        left = producer.flush(_TOLD_TIMEOUT_S)
        assert not left, f"{left} inputs were not acknowledged"
        assert not problems, problems[0]

    def heal(self) -> None:
        self.world.installation.restart_dead()

    def _ways(self) -> list[tuple[str, Callable[[Producer, str, list[str]], None]]]:
        def whole(make: Callable[[], bytes]) -> Callable[[Producer, str, list[str]], None]:
            return lambda producer, _, problems: self._send(producer, make(), self.draw.randrange(PARTITIONS), [-1], problems)

        draw = self.draw
        return [
            ("garbage", whole(lambda: b"\xff" + draw.randbytes(draw.randint(0, 2_000)))),
            ("cut off", whole(lambda: _batch([self._event("cut")])[:-3])),
            ("an unknown version", whole(lambda: UsageBatch(schema_version=draw.randint(2, 2**31)).SerializeToString())),
            ("nothing", whole(lambda: b"")),
            ("oversized", whole(lambda: bytes(draw.randint(BATCH_BYTES_MAX + 1, BATCH_BYTES_MAX + 5_000)))),
            ("too many events", whole(lambda: _batch([UsageEvent()] * (BATCH_EVENTS_MAX + 1)))),
            ("mixed", self._mixed),
            ("mixed", self._mixed),
        ]

    def _event(self, name: str) -> UsageEvent:
        tenant = self.draw.choice(self.world.tenants)
        tokens = {"uncached_input_tokens": self.draw.randint(1, 4_000), "output_tokens": self.draw.randint(0, 2_000)}
        return event_of({"id": name, "tenant": tenant, "tokens": tokens, "at_ms": time.time_ns() // 1_000_000})

    def _mixed(self, producer: Producer, name: str, problems: list[str]) -> None:
        """Some events of one batch are impossible, each in a way of its own; the others must be charged."""
        history = self.world.history
        assert history is not None
        events = [self._event(f"{name}-{index}") for index in range(_MIXED)]
        home = partition_of(events[0].tenant_id, PARTITIONS)
        bad = sorted(self.draw.sample(range(_MIXED), self.draw.randint(1, _MIXED)))
        for event in events:
            event.tenant_id = events[0].tenant_id
        for index in bad:
            self.draw.choice(_IMPOSSIBLE)(events[index])
        attempts = [
            Attempt(
                event.request_id,
                event.tenant_id,
                {name: getattr(event, name) for name in ("uncached_input_tokens", "output_tokens")},
                PRICES_PICO,
                at_ms=time.time_ns() // 1_000_000,
            )
            for event in events
        ]
        history.add(attempts)
        self._sent_events += len(events)

        def acknowledged() -> None:
            history.add([Receipt(attempt.request_id, Outcome.OK, at_ms=time.time_ns() // 1_000_000) for attempt in attempts])

        self._send(producer, _batch(events), home, bad, problems, acknowledged)

    def _send(
        self,
        producer: Producer,
        value: bytes,
        partition: int,
        bad: list[int],
        problems: list[str],
        acknowledged: Callable[[], None] = lambda: None,
    ) -> None:
        """`bad`: the indexes of events that must be refused, or -1 for all of it."""

        def delivered(error: KafkaError | None, message: Message) -> None:
            offset = message.offset()
            if error is not None or offset is None:
                problems.append(f"an input of {len(value)} bytes was not taken by Kafka: {error}")
                return
            self._wanted |= {(self._topic, partition, offset, index) for index in bad}
            acknowledged()

        producer.produce(self._topic, value, partition=partition, on_delivery=delivered)

    def evidence(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._kinds.items()))
        events = [place for place in self._wanted if place[3] >= 0]
        billed = self._sent_events - len(events)
        accepted = sum(self._kinds.values()) - self._kinds["mixed"] + self._sent_events
        assert accepted == billed + len(self._wanted)
        return f"{kinds}: {accepted} accepted = {billed} billed + {len(self._wanted)} rejected" if self._wanted else ""

    def violations(self) -> list[str]:
        missing, beyond = self._wanted - self._stated, self._stated - self._wanted
        return (
            super().violations()
            + [
                f"{place} was accepted by Kafka and is impossible, and the ledger does not refuse it"
                for place in sorted(missing)
            ]
            + [f"{place} was refused by the ledger, and is in order" for place in sorted(beyond)]
        )


def _batch(events: list[UsageEvent]) -> bytes:
    return UsageBatch(schema_version=1, events=events).SerializeToString()


def _no_model(event: UsageEvent) -> None:
    event.model = ""


def _negative(event: UsageEvent) -> None:
    event.output_tokens = 2**64 - 5


def _too_much(event: UsageEvent) -> None:
    event.uncached_input_tokens = QUANTITY_MAX + 1


def _backwards(event: UsageEvent) -> None:
    event.started_ms = event.ended_ms + 1


def _microseconds(event: UsageEvent) -> None:
    event.started_ms, event.ended_ms = event.started_ms * 1_000, event.ended_ms * 1_000


def _far_ahead(event: UsageEvent) -> None:
    event.ended_ms += 400 * _DAY_MS


def _long_ago(event: UsageEvent) -> None:
    event.started_ms, event.ended_ms = event.started_ms - 400 * _DAY_MS, event.ended_ms - 400 * _DAY_MS


_IMPOSSIBLE: Final = (_no_model, _negative, _too_much, _backwards, _microseconds, _far_ahead, _long_ago)
