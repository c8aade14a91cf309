"""Topics and founding: the dry run says what is done, a second run does nothing, what is wrong is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from billing.founding import LedgerSettings
from billing.v1.ledger_pb2 import LedgerRecord
from stream_processors.errors import RefusedToStart
from stream_processors.settings import TopicSettings
from stream_processors.topics import apply, check_partitions, plan
from tests.stream_processors.harness import DEDUPE_KEY, Ledger


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
