"""What the ledger has forgotten and the database has as charged: a backfill is not charged a second time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.state import DAY_MS
from sinks import earlier_charges
from sinks.earlier_charges import charged_before
from sinks.follow import feed
from tests.billing.ledgers import KEYS, NOW_MS, Ledger, batch, tenants_in, usage

if TYPE_CHECKING:
    import pytest

    from sinks.engines.chdb import ChdbEngine


def test_what_the_ledger_has_forgotten_is_found_where_it_was_charged(
    engine: ChdbEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tenants_in(1)[:2]
    ledger = Ledger()
    events = [usage(f"r{number}", one) for number in range(12)]
    ledger.usage(batch([*events, usage("r0", two), usage("bad", one, model="")]))
    later_ms = NOW_MS + 60 * DAY_MS
    ledger.tick(later_ms)
    again = batch([usage("r3", one, backfill=True), usage("new", one, backfill=True)])
    feed(engine, ledger.stored, KEYS.seal_key)
    asked = [(one, f"r{number}") for number in range(12)] + [(two, "r0"), (two, "r1"), (one, "new"), (one, "bad"), ("x", "r0")]
    expected = {(one, f"r{number}") for number in range(12)} | {(two, "r0")}
    assert charged_before(engine, asked) == expected
    assert charged_before(engine, []) == set()
    monkeypatch.setattr(earlier_charges, "_IDS_MAX", 5)
    monkeypatch.setattr(earlier_charges, "_ID_BYTES_MAX", 8)
    assert charged_before(engine, asked) == expected
    # The ledger alone would charge both.
    assert len(ledger.usage(again, later_ms).record.usage.cost_pico_low) == 2
