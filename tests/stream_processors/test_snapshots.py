"""A snapshot restored and the log behind it give the state of the whole log, by hash; anything but a whole one is refused."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from billing import replay
from billing.chain import Chain, seal_and_hash
from billing.founding import LedgerSettings, found
from billing.key_ring import Keys
from billing.state import DAY_MS, LedgerState, MemorySeenKeys
from billing.step import LedgerKeys, UsageInput
from billing.v1.usage_pb2 import UsageBatch
from stream_processors import restoring, seen_store
from stream_processors.bucket import Bucket
from stream_processors.errors import BucketError, RefusedToStart, SnapshotRefused
from stream_processors.ledger_host import HostSettings, LedgerHost
from stream_processors.local_store import LocalStore
from stream_processors.restoring import Restoring
from stream_processors.settings import SnapshotSettings
from stream_processors.snapshots import Snapshot, SnapshotStore
from stream_processors.snapshotter import Snapshotter
from tests.stream_processors.harness import event
from tests.stream_processors.test_ledger_host import MemoryLogs

KEYS = LedgerKeys(b"s" * 32, b"c" * 32)
NOW_MS = 1_800_000_000_000


class Logs(MemoryLogs):
    """Kafka's retention may have taken the beginning."""

    first = 0

    async def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        return self.first, len(self.log(topic, partition))

    async def read(self, topic: str, partition: int, start: int, end: int) -> AsyncIterator[Sequence[tuple[int, bytes]]]:
        for offset in range(max(start, self.first), end):
            yield [(offset, self.log(topic, partition)[offset])]


