"""The dedupe memory answers as a plain dictionary does, whether keys are in memory, in runs, merged or expired."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from billing.state import MemorySeenKeys
from stream_processors import seen_store
from stream_processors.seen_runs import DamagedRunError
from stream_processors.seen_store import SeenStore


class Keeper:
    """What the local store does around a SeenStore: blobs by sequence, the list of runs, one batch at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs: dict[int, list[tuple[int, bytes]]] = {}
        self.runs: set[str] = set()
        self.forgotten = 0
        self.sequence = -1
        self.store = SeenStore(folder, (), 0)

    def record(self, entries: list[tuple[int, bytes]]) -> None:
        self.sequence += 1
        self.blobs[self.sequence] = entries
        self.store.acknowledged(self.sequence, entries, self.forgotten)

    def note(self, *, crash_before_adopting: bool = False) -> bool:
        change = self.store.finished()
        if change is None:
            return False
        self.runs = (self.runs | set(change.added)) - set(change.removed)
        if change.blobs_through_sequence is not None:
            self.blobs = {s: b for s, b in self.blobs.items() if s > (change.blobs_through_sequence or 0)}
        if not crash_before_adopting:
            self.store.adopt(change)
        return True

    def reopen(self) -> None:
        self.store.close()
        self.store = SeenStore(self.folder, self.runs, self.forgotten)
        for sequence in sorted(self.blobs):
            self.store.restore(sequence, self.blobs[sequence])


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    monkeypatch.setattr(seen_store, "RECENT_KEYS_MAX", 64)
    keeper = Keeper(tmp_path / "seen")
    yield keeper
    keeper.store.close()


def _keys(rng: random.Random, count: int) -> tuple[list[bytes], list[bytes]]:
    # A shared first half now and then: the numbers that rows are sorted by may be equal.
    digests = [(bytes(8) if rng.random() < 0.1 else rng.randbytes(8)) + rng.randbytes(8) for _ in range(count)]
    return digests, [rng.randbytes(8) for _ in range(count)]


def _entries(digests: list[bytes], fingerprints: list[bytes]) -> bytes:
    return b"".join(a + b for a, b in zip(digests, fingerprints, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_answers_as_a_dictionary_does(seed: int, keeper: Keeper) -> None:
    rng = random.Random(seed)
    model = MemorySeenKeys()
    every: list[bytes] = []
    in_flight: list[list[tuple[int, bytes]]] = []
    day = 100
    for _ in range(400):
        choice = rng.random()
        if choice < 0.55:
            digests, fingerprints = _keys(rng, rng.randrange(1, 30))
            expires = day + rng.randrange(1, 6)
            keeper.store.remember(expires, digests, fingerprints)
            model.remember(expires, digests, fingerprints)
            every += digests
            in_flight.append([(expires, _entries(digests, fingerprints))])
        elif choice < 0.85:
            if in_flight:
                keeper.record(in_flight.pop(0))
        elif choice < 0.95:
            if rng.random() < 0.7:
                keeper.store.settle()
            keeper.note()
        elif choice < 0.97:
            day += 1
            keeper.store.expire(day)
            model.expire(day)
            # Only an acknowledged record says so to the disk; here every remembered key came before it.
            while in_flight:
                keeper.record(in_flight.pop(0))
            keeper.forgotten = day
            keeper.record([])
        else:
            while in_flight:
                keeper.record(in_flight.pop(0))
            keeper.store.settle()
            keeper.note(crash_before_adopting=rng.random() < 0.5)
            keeper.reopen()
        wanted = rng.sample(every, min(len(every), 40)) + [rng.randbytes(16) for _ in range(10)]
        assert keeper.store.find(wanted) == model.find(wanted)
        if rng.random() < 0.1:
            assert keeper.store.digest() == model.digest(), "by hash, whatever it is kept in"
    assert keeper.store.find(every) == model.find(every)


def test_runs_are_merged_and_dropped_when_they_expire(keeper: Keeper) -> None:
    rng = random.Random(1)
    for _ in range(200):
        digests, fingerprints = _keys(rng, 64)
        keeper.store.remember(50, digests, fingerprints)
        keeper.record([(50, _entries(digests, fingerprints))])
        keeper.store.settle()
        while keeper.note():
            keeper.store.settle()
    levels = sorted(int(name[0]) for name in keeper.runs)
    assert levels.count(0) < 8
    assert levels.count(1) < 8
    assert 2 in levels
    assert keeper.store.keys_on_disk + keeper.store.recent_keys == 200 * 64
    keeper.store.expire(50)
    keeper.forgotten = 50
    keeper.record([])
    keeper.store.settle()
    while keeper.note():
        keeper.store.settle()
    assert keeper.runs == set()
    assert list(keeper.folder.iterdir()) == []


def test_nothing_unacknowledged_reaches_the_disk(keeper: Keeper) -> None:
    rng = random.Random(2)
    acknowledged, fingerprints = _keys(rng, 100)
    keeper.store.remember(50, acknowledged, fingerprints)
    in_flight, more = _keys(rng, 100)
    keeper.store.remember(50, in_flight, more)
    keeper.record([(50, _entries(acknowledged, fingerprints))])
    keeper.store.settle()
    keeper.note()
    assert keeper.runs == set(), "frozen with keys in flight: it waits for them"
    keeper.reopen()
    assert keeper.store.find(in_flight) == [None] * 100
    assert keeper.store.find(acknowledged) == fingerprints


def test_a_damaged_run_is_named(keeper: Keeper) -> None:
    digests, fingerprints = _keys(random.Random(3), 100)
    keeper.store.remember(50, digests, fingerprints)
    keeper.record([(50, _entries(digests, fingerprints))])
    keeper.store.settle()
    keeper.note()
    (name,) = keeper.runs
    path = keeper.folder / name
    keeper.store.close()
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedRunError, match=name):
        SeenStore(keeper.folder, keeper.runs, 0)
    path.write_bytes(data[:100])
    with pytest.raises(DamagedRunError, match=name):
        SeenStore(keeper.folder, keeper.runs, 0)
