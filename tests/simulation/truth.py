"""What really happened, noted outside of everything that is tested, and what must hold of it.

Promise: no judgement here uses the code that it judges. Links, charges, costs, sums and coverage are computed anew from the
bytes in the log; of `billing` only the contracts, the partitioner and `replay.apply` (for digests) are used. Continuously, with
each record that the first-valid-record rule accepts: log time and inputs move forward; a request is charged once; nothing is
charged that nobody attempted; what is called a duplicate, a conflict or forwarded is one; each cost is quantity times price;
window totals and accounts are the sums of the charged events; alerts are raised once, and told in order.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from billing import replay
from billing.identity import partition_of
from billing.state import LedgerState, MemorySeenKeys
from billing.v1.account_pb2 import Amount, Progress
from billing.v1.alert_pb2 import ALERT_STATE_RAISED
from billing.v1.command_pb2 import Command, PriceBook
from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_DUPLICATE,
    DROP_REASON_FORWARDED,
    DROP_REASON_TOO_FAR_IN_FUTURE,
    DROP_REASON_TOO_OLD,
    LedgerRecord,
)
from billing.v1.usage_pb2 import OUTCOME_BACKEND_ERROR, OUTCOME_REJECTED, RawUsageBatch, UsageEvent
from tests.simulation.loop import SimLoop

__all__ = ["EVENTS", "LEDGER", "PartitionTruth", "Truth"]

EVENTS, LEDGER = "usage.events", "usage.ledger"
_TOKENS = {
    "uncached_input_tokens": "uncached_input_pico",
    "output_tokens": "output_pico",
    "cache_read_tokens": "cache_read_pico",
}
_FREE = (OUTCOME_REJECTED, OUTCOME_BACKEND_ERROR)
Identity = tuple[str, str]


def pico(amount: Amount) -> int:
    return amount.high * 2**64 + amount.low


@dataclass
class Charge:
    raw: bytes
    cost_pico: int
    sequence: int


@dataclass
class Sum:
    events: int = 0
    cost_pico: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_TOKENS, 0))


class PartitionTruth:
    """One partition's accepted records, and what follows from them."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.generation = b""
        self.hashes: list[bytes] = []
        self.offsets: list[int] = []
        self.stored: list[bytes] = []
        # Of the state at a sequence, for those that were asked about.
        self._digests: dict[int, str] = {}
        self.log_time_ms = 0
        self.inputs: dict[str, int] = {}
        self.charged: dict[Identity, Charge] = {}
        self.rejected: set[bytes] = set()
        self.conflicts: set[bytes] = set()
        self.alert_ids: set[str] = set()
        # What was told of each: its ID and revision.
        self.told: set[tuple[str, int]] = set()
        self.shown_rejections: set[str] = set()
        self.windows: dict[bytes, Sum] = {}
        self.accounts: dict[str, Sum] = defaultdict(Sum)
        self.credit_pico: dict[str, int] = defaultdict(int)
        self.granted: set[str] = set()
        self.books: dict[int, PriceBook] = {}
        self.state = LedgerState(MemorySeenKeys())
        # Identity to when its key may be forgotten (log time).
        self.forgotten_after_ms: dict[Identity, int] = {}

    @property
    def sequence(self) -> int:
        return len(self.hashes) - 1

    def digest_at(self, sequence: int) -> str:
        """The digest of the state that the records up to `sequence` leave. Most are never asked for: none is kept ready."""
        if sequence not in self._digests:
            state = self.state
            if sequence != self.sequence:
                state = LedgerState(MemorySeenKeys())
                for stored in self.stored[: sequence + 1]:
                    replay.apply(state, LedgerRecord.FromString(stored), stored)
            self._digests[sequence] = state.digest(with_memory=False)
        return self._digests[sequence]


def _version_at(truth: PartitionTruth, event: UsageEvent) -> int:
    """The price version whose window takes `event`: the last one in effect, if it has a price."""
    effective = [version for version, book in truth.books.items() if book.effective_ms <= event.ended_ms]
    latest = max(effective, default=0)
    return latest if latest and any(price.model == event.model for price in truth.books[latest].prices) else 0


