"""The ledger agent: Faust assigns partitions, a `LedgerHost` for each does the work.

Promise: a partition is worked on only between its takeover (local store opened, log replayed, held against what its readers
have taken, input logs checked) and its revocation (input refused, everything in flight settled). Any doubt ends the process
with a reason; a new process starts over from the log. `failure` holds that reason.

    on_partitions_revoked   take no more input, wait until nothing is in flight; else this process ends
    on_rebalance_complete   close what is gone, replay what is mine, then own it (heartbeats go on meanwhile)
    perform_seek            input resumes behind the positions that the ledger records
    agent                   noack; not owned: skip, it comes again; else hand it to the host, acknowledge when applied
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import faust
from faust.exceptions import ConsumerNotStarted
from faust.types import TP

from billing.step import CommandInput, UsageInput
from billing.v1.account_pb2 import LedgerPosition
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors.bucket import Bucket
from stream_processors.errors import HostStopped, RefusedToStart, SnapshotRefused
from stream_processors.faust_apps import Failure, make_app, raw_agent
from stream_processors.kafka_ports import KafkaLogReader, KafkaLogWriter
from stream_processors.ledger_host import HostSettings, LedgerHost
from stream_processors.local_store import LocalStore
from stream_processors.reader_marks import check_readers, last_marks
from stream_processors.restoring import Restoring
from stream_processors.settings import SnapshotSettings, WorkerSettings
from stream_processors.snapshots import Snapshot, SnapshotStore
from stream_processors.snapshotter import Snapshotter
from stream_processors.tally import Tally

__all__ = ["LedgerApp"]

logger = logging.getLogger(__name__)


class LedgerApp:
    """The hosts of this process and the app that feeds them. Make it on the running event loop."""

    def __init__(self, settings: WorkerSettings, host_settings: HostSettings, failure: Failure) -> None:
        self.settings = settings
        self.failure = failure
        self.hosts: dict[int, LedgerHost] = {}
        self.tally = Tally()
        # As a host's; set before the start.
        self.on_recorded: Callable[[LedgerRecord], None] = lambda _: None
        self.reader = KafkaLogReader(settings.kafka)
        self.writer = KafkaLogWriter(settings.kafka)
        self._host_settings = host_settings
        self._inputs = {settings.topics.events: UsageInput, settings.topics.commands: CommandInput}
        self._tasks: list[asyncio.Task[None]] = []
        self._bucket: Bucket | None = None
        # One: a snapshot at a time, so that they cost the stream little.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._snapshotters: dict[int, Snapshotter] = {}
        self.app: faust.App = make_app(settings, settings.group, self._positions)
        raw_agent(self.app, settings.topics.events, "usage-events", partial(self._agent, UsageInput))
        raw_agent(self.app, settings.topics.commands, "billing-commands", partial(self._agent, CommandInput))
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalanced)

    async def start(self) -> None:
        """Join the group."""
        await self.app.start()
        self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Leave the group, settle what is in flight, close the stores."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._release_all()
        await self.app.stop()
        await self.writer.close(self.settings.drain_timeout_s)
        for partition in list(self.hosts):
            self._close(partition)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def confirmed(self, partition: int, generation: bytes, sequence: int) -> None:
        """The sink has made everything through this record durable: its bytes need not be kept here."""
        host = self.hosts.get(partition)
        if host is not None and host.store.place.position.generation == generation:
            host.store.trim_unconfirmed(sequence)

    def waiting(self, partition: int) -> dict[str, int]:
        """By topic, how many messages the partition's host has not taken, by the log's end as last heard of. Any thread."""
        host = self.hosts.get(partition)
        found: dict[str, int] = {}
        if host is None:
            return found
        for topic in self._inputs:
            # Not assigned any more, not started, or nothing fetched yet (None): nothing is known.
            with contextlib.suppress(AssertionError, ConsumerNotStarted, TypeError):
                end = self.app.consumer.highwater(TP(topic, partition))
                found[topic] = max(0, end - host.state.inputs.get(topic, -1) - 1)
        return found

    def snapshot_log_time_ms(self, partition: int) -> int | None:
        """Of the last snapshot, whoever took it; None: none are taken, or it is not known yet."""
        snapshotter = self._snapshotters.get(partition)
        return None if snapshotter is None else snapshotter.last_log_time_ms

    async def applied(self, partition: int, sequence: int) -> None:
        """Wait until this process has the record on local disk."""
        while not self._has(partition, sequence):  # noqa: ASYNC110  hosts come and go, there is no one event to wait for
            await asyncio.sleep(0.005)

    def _has(self, partition: int, sequence: int) -> bool:
        host = self.hosts.get(partition)
        return host is not None and host.store.place.position.sequence >= sequence

    async def _release_all(self) -> bool:
        drained = await asyncio.gather(*(host.drain(self.settings.drain_timeout_s) for host in self.hosts.values()))
        return all(drained)

    # --- Faust's hooks ---

    async def _on_revoked(self, _app: Any, /, *_: Any, **__: Any) -> None:
        if not await self._release_all():
            reasons = [host.stopped for host in self.hosts.values() if host.stopped is not None]
            stuck = [host.where for host in self.hosts.values() if host.in_flight]
            unsettled = HostStopped(
                f"{', '.join(stuck) or 'a partition'} was revoked and did not settle in {self.settings.drain_timeout_s:g} s; "
                "starting over from the log"
            )
            self.failure.set(reasons[0] if reasons else unsettled)

    async def _on_rebalanced(self, _app: Any, /, *_: Any, **__: Any) -> None:
        try:
            assigned = {tp.partition for tp in self.app.consumer.assignment() if tp.topic in self._inputs}
            for partition in [partition for partition in self.hosts if partition not in assigned]:
                self._close(partition)
            # Together: most of a takeover is waiting for the broker.
            async with asyncio.TaskGroup() as group:
                for partition in assigned:
                    group.create_task(self._own(partition))
        except* Exception as errors:  # noqa: BLE001  Faust would go on; this process must not
            first = errors.exceptions[0]
            logger.error("the takeover failed: %s", first)
            self.failure.set(first)

    async def _own(self, partition: int) -> None:
        host = self.hosts.get(partition)
        if host is None or not await host.resume():
            self._close(partition)
            await self._take_over(partition)

    async def _take_over(self, partition: int) -> None:
        began = time.monotonic()
        folder = self.settings.state_folder / f"partition-{partition}"
        if self.settings.snapshots is None:
            store = LocalStore(folder, partition, keep_unconfirmed=bool(self.settings.keep_unconfirmed_for))
            host = await self._recover(store)
        else:
            host = await self._restore(folder, partition, self.settings.snapshots)
        self.hosts[partition] = host
        logger.info("%s: taken over in %.2f s", host.where, time.monotonic() - began)

    async def _restore(self, folder: Path, partition: int, settings: SnapshotSettings) -> LedgerHost:
        seal_key = self.settings.keys.seal_key
        self._bucket = self._bucket or Bucket(settings.url)
        snapshots = SnapshotStore(self._bucket, partition, seal_key, kept=settings.kept, writer=self._host_settings.writer)
        restoring = Restoring(self.reader, self.settings.topics.ledger, seal_key, snapshots, folder)
        while True:
            store, snapshot = await restoring.open()
            try:
                host = await self._recover(store, snapshot)
            except SnapshotRefused as refusal:
                assert snapshot is not None
                restoring.discard(snapshot, refusal)
                continue
            self._snapshotters[partition] = Snapshotter(host, snapshots, settings, self._threads, _clock_ms)
            return host

    async def _recover(self, store: LocalStore, snapshot: Snapshot | None = None) -> LedgerHost:
        """A host on this store, at the log's end; where there cannot be one, the store is closed."""
        restored = None if snapshot is None else snapshot.taken
        host = LedgerHost(
            self._host_settings,
            store.partition,
            store,
            self.reader,
            self.writer,
            _clock_ms,
            self.failure.set,
            restored=restored,
            tally=self.tally,
            on_recorded=self.on_recorded,
        )
        try:
            # In this order: what a reader has taken by now, the log has by the time that its end is looked for.
            marks = await last_marks(self.reader, self.settings.topics.progress, store.partition)
            await host.recover()
            reached = LedgerPosition(generation=host.state.generation, sequence=host.state.sequence)
            await check_readers(self.reader, self.settings.topics.ledger, marks, reached, self.settings.keys.seal_key)
            for topic in self._inputs:
                await self._check_input(host, topic)
        except BaseException:
            store.close()
            raise
        return host

    async def _check_input(self, host: LedgerHost, topic: str) -> None:
        """The input log must hold what follows the recorded position, or usage would be lost, or taken for taken."""
        next_offset = host.state.inputs.get(topic, -1) + 1
        first, end = await self.reader.bounds(topic, host.partition)
        if first > next_offset:
            raise RefusedToStart(
                f"{topic}[{host.partition}]: the ledger has taken everything before offset {next_offset}, and the log starts "
                f"at {first}: {first - next_offset} messages were deleted unread. Restore them, or have the producers send "
                "again what usage.progress does not cover and found the ledger again"
            )
        if end < next_offset:
            raise RefusedToStart(
                f"{topic}[{host.partition}]: the ledger has taken everything before offset {next_offset}, and the log ends at "
                f"{end}: the topic was recreated or cut, so new usage would be taken for old. Restore the topic; where the "
                "broker keeps nothing (embedded), run: taximeter up"
            )

    def _close(self, partition: int) -> None:
        snapshotter = self._snapshotters.pop(partition, None)
        if snapshotter is not None:
            snapshotter.close()
        host = self.hosts.pop(partition, None)
        if host is not None:
            host.store.close()

    def _positions(self) -> Mapping[TP, int]:
        return {
            TP(topic, partition): host.state.inputs.get(topic, -1) + 1
            for partition, host in self.hosts.items()
            for topic in self._inputs
        }

    # --- work ---

    async def _agent(self, kind: type[UsageInput] | type[CommandInput], stream: Any) -> None:
        async for event in stream.noack().events():
            message = event.message
            host = self.hosts.get(message.partition)
            if host is None or not host.owned:
                continue
            try:
                await host.handle(kind(message.topic, message.offset, bytes(message.value or b"")), event.ack)
            except HostStopped:
                # Revoked meanwhile: it comes again, here or elsewhere. Stopped: this process ends.
                if host.stopped is not None:
                    raise

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.settings.tick_interval_s)
            for partition, host in list(self.hosts.items()):
                # Revoked meanwhile, or stopped, which has been told already.
                with contextlib.suppress(HostStopped):
                    await host.tick()
                    await self._poll_snapshots(partition)

    async def _poll_snapshots(self, partition: int) -> None:
        snapshotter = self._snapshotters.get(partition)
        if snapshotter is not None:
            # One after the other: what waits for its turn would hold on to what it has captured.
            await snapshotter.poll(may_start=not any(each.is_busy for each in self._snapshotters.values()))

    async def _watch(self) -> None:
        """End the process when input waits and nothing is acknowledged: silent stalls of the consumer are known to happen."""
        seen: dict[int, tuple[int, float]] = {}
        while True:
            await asyncio.sleep(self.settings.stall_timeout_s / 4)
            for partition, host in list(self.hosts.items()):
                inputs = sum(host.state.inputs.values())
                before, since = seen.get(partition, (-1, 0.0))
                if inputs != before or not host.owned:
                    seen[partition] = (inputs, time.monotonic())
                elif time.monotonic() - since >= self.settings.stall_timeout_s:
                    await self._look_for_stall(host)

    async def _look_for_stall(self, host: LedgerHost) -> None:
        for topic in self._inputs:
            _, end = await self.reader.bounds(topic, host.partition)
            waiting = end - host.state.inputs.get(topic, -1) - 1
            if waiting > 0 and host.owned:
                self.failure.set(
                    HostStopped(
                        f"{topic}[{host.partition}]: {waiting} messages wait and none was taken for "
                        f"{self.settings.stall_timeout_s:g} s (stall_timeout_s); ending, so that a new process takes over"
                    )
                )


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
