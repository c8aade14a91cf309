"""A ledger from its backup on real brokers: the same messages, every charge once, nothing where something is already."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from billing import replay
from billing.chain import Chain
from billing.state import LedgerState, MemorySeenKeys
from stream_processors import ledger_restore, topics
from stream_processors.errors import BackupError, RefusedToStart
from stream_processors.kafka_ports import KafkaLogReader, KafkaLogWriter
from stream_processors.ledger_backup import take
from stream_processors.settings import KafkaSettings, TopicSettings
from stream_processors.topics import ApplySettings, Change
from taximeter.embedded.broker import TansuBroker, TansuSettings
from tests.billing.ledgers import NOW_MS, SEAL_KEY
from tests.stream_processors import worker_main
from tests.stream_processors.harness import TIMEOUT_S, Ledger, event
from tests.stream_processors.ledger_port import PARTITIONS, SETTINGS, TOPIC, LedgerPort


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster that has nothing."""
    broker = TansuBroker(TansuSettings(log_path=tmp_path / "empty.log"))
    broker.start()
    yield broker.bootstrap
    broker.stop()


def settings_of(bootstrap: str) -> ApplySettings:
    return ApplySettings(
        kafka=KafkaSettings(bootstrap), topics=TopicSettings(partitions=PARTITIONS), ledger=SETTINGS, seal_key=SEAL_KEY
    )


def restore(settings: ApplySettings, folder: Path, *, inputs_kept: bool = False, dry_run: bool = False) -> list[Change]:
    work = ledger_restore.plan if dry_run else ledger_restore.restore
    return asyncio.run(work(settings, folder, inputs_kept=inputs_kept, on_record=lambda *_: None))


def backed_up(folder: Path) -> LedgerPort:
    """A ledger in memory with something of everybody in it, and its backup."""
    port = LedgerPort()
    port.forge()
    asyncio.run(take(port, TOPIC, PARTITIONS, SEAL_KEY, folder, NOW_MS))
    return port


def back_up(ledger: Ledger, folder: Path) -> None:
    reader = KafkaLogReader(KafkaSettings(ledger.bootstrap))
    asyncio.run(take(reader, ledger.names.ledger, ledger.partitions, worker_main.SEAL_KEY, folder, NOW_MS))


def topic(bootstrap: str, partition: int) -> list[bytes]:
    return Ledger(bootstrap, Path(), prefix="").read(TOPIC, partition)


def generations(bootstrap: str, port: LedgerPort) -> set[bytes]:
    """Of the new founding records; the topic must be the backup and one of them in each partition."""
    found = set()
    for number, stored in enumerate(port.stored):
        *before, founding = topic(bootstrap, number)
        assert before == stored
        chain, state = Chain(number, SEAL_KEY), LedgerState(MemorySeenKeys())
        for value in [*before, founding]:
            record = chain.accept(value)
            if record is not None:
                replay.apply(state, record, value)
        assert (state.sequence, state.record_hash) == (0, chain.record_hash)
        assert state.accounts[port.tenant(number)].events == port.ledgers[number].state.accounts[port.tenant(number)].events
        marks = [each.producers["p"].to_mark() for each in (state, port.ledgers[number].state)]
        assert marks[0] == marks[1], "a number that went with the old ledger shows as missing"
        assert state.seen.digest() == port.ledgers[number].state.seen.digest(), "what was charged is remembered"
        found.add(state.generation)
    return found


def test_the_dry_run_says_what_is_done_and_a_second_run_does_nothing(empty: str, tmp_path: Path) -> None:
    port = backed_up(tmp_path / "backup")
    settings = settings_of(empty)
    planned = restore(settings, tmp_path / "backup", dry_run=True)
    assert topics.existing_topics(settings) == {}
    done = restore(settings, tmp_path / "backup")
    assert sorted((each.kind, each.name) for each in planned) == sorted((each.kind, each.name) for each in done)
    assert len(done) == 9 + 2 * PARTITIONS
    assert len(generations(empty, port)) == 1
    assert restore(settings, tmp_path / "backup") == []
    assert asyncio.run(topics.plan(settings)) == []


