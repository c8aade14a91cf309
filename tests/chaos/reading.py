"""What the ledger, usage.rejected and the database say, read from where the last look ended.

`TopicReader` reads a topic from offsets that it keeps itself: nothing is committed, nothing is reset. `LedgerReader` reads
usage.ledger with one, and with the chain's rule, so what it knows is what any reader accepts; what it ignores (a zombie's, a
repeat) it keeps for those who want to show that there was one. `DatabaseReader` asks for the rows beyond the positions that it
has seen, and for sums.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from billing.chain import Chain
from billing.v1.ledger_pb2 import DROP_REASON_DUPLICATE, DROP_REASON_FORWARDED, LedgerRecord
from billing.v1.usage_pb2 import OUTCOME_BACKEND_ERROR, OUTCOME_REJECTED, RawUsageBatch, UsageEvent
from sinks.engine import Reader, decimal_to_pico
from taximeter import compose
from taximeter.config import Config
from tests.chaos.checker import Charge, Sums

# Where a refused input lies: topic, partition, offset, and the event's index in its batch; -1: the whole message.
Place = tuple[str, int, int, int]

__all__ = ["DatabaseReader", "LedgerReader", "NotReadableError", "TopicReader"]

TOKENS: Final = (
    "uncached_input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "image_input_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
)
# Charged elsewhere, or before: no refusal.
_QUIET_DROPS: Final = (DROP_REASON_DUPLICATE, DROP_REASON_FORWARDED)
_FREE: Final = (OUTCOME_REJECTED, OUTCOME_BACKEND_ERROR)
_FREE_NAMES: Final = ("rejected", "backend_error")
_METADATA_TIMEOUT_S: Final = 3.0
_READ_TIMEOUT_S: Final = 10.0


class NotReadableError(Exception):
    """Not just now: ask again."""


def identity_of(request_id: str, client_request_id: str) -> str:
    """The ID that the driver knows: its own, which a gateway keeps beside the one that it assigns."""
    return client_request_id or request_id


@dataclass
class Seen:
    """What one partition's log has said since `LedgerReader.take`."""

    charges: list[Charge] = field(default_factory=list)
    # Of each accepted record with usage: its sequence and who wrote it.
    written: list[tuple[int, str]] = field(default_factory=list)
    # Written and not accepted by the chain's rule: sequence and writer.
    ignored: list[tuple[int, str]] = field(default_factory=list)
    # Refused inputs, and refused events of batches: what must be on usage.rejected.
    rejected: set[Place] = field(default_factory=set)


class TopicReader:
    """Every partition of a topic, from where it has read to."""

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._offsets = [0] * partitions

    def read(self, take: Callable[[int, bytes], None], *, from_beginning: bool = False) -> None:
        """Hand each message, its partition and value, to `take`, to the end of every partition as it is now.

        Raises NotReadableError when Kafka does not let us; what was taken is not taken again.
        """
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": "chaos-reader",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "allow.auto.create.topics": False,
                "fetch.queue.backoff.ms": 5,
                "fetch.wait.max.ms": 10,
                "log_level": 0,
            }
        )
        try:
            known = consumer.list_topics(self._topic, timeout=_METADATA_TIMEOUT_S).topics[self._topic]
            if known.error is not None or len(known.partitions) != len(self._offsets):
                raise NotReadableError(f"{self._topic}: {known.error or len(known.partitions)}")
            if from_beginning:
                self._offsets = [0] * len(self._offsets)
            self._read(consumer, take)
        except KafkaException as error:
            raise NotReadableError(str(error)) from error
        finally:
            consumer.close()

    def _read(self, consumer: Consumer, take: Callable[[int, bytes], None]) -> None:
        consumer.assign([TopicPartition(self._topic, p, offset or OFFSET_BEGINNING) for p, offset in enumerate(self._offsets)])
        left = set(range(len(self._offsets)))
        deadline = time.monotonic() + _READ_TIMEOUT_S
        while left:
            messages = consumer.consume(500, 0.05)
            if not messages and time.monotonic() > deadline:
                raise NotReadableError(f"{self._topic}: the end was not reached in {_READ_TIMEOUT_S:g} s")
            for message in messages:
                partition, error = message.partition() or 0, message.error()
                if error is None:
                    take(partition, bytes(message.value() or b""))
                    self._offsets[partition] = (message.offset() or 0) + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(partition)
                else:
                    raise KafkaException(error)


