"""The publisher's place in a ledger: found by hash, doubted when records come that do not follow, refused when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from billing.chain import record_hash, seal
from billing.v1.account_pb2 import AccountUpdate, LedgerPosition, Progress
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors import publisher_app
from stream_processors.errors import RefusedToStart, WorkerError
from stream_processors.faust_apps import Failure
from stream_processors.publisher_app import PublisherApp
from stream_processors.reader_marks import PUBLISHER
from stream_processors.settings import KafkaSettings, TopicNames, WorkerSettings
from tests.billing.ledgers import KEYS, Ledger, batch, tenants_in, usage
from tests.stream_processors.test_ledger_host import MemoryLogs

PARTITION = 1
TENANT = tenants_in(PARTITION)[0]
TOPICS = TopicNames()


def filled(name: str, batches: int) -> Ledger:
    """Two of them have the founding record and the tenant in common."""
    ledger = Ledger(PARTITION)
    ledger.tenant(TENANT)
    for number in range(batches):
        ledger.usage(batch([usage(f"{name}-{number}", TENANT)]))
    return ledger


class Bench:
    """A publisher over logs in memory, which takes over and reads as Faust would have it."""

    def __init__(self, logs: MemoryLogs, folder: Path) -> None:
        self.logs = logs
        self.failure = Failure()
        # Nobody is there, and the client need not say so.
        kafka = KafkaSettings("127.0.0.1:1", {"log_level": "0"})
        settings = WorkerSettings(kafka, folder, KEYS, TOPICS)
        self.app = PublisherApp(settings, self.failure, KEYS.seal_key)
        self.app._reader = logs  # type: ignore[assignment]
        self.event = SimpleNamespace(ack=lambda: None)

    @property
    def log(self) -> list[bytes]:
        return self.logs.log(TOPICS.ledger, PARTITION)

    async def take_over(self) -> int:
        await self.app._take_over(PARTITION)
        return self.app._resume[PARTITION]

    async def read(self, stored: list[bytes]) -> None:
        for each in stored:
            self.log.append(each)
            await self.app._take(PARTITION, len(self.log) - 1, each, self.event)

    def mark(self, ledger: Ledger, sequence: int) -> None:
        """What it has published by now, as it says itself."""
        record = ledger.records()[sequence]
        place = Progress(
            partition=PARTITION,
            reader=PUBLISHER,
            position=LedgerPosition(generation=record.generation, sequence=sequence),
            record_hash=record_hash(ledger.stored[sequence]),
            ledger_offset=sequence,
        )
        self.logs.log(TOPICS.progress, PARTITION).append(place.SerializeToString())


@asynccontextmanager
async def publisher(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(MemoryLogs(), folder)
    yield bench
    await bench.app._writer.close(0.1)


async def test_it_goes_on_behind_what_it_published(tmp_path: Path) -> None:
    async with publisher(tmp_path) as bench:
        assert await bench.take_over() == 0, "nothing there, nothing published"
        ledger = filled("a", 3)
        bench.log.extend(ledger.stored)
        bench.mark(ledger, 2)
        assert await bench.take_over() == 3


async def test_what_the_ledgers_key_did_not_seal_is_told_and_not_published(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with publisher(tmp_path) as bench:
        ledger = filled("a", 2)
        await bench.take_over()
        *before, last = ledger.stored
        forged = LedgerRecord.FromString(last)
        forged.ClearField("seal")
        forged.accounts[0].credit.low = 10**18
        await bench.read([*before, seal(forged, b"x" * 32)])
        assert bench.app.published_records == len(before)
        assert f"offset {len(before)} was refused" in caplog.text
        await bench.read([last])
        assert bench.app.published_records == len(ledger.stored)
        published = bench.app._batches[PARTITION].states[TOPICS.accounts, TENANT]
        assert AccountUpdate.FromString(published).account.credit.low == 0


async def test_a_log_that_lost_what_it_published_is_refused(tmp_path: Path) -> None:
    async with publisher(tmp_path) as bench:
        ledger = filled("a", 3)
        bench.mark(ledger, 4)
        for log in (ledger.stored[:3], filled("b", 6).stored, []):
            bench.log[:] = log
            with pytest.raises(RefusedToStart, match=r"the reader publisher has taken sequence 4 at offset 4, and the log"):
                await bench.take_over()


async def test_records_that_do_not_follow_are_a_zombies_or_the_log_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_app, "_DOUBT_S", 0.01)
    async with publisher(tmp_path) as bench:
        ledger, cut = filled("a", 3), filled("b", 9)
        await bench.take_over()
        await bench.read(ledger.stored[:4])
        await bench.read([ledger.stored[3]])
        await asyncio.sleep(0.02)
        await bench.app._look_at_doubts()
        assert not bench.app._doubted_s, "the log has its place: that was a repeat"
        await bench.read([ledger.stored[3], ledger.stored[4]])
        assert not bench.app._doubted_s, "and here another that follows came"
        # The log is cut before its place and written on, beyond what it had read.
        bench.log[:] = cut.stored[:7]
        await bench.read(cut.stored[7:8])
        await asyncio.sleep(0.02)
        with pytest.raises(WorkerError, match="its end was cut, or it was restored from an older time"):
            await bench.app._look_at_doubts()
