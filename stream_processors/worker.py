"""One worker process: the ledger agent, and the publisher beside it.

Promise: `run_worker` returns after SIGTERM, SIGINT or `stop`, with everything in flight settled and the group left; it raises
the reason (a WorkerError) when it had to end. Whoever supervises it starts it again: a new process starts over from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

from billing.v1.account_pb2 import Progress
from stream_processors.faust_apps import Failure
from stream_processors.kafka_ports import KafkaLogReader
from stream_processors.ledger_app import LedgerApp
from stream_processors.ledger_host import HostSettings
from stream_processors.publisher_app import PublisherApp
from stream_processors.settings import WorkerSettings
from stream_processors.topics import check_partitions

__all__ = ["run_worker"]

_CONFIRMATIONS_INTERVAL_S = 2.0


async def run_worker(
    settings: WorkerSettings,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[LedgerApp | None], None] | None = None,
    watch: Callable[[LedgerApp | None, PublisherApp | None], None] | None = None,
) -> None:
    """Work until told to stop. `watch` hears of the apps before they start, for metrics; `ready` once the group was joined."""
    partitions = await asyncio.to_thread(check_partitions, settings.kafka, settings.topics)
    settings.state_folder.mkdir(parents=True, exist_ok=True)
    stopping = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Only the main thread may; elsewhere `stop` is the way.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            loop.add_signal_handler(number, stopping.set)
    failure = Failure()
    ledger = _ledger(settings, partitions, failure) if settings.ledger else None
    publisher = _publisher(settings, failure, ledger) if settings.publish else None
    apps = [app for app in (ledger, publisher) if app is not None]
    if watch is not None:
        watch(ledger, publisher)
    tasks = [asyncio.ensure_future(stopping.wait()), asyncio.ensure_future(failure.wait())]
    try:
        await asyncio.gather(*(app.start() for app in apps))
        # An app of Faust that crashed is stopped, and says so nowhere else.
        tasks += [asyncio.ensure_future(_crashed(app.app, failure, stopping)) for app in apps]
        if ledger is not None and settings.keep_unconfirmed_for:
            tasks.append(asyncio.ensure_future(_follow_confirmations(settings, partitions, ledger, failure)))
        if ready is not None:
            ready(ledger)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The publisher first: it may wait for what the ledger still applies.
        for app in reversed(apps):
            await app.stop()
    if failure.reason is not None:
        raise failure.reason


def _ledger(settings: WorkerSettings, partitions: int, failure: Failure) -> LedgerApp:
    host_settings = HostSettings(
        events_topic=settings.topics.events,
        ledger_topic=settings.topics.ledger,
        partitions=partitions,
        keys=settings.keys,
        writer=f"{socket.gethostname()}/{os.getpid()}/{time.time_ns() // 1_000_000}",
        in_flight_max=settings.in_flight_max,
    )
    return LedgerApp(settings, host_settings, failure)


def _publisher(settings: WorkerSettings, failure: Failure, ledger: LedgerApp | None) -> PublisherApp:
    gate = ledger.applied if ledger is not None and settings.keep_unconfirmed_for else None
    return PublisherApp(settings, failure, settings.keys.seal_key, gate)


async def _crashed(app: object, failure: Failure, stopping: asyncio.Event) -> None:
    await app.wait_until_stopped()  # type: ignore[attr-defined]
    if not stopping.is_set():
        failure.set(getattr(app, "crash_reason", None) or RuntimeError("Faust stopped by itself"))


async def _follow_confirmations(settings: WorkerSettings, partitions: int, ledger: LedgerApp, failure: Failure) -> None:
    """Let go of records that the sink has confirmed on usage.progress."""
    reader = KafkaLogReader(settings.kafka)
    try:
        async for partition, value in reader.follow(settings.topics.progress, partitions, _CONFIRMATIONS_INTERVAL_S):
            progress = Progress.FromString(value)
            if progress.reader == settings.keep_unconfirmed_for:
                ledger.confirmed(partition, progress.position.generation, progress.position.sequence)
    except Exception as error:  # noqa: BLE001  nobody waits for this task
        failure.set(error)