class LedgerReader:
    """Every partition of the ledger. `forgets`: the broker may begin its logs anew; then each look begins at offset 0."""

    def __init__(self, config: Config, archive: Reader | None = None) -> None:
        self._topic = TopicReader(config.kafka.bootstrap, compose.topic_names(config).ledger, config.ledger.partitions)
        self._archive = archive
        seal_key = compose.ledger_keys(config).seal_key
        self.chains = [Chain(partition, seal_key) for partition in range(config.ledger.partitions)]
        self.seen = [Seen() for _ in self.chains]
        self.charged: Counter[str] = Counter()
        # The log time of the record that charged it.
        self.charged_ms: dict[str, int] = {}
        self.commands: Counter[str] = Counter()
        self.refusals: list[str] = []
        # producer -> by partition, the number up to which the ledger has everything.
        self.covered: dict[str, list[int]] = {}

    def look(self) -> None:
        """Read to the end of every partition. Raises NotReadableError when Kafka does not let us."""
        self._topic.read(self._take_record, from_beginning=self._archive is not None)

    def take(self) -> list[Seen]:
        """What was seen since the last call."""
        taken, self.seen = self.seen, [Seen() for _ in self.chains]
        return taken

    def _take_record(self, partition: int, stored: bytes) -> None:
        chain = self.chains[partition]
        if self._archive is not None:
            claimed = LedgerRecord.FromString(stored)
            if claimed.generation == chain.generation and claimed.sequence <= chain.sequence:
                return
            if claimed.HasField("founding") and claimed.founding.HasField("predecessor"):
                self._fill(partition, self._archive)
        self._accept(partition, stored)

    def _fill(self, partition: int, archive: Reader) -> None:
        """The end of a log that is gone: the database was handed it before the new one was founded."""
        chain = self.chains[partition]
        rows = archive.query(
            "SELECT hex(record) FROM ledger_records FINAL WHERE ledger_partition = {partition:UInt32} "
            "AND generation = {generation:String} AND sequence > {sequence:UInt64} ORDER BY sequence",
            {"partition": partition, "generation": chain.generation.hex(), "sequence": chain.sequence},
        ).rows
        for (record,) in rows:
            self._accept(partition, bytes.fromhex(str(record)))

    def _accept(self, partition: int, stored: bytes) -> None:
        record = self.chains[partition].accept(stored)
        seen = self.seen[partition]
        if record is None:
            other = LedgerRecord.FromString(stored)
            seen.ignored.append((other.sequence, other.writer))
            return
        for mark in record.producers:
            covered = self.covered.setdefault(mark.producer_id, [0] * len(self.chains))
            covered[partition] = mark.covered_sequence
        if record.HasField("command"):
            if record.command.applied:
                self.commands["applied"] += 1
            else:
                self.refusals.append(record.command.refusal)
        seen.rejected |= _rejected(record)
        if record.HasField("usage"):
            charges = list(_charges(record))
            seen.charges += charges
            self.charged.update(charge.request_id for charge in charges)
            self.charged_ms.update(dict.fromkeys((charge.request_id for charge in charges), record.log_time_ms))
            if charges:
                seen.written.append((record.sequence, record.writer))


def _rejected(record: LedgerRecord) -> set[Place]:
    if record.HasField("rejected"):
        return {(record.rejected.topic, record.partition, record.rejected.offset, -1)}
    places = [position for position in record.inputs if position.topic.endswith("usage.events")]
    return {
        (places[0].topic, record.partition, places[0].offset, each.index)
        for each in record.usage.dropped
        if each.reason not in _QUIET_DROPS
    }


