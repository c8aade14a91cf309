"""Where the simulation takes the place of the world: clock, threads, RocksDB, Kafka's clients. Nothing else is replaced."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from producers import publisher
from stream_processors import ledger_app, local_store, seen_store, topics
from tests.simulation.broker import Client
from tests.simulation.disk import Disks, LazyThreads, MemoryBatch, MemoryDb
from tests.simulation.loop import PROCESS, SimLoop
from tests.simulation.producing import NoFollower

__all__ = ["BASE_MS", "seams"]

# A quarter to midnight in UTC, so that runs cross into another day.
BASE_MS = 1_800_057_600_000 - 20_000
# So few that runs of the dedupe memory are written, merged and dropped within a run of the simulation.
_RECENT_KEYS_MAX = 24
_RUNS_PER_LEVEL = 2


@contextlib.contextmanager
def seams(loop: SimLoop, choices: random.Random, disks: Disks, admin: Client) -> Iterator[None]:
    def clock_ms() -> int:
        process = PROCESS.get()
        return BASE_MS + int(loop.time() * 1000) + (process.skew_ms if process is not None else 0)

    clock = SimpleNamespace(monotonic=loop.time, time_ns=lambda: clock_ms() * 1_000_000)

    def client(*_: Any, **__: Any) -> Client:
        return admin

    with contextlib.ExitStack() as patches:
        for target, name, stand_in in (
            (local_store, "Rdict", MemoryDb),
            (local_store, "WriteBatch", MemoryBatch),
            (seen_store, "ThreadPoolExecutor", LazyThreads),
            (seen_store, "RECENT_KEYS_MAX", _RECENT_KEYS_MAX),
            (seen_store, "RUNS_PER_LEVEL", _RUNS_PER_LEVEL),
            (ledger_app, "time", clock),
            (ledger_app, "_clock_ms", clock_ms),
            (publisher, "time", clock),
            (publisher, "TopicFollower", NoFollower),
            (topics, "KafkaLogReader", client),
            (topics, "KafkaLogWriter", client),
            (topics, "time", clock),
            (topics, "secrets", SimpleNamespace(token_bytes=choices.randbytes)),
        ):
            patches.enter_context(mock.patch.object(target, name, stand_in))
        patches.enter_context(mock.patch.object(MemoryDb, "disks", disks, create=True))
        patches.enter_context(mock.patch.object(LazyThreads, "choices", choices, create=True))
        yield
