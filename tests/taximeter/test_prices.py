"""Prices by command."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.migrate import migrate
from taximeter.commands.prices import await_first_book
from tests.billing.ledgers import KEYS, Ledger

if TYPE_CHECKING:
    from pathlib import Path


def test_prices_that_the_ledger_has_and_the_database_does_not_yet_are_awaited(chdb_folder: Path) -> None:
    engine = ChdbEngine(chdb_folder, "first_book", threads=1)
    try:
        migrate(engine)
        await_first_book(engine, timeout_s=0.0)
        ledger = Ledger()
        ledger.price()
        later = threading.Timer(0.2, feed, (engine, ledger.stored, KEYS.seal_key))
        later.start()
        await_first_book(engine, timeout_s=60.0)
        assert engine.query("SELECT count() FROM price_books").rows != [(0,)]
        later.join()
    finally:
        engine.close()
