"""A bounded number of seeds, the same run from the same seed, and the stand-in for RocksDB against the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rocksdict import Options, Rdict, WriteBatch

from tests.simulation.disk import Disks, MemoryBatch, MemoryDb
from tests.simulation.many import attempt_all

ROOT = Path(__file__).parents[2]
SEEDS = int(os.environ.get("SIMULATION_SEEDS", "100"))


@pytest.mark.timeout(900)
def test_whatever_dies_everything_durable_is_charged_once() -> None:
    faults: Counter[str] = Counter()
    ignored = 0
    for outcome in attempt_all(range(SEEDS), os.cpu_count() or 1):
        assert not isinstance(outcome, str), outcome
        faults += outcome.faults
        ignored += outcome.ignored
    # A run of seeds in which nothing was hit proves nothing.
    assert ignored > 0, "no zombie ever wrote"
    for fault in ("worker killed", "worker killed at a disk write", "worker stopped for a while", "log cut", "disk lost"):
        assert faults[fault] > 0, f"{fault}: never happened"
    for fault in ("lost", "unsure", "twice", "nameless", "late"):
        assert faults[f"{fault} usage.ledger"] > 0, f"{fault}: never struck a record"


@pytest.mark.timeout(900)
def test_the_same_seed_is_the_same_run_whatever_the_order_of_sets() -> None:
    told = {
        subprocess.run(
            [sys.executable, "-c", "from tests.simulation.many import attempt; print(attempt(9), attempt(28))"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=400,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(told) == 1, "the runs differ"
    assert "fingerprint" in told.pop()


# Under `m` stands where a store is, which the stand-in reads.
_KEY = st.binary(min_size=1, max_size=3).filter(lambda key: key != b"m")
_CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), _KEY, st.binary(max_size=3)),
        st.tuples(st.just("delete"), _KEY),
        # To order them is to lose none: with each draw that a filter refuses the whole example may be one.
        st.sets(_KEY, min_size=2, max_size=2).map(lambda ends: ("delete_range", *sorted(ends))),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(batches=st.lists(_CALLS, max_size=6), start=_KEY)
def test_memory_does_what_rocksdb_does(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[bytes, ...]]], start: bytes
) -> None:
    import random

    options = Options(raw_mode=True)
    options.create_if_missing(True)
    real = Rdict(str(tmp_path_factory.mktemp("rocks")), options)
    MemoryDb.disks = Disks(random.Random(0), lambda _: None)
    stand_in = MemoryDb("here")
    for calls in batches:
        one, other = WriteBatch(raw_mode=True), MemoryBatch(raw_mode=True)
        for name, *arguments in calls:
            getattr(one, str(name))(*arguments)
            getattr(other, str(name))(*arguments)
        real.write(one)
        stand_in.write(other)
    assert list(real.items(from_key=start)) == list(stand_in.items(from_key=start))
    assert real.get(start) == stand_in.get(start)
    real.close()