class Installation:
    """A log, a bucket, and workers with disks of their own, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bucket_folder = folder / "bucket"
        self.url = self.bucket_folder.as_uri()
        self.logs = Logs()
        self.now_ms = NOW_MS
        self.offset = 0
        settings = LedgerSettings(partitions=1, dedupe_key=b"d" * 32)
        _, stored = found(settings, 0, b"g" * 16, NOW_MS, KEYS.seal_key, "test")
        self.logs.log("ledger", 0).append(stored)
        self.opened: list[LocalStore] = []

    def snapshots(self, seal_key: Keys = KEYS.seal_key, kept: int = 3) -> SnapshotStore:
        return SnapshotStore(Bucket(self.url), 0, seal_key, kept=kept, writer="test")

    async def worker(self, name: str, snapshots: SnapshotStore | None = None) -> tuple[LedgerHost, Snapshot | None]:
        """As `LedgerApp` takes a partition over."""
        settings = HostSettings("events", "ledger", 1, KEYS, name)
        opening = Restoring(
            self.logs, "ledger", KEYS.seal_key, snapshots or self.snapshots(), self.folder / "disks" / name / "partition-0"
        )
        while True:
            store, snapshot = await opening.open()
            restored = None if snapshot is None else snapshot.taken
            host = LedgerHost(settings, 0, store, self.logs, self.logs, lambda: self.now_ms, restored=restored)
            try:
                await host.recover()
            except SnapshotRefused as refusal:
                store.close()
                assert snapshot is not None
                opening.discard(snapshot, refusal)
                continue
            except BaseException:
                store.close()
                raise
            self.opened.append(store)
            return host, snapshot

    async def work(self, host: LedgerHost, batches: int, *, tenants: int = 5) -> None:
        for _ in range(batches):
            events = [event(f"tenant-{i % tenants}", f"{self.offset}-{i}") for i in range(20)]
            for one in events:
                one.started_ms, one.ended_ms = self.now_ms - 5, self.now_ms
            batch = UsageBatch(schema_version=1, events=events).SerializeToString()
            await host.handle(UsageInput("events", self.offset, batch), lambda: None)
            await self.logs.deliver()
            self.offset += 1

    async def let_pass(self, host: LedgerHost, time_ms: int) -> None:
        self.now_ms += time_ms
        await host.tick()
        await self.logs.deliver()

    def take(self, host: LedgerHost, snapshots: SnapshotStore | None = None) -> Snapshot:
        return (snapshots or self.snapshots()).write(host.store.capture(), self.now_ms, lambda: False)

    async def announce(self, host: LedgerHost, snapshot: Snapshot) -> None:
        await host.announce(snapshot.taken)
        await self.logs.deliver()

    def digest_of_log(self) -> str:
        """Of the state that the whole log leads to, in plain dictionaries."""
        chain, state = Chain(0, KEYS.seal_key), LedgerState(MemorySeenKeys())
        for stored in self.logs.log("ledger", 0):
            record = chain.accept(stored)
            assert record is not None
            replay.apply(state, record, stored)
        return state.digest()

    def files(self, kind: str) -> list[Path]:
        return sorted((self.bucket_folder / "partition-0" / kind).iterdir())

    def end(self, host: LedgerHost) -> None:
        self.opened.remove(host.store)
        host.store.close()

    def close(self) -> None:
        for store in self.opened:
            store.close()


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    # So few that runs are written and merged within a test.
    monkeypatch.setattr(seen_store, "RECENT_KEYS_MAX", 100)
    monkeypatch.setattr(seen_store, "RUNS_PER_LEVEL", 3)
    monkeypatch.setattr(restoring, "_BEHIND_RECORDS_MAX", 20)
    return Installation(tmp_path)


async def test_a_new_disk_comes_to_the_state_of_the_whole_log_by_hash(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 30)
    host.store.seen.settle()
    await installation.work(host, 3)
    snapshot = installation.take(host)
    assert len(snapshot.manifest.files) > 1, "it has runs"
    await installation.announce(host, snapshot)
    await installation.work(host, 10)
    await installation.let_pass(host, 2 * DAY_MS)
    fresh, restored = await installation.worker("fresh")
    assert restored is not None
    assert restored.taken == snapshot.taken
    assert fresh.replayed_records == 12, "what lies behind the snapshot, and no more"
    assert fresh.state.digest() == host.state.digest() == installation.digest_of_log()
    fresh.store.close()
    again = LocalStore(fresh.store.folder, 0)
    loaded = again.load()
    assert loaded is not None
    assert loaded.digest() == host.state.digest()
    installation.opened[1:] = [again]
    installation.close()


@pytest.mark.parametrize("seed", range(6))
async def test_whenever_disks_are_lost_the_state_is_that_of_the_log(seed: int, installation: Installation) -> None:
    rng = random.Random(seed)
    host, _ = await installation.worker("0")
    for number in range(1, 12):
        await installation.work(host, rng.randrange(1, 25))
        if rng.random() < 0.3:
            await installation.let_pass(host, rng.choice((60_000, 3_600_000, 20 * DAY_MS)))
        if rng.random() < 0.6:
            snapshot = installation.take(host)
            if rng.random() < 0.5:
                await installation.announce(host, snapshot)
        if rng.random() < 0.5:
            host.store.close()
            # A new disk, or one that was away for a while.
            host, _ = await installation.worker(str(number if rng.random() < 0.6 else rng.randrange(number)))
        assert host.state.digest() == installation.digest_of_log()
    host.store.close()


async def test_a_snapshot_is_of_the_moment_whatever_is_written_meanwhile(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 12)
    host.store.seen.settle()
    await installation.work(host, 1)
    captured, digest = host.store.capture(), host.state.digest()
    assert captured.runs
    # Merges take the runs away, blobs go into runs, windows and accounts move, all before the first byte is written.
    await installation.let_pass(host, 2 * DAY_MS)
    for _ in range(6):
        await installation.work(host, 6)
        host.store.seen.settle()
        await installation.work(host, 1)
    assert not {path.name for path in captured.runs} <= {path.name for path in (host.store.folder / "seen").iterdir()}
    snapshots = installation.snapshots()
    snapshot = snapshots.write(captured, NOW_MS, lambda: False)
    assert not captured.folder.exists()
    snapshots.restore(snapshot, installation.folder / "then")
    then = LocalStore(installation.folder / "then", 0)
    loaded = then.load()
    assert loaded is not None
    assert loaded.digest() == digest
    then.close()
    installation.close()


async def test_only_new_runs_are_uploaded_and_what_is_superseded_goes(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    snapshots = installation.snapshots(kept=2)
    await installation.work(host, 12)
    host.store.seen.settle()
    await installation.work(host, 1)
    first = installation.take(host, snapshots)
    written = {path: path.stat().st_mtime_ns for path in installation.files("files")}
    await installation.work(host, 1)
    # Another process, which has only the bucket to know by.
    second = installation.take(host, installation.snapshots(kept=2))
    shared = {file.digest.hex() for file in first.manifest.files} & {file.digest.hex() for file in second.manifest.files}
    assert len(shared) == len(first.manifest.files) - 1
    assert all(path.stat().st_mtime_ns == at for path, at in written.items()), "nothing was written again"
    last = second
    for _ in range(4):
        await installation.work(host, 20)
        host.store.seen.settle()
        last = installation.take(host, snapshots)
    assert [each.taken for each in snapshots.find()][:1] == [last.taken]
    assert len(snapshots.find()) == 2
    named = {file.digest.hex() for each in snapshots.find() for file in each.manifest.files}
    superseded = {file.digest.hex() for file in first.manifest.files} - named
    assert superseded
    assert not superseded & {path.name for path in installation.files("files")}
    installation.close()


async def test_what_nobody_named_goes_after_an_hour_and_not_beside_another_installations(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    installation.take(host)
    orphan = installation.bucket_folder / "partition-0" / "files" / ("0" * 64)
    draft = orphan.with_name("1" * 64 + "#0")
    for path in (orphan, draft):
        path.write_bytes(b"half of it")
    await installation.work(host, 1)
    installation.take(host)
    assert orphan.exists(), "another worker may be about to name it"
    for path in (orphan, draft):
        os.utime(path, (path.stat().st_atime - 7_200, path.stat().st_mtime - 7_200))
    foreign = installation.bucket_folder / "partition-0" / "manifests" / "9-of-somebody-else"
    foreign.write_bytes(b"another ledger's")
    await installation.work(host, 1)
    installation.take(host)
    assert orphan.exists(), "it may be theirs"
    foreign.unlink()
    await installation.work(host, 1)
    installation.take(host)
    assert not orphan.exists()
    assert not draft.exists()
    installation.close()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
@pytest.mark.parametrize("kind", ["state", "run", "manifest"])
async def test_a_damaged_snapshot_is_refused_and_the_one_before_serves(
    damage: Callable[[Path], None], kind: str, installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 3)
    older = installation.take(host)
    await installation.work(host, 12)
    host.store.seen.settle()
    await installation.work(host, 1)
    newer = installation.take(host)
    await installation.work(host, 5)
    by_name = {file.name: file.digest.hex() for file in newer.manifest.files}
    assert len(by_name) > 1
    if kind == "manifest":
        damage(installation.bucket_folder / newer.name)
    else:
        digest = next(digest for name, digest in by_name.items() if (name == "state") == (kind == "state"))
        damage(installation.bucket_folder / "partition-0" / "files" / digest)
    with caplog.at_level(logging.ERROR):
        fresh, restored = await installation.worker("fresh")
    assert restored is not None
    assert restored.taken == older.taken
    assert fresh.state.digest() == installation.digest_of_log()
    if not (kind == "manifest" and damage is Path.unlink):
        assert newer.name in caplog.text
    installation.close()


async def test_what_was_found_damaged_is_written_again(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 12)
    host.store.seen.settle()
    await installation.work(host, 1)
    first = installation.take(host)
    run = next(file for file in first.manifest.files if file.name != "state")
    _flip(installation.bucket_folder / "partition-0" / "files" / run.digest.hex())
    snapshots = installation.snapshots()
    with pytest.raises(SnapshotRefused, match="is damaged"):
        snapshots.verify(first)
    await installation.work(host, 1)
    snapshots.verify(installation.take(host, snapshots))
    snapshots.verify(first)
    installation.close()


async def test_a_forged_manifest_is_refused(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can write to the bucket, and not to the ledger, has no credit to give."""
    host, _ = await installation.worker("one")
    await installation.work(host, 3)
    genuine = installation.take(host)
    path = installation.bucket_folder / genuine.name
    manifests = path.parent
    forged = [
        # Sealed with another key, with the ledger's own (what seals records seals no manifest), and a record of the ledger.
        seal_and_hash(genuine.manifest, b"x" * 32)[0],
        seal_and_hash(genuine.manifest, KEYS.seal_key)[0],
        installation.logs.log("ledger", 0)[1],
        b"",
    ]
    for number, stored in enumerate(forged):
        (manifests / f"9{number}").write_bytes(stored)
    fresh, restored = await installation.worker("fresh")
    assert restored is not None
    assert restored.taken == genuine.taken
    assert caplog.text.count("is not sealed with this ledger's key") == len(forged)
    # A genuine one of another partition, moved here.
    (manifests / path.name).rename(manifests / "moved")
    other = SnapshotStore(Bucket(installation.url), 1, KEYS.seal_key)
    (installation.bucket_folder / "partition-1" / "manifests").mkdir(parents=True)
    (installation.bucket_folder / "partition-1" / "manifests" / "moved").write_bytes((manifests / "moved").read_bytes())
    assert other.find() == []
    assert "is one of partition 0; it was moved here" in caplog.text
    assert fresh.state.digest() == installation.digest_of_log()
    installation.close()


