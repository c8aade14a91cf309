"""Whoever has a ledger's records has its state: a replay, a local store, a ledger that is founded again, the audit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing import replay
from billing.chain import Chain
from billing.founding import found_again
from billing.state import LedgerState, MemorySeenKeys
from sinks.recompute import Recomputed
from stream_processors.local_store import Acknowledged, LocalStore
from tests.billing.ledgers import KEYS, Ledger

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["agreed"]


def agreed(made: Ledger, folder: Path) -> None:
    """They have what the step has. `folder` is for the local store, which is opened and closed in it."""
    assert made.replayed().digest() == made.state.digest()
    recomputed = Recomputed(1)
    for record in made.records():
        recomputed.take(record)
    assert recomputed.findings == []
    records = [
        Acknowledged(record, stored, i) for i, (record, stored) in enumerate(zip(made.records(), made.stored, strict=True))
    ]
    store = LocalStore(folder, 1)
    for start in range(0, len(records), 3):
        store.apply(records[start : start + 3])
    store.close()
    store = LocalStore(folder, 1)
    loaded = store.load()
    assert loaded is not None
    assert loaded.digest(with_memory=False) == made.state.digest(with_memory=False)
    store.close()
    record, stored = found_again(made.state, b"h" * 16, made.state.log_time_ms, KEYS.seal_key, "test")
    carried = LedgerState(MemorySeenKeys())
    assert Chain(1, KEYS.seal_key).accept(stored) is not None
    replay.apply(carried, record, stored)
    assert list(carried.credits.all()) == list(made.state.credits.all())
    assert list(carried.budgets.all()) == list(made.state.budgets.all())
    assert carried.registrations.all() == made.state.registrations.all()
    assert list(carried.all_projects()) == list(made.state.all_projects())
    recomputed.take(record)
    assert recomputed.findings == []