class Truth:
    """Of the whole run."""

    def __init__(self, loop: SimLoop, partitions: int) -> None:
        self.loop = loop
        self.partitions = [PartitionTruth(partition) for partition in range(partitions)]
        # Everything that anybody ever tried to record, by identity: the payloads.
        self.attempts: dict[Identity, set[bytes]] = defaultdict(set)
        # What was promised: durable in a journal, or acknowledged to a producer without one.
        self.durable: set[bytes] = set()
        self.sent: list[set[bytes]] = [set() for _ in range(partitions)]
        # Partitions whose log is just now not what was acknowledged: nothing is concluded from it.
        self.cut: dict[int, int] = {}
        self.ignored = 0

    def attempt(self, raw: bytes) -> None:
        event = UsageEvent.FromString(raw)
        self.attempts[event.tenant_id, event.request_id].add(raw)

    # --- what the log says ---

    def on_append(self, topic: str, partition: int, offset: int, value: bytes) -> None:
        if topic == EVENTS:
            try:
                self.sent[partition].update(RawUsageBatch.FromString(value).events)
            except DecodeError:
                return
        elif topic == LEDGER and partition not in self.cut:
            self._on_record(self.partitions[partition], offset, value)

    def _on_record(self, truth: PartitionTruth, offset: int, stored: bytes) -> None:
        record = LedgerRecord.FromString(stored)
        if truth.sequence < 0:
            links = record.sequence == 0 and record.HasField("founding")
        else:
            links = (
                record.generation == truth.generation
                and record.sequence == truth.sequence + 1
                and record.previous_hash == truth.hashes[-1]
            )
        if not links:
            self.ignored += 1
            return
        truth.generation = record.generation
        truth.hashes.append(hashlib.sha256(stored).digest())
        truth.offsets.append(offset)
        truth.stored.append(stored)
        self._judge(truth, record)
        replay.apply(truth.state, record, stored)

    def _fail(self, truth: PartitionTruth, record: LedgerRecord, what: str) -> None:
        self.loop.fail(f"{LEDGER}[{truth.partition}], sequence {record.sequence}, by {record.writer}: {what}")

    def _judge(self, truth: PartitionTruth, record: LedgerRecord) -> None:
        if record.log_time_ms < truth.log_time_ms:
            self._fail(truth, record, f"log time went back from {truth.log_time_ms} to {record.log_time_ms}")
        truth.log_time_ms = record.log_time_ms
        moved = [p.topic for p in record.inputs if p.offset != truth.inputs.get(p.topic, -1)]
        source = record.WhichOneof("source")
        if any(p.offset < truth.inputs.get(p.topic, -1) for p in record.inputs):
            self._fail(truth, record, "an input went back")
        for position in record.inputs:
            if position.offset > truth.inputs.get(position.topic, -1) + 1:
                self._fail(truth, record, f"{position.topic}: input {position.offset - 1} was passed over")
        if len(moved) != (source in ("usage", "command", "rejected")):
            self._fail(truth, record, f"the inputs {moved} moved by a {source}")
        truth.inputs.update({p.topic: p.offset for p in record.inputs})
        for alert in record.alerts:
            if (alert.state == ALERT_STATE_RAISED) == (alert.alert_id in truth.alert_ids):
                self._fail(truth, record, f"alert {alert.alert_id} was raised before, or never was")
            name, revision = alert.alert_id, alert.revision
            if (name, revision) in truth.told or (revision > 1 and (name, revision - 1) not in truth.told):
                self._fail(truth, record, f"alert {name}: revision {revision} is told twice, or the one before never")
            truth.alert_ids.add(alert.alert_id)
            truth.told.add((alert.alert_id, alert.revision))
        if source == "rejected":
            truth.shown_rejections.add(f"{record.sequence}/-1")
        if source == "usage":
            self._judge_usage(truth, record)
        elif source == "command" and record.command.applied:
            self._judge_command(truth, record)
        self._compare_sums(truth, record)

    def _judge_command(self, truth: PartitionTruth, record: LedgerRecord) -> None:
        command = Command.FromString(record.command.command)
        if command.command_id in truth.granted:
            self._fail(truth, record, f"command {command.command_id} was applied twice")
        truth.granted.add(command.command_id)
        if command.HasField("credit_grant"):
            truth.credit_pico[command.credit_grant.tenant_id] += pico(command.credit_grant.amount)
        if command.HasField("price_book"):
            truth.books[command.price_book.version] = command.price_book

    def _judge_usage(self, truth: PartitionTruth, record: LedgerRecord) -> None:
        usage = record.usage
        raws = list(RawUsageBatch.FromString(usage.batch).events)
        dropped = {each.index: each for each in usage.dropped}
        charged = [index for index in range(len(raws)) if index not in dropped]
        versions = list(usage.price_versions)
        if len(versions) == 1:
            versions *= len(charged)
        if len(usage.cost_pico_low) != len(charged) or (charged and len(versions) != len(charged)):
            self._fail(truth, record, "costs or price versions do not stand beside the charged events")
            return
        before = dict(truth.charged)
        for place, index in enumerate(charged):
            high = usage.cost_pico_high[place] if usage.cost_pico_high else 0
            self._charge(truth, record, raws[index], usage.cost_pico_low[place] + (high << 64), versions[place])
        for index, drop in dropped.items():
            raw = raws[index]
            event = UsageEvent.FromString(raw)
            identity = (event.tenant_id, event.request_id)
            known = truth.charged.get(identity)
            ahead_ms = event.ended_ms - record.log_time_ms
            settings = truth.state.settings
            if drop.reason == DROP_REASON_DUPLICATE:
                fits = known is not None and known.raw == raw
            elif drop.reason == DROP_REASON_CONFLICT:
                fits = known is not None and known.raw != raw
                truth.conflicts.add(raw)
            elif drop.reason == DROP_REASON_FORWARDED:
                home = partition_of(event.tenant_id, len(self.partitions))
                fits = home != truth.partition and raw in self.sent[home]
            elif drop.reason == DROP_REASON_TOO_OLD:
                fits = -ahead_ms > settings.dedupe_horizon_ms
            elif drop.reason == DROP_REASON_TOO_FAR_IN_FUTURE:
                fits = ahead_ms > settings.future_reject_ms
            else:
                fits = (
                    not event.model
                    or event.started_ms > event.ended_ms
                    or (partition_of(event.tenant_id, len(self.partitions)) != truth.partition)
                )
            if not fits:
                self._fail(truth, record, f"event {identity} was dropped for reason {drop.reason}, which it is not")
            if drop.reason not in (DROP_REASON_DUPLICATE, DROP_REASON_CONFLICT, DROP_REASON_FORWARDED):
                truth.rejected.add(raw)
            if drop.reason not in (DROP_REASON_DUPLICATE, DROP_REASON_FORWARDED):
                truth.shown_rejections.add(f"{record.sequence}/{index}")
        assert len(truth.charged) >= len(before)

    def _charge(self, truth: PartitionTruth, record: LedgerRecord, raw: bytes, cost_pico: int, version: int) -> None:
        event = UsageEvent.FromString(raw)
        identity = (event.tenant_id, event.request_id)
        if identity in truth.charged and record.log_time_ms <= truth.forgotten_after_ms[identity]:
            self._fail(truth, record, f"{identity} is charged twice")
        if raw not in self.attempts[identity]:
            self._fail(truth, record, f"{identity} is charged and nobody attempted it")
        if partition_of(event.tenant_id, len(self.partitions)) != truth.partition:
            self._fail(truth, record, f"{identity} is charged in a partition where its tenant does not live")
        expected = 0
        if version and event.outcome not in _FREE:
            price = next((p for p in truth.books[version].prices if p.model == event.model), None)
            if price is None:
                self._fail(truth, record, f"{identity} is rated by version {version}, which has no price for it")
                return
            expected = sum(getattr(event, tokens) * getattr(price, name) for tokens, name in _TOKENS.items())
        if cost_pico != expected:
            self._fail(truth, record, f"{identity} costs {cost_pico} pico, {expected} is right")
        truth.charged[identity] = Charge(raw, cost_pico, record.sequence)
        lives_ms = max(record.log_time_ms, event.ended_ms) + truth.state.settings.dedupe_horizon_ms
        truth.forgotten_after_ms[identity] = lives_ms
        sums = [truth.accounts[event.tenant_id]]
        sums += [
            truth.windows.setdefault(total.key.SerializeToString(deterministic=True), Sum())
            for total in record.totals
            if (total.key.tenant_id, total.key.model, total.key.minute, total.key.price_version)
            == (event.tenant_id, event.model, event.ended_ms // 60_000, _version_at(truth, event))
        ]
        if len(sums) != 2:
            self._fail(truth, record, f"{identity} is charged and {len(sums) - 1} windows say so")
        for each in sums:
            each.events += 1
            each.cost_pico += cost_pico
            if event.outcome not in _FREE:
                for tokens in _TOKENS:
                    each.tokens[tokens] += getattr(event, tokens)

    def _compare_sums(self, truth: PartitionTruth, record: LedgerRecord) -> None:
        for total in record.totals:
            known = truth.windows.get(total.key.SerializeToString(deterministic=True), Sum())
            stated = Sum(total.events, pico(total.cost), {tokens: getattr(total, tokens) for tokens in _TOKENS})
            if stated != known:
                self._fail(truth, record, f"window {total.key} states {stated}; the charged events sum to {known}")
        for account in record.accounts:
            own = truth.accounts[account.tenant_id]
            if (account.events, pico(account.spend)) != (own.events, own.cost_pico):
                self._fail(
                    truth, record, f"account {account.tenant_id} states {account.events} events, {own.events} were charged"
                )
            if pico(account.credit) != truth.credit_pico[account.tenant_id]:
                self._fail(truth, record, f"account {account.tenant_id} states another credit than was granted")

    # --- what others claim ---

    def on_place(self, place: Progress) -> None:
        """A local store writes that it stands there: the log must have that record."""
        truth = self.partitions[place.partition]
        if place.partition in self.cut:
            return
        sequence = place.position.sequence
        if sequence > truth.sequence:
            self.loop.fail(
                f"partition {place.partition}: the local store stands at {sequence}, the log ends at {truth.sequence}"
            )
        elif truth.hashes[sequence] != place.record_hash or truth.generation != place.position.generation:
            self.loop.fail(f"partition {place.partition}: the local store stands on another record {sequence} than the log has")
        elif self.offset_moves(truth, sequence, place.ledger_offset):
            self.loop.fail(f"partition {place.partition}: record {sequence} is not at the offset {place.ledger_offset}")

    @staticmethod
    def offset_moves(truth: PartitionTruth, sequence: int, offset: int) -> bool:
        return truth.offsets[sequence] != offset

    def on_free(self, partition: int, events: list[bytes], who: str) -> None:
        """A journal lets go of these: the ledger must have them."""
        truth = self.partitions[partition]
        for raw in events:
            if not self.is_settled(truth, raw):
                event = UsageEvent.FromString(raw)
                self.loop.fail(f"{who} let go of {event.request_id}, and the ledger does not have it")

    def is_settled(self, truth: PartitionTruth, raw: bytes) -> bool:
        """Whether the ledger has said what becomes of this event: charged, a conflict of a charged one, or refused."""
        event = UsageEvent.FromString(raw)
        charge = truth.charged.get((event.tenant_id, event.request_id))
        return (charge is not None and (charge.raw == raw or raw in truth.conflicts)) or raw in truth.rejected

    def compare_state(self, state: LedgerState, who: str) -> None:
        """A state that somebody computed or followed: the same digest as here, at the same place."""
        truth = self.partitions[state.partition]
        if state.partition in self.cut:
            return
        if state.sequence > truth.sequence or state.digest(with_memory=False) != truth.digest_at(state.sequence):
            self.loop.fail(f"{who}: its state at sequence {state.sequence} of partition {state.partition} is not the log's")
        if state.sequence == truth.sequence and state.seen.digest() != truth.state.seen.digest():
            self.loop.fail(f"{who}: its dedupe memory at sequence {state.sequence} of {state.partition} is not the log's")