async def test_a_manifest_that_names_a_path_is_refused(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    snapshots = installation.snapshots()
    genuine = installation.take(host, snapshots)
    genuine.manifest.files.add(name="../../etc/passwd", digest=b"d" * 32, size_bytes=1)
    genuine.manifest.seal = b""
    (installation.bucket_folder / genuine.name).write_bytes(seal_and_hash(genuine.manifest, snapshots._keys)[0])
    assert snapshots.find() == []
    installation.close()


async def test_another_snapshot_than_the_log_announces_is_refused(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 3)
    announced = installation.take(host)
    other = SnapshotStore(Bucket(installation.url), 0, KEYS.seal_key, writer="another").write(
        host.store.capture(), NOW_MS, lambda: False
    )
    assert other.place == announced.place
    assert other.taken != announced.taken
    await installation.announce(host, announced)
    fresh, restored = await installation.worker("fresh")
    assert restored is not None
    assert restored.taken == announced.taken
    (installation.bucket_folder / announced.name).unlink()
    alone, restored = await installation.worker("alone")
    assert restored is None, "the whole log"
    assert "the log announces the snapshot" in caplog.text
    assert alone.state.digest() == fresh.state.digest() == installation.digest_of_log()
    installation.close()


async def test_a_snapshot_makes_a_new_disk_possible_when_the_logs_beginning_is_gone(installation: Installation) -> None:
    old, _ = await installation.worker("old")
    await installation.work(old, 2)
    installation.end(old)
    host, _ = await installation.worker("one")
    await installation.work(host, 10)
    snapshot = installation.take(host)
    await installation.work(host, 4)
    # Right behind the snapshot, and then between it and its successor.
    installation.logs.first = snapshot.place.ledger_offset + 1
    for name in ("fresh", "old"):
        fresh, restored = await installation.worker(name)
        assert restored is not None
        assert fresh.state.digest() == installation.digest_of_log()
        installation.end(fresh)
    installation.logs.first += 1
    with pytest.raises(RefusedToStart, match=r"its beginning was deleted.*snapshot_url"):
        await installation.worker("too late")
    installation.close()


async def test_a_snapshot_that_the_log_does_not_have_means_that_records_are_lost(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 10)
    installation.take(host)
    log = installation.logs.log("ledger", 0)
    kept, log[5:] = log[5:], []
    with pytest.raises(RefusedToStart, match="acknowledged records were deleted or cut"):
        await installation.worker("fresh")
    log += kept
    fresh, _ = await installation.worker("fresh")
    assert fresh.state.digest() == host.state.digest()
    installation.close()


async def test_a_ledger_that_was_founded_anew_does_not_take_the_old_ones_snapshot(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 3)
    installation.take(host)
    settings = LedgerSettings(partitions=1, dedupe_key=b"d" * 32)
    _, stored = found(settings, 0, b"h" * 16, NOW_MS, KEYS.seal_key, "test")
    installation.logs.log("ledger", 0)[:] = [stored]
    fresh, restored = await installation.worker("fresh")
    assert restored is None
    assert fresh.state.generation == b"h" * 16
    assert "its place in the log is other generation" in caplog.text
    installation.close()


async def test_a_store_that_is_close_behind_is_not_replaced_and_one_that_is_far_is(installation: Installation) -> None:
    away, _ = await installation.worker("away")
    await installation.work(away, 2)
    installation.end(away)
    host, _ = await installation.worker("one")
    await installation.work(host, 10)
    installation.take(host)
    away, restored = await installation.worker("away")
    assert restored is None
    installation.end(away)
    await installation.work(host, 25)
    installation.take(host)
    await installation.work(host, 5)
    returned, restored = await installation.worker("away")
    assert restored is not None
    assert returned.state.digest() == installation.digest_of_log()
    installation.close()


async def test_a_bucket_that_is_away_costs_time_only(installation: Installation, caplog: pytest.LogCaptureFixture) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 3)
    snapshots = installation.snapshots()
    installation.take(host, snapshots)
    away = Bucket("s3://nowhere/at-all")
    away._store = None  # type: ignore[assignment]
    away._errors = (Exception,)
    fresh, restored = await installation.worker("fresh", SnapshotStore(away, 0, KEYS.seal_key))
    assert restored is None
    assert fresh.state.digest() == installation.digest_of_log()
    assert "going on without snapshots" in caplog.text
    installation.close()


