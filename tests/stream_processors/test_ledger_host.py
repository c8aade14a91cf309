"""The host over a log in memory: order, acknowledgement, doubt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from billing import period_lines
from billing.chain import record_hash, seal
from billing.founding import LedgerSettings, found, found_again
from billing.identity import partition_of
from billing.limits import REFUSED_RECORDS_NAMED
from billing.state import DAY_MS
from billing.step import LedgerKeys, UsageInput
from billing.v1.alert_pb2 import ALERT_RULE_FORGED_RECORD, SEVERITY_CRITICAL
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch
from stream_processors.errors import HostStopped, RefusedToStart
from stream_processors.ledger_host import HostSettings, LedgerHost
from stream_processors.local_store import LocalStore
from tests.billing.ledgers import KEYS as LEDGER_KEYS
from tests.billing.ledgers import Ledger, batch
from tests.billing.ledgers import usage as of_tenant
from tests.stream_processors.harness import event

KEYS = LedgerKeys(b"s" * 32, b"c" * 32)
NOW_MS = 1_800_000_000_000


class MemoryLogs:
    """Both ports on lists. Deliveries wait until `deliver`."""

    def __init__(self) -> None:
        self.logs: dict[tuple[str, int], list[bytes]] = {}
        self.waiting: list[tuple[Callable[[int, str], None], int, str]] = []
        self.problem = ""

    def log(self, topic: str, partition: int) -> list[bytes]:
        return self.logs.setdefault((topic, partition), [])

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self.log(topic, partition))

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        for offset in range(start, end):
            yield [(offset, self.log(topic, partition)[offset])]

    def write(self, topic: str, partition: int, value: bytes, on_done: Callable[[int, str], None], *, time_ms: int = 0) -> None:
        log = self.log(topic, partition)
        if not self.problem:
            log.append(value)
        self.waiting.append((on_done, len(log) - 1, self.problem))

    async def deliver(self) -> None:
        waiting, self.waiting = self.waiting, []
        for on_done, offset, problem in waiting:
            on_done(offset, problem)
        for _ in range(3):
            await asyncio.sleep(0)


class Bench:
    def __init__(self, folder: Path, partitions: int = 1) -> None:
        self.folder = folder
        self.logs = MemoryLogs()
        self.partitions = partitions
        self.now_ms = NOW_MS
        self.stopped: list[HostStopped] = []
        settings = LedgerSettings(partitions=partitions, dedupe_key=b"d" * 32)
        for partition in range(partitions):
            _, stored = found(settings, partition, b"g" * 16, NOW_MS, KEYS.seal_key, "test")
            self.logs.log("ledger", partition).append(stored)

    async def host(
        self, name: str = "a", *, partitions: int = 0, in_flight_max: int = 8, keys: LedgerKeys = KEYS
    ) -> LedgerHost:
        settings = HostSettings("events", "ledger", partitions or self.partitions, keys, name, in_flight_max)
        store = LocalStore(self.folder / name, 0)
        host = LedgerHost(settings, 0, store, self.logs, self.logs, lambda: self.now_ms, self.stopped.append)
        try:
            await host.recover()
        except BaseException:
            store.close()
            raise
        return host


def usage(offset: int, tenant_id: str = "tenant-1") -> UsageInput:
    one = event(tenant_id, f"request-{offset}")
    one.started_ms, one.ended_ms = NOW_MS - 5, NOW_MS
    return UsageInput("events", offset, UsageBatch(schema_version=1, events=[one]).SerializeToString())


async def test_an_input_is_done_only_when_its_record_is_in_the_log_and_on_disk(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    host = await bench.host()
    done: list[int] = []
    for offset in range(3):
        await host.handle(usage(offset), lambda offset=offset: done.append(offset))  # type: ignore[misc]
    assert (done, host.in_flight, host.store.place.position.sequence) == ([], 3, 0)
    await bench.logs.deliver()
    assert (done, host.in_flight, host.store.place.position.sequence) == ([0, 1, 2], 0, 3)
    await host.handle(usage(1), lambda: done.append(99))
    assert done[-1] == 99, "taken before: acknowledged, and no record"
    assert len(bench.logs.log("ledger", 0)) == 4
    digest = host.state.digest()
    host.store.close()
    fresh = await bench.host("b")
    assert fresh.state.digest() == digest
    fresh.store.close()


async def test_a_forged_record_is_refused_told_in_the_ledger_once_and_never_followed(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    host = await bench.host()
    await host.handle(usage(0), lambda: None)
    await bench.logs.deliver()
    log = bench.logs.log("ledger", 0)
    minted = LedgerRecord.FromString(log[-1])
    minted.ClearField("seal")
    minted.sequence += 1
    minted.previous_hash = record_hash(log[-1])
    minted.accounts[0].credit.low = 10**18
    # The links are right; the key is not.
    log.append(seal(minted, b"x" * 32))
    log.append(b"\xff garbage")
    await host.handle(usage(1), lambda: None)
    await bench.logs.deliver()
    assert "somebody else wrote" in str(host.stopped), "the worker starts over from the log"
    host.store.close()
    host = await bench.host()
    # What it had written behind them links to what was before them, so it is followed.
    assert (host.refused_records, host.state.sequence) == (2, 2)
    assert host.state.accounts["tenant-1"].credit_pico == 0
    await host.tick()
    await bench.logs.deliver()
    record = LedgerRecord.FromString(log[-1])
    assert [(each.offset, each.hash) for each in record.tick.refused] == [(2, record_hash(log[2])), (3, record_hash(log[3]))]
    [alert] = record.alerts
    assert (alert.rule, alert.figures["records"], alert.severity) == (ALERT_RULE_FORGED_RECORD, 2, SEVERITY_CRITICAL)
    digest = host.state.digest()
    host.store.close()
    # A worker that replays all of it finds them again, and that they have been told.
    fresh = await bench.host("fresh")
    await fresh.tick()
    await bench.logs.deliver()
    assert fresh.refused_records == 2
    assert not LedgerRecord.FromString(log[-1]).tick.refused
    assert digest != fresh.state.digest(), "that tick"
    fresh.store.close()


async def test_a_flood_of_forged_records_is_counted_and_takes_no_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path)
    log = bench.logs.log("ledger", 0)
    log.extend(b"\xff forged %d" % number for number in range(500))
    with caplog.at_level(logging.ERROR):
        host = await bench.host()
    assert host.refused_records == 500
    assert len(caplog.records) == REFUSED_RECORDS_NAMED, "its log says the first few"
    await host.tick()
    await bench.logs.deliver()
    record = LedgerRecord.FromString(log[-1])
    assert record.tick.refused_records == 500
    assert [each.offset for each in record.tick.refused] == [*range(1, REFUSED_RECORDS_NAMED), 500]
    [alert] = record.alerts
    assert alert.summary.startswith("500 message(s) in the ledger's log were refused; the first, at offset 1: ")
    await host.tick()
    await bench.logs.deliver()
    assert not LedgerRecord.FromString(log[-1]).tick.refused, "it is told once"
    host.store.close()


async def test_a_worker_with_another_seal_key_refuses_to_start(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    host = await bench.host()
    await host.handle(usage(0), lambda: None)
    await bench.logs.deliver()
    host.store.close()
    other = LedgerKeys(b"x" * 32, KEYS.command_key)
    for name, says in (("a", "our own place is sealed with another key"), ("fresh", "are sealed with another key")):
        with pytest.raises(RefusedToStart, match=says):
            await bench.host(name, keys=other)


async def test_a_record_of_a_newer_version_stops_a_worker_that_would_lose_a_part_of_it(tmp_path: Path) -> None:
    """At whatever depth it is; one that only knows more fields than the record has is no reason."""
    for name, newer in (("top", b"\xd2\x05\x03new"), ("below", b"")):
        bench = Bench(tmp_path)
        host = await bench.host(name)
        await host.handle(usage(0), lambda: None)
        await bench.logs.deliver()
        host.store.close()
        log = bench.logs.log("ledger", 0)
        record = LedgerRecord.FromString(log[-1])
        record.ClearField("seal")
        if not newer:
            # Field 90 of its account, which no version has yet.
            record.accounts[0].MergeFromString(b"\xd2\x05\x03new")
        log[-1] = seal(LedgerRecord.FromString(record.SerializeToString() + newer), KEYS.seal_key)
        with pytest.raises(RefusedToStart, match="offset 1: a newer version wrote sequence 1, with fields that this one"):
            await bench.host(f"other disk, {name}")
        assert len(log) == 2


async def test_a_log_that_carries_on_a_state_is_taken_over_on_that_state_alone(tmp_path: Path) -> None:
    """On an empty disk the same request would be charged again."""
    bench = Bench(tmp_path)
    host = await bench.host("a")
    await host.handle(usage(0), lambda: None)
    await bench.logs.deliver()
    _, stored = found_again(host.state, b"h" * 16, NOW_MS, KEYS.seal_key, "test")
    host.store.close()
    bench.logs.logs["ledger", 0] = [stored]
    with pytest.raises(RefusedToStart, match="what was charged before is known only to the local store"):
        await bench.host("empty")
    host = await bench.host("a")
    await host.handle(usage(0), lambda: None)
    await bench.logs.deliver()
    assert LedgerRecord.FromString(bench.logs.log("ledger", 0)[-1]).usage.duplicates == 1
    host.store.close()


async def test_a_replay_of_many_records_at_once_comes_to_the_same_state(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    host = await bench.host()
    for offset in range(150):
        if offset in (40, 100):
            await bench.logs.deliver()
            # Windows are let go, and late usage opens them again.
            bench.now_ms += 7_200_000
            await host.tick()
            assert not host.state.windows
        await host.handle(usage(offset, f"tenant-{offset % 3}"), lambda: None)
        if offset % 7 == 0:
            await bench.logs.deliver()
    await bench.logs.deliver()
    assert len(host.state.windows) == 3
    assert sum(account.events for account in host.state.accounts.values()) == 150
    live = host.store.load()
    fresh = await bench.host("b")
    assert fresh.replayed_records == 153
    loaded = fresh.store.load()
    assert live is not None
    assert loaded is not None
    assert fresh.state.digest() == host.state.digest() == live.digest() == loaded.digest()
    host.store.close()
    fresh.store.close()


async def test_a_replay_lets_go_of_what_the_writer_let_go_of_at_that_record(tmp_path: Path) -> None:
    """A month's lines go with a day's first tick, by what the account was then: it is stated again behind the tick."""
    ledger = Ledger(0, LedgerSettings(partitions=1, dedupe_key=b"k" * 32))
    late_ms = ledger.state.log_time_ms + period_lines.KEPT_MS + 60 * DAY_MS
    for number in range(2):
        ledger.usage(batch([of_tenant(f"r{number}", "tenant-1", backfill=True)]), late_ms)
        ledger.tick(late_ms + 3_600_000)
        late_ms += DAY_MS
        ledger.tick(late_ms)
    ledger.usage(batch([of_tenant("r2", "tenant-1", backfill=True)]), late_ms)
    bench = Bench(tmp_path)
    bench.logs.log("ledger", 0)[:] = ledger.stored
    host = await bench.host(keys=LEDGER_KEYS)
    assert host.state.digest() == ledger.state.digest()
    loaded = host.store.load()
    assert loaded is not None
    assert loaded.digest() == ledger.state.digest()
    host.store.close()


async def test_at_most_so_many_are_in_flight(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    host = await bench.host(in_flight_max=2)
    for offset in range(2):
        await host.handle(usage(offset), lambda: None)
    third = asyncio.ensure_future(host.handle(usage(2), lambda: None))
    await asyncio.sleep(0)
    assert not third.done()
    await bench.logs.deliver()
    await third
    draining = asyncio.ensure_future(host.drain(60.0))
    await asyncio.sleep(0)
    assert not draining.done()
    await bench.logs.deliver()
    assert await draining
    with pytest.raises(HostStopped, match="does not own"):
        await host.handle(usage(3), lambda: None)
    assert await host.resume()
    host.store.close()


async def test_a_foreign_record_or_a_delivery_error_stops_it_and_nothing_is_applied(tmp_path: Path) -> None:
    for name, disturb in (("foreign", b"x"), ("error", b"")):
        bench = Bench(tmp_path / name)
        host = await bench.host()
        if disturb:
            bench.logs.log("ledger", 0).append(bench.logs.log("ledger", 0)[0])
        else:
            bench.logs.problem = "timed out"
        done: list[int] = []
        await host.handle(usage(0), lambda done=done: done.append(0))  # type: ignore[misc]
        await host.handle(usage(1), lambda done=done: done.append(1))  # type: ignore[misc]
        await bench.logs.deliver()
        assert done == []
        assert host.store.place.position.sequence == 0
        assert len(bench.stopped) == 1
        with pytest.raises(HostStopped):
            await host.handle(usage(2), lambda: None)
        assert not await host.drain(60.0)
        host.store.close()
        bench.logs.problem = ""
        heir = await bench.host()
        assert heir.state.sequence == (2 if disturb else 0), "the log tells"
        heir.store.close()


async def test_what_is_forwarded_is_acknowledged_before_its_record_is_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path, partitions=2)
    host = await bench.host()
    stray = next(f"tenant-{i}" for i in range(99) if partition_of(f"tenant-{i}", 2) == 1)
    handling = asyncio.ensure_future(host.handle(usage(0, stray), lambda: None))
    await asyncio.sleep(0)
    assert len(bench.logs.log("events", 1)) == 1
    assert len(bench.logs.log("ledger", 0)) == 1
    await bench.logs.deliver()
    await handling
    assert len(bench.logs.log("ledger", 0)) == 2
    host.store.close()


async def test_a_log_that_lost_or_changed_what_the_store_has_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    host = await bench.host()
    for offset in range(3):
        await host.handle(usage(offset), lambda: None)
    await bench.logs.deliver()
    host.store.close()
    log = bench.logs.log("ledger", 0)
    kept = list(log)
    for broken in ([], kept[:2], [*kept[:3], kept[1]], [found_other(), *kept[1:]][:1]):
        log[:] = broken
        with pytest.raises(RefusedToStart, match="deleted, cut, or recreated"):
            await bench.host()
    log[:] = kept
    with pytest.raises(RefusedToStart, match="founded with 1 partitions"):
        await bench.host(partitions=2)
    log[:] = []
    with pytest.raises(RefusedToStart, match="run: taximeter topics apply"):
        await bench.host("empty disk")
    log[:] = kept
    host = await bench.host()
    assert host.replayed_records == 0
    host.store.close()


def found_other() -> bytes:
    settings = LedgerSettings(partitions=1, dedupe_key=b"e" * 32)
    return found(settings, 0, b"h" * 16, NOW_MS, KEYS.seal_key, "test")[1]
