"""The publisher agent: what the ledger says, put where others look for it.

It reads `usage.ledger` by the chain's rule and writes accounts and a tick (how fresh they are), keys, how far each producer is
covered, alerts, and what was rejected. An app of its own with a group of its own: in the worker's process by default, apart
where somebody wants that.

Promise: everything of a batch is acknowledged before the publisher's own position (Progress, reader "publisher") is written,
and from there it resumes. What is repeated after a crash is harmless: states carry versions, alerts and rejections stable IDs.
When a ledger was founded again on a state, its founding record states every account, key and mark, and they are published.
A log that lost what was published, or has another record in its place, is refused: at the start, and while it runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import faust
from faust.types import TP

from billing.chain import Chain, UnreadableRecord
from billing.key_ring import Keys
from billing.v1.account_pb2 import AccountUpdate, LedgerPosition, LedgerTick, Progress
from billing.v1.alert_pb2 import Alert
from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_FOREIGN_TENANT,
    DROP_REASON_INVALID,
    DROP_REASON_TOO_FAR_IN_FUTURE,
    DROP_REASON_TOO_OLD,
    LedgerRecord,
)
from billing.v1.rejected_pb2 import RejectedInput
from billing.v1.usage_pb2 import RawUsageBatch, UsageEvent
from stream_processors.errors import HostStopped, RefusedToStart
from stream_processors.faust_apps import Failure, make_app, raw_agent
from stream_processors.kafka_ports import KafkaLogReader, KafkaLogWriter
from stream_processors.log_place import LogPlace, Standing, find_place
from stream_processors.reader_marks import PUBLISHER, cut, last_marks
from stream_processors.settings import TopicNames, WorkerSettings

__all__ = ["PublisherApp", "messages_of"]

logger = logging.getLogger(__name__)

_FLUSH_INTERVAL_S = 0.05
_BATCH_MESSAGES_MAX = 10_000
# A writer that is well follows a zombie's record with one of its own, a tick at least, within about so long.
_DOUBT_S = 2.0
_SHOWN_DROPS = frozenset(
    (
        DROP_REASON_CONFLICT,
        DROP_REASON_INVALID,
        DROP_REASON_TOO_FAR_IN_FUTURE,
        DROP_REASON_TOO_OLD,
        DROP_REASON_FOREIGN_TENANT,
    )
)

# Waits until (partition, sequence) is on local disk: where the broker may forget, producers are told nothing before that.
Gate = Callable[[int, int], Awaitable[None]]


@dataclass(slots=True)
class Batch:
    """What is published together: states, of which the last is enough, and notices, of which each counts."""

    states: dict[tuple[str, str], bytes] = field(default_factory=dict)
    notices: list[tuple[str, str, bytes]] = field(default_factory=list)
    # States of which nothing more is to be kept, once whoever follows has been told so.
    ended: set[tuple[str, str]] = field(default_factory=set)
    place: Progress | None = None
    # Of the record at `place`.
    log_time_ms: int = 0
    events: list[Any] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.states) + len(self.notices) + len(self.ended)


def messages_of(record: LedgerRecord, topics: TopicNames, batch: Batch) -> None:
    """Add to `batch` what `record` has to say."""
    version = LedgerPosition(generation=record.generation, sequence=record.sequence)
    partition = record.partition
    for account in record.accounts:
        batch.states[topics.accounts, _key(account.tenant_id)] = AccountUpdate(account=account).SerializeToString()
    for lease in record.leases:
        if not lease.ended:
            # What its holder looks for. That an earlier epoch of it has ended or is gone, the holder need not know.
            update = AccountUpdate(lease=lease)
            batch.states[topics.accounts, _key("lease", lease.tenant_id, lease.holder_id)] = update.SerializeToString()
    for budget in record.budgets:
        place = topics.accounts, _key("budget", budget.tenant_id, budget.project_id, budget.user_id)
        batch.states[place] = AccountUpdate(budget=budget).SerializeToString()
        # A user's ID is in it, and compaction would keep that for good.
        (batch.ended.add if budget.gone else batch.ended.discard)(place)
    for project in record.projects:
        update = AccountUpdate(project=project)
        batch.states[topics.accounts, _key("project", project.tenant_id, project.project_id)] = update.SerializeToString()
    books = record.founding.price_books if record.HasField("founding") else ()
    for book in [*books, record.command.price_book] if record.command.HasField("price_book") else books:
        batch.states[topics.prices, f"{book.currency}/{book.version}"] = book.SerializeToString()
    tick = LedgerTick(partition=partition, version=version, log_time_ms=record.log_time_ms)
    ticking = topics.accounts, f"tick/{partition}"
    # Behind every account of its record: who sees it takes what it has for as fresh as this.
    batch.states.pop(ticking, None)
    batch.states[ticking] = AccountUpdate(tick=tick).SerializeToString()
    for key in record.keys:
        batch.states[topics.keys, key.key_id] = key.SerializeToString()
    for mark in record.producers:
        progress = Progress(
            partition=partition, producer_id=mark.producer_id, covered_sequence=mark.covered_sequence, position=version
        )
        batch.states[topics.progress, f"producer/{mark.producer_id}/{partition}"] = progress.SerializeToString()
    batch.notices.extend((topics.alerts, _alert_key(alert), alert.SerializeToString()) for alert in record.alerts)
    batch.notices.extend(
        (topics.rejected, f"{version.generation.hex()}/{version.sequence}/{rejected.index}", rejected.SerializeToString())
        for rejected in _rejected_of(record, topics, version)
    )


def _key(*names: str) -> str:
    """On a compacted topic, where the last value of a key is the only one: another key for other names, whatever they hold."""
    return "/".join([name.replace("%", "%25").replace("/", "%2F") for name in names])


def _alert_key(alert: Alert) -> str:
    """Whom it is about: a tenant, or a producer, or the system."""
    producer_id = alert.labels.get("producer_id", "")
    return alert.tenant_id or (f"producer/{producer_id}" if producer_id else "")


def _rejected_of(record: LedgerRecord, topics: TopicNames, version: LedgerPosition) -> list[RejectedInput]:
    source = record.WhichOneof("source")
    if source == "rejected":
        rejected = record.rejected
        return [
            RejectedInput(
                topic=rejected.topic,
                partition=record.partition,
                offset=rejected.offset,
                index=-1,
                reason=rejected.reason,
                payload=rejected.payload,
                payload_bytes=rejected.payload_bytes,
                position=version,
            )
        ]
    shown = [dropped for dropped in record.usage.dropped if dropped.reason in _SHOWN_DROPS] if source == "usage" else []
    if not shown:
        return []
    raws = RawUsageBatch.FromString(record.usage.batch).events
    offset = next((position.offset for position in record.inputs if position.topic == topics.events), -1)
    found = []
    for dropped in shown:
        raw = raws[dropped.index]
        event = UsageEvent.FromString(raw)
        found.append(
            RejectedInput(
                topic=topics.events,
                partition=record.partition,
                offset=offset,
                index=dropped.index,
                drop_reason=dropped.reason,
                reason=dropped.detail,
                payload=raw,
                payload_bytes=len(raw),
                position=version,
                tenant_id=event.tenant_id,
                request_id=event.request_id,
            )
        )
    return found


class PublisherApp:
    """The publisher of this process. Make it on the running event loop."""

    def __init__(self, settings: WorkerSettings, failure: Failure, seal_key: Keys, gate: Gate | None = None) -> None:
        self.settings = settings
        self.failure = failure
        self.published_records = 0
        # By partition, the last record of which everything is published: its sequence and log time.
        self.published: dict[int, tuple[int, int]] = {}
        self._seal_key = seal_key
        self._gate = gate
        self._reader = KafkaLogReader(settings.kafka)
        self._writer = KafkaLogWriter(settings.kafka, linger_ms=5.0)
        self._chains: dict[int, Chain] = {}
        # The last record that each chain accepted, and since when others came that do not follow it.
        self._places: dict[int, Progress | None] = {}
        self._doubted_s: dict[int, float] = {}
        self._resume: dict[int, int] = {}
        self._batches: dict[int, Batch] = {}
        self._flushing: dict[int, asyncio.Lock] = {}
        self._task: asyncio.Task[None] | None = None
        self.app: faust.App = make_app(settings, f"{settings.group}-publisher", self._positions)
        raw_agent(self.app, settings.topics.ledger, "usage-ledger", self._agent)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalanced)

    async def start(self) -> None:
        """Join the group."""
        await self.app.start()
        self._task = asyncio.create_task(self._flush_often())

    async def stop(self) -> None:
        """Publish what was read, and leave the group."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.failure.reason is None:
            await self._settle()
        self._chains.clear()
        await self.app.stop()
        await self._writer.close(self.settings.drain_timeout_s)

    async def _settle(self) -> None:
        try:
            async with asyncio.timeout(self.settings.drain_timeout_s):
                for partition in list(self._chains):
                    await self._flush(partition)
        except TimeoutError:
            logger.warning("the publisher did not settle in %g s; it repeats that later", self.settings.drain_timeout_s)

    # --- Faust's hooks ---

    async def _on_revoked(self, _app: Any, /, *_: Any, **__: Any) -> None:
        await self._settle()
        self._chains.clear()
        self._batches.clear()
        self.published.clear()
        self._doubted_s.clear()

    async def _on_rebalanced(self, _app: Any, /, *_: Any, **__: Any) -> None:
        try:
            ledger = self.settings.topics.ledger
            async with asyncio.TaskGroup() as group:
                for tp in self.app.consumer.assignment():
                    if tp.topic == ledger:
                        group.create_task(self._take_over(tp.partition))
        except* Exception as errors:  # noqa: BLE001  Faust would go on; this process must not
            first = errors.exceptions[0]
            logger.error("the publisher's takeover failed: %s", first)
            self.failure.set(first)

    async def _take_over(self, partition: int) -> None:
        ledger = self.settings.topics.ledger
        place = (await last_marks(self._reader, self.settings.topics.progress, partition)).get(PUBLISHER)
        follow = Chain(partition, self._seal_key)
        start, _ = await self._reader.bounds(ledger, partition)
        if place is not None:
            found = await self._find(place)
            if found.standing is Standing.FITS:
                follow.generation, follow.sequence = place.position.generation, place.position.sequence
                follow.record_hash = place.record_hash
                start = found.next_offset
        if start > 0 and not follow.generation:
            raise RefusedToStart(
                f"{ledger}[{partition}]: the log starts at offset {start} and the publisher has no position in it; restore "
                f"{self.settings.topics.progress}, or the log's beginning, from a backup"
            )
        self._chains[partition] = follow
        self._places[partition] = place if follow.generation else None
        self._resume[partition] = start
        self._batches[partition] = Batch()
        self._flushing.setdefault(partition, asyncio.Lock())

    async def _find(self, place: Progress) -> LogPlace:
        """Where the log has the record of `place`; a log that lost it is refused, one that was founded again is not."""
        ledger = self.settings.topics.ledger
        first, end = await self._reader.bounds(ledger, place.partition)
        try:
            found = await find_place(self._reader, ledger, place, self._seal_key, first, end)
        except UnreadableRecord as error:
            raise RefusedToStart(f"{ledger}[{place.partition}]: {error}") from error
        if found.standing is Standing.LOST:
            raise cut(ledger, PUBLISHER, place, first, end)
        return found

    def _positions(self) -> Mapping[TP, int]:
        ledger = self.settings.topics.ledger
        return {TP(ledger, partition): self._resume[partition] for partition in self._chains}

    # --- work ---

    async def _agent(self, stream: Any) -> None:
        async for event in stream.noack().events():
            message = event.message
            partition = message.partition
            if partition not in self._chains or message.offset < self._resume[partition]:
                continue
            try:
                await self._take(partition, message.offset, bytes(message.value or b""), event)
            except Exception as error:
                self.failure.set(error)
                raise

    async def _take(self, partition: int, offset: int, stored: bytes, event: Any) -> None:
        if offset > self._resume[partition]:
            # The ledger's offsets have no holes. Behind one, the first record that links may be a zombie's, which came second.
            raise HostStopped(
                f"{self.settings.topics.ledger}[{partition}]: offset {offset} came and {self._resume[partition]} was due; "
                "starting over from the published position"
            )
        try:
            record = self._chains[partition].accept(stored)
        except UnreadableRecord as error:
            raise HostStopped(f"{self.settings.topics.ledger}[{partition}], offset {offset}: {error}") from error
        batch = self._batches[partition]
        batch.events.append(event)
        self._resume[partition] = offset + 1
        if record is None:
            if self._chains[partition].refusal:
                logger.error(
                    "%s[%d]: offset %d was refused: %s",
                    self.settings.topics.ledger,
                    partition,
                    offset,
                    self._chains[partition].refusal,
                )
            self._doubted_s.setdefault(partition, asyncio.get_running_loop().time())
            return
        self._doubted_s.pop(partition, None)
        messages_of(record, self.settings.topics, batch)
        batch.place = self._places[partition] = Progress(
            partition=partition,
            reader=PUBLISHER,
            position=LedgerPosition(generation=record.generation, sequence=record.sequence),
            record_hash=self._chains[partition].record_hash,
            ledger_offset=offset,
        )
        batch.log_time_ms = record.log_time_ms
        self.published_records += 1
        if batch.size >= _BATCH_MESSAGES_MAX:
            await self._flush(partition)

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_INTERVAL_S)
            try:
                for partition in list(self._chains):
                    await self._flush(partition)
                await self._look_at_doubts()
            except Exception as error:  # noqa: BLE001  nobody waits for this task
                self.failure.set(error)
                return

    async def _look_at_doubts(self) -> None:
        """Records came that do not follow ours, and none that does: a zombie's, or the log is not the one that we followed."""
        for partition, since_s in list(self._doubted_s.items()):
            if asyncio.get_running_loop().time() - since_s < _DOUBT_S:
                continue
            del self._doubted_s[partition]
            place = self._places.get(partition)
            if place is not None:
                await self._find(place)

    async def _flush(self, partition: int) -> None:
        async with self._flushing[partition]:
            batch = self._batches.get(partition)
            if batch is None:
                return
            if batch.place is None:
                # Nothing, or only what the chain ignored.
                for event in batch.events:
                    event.ack()
                batch.events.clear()
                return
            self._batches[partition] = Batch()
            if self._gate is not None:
                await self._gate(partition, batch.place.position.sequence)
            sends: list[tuple[str, str, bytes | None]] = [(*place, value) for place, value in batch.states.items()]
            sends += batch.notices
            # Without a value: Kafka's compaction takes out what stood under the key, and then this.
            sends += [(*place, None) for place in sorted(batch.ended)]
            await self._send_all(partition, sends)
            progress = (self.settings.topics.progress, f"reader/{PUBLISHER}/{partition}", batch.place.SerializeToString())
            await self._send_all(partition, [progress])
            self.published[partition] = batch.place.position.sequence, batch.log_time_ms
            for event in batch.events:
                event.ack()

    async def _send_all(self, partition: int, sends: Sequence[tuple[str, str, bytes | None]]) -> None:
        if not sends:
            return
        all_done = asyncio.get_running_loop().create_future()
        left = len(sends)

        def on_done(_: int, problem: str) -> None:
            nonlocal left
            left -= 1
            if all_done.done():
                return
            if problem:
                all_done.set_exception(HostStopped(f"the publisher could not write ({problem}); starting over"))
            elif left == 0:
                all_done.set_result(None)

        for topic, key, value in sends:
            self._writer.write(topic, partition, value, on_done, key.encode())
        await all_done