async def test_a_cancelled_snapshot_names_nothing_and_lets_go_of_the_store(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    await installation.work(host, 12)
    snapshots = installation.snapshots()
    captured = host.store.capture()
    with pytest.raises(CancelledError):
        snapshots.write(captured, NOW_MS, lambda: True)
    assert snapshots.find() == []
    # RocksDB's lock is free at once.
    host.store.close()
    LocalStore(host.store.folder, 0).close()
    assert not captured.folder.exists(), "what a killed process left goes at the next start"


async def test_snapshots_are_taken_when_due_and_announced_once_durable(installation: Installation) -> None:
    host, _ = await installation.worker("one")
    settings = SnapshotSettings(installation.url, interval_s=600, log_bytes=20_000)
    snapshots = installation.snapshots()
    with ThreadPoolExecutor(1) as threads:
        snapshotter = Snapshotter(host, snapshots, settings, threads, lambda: installation.now_ms)

        async def poll() -> int:
            """How many there are after everything that is due was done."""
            for _ in range(4):
                await snapshotter.poll(may_start=True)
                threads.submit(int).result()
            await installation.logs.deliver()
            return len(snapshots.find())

        assert await poll() == 1, "there was none"
        records = len(installation.logs.log("ledger", 0))
        assert await poll() == 1
        assert len(installation.logs.log("ledger", 0)) == records
        await installation.let_pass(host, 599_000)
        assert await poll() == 1
        await installation.let_pass(host, 1_000)
        assert await poll() == 2, "time has passed"
        await installation.work(host, 10)
        assert await poll() == 3, "much was written"
        chain = Chain(0, KEYS.seal_key)
        accepted = [chain.accept(stored) for stored in installation.logs.log("ledger", 0)]
        announced = [record.tick.snapshot for record in accepted if record is not None and record.tick.HasField("snapshot")]
        assert announced == [each.taken for each in reversed(snapshots.find())]
        # The bucket goes away: the ledger goes on, and tries again when a minute has passed.
        (installation.bucket_folder / "partition-0").rename(installation.folder / "away")
        (installation.bucket_folder / "partition-0").write_bytes(b"in the way")
        await installation.let_pass(host, 600_000)
        for _ in range(4):
            await snapshotter.poll(may_start=True)
            threads.submit(int).result()
        assert host.owned
        (installation.bucket_folder / "partition-0").unlink()
        (installation.folder / "away").rename(installation.bucket_folder / "partition-0")
        assert await poll() == 3
        await installation.let_pass(host, 61_000)
        assert await poll() == 3, "the last ones are kept"
        assert snapshots.find()[0].place.position.sequence > announced[-1].position.sequence
        snapshotter.close()
    installation.close()


def test_a_bucket_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(BucketError, match="snapshot_url"):
        Bucket("nowhere://x/y")
    for url in ("/a/path", "s3://user:secret@bucket"):
        with pytest.raises(ValueError, match="file:///folder"):
            SnapshotSettings(url)
    bucket = Bucket((tmp_path / "made").as_uri())
    assert bucket.list("any") == []
    bucket.delete(["not there"])
    with pytest.raises(FileNotFoundError):
        list(bucket.read("not there", 5))
