"""Topics and founding: the dry run says what is done, a second run does nothing, what is wrong is refused."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from billing import chain, replay
from billing.founding import LedgerSettings
from billing.state import LedgerState, MemorySeenKeys
from billing.step import CommandInput, LedgerKeys, step
from billing.v1.account_pb2 import Progress
from billing.v1.command_pb2 import Command, Price, PriceBook
from billing.v1.ledger_pb2 import LedgerRecord
from producers.commands import CommandSender, CommandSettings
from stream_processors import topics
from stream_processors.errors import RefusedToStart, WorkerError
from stream_processors.local_store import Acknowledged, LocalStore
from stream_processors.settings import TopicSettings
from stream_processors.topics import ApplySettings, apply, check_partitions, plan
from tests.stream_processors.harness import DEDUPE_KEY, Ledger
from tests.stream_processors.worker_main import COMMAND_KEY, SEAL_KEY


def test_the_dry_run_says_what_is_done_and_a_second_run_does_nothing(bootstrap: str, tmp_path: Path) -> None:
    ledger = Ledger(bootstrap, tmp_path)
    settings = ledger.apply_settings()
    with pytest.raises(RefusedToStart, match="run: taximeter topics apply"):
        check_partitions(settings.kafka, settings.names)
    planned = asyncio.run(plan(settings))
    done = asyncio.run(apply(settings))
    assert [(change.kind, change.name) for change in planned] == [(change.kind, change.name) for change in done]
    assert len(done) == 9 + 2
    assert asyncio.run(plan(settings)) == []
    assert asyncio.run(apply(settings)) == []
    assert check_partitions(settings.kafka, settings.names) == 2
    records = [LedgerRecord.FromString(ledger.read(ledger.names.ledger, partition)[0]) for partition in range(2)]
    assert len({record.generation for record in records}) == 1
    assert all(record.founding.partitions == 2 for record in records)


def test_another_number_of_partitions_is_refused(bootstrap: str, tmp_path: Path) -> None:
    ledger = Ledger(bootstrap, tmp_path)
    ledger.found()
    wrong = replace(
        ledger.apply_settings(),
        topics=TopicSettings(partitions=3),
        ledger=LedgerSettings(partitions=3, dedupe_key=DEDUPE_KEY),
    )
    with pytest.raises(RefusedToStart, match="has 2 partitions, the setting partitions is 3"):
        asyncio.run(plan(wrong))


def test_a_ledger_that_was_there_is_not_founded_anew(bootstrap: str, tmp_path: Path) -> None:
    """It would be one without prices, balances and the memory of what was charged."""
    ledger = Ledger(bootstrap, tmp_path)
    settings = ledger.apply_settings()
    ledger.found()
    # The publisher has been at work.
    progress = Progress(partition=1, reader="publisher").SerializeToString()
    ledger.send_bytes(progress, 1, ledger.names.progress, key=b"reader/publisher/1")
    admin = AdminClient({"bootstrap.servers": ledger.bootstrap})
    admin.delete_topics([ledger.names.ledger])[ledger.names.ledger].result(20)
    ledger.wait(lambda: ledger.names.ledger not in admin.list_topics(timeout=10).topics, "the deletion")
    for run in (plan, apply):
        with pytest.raises(RefusedToStart, match="would forget prices, balances and what was charged"):
            asyncio.run(run(settings))
    assert ledger.read(ledger.names.ledger, 0) == ledger.read(ledger.names.ledger, 1) == []


async def _stop_behind_the_first(settings: ApplySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    write = topics._write

    async def first_alone(*args: Any) -> int:
        if written:
            raise WorkerError("killed here")
        written.append(args)
        return await write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(topics, "_write", first_alone)
        with pytest.raises(WorkerError, match="killed here"):
            await apply(settings)


def test_a_partition_that_is_founded_later_takes_the_price_book_of_the_others(
    bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(bootstrap, tmp_path)
    asyncio.run(_stop_behind_the_first(ledger.apply_settings(), monkeypatch))
    book = PriceBook(version=1, currency="USD", prices=[Price(model="*", output_pico=1)])
    command = Command(schema_version=1, command_id="book", issued_ms=time.time_ns() // 1_000_000, price_book=book)
    CommandSender(CommandSettings(bootstrap, 2, ledger.names.commands), COMMAND_KEY).send(command)
    assert [change.name for change in ledger.found()] == [f"{ledger.names.ledger}[1]"]
    for partition in range(2):
        [stored], [value] = ledger.read(ledger.names.ledger, partition), ledger.read(ledger.names.commands, partition)
        state = LedgerState(MemorySeenKeys())
        replay.apply(state, LedgerRecord.FromString(stored), stored)
        assert state.inputs == {}, "it begins with the first message"
        keys = LedgerKeys(SEAL_KEY, COMMAND_KEY)
        step(state, CommandInput(ledger.names.commands, 0, value), command.issued_ms, keys=keys, writer="test")
        assert state.books.version("USD", 1) == book


def test_a_local_store_of_the_generation_that_others_go_on_in_founds_nothing(
    bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two records of one partition would have one position."""
    ledger = Ledger(bootstrap, tmp_path)
    asyncio.run(_stop_behind_the_first(ledger.apply_settings(), monkeypatch))
    [stored] = ledger.read(ledger.names.ledger, 0)
    record = LedgerRecord.FromString(stored)
    store = LocalStore(tmp_path / "stores" / "partition-1", 1)
    record.partition = 1
    store.apply([Acknowledged(record, chain.seal(record, SEAL_KEY), 0)])
    store.close()
    with pytest.raises(RefusedToStart, match=r"partition 0 goes on in the generation that the local store is of"):
        ledger.found(tmp_path / "stores")
    assert ledger.read(ledger.names.ledger, 1) == []


def test_a_ledger_is_kept_at_least_as_long_as_dedupe_keys_live(tmp_path: Path) -> None:
    settings = Ledger("nowhere:1", tmp_path).apply_settings()
    with pytest.raises(ValueError, match="under the dedupe horizon"):
        replace(settings, topics=TopicSettings(partitions=2, ledger_retention_ms=86_400_000))


def test_a_topic_that_cannot_be_read_yet_is_waited_for(bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apache Kafka says that a topic is created before its partitions have leaders; the founding was refused then."""
    asked = []
    list_offsets = AdminClient.list_offsets

    def late(self: AdminClient, places: dict[TopicPartition, OffsetSpec], **more: float) -> object:
        asked.append(places)
        if len(asked) % 3:
            raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
        return list_offsets(self, places, **more)

    monkeypatch.setattr(AdminClient, "list_offsets", late)
    ledger = Ledger(bootstrap, tmp_path)
    assert len(ledger.found()) == 9 + 2
    # Two refusals of ours before each answer; a loaded broker may add its own.
    assert len(asked) >= 9 * 3
