"""Brings a database to this version's schema: numbered SQL files, each applied once and recorded.

Promise: a dry run says what would change and changes nothing. Every statement may run twice, so a crash half-way is mended by
running it again. A file that was edited after it was applied, or a database that a newer version made, stops with SchemaError.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sinks.engine import Engine, Kind, Reader, Table
from sinks.errors import SchemaError

__all__ = ["Migration", "load_migrations", "migrate", "pending"]

_FOLDER = Path(__file__).parent / "schema"
_FILE = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
# A statement ends with a semicolon at the end of a line, outside of texts and comments.
_STATEMENT_END = re.compile(r";[ \t]*(?:\n|$)")

_APPLIED = Table("schema_migrations", {"number": Kind.UINT32, "name": Kind.TEXT, "checksum": Kind.TEXT})
_APPLIED_DDL = """CREATE TABLE IF NOT EXISTS schema_migrations (number UInt32, name String, checksum String)
ENGINE = ReplacingMergeTree ORDER BY number"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of `schema/`."""

    number: int
    name: str
    statements: tuple[str, ...]
    checksum: str

    def __str__(self) -> str:
        return f"{self.number:04d}_{self.name}"


def load_migrations(folder: Path = _FOLDER) -> list[Migration]:
    """Every migration in order. Raises SchemaError unless the numbers are 1, 2, 3, ..."""
    migrations: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None or int(match[1]) != len(migrations) + 1:
            raise SchemaError(f"{path.name}: the next migration is named {len(migrations) + 1:04d}_what_it_does.sql")
        text = path.read_text()
        code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
        statements = tuple(part.strip() for part in _STATEMENT_END.split(code) if part.strip())
        checksum = hashlib.sha256("\n".join(statements).encode()).hexdigest()
        migrations.append(Migration(int(match[1]), match[2], statements, checksum))
    return migrations


def pending(reader: Reader, migrations: Sequence[Migration] | None = None) -> list[Migration]:
    """What `migrate` would apply. Raises SchemaError when the database is not one that this version can work on."""
    known = list(migrations) if migrations is not None else load_migrations()
    exists = reader.query("SELECT name FROM system.tables WHERE database = currentDatabase() AND name = 'schema_migrations'")
    if not exists.rows:
        return known
    applied = {
        int(str(number)): (str(name), str(checksum))
        for number, name, checksum in reader.query(
            "SELECT number, name, checksum FROM schema_migrations FINAL ORDER BY number"
        ).rows
    }
    by_number = {migration.number: migration for migration in known}
    for number, (name, checksum) in applied.items():
        migration = by_number.get(number)
        if migration is None:
            raise SchemaError(f"the database has migration {number:04d}_{name}, which this version does not know: upgrade it")
        if migration.checksum != checksum:
            raise SchemaError(f"schema/{migration}.sql was edited after it was applied; undo the edit and add a new migration")
    return [migration for migration in known if migration.number not in applied]


def migrate(engine: Engine, *, dry_run: bool = False) -> list[Migration]:
    """Apply what is pending, in order; returns it. With `dry_run` nothing changes."""
    migrations = pending(engine)
    if dry_run:
        return migrations
    engine.execute(_APPLIED_DDL)
    for migration in migrations:
        for statement in migration.statements:
            engine.execute(statement)
        engine.insert(_APPLIED, {"number": [migration.number], "name": [migration.name], "checksum": [migration.checksum]})
    return migrations