def _charges(record: LedgerRecord) -> list[Charge]:
    usage = record.usage
    dropped = {each.index for each in usage.dropped}
    raws = [raw for index, raw in enumerate(RawUsageBatch.FromString(usage.batch).events) if index not in dropped]
    highs = usage.cost_pico_high or [0] * len(raws)
    found = []
    for raw, low, high in zip(raws, usage.cost_pico_low, highs, strict=True):
        event = UsageEvent.FromString(raw)
        tokens = {name: getattr(event, name) for name in TOKENS if getattr(event, name)}
        identity = identity_of(event.request_id, event.client_request_id)
        # What was refused, or never delivered, is recorded and counts for nothing.
        found.append(Charge(identity, event.tenant_id, {} if event.outcome in _FREE else tokens, low + (high << 64)))
    return found


class DatabaseReader:
    """Rows and sums. In SQL that ClickHouse of every age understands."""

    def __init__(self, reader: Reader, partitions: int) -> None:
        self._reader = reader
        self._versions = [0] * partitions
        self._totals: dict[str, Sums] = {}
        self._accounts: dict[str, Sums] = {}

    def positions(self) -> list[tuple[bytes, int]]:
        """How far the sink says that it is, by partition."""
        found = [(b"", -1)] * len(self._versions)
        for partition, generation, sequence in self._reader.query(
            "SELECT ledger_partition, generation, sequence FROM sink_positions FINAL"
        ).rows:
            found[int(str(partition))] = bytes.fromhex(str(generation)), int(str(sequence))
        return found

    def rows(self) -> list[Charge]:
        """The events whose rows were written for ledger records beyond those that were seen, and none that is older."""
        where = " OR ".join(
            f"(ledger_partition = {partition} AND version > {version})" for partition, version in enumerate(self._versions)
        )
        columns = ", ".join(TOKENS)
        rows = self._reader.query(
            f"SELECT ledger_partition, version, tenant_id, request_id, client_request_id, outcome, cost, {columns} "
            f"FROM usage_events FINAL WHERE {where}"
        ).rows
        found = []
        for partition, version, tenant_id, request_id, client_id, outcome, cost, *counts in rows:
            index = int(str(partition))
            self._versions[index] = max(self._versions[index], int(str(version)))
            tokens = {name: int(str(count)) for name, count in zip(TOKENS, counts, strict=True) if count}
            tokens = {} if outcome in _FREE_NAMES else tokens
            found.append(Charge(identity_of(str(request_id), str(client_id)), str(tenant_id), tokens, _pico(cost)))
        return found

    def gains(self) -> tuple[dict[str, Sums], dict[str, Sums]]:
        """What the totals and the accounts of each tenant have gained since the last call."""
        columns = ", ".join(f"sum({name})" for name in TOKENS)
        totals = {}
        for tenant_id, events, cost, *counts in self._reader.query(
            f"SELECT tenant_id, sum(events), sum(cost), {columns} FROM usage_totals FINAL GROUP BY tenant_id"
        ).rows:
            sums = Sums(int(str(events)), Counter(), _pico(cost))
            sums.tokens.update({name: int(str(count)) for name, count in zip(TOKENS, counts, strict=True) if count})
            totals[str(tenant_id)] = sums
        accounts = {
            str(tenant_id): Sums(int(str(events)), Counter(), _pico(spend))
            for tenant_id, events, spend in self._reader.query("SELECT tenant_id, events, spend FROM accounts FINAL").rows
        }
        gained = _gained(self._totals, totals), _gained(self._accounts, accounts)
        self._totals, self._accounts = totals, accounts
        return gained


def _gained(before: dict[str, Sums], now: dict[str, Sums]) -> dict[str, Sums]:
    found = {}
    for tenant_id in before.keys() | now.keys():
        old, new = before.get(tenant_id, Sums()), now.get(tenant_id, Sums())
        tokens = Counter(new.tokens)
        tokens.subtract(old.tokens)
        sums = Sums(new.events - old.events, tokens, new.cost_pico - old.cost_pico)
        if sums.events or sums.cost_pico or any(tokens.values()):
            found[tenant_id] = sums
    return found


def _pico(value: object) -> int:
    assert isinstance(value, Decimal), value
    return decimal_to_pico(value)
