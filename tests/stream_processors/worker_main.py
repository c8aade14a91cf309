"""A worker process for tests: `run_worker`, killed by itself at a named point, after that point was passed some times."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from billing.step import LedgerKeys
from stream_processors import ledger_app
from stream_processors.errors import WorkerError
from stream_processors.kafka_ports import KafkaLogWriter
from stream_processors.ledger_host import LedgerHost
from stream_processors.local_store import LocalStore
from stream_processors.settings import KafkaSettings, SnapshotSettings, TopicNames, WorkerSettings
from stream_processors.snapshots import SnapshotStore
from stream_processors.worker import run_worker

SEAL_KEY = b"seal" * 8
COMMAND_KEY = b"command!" * 4
REFUSED = 3


def worker_settings(
    bootstrap: str,
    prefix: str,
    folder: Path,
    snapshots: dict[str, Any] | None = None,
    delivery_timeout_ms: int = 60_000,
    **more: Any,
) -> WorkerSettings:
    return WorkerSettings(
        kafka=KafkaSettings(bootstrap, delivery_timeout_ms=delivery_timeout_ms),
        state_folder=folder,
        keys=LedgerKeys(SEAL_KEY, COMMAND_KEY),
        topics=TopicNames(prefix),
        snapshots=None if snapshots is None else SnapshotSettings(**snapshots),
        **{
            "group": f"{prefix}ledger",
            "tick_interval_s": 0.5,
            # The least that Apache Kafka allows by default; Tansu takes half of it to answer a join.
            "session_timeout_s": 6.0,
            "heartbeat_interval_s": 1.0,
            # A slow disk is no reason to end: nobody starts this worker again.
            "drain_timeout_s": 30.0,
            **more,
        },
    )


def _crash_at(point: str, after: int) -> None:
    """Kill this process with -9 when it comes to `point` for the `after`-th time."""
    left = [after]

    def count() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count()
            return original(*args, **kwargs)

        return call

    def following(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            if left[0] == 1:
                # The record is in the log, and this process never hears of it.
                self._producer.flush(10)
            count()
            return result

        return call

    if point == "before produce":
        KafkaLogWriter.write = before(KafkaLogWriter.write)  # type: ignore[method-assign]
    elif point == "after produce":
        KafkaLogWriter.write = following(KafkaLogWriter.write)  # type: ignore[method-assign]
    elif point == "before the local write":
        LocalStore.apply = before(LocalStore.apply)  # type: ignore[method-assign]
    elif point == "after the local write":
        original = LocalStore.apply

        def apply(self: LocalStore, records: Any) -> None:
            original(self, records)
            count()

        LocalStore.apply = apply  # type: ignore[method-assign]
    elif point == "before a snapshot's manifest":
        SnapshotStore._put_manifest = before(SnapshotStore._put_manifest)  # type: ignore[method-assign]
    elif point == "before the announcement":
        LedgerHost.announce = before(LedgerHost.announce)  # type: ignore[method-assign]
    else:
        raise ValueError(point)


async def _ask_no_reader(*_: Any) -> None:
    """In place of `check_readers`: what an older version did."""


def main(
    bootstrap: str,
    prefix: str,
    folder: str,
    point: str = "",
    after: int = 0,
    clock_ahead_ms: int = 0,
    asks_readers: bool = True,
    **more: Any,
) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    if point:
        _crash_at(point, after)
    if clock_ahead_ms:
        now_ms = ledger_app._clock_ms
        ledger_app._clock_ms = lambda: now_ms() + clock_ahead_ms
    if not asks_readers:
        ledger_app.check_readers = _ask_no_reader  # type: ignore[attr-defined, assignment]
    try:
        asyncio.run(run_worker(worker_settings(bootstrap, prefix, Path(folder), **more)))
    except WorkerError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return REFUSED
    return 0
