"""The page of tables and views, from the migrations: what stands there is what a database gets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from sinks.migrate import load_migrations
from taximeter.reference.markdown import cell, code, table

__all__ = ["schema_page"]

_TABLE = re.compile(
    r"CREATE TABLE IF NOT EXISTS (\w+)\s*\((.*?)\n\)\nENGINE = (\w+)(?:\(\w+\))?.*?\nORDER BY (\([^)]*\)|\w+)", re.DOTALL
)
_VIEW = re.compile(r"CREATE (?:OR REPLACE )?VIEW (?:IF NOT EXISTS )?(\w+) AS\s*(.*)", re.DOTALL)
_ADDED = re.compile(r"ALTER TABLE (\w+)\s+(.*)", re.DOTALL)
_ADDED_COLUMN = re.compile(r"ADD COLUMN (?:IF NOT EXISTS )?(.+?)(?=,\s*ADD |,\s*MODIFY |\Z)", re.DOTALL)
_COLUMN = re.compile(r"\s*(\w+) ((?:[^\s(]|\([^()]*(?:\([^()]*\)[^()]*)*\))+)")
_COMMENT = re.compile(r"COMMENT '((?:[^']|'')*)'")

_INTRODUCTION = """\
What the sink keeps in ClickHouse, and what to ask. Amounts are `Decimal(38, 12)`, exact; times are UTC. Read the views;
where a table is read, `FINAL` gives one row a key. Nobody but the sink writes here."""


@dataclass(slots=True)
class _Table:
    key: str
    says: str
    columns: list[tuple[str, str, str]] = field(default_factory=list)


def schema_page(folder: Path) -> str:
    """Every table with its columns, every view with its question."""
    tables: dict[str, _Table] = {}
    views: dict[str, tuple[str, str]] = {}
    for migration in load_migrations(folder):
        for statement in migration.statements:
            _read(statement, tables, views)
    sections = ["# SQL", _INTRODUCTION, "## Views"]
    for name, (says, question) in views.items():
        sections += [f"### {name}", cell(says), f"```sql\n{question}\n```"]
    sections.append("## Tables")
    for name, each in tables.items():
        rows = [(code(column), code(kind), cell(said)) for column, kind, said in each.columns]
        sections += [
            f"### {name}",
            cell(each.says),
            f"One row for each {code(each.key)}.",
            table(("column", "type", "says"), rows),
        ]
    return "\n\n".join(sections)


def _read(statement: str, tables: dict[str, _Table], views: dict[str, tuple[str, str]]) -> None:
    if found := _TABLE.match(statement):
        name, body, _, key = found.groups()
        table_comment = _COMMENT.findall(statement[found.end() :])
        tables[name] = _Table(key.strip("()"), _plain(table_comment[-1]) if table_comment else "")
        tables[name].columns += [column for line in body.splitlines() if (column := _column(line)) is not None]
    elif found := _VIEW.match(statement):
        name, rest = found.groups()
        comment = list(_COMMENT.finditer(rest))
        end = comment[-1].start() if comment else len(rest)
        views[name] = (_plain(comment[-1][1]) if comment else "", rest[:end].strip())
    elif found := _ADDED.match(statement):
        for added in _ADDED_COLUMN.findall(found[2]):
            column = _column(added)
            if column is not None:
                tables[found[1]].columns.append(column)


def _column(line: str) -> tuple[str, str, str] | None:
    found = _COLUMN.match(line)
    if found is None or found[1] in {"INDEX", "PROJECTION", "CONSTRAINT"}:
        return None
    comment = _COMMENT.search(line)
    return found[1], found[2].rstrip(","), _plain(comment[1]) if comment else ""


def _plain(text: str) -> str:
    return text.replace("''", "'")
