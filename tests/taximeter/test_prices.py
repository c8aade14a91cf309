"""Prices by command."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from billing.v1.command_pb2 import PriceBook
from sinks.engines.chdb import ChdbEngine
from sinks.follow import feed
from sinks.migrate import migrate
from taximeter.commands.prices import books_before
from tests.billing.ledgers import KEYS, Ledger

if TYPE_CHECKING:
    from pathlib import Path


def test_prices_that_the_ledger_has_and_the_database_does_not_yet_are_awaited(chdb_folder: Path) -> None:
    engine = ChdbEngine(chdb_folder, "first_book", threads=1)
    try:
        migrate(engine)
        second = PriceBook(version=2, currency="USD")
        assert books_before(engine, second, timeout_s=0.0).all() == []
        ledger = Ledger()
        ledger.price()
        later = threading.Timer(0.2, feed, (engine, ledger.stored, KEYS.seal_key))
        later.start()
        assert [book.version for book in books_before(engine, second, timeout_s=60.0).all()] == [1]
        later.join()
    finally:
        engine.close()
