"""A small ledger for tests: found a partition, give it commands and usage, look at what it says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from billing import chain, commands, replay
from billing.founding import LedgerSettings, found
from billing.identity import partition_of
from billing.key_ring import Keys
from billing.state import LedgerState, MemorySeenKeys
from billing.step import CommandInput, LedgerKeys, StepResult, TickInput, UsageInput, step
from billing.v1.account_pb2 import BILLING_MODE_PREPAID, Plan
from billing.v1.command_pb2 import Command, Price, PriceBook, TenantUpsert
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import OUTCOME_COMPLETED, SERVICE_CLASS_STANDARD, UsageBatch, UsageEvent

SEAL_KEY, COMMAND_KEY = b"s" * 32, b"c" * 32
KEYS = LedgerKeys(seal_key=SEAL_KEY, command_key=COMMAND_KEY)
NOW_MS = 1_763_880_000_000
PARTITIONS = 4
PLAN = Plan(plan_id="test", billing_mode=BILLING_MODE_PREPAID, burst_tokens_floor=1_000, burst_factor=5)
PRICES = (
    Price(
        model="smollm2",
        uncached_input_pico=10_000,
        output_pico=40_000,
        cache_read_pico=1_001,
        reasoning_pico=40_003,
        audio_output_pico=7,
        unit_pico={"characters": 13},
    ),
)


def tenants_in(partition: int, count: int = 3, partitions: int = PARTITIONS) -> list[str]:
    """Names of tenants that live in `partition`."""
    names = (f"tenant-{number}" for number in itertools.count())
    return list(itertools.islice((name for name in names if partition_of(name, partitions) == partition), count))


def usage(request_id: str, tenant_id: str, **fields: Any) -> UsageEvent:
    """A plain completed request that ended at NOW_MS."""
    values: dict[str, Any] = {
        "model": "smollm2",
        "project_id": "default",
        "operation": 1,
        "service_class": SERVICE_CLASS_STANDARD,
        "outcome": OUTCOME_COMPLETED,
        "started_ms": NOW_MS - 500,
        "ended_ms": NOW_MS,
        "uncached_input_tokens": 100,
        "output_tokens": 10,
    }
    return UsageEvent(request_id=request_id, tenant_id=tenant_id, **(values | fields))


def batch(events: Iterable[UsageEvent], producer_id: str = "", first: int = 0, highest: int = 0) -> bytes:
    """The bytes of a batch."""
    return UsageBatch(
        schema_version=1, producer_id=producer_id, first_sequence=first, highest_sequence=highest, events=events
    ).SerializeToString(deterministic=True)


class Ledger:
    """One partition: its state and every record that it wrote, as stored."""

    def __init__(self, partition: int = 1, settings: LedgerSettings | None = None) -> None:
        self.settings = settings or LedgerSettings(partitions=PARTITIONS, dedupe_key=b"k" * 32)
        self.state = LedgerState(MemorySeenKeys())
        record, stored = found(self.settings, partition, b"g" * 16, NOW_MS - 1_000, KEYS.seal_key, "test")
        replay.apply(self.state, record, stored)
        self.stored = [stored]
        self._offsets = {"usage.events": -1, "billing.commands": -1}

    def _offset(self, topic: str) -> int:
        self._offsets[topic] += 1
        return self._offsets[topic]

    def _take(self, result: StepResult) -> StepResult:
        self.stored.append(result.stored)
        return result

    def usage(self, value: bytes, log_time_ms: int = NOW_MS) -> StepResult:
        source = UsageInput("usage.events", self._offset("usage.events"), value)
        return self._take(step(self.state, source, log_time_ms, keys=KEYS, writer="test"))

    def command(self, log_time_ms: int = NOW_MS, key: Keys = KEYS.command_key, **action: Any) -> StepResult:
        values: dict[str, Any] = {
            "command_id": f"c{len(self.stored)}",
            "issued_ms": max(log_time_ms, self.state.log_time_ms),
        } | action
        command = Command(schema_version=1, **values)
        source = CommandInput("billing.commands", self._offset("billing.commands"), commands.sign(command, key))
        return self._take(step(self.state, source, log_time_ms, keys=KEYS, writer="test"))

    def raw_command(self, value: bytes, log_time_ms: int = NOW_MS) -> StepResult:
        source = CommandInput("billing.commands", self._offset("billing.commands"), value)
        return self._take(step(self.state, source, log_time_ms, keys=KEYS, writer="test"))

    def tick(self, log_time_ms: int) -> StepResult:
        return self._take(step(self.state, TickInput(), log_time_ms, keys=KEYS, writer="test"))

    def price(self, prices: Sequence[Price] = PRICES, version: int = 1, effective_ms: int = 0) -> StepResult:
        book = PriceBook(version=version, currency="USD", effective_ms=effective_ms, prices=prices)
        return self.command(price_book=book)

    def tenant(self, tenant_id: str, plan: Plan = PLAN) -> StepResult:
        return self.command(tenant_upsert=TenantUpsert(tenant_id=tenant_id, currency="USD", plan=plan))

    def records(self) -> list[LedgerRecord]:
        """Every record that it wrote."""
        return [LedgerRecord.FromString(stored) for stored in self.stored]

    def replayed(self) -> LedgerState:
        """A state that knows only the stored records."""
        state = LedgerState(MemorySeenKeys())
        reader = chain.Chain(self.state.partition, KEYS.seal_key)
        for stored in self.stored:
            record = reader.accept(stored)
            assert record is not None
            replay.apply(state, record, stored)
        return state