def test_a_restore_that_is_killed_goes_on_where_it_was(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each write and each new topic: in the end it is one ledger of one generation."""
    port = backed_up(tmp_path / "backup")
    settings = settings_of(empty)
    left = [0]

    class Killed(BaseException):
        """The process ends here."""

    def killed(original: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return original(*arguments, **more)

        return call

    monkeypatch.setattr(KafkaLogWriter, "write", killed(KafkaLogWriter.write))
    monkeypatch.setattr(topics, "_await_leaders", killed(topics._await_leaders))
    kills = 0
    # Each time a little further, on top of what is there.
    for point in range(2, 1_000):
        left[0] = point
        try:
            restore(settings, tmp_path / "backup")
        except Killed:
            kills += 1
        else:
            break
    assert kills >= 5
    left[0] = 0
    assert len(generations(empty, port)) == 1
    assert asyncio.run(topics.plan(settings)) == []


def test_nothing_is_written_where_something_is(empty: str, tmp_path: Path) -> None:
    port = backed_up(tmp_path / "backup")
    settings = settings_of(empty)
    other = Ledger(empty, tmp_path, prefix="")
    asyncio.run(topics.apply(settings))
    there = [topic(empty, number) for number in range(PARTITIONS)]
    with pytest.raises(RefusedToStart, match=r"usage.ledger\[0\] holds offsets 0 to 1, .* a ledger is there, or was"):
        restore(settings, tmp_path / "backup")
    assert [topic(empty, number) for number in range(PARTITIONS)] == there

    admin = AdminClient({"bootstrap.servers": empty})
    admin.delete_topics([TOPIC])[TOPIC].result(TIMEOUT_S)
    other.wait(lambda: TOPIC not in admin.list_topics(timeout=TIMEOUT_S).topics, "the deletion")
    other.send([event("tenant")], partition=1)
    with pytest.raises(RefusedToStart, match=r"usage.events\[1\] is not new, it holds offsets 0 to 1"):
        restore(settings, tmp_path / "backup")
    with pytest.raises(RefusedToStart, match=r"holds offsets 0 to 0, and the backup has taken everything before 4"):
        restore(settings, tmp_path / "backup", inputs_kept=True)
    for number, ledger in enumerate(port.ledgers):
        for _ in range(sum(record.WhichOneof("source") == "usage" for record in ledger.records())):
            other.send([event("other")], partition=number)
    with pytest.raises(RefusedToStart, match=r"usage.events\[0\], offset 3, is not what the ledger has taken from there"):
        restore(settings, tmp_path / "backup", inputs_kept=True)
    assert TOPIC not in topics.existing_topics(settings)


def test_of_a_damaged_backup_nothing_is_written(empty: str, tmp_path: Path) -> None:
    backed_up(tmp_path / "backup")
    [path] = (tmp_path / "backup").glob("partition-1/*.messages")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BackupError):
        restore(settings_of(empty), tmp_path / "backup")
    assert topics.existing_topics(settings_of(empty)) == {}


@pytest.mark.timeout(600)
def test_a_cluster_is_lost_and_every_charge_stands_once_in_the_next(tansu: TansuBroker, empty: str, tmp_path: Path) -> None:
    """Producers send again what they have, what the backup covers too; what only the lost cluster had is charged too."""
    ledger = Ledger(tansu.bootstrap, tmp_path, quick_sessions=True)
    ledger.found()
    worker = ledger.worker("lost")
    try:
        ledger.send([event(f"tenant-{number}") for number in range(20)])
        ledger.wait_charged()
        back_up(ledger, tmp_path / "backup")
        ledger.send([event(f"tenant-{number}") for number in range(20)])
        ledger.wait_charged()
        covered = ledger.charged()
        worker.kill9()

        new = Ledger(empty, tmp_path, quick_sessions=True, prefix=ledger.prefix)
        restore(new.apply_settings(), tmp_path / "backup")
        assert sum(new.charged().values()) == 20
        ledger.workers.append(new.worker("new"))
        new.send(list(ledger.sent.values()))
        new.send([event("tenant-3")])
        new.wait_charged()
        new.assert_exact()
        assert len(new.sent) == len(covered) + 1
        # And it is a ledger of which a backup can be taken, the same one on.
        back_up(new, tmp_path / "backup")
    finally:
        ledger.stop()


@pytest.mark.timeout(600)
@pytest.mark.apache_kafka
def test_only_the_ledger_is_lost_and_what_came_after_the_backup_is_taken_again(apache_kafka: Any, tmp_path: Path) -> None:
    ledger = Ledger(apache_kafka.bootstrap, tmp_path)
    ledger.found()
    worker = ledger.worker("lost")
    try:
        ledger.send([event(f"tenant-{number}") for number in range(20)])
        ledger.wait_charged()
        back_up(ledger, tmp_path / "backup")
        ledger.send([event(f"tenant-{number}") for number in range(20)])
        ledger.wait_charged()
        worker.kill9()
        admin = AdminClient({"bootstrap.servers": ledger.bootstrap})
        gone = [ledger.names.ledger, ledger.names.progress]
        for future in admin.delete_topics(gone).values():
            future.result(TIMEOUT_S)
        ledger.wait(lambda: not set(gone) & admin.list_topics(timeout=TIMEOUT_S).topics.keys(), "the deletion")

        with pytest.raises(RefusedToStart, match="say --inputs-kept"):
            restore(ledger.apply_settings(), tmp_path / "backup")
        restore(ledger.apply_settings(), tmp_path / "backup", inputs_kept=True)
        assert sum(ledger.charged().values()) == 20
        ledger.worker("new")
        ledger.wait_charged()
        ledger.assert_exact()
    finally:
        ledger.stop()
