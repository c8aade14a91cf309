"""What Debian's ClickHouse of December 2018 lacks, substituted in the DDL that it is sent: the product's own stays as it is.

Types that it has not become ones that hold the same values (DateTime64(3) is Int64 in milliseconds, LowCardinality is plain);
codecs, comments, skip indexes and settings of tables are left out. Inserts and the writer's own query are the product's. Views
are not made: all SQL for people runs on chDB.
"""

from __future__ import annotations

import re

from sinks.engine import Table
from sinks.engines.server import ServerEngine
from sinks.migrate import load_migrations

_SUBSTITUTES = (
    (re.compile(r"\bLowCardinality\(String\)"), "String"),
    (re.compile(r"DateTime64\(3, 'UTC'\)"), "Int64"),
    (re.compile(r" COMMENT '(?:[^']|'')*'"), ""),
    (re.compile(r"\nCOMMENT '(?:[^']|'')*'$"), ""),
    (re.compile(r" CODEC\((?:[^()]|\([^()]*\))*\)"), ""),
    (re.compile(r",\n    INDEX [^\n]*"), ""),
    (re.compile(r"\nSETTINGS [^\n]*"), ""),
    (re.compile(r"\bADD COLUMN IF NOT EXISTS\b"), "ADD COLUMN"),
)


def create_tables(engine: ServerEngine) -> None:
    """The product's tables, as far as the old server knows their parts."""
    statements = [statement for migration in load_migrations() for statement in migration.statements]
    for statement in statements:
        if statement.startswith(("CREATE VIEW", "CREATE OR REPLACE VIEW")) or " ADD INDEX " in statement:
            continue
        for pattern, substitute in _SUBSTITUTES:
            statement = pattern.sub(substitute, statement)
        engine.execute(statement)


def count(engine: ServerEngine, table: Table) -> int:
    """Rows of `table`, as a reader by key sees them."""
    [[rows]] = engine.query(f"SELECT count() FROM {table.name} FINAL").rows
    assert isinstance(rows, int)
    return rows


__all__ = ["count", "create_tables"]
