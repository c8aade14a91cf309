"""Before the parts of `up` start: the schema, the topics, and a ledger, on the state that is there if there is one.

Promise: it may be interrupted anywhere and run again. In this order:
 1. A database that is there gets this version's schema. Where there is none yet, the sink makes it.
 2. If the broker has forgotten the ledger and local stores hold its state, the database gets the records that it lacks from
    there. A crash here repeats that, and what the database has already is left out.
 3. Topics are made, and the ledger is founded: new, or a new generation on the local state, which names where the old one
    ended. A crash in between leaves partitions to be founded with the same generation.
 4. A ledger without prices gets the price book. Sent twice, it is applied once, for its ID says which book it is; so one that
    was on its way when the broker died is sent again.

It opens chDB and RocksDB where they are, so no sink and no worker may run meanwhile.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stream_processors import topics
from taximeter import compose
from taximeter.commanding import Commander
from taximeter.price_files import default_price_book, read_price_book

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sinks.engine import Engine
    from stream_processors.local_store import LocalStore
    from taximeter.config import Config

__all__ = ["prepare"]

_log = logging.getLogger(__name__)


async def prepare(config: Config) -> None:
    """Make everything ready for the parts of `up`."""
    stores = sorted(config.ledger.state_dir.glob("partition-*"))
    # To load chDB and to open it costs as much as all the rest of this, for a database in which there is nothing.
    is_new = config.clickhouse.engine == "chdb" and not config.clickhouse.chdb_path.exists() and not stores
    fed, has_prices = (0, False) if is_new else _renew_the_database(config, stores)
    changes = await topics.apply(compose.apply_settings(config, embedded=True))
    for change in changes:
        _log.info("%s %s: %s", change.kind, change.name, change.detail)
    if fed:
        _log.info("the database was handed %d records of the generation before", fed)
    if not has_prices:
        path = config.prices.initial_book
        book = default_price_book() if path is None else read_price_book(path)
        commander = Commander(config, "taximeter up")
        commander.send([commander.prices(book, command_id=f"prices-{book.currency}-{book.version}")])


def _renew_the_database(config: Config, stores: list[Path]) -> tuple[int, bool]:
    """Its schema, and what it lacks; how many records were looked at, and whether it has prices."""
    from sinks.migrate import migrate

    with compose.open_engine(config) as engine:
        for migration in migrate(engine):
            _log.info("schema: applied %s", migration)
        fed = _feed_the_tail(config, engine, stores)
        return fed, engine.query("SELECT count() FROM price_books").rows[0][0] != 0


def _feed_the_tail(config: Config, engine: Engine, stores: list[Path]) -> int:
    """Hand the database the records that only local stores have; how many were looked at."""
    from sinks.follow import feed
    from stream_processors.local_store import LocalStore

    looked_at = 0
    seal_key = compose.ledger_keys(config).seal_key
    events_topic = compose.topic_names(config).events
    for folder in stores:
        partition = int(folder.name.removeprefix("partition-"))
        records = list(_unconfirmed(LocalStore(folder, partition, keep_unconfirmed=True)))
        looked_at += len(records)
        feed(engine, records, seal_key, usage_topic=events_topic)
    return looked_at


def _unconfirmed(store: LocalStore) -> Iterator[bytes]:
    try:
        yield from store.unconfirmed_records(-1)
    finally:
        store.close()
