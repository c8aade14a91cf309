"""What an operator does once in a while: topics, schema, and, inside `up`, both and the founding of the ledger."""

import asyncio
from typing import Annotated

import typer

from sinks.migrate import migrate as migrate_schema
from sinks.migrate import pending
from taximeter import compose
from taximeter.commands.common import Context, JsonOption, command
from taximeter.commands.parts import LogLevelOption
from taximeter.logs import start_logging

__all__ = ["apply_topics", "migrate", "prepare"]

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]


@command
def apply_topics(context: Context, dry_run: DryRunOption = False, json: JsonOption = False) -> None:
    """Make the topics right, and found the ledger where there is none."""
    from stream_processors import topics

    settings = compose.apply_settings(context.config(), embedded=False)
    changes = asyncio.run(topics.plan(settings) if dry_run else topics.apply(settings))
    if json:
        values = [{"kind": change.kind, "name": change.name, "detail": change.detail} for change in changes]
        context.output.json({"dry_run": dry_run, "changes": values})
        return
    context.output.table(
        "Would change" if dry_run else "Changed",
        ("what", "name", "how"),
        [(change.kind, change.name, change.detail) for change in changes],
        empty="Everything is as it should be.",
    )


@command
def migrate(context: Context, dry_run: DryRunOption = False, json: JsonOption = False) -> None:
    """Bring the database to this version's schema."""
    config = context.config()
    if dry_run:
        # A look needs no ownership of the database, so it may be had while a sink runs.
        with compose.open_reader(config) as reader:
            applied = [str(migration) for migration in pending(reader)]
    else:
        with compose.open_engine(config) as engine:
            applied = [str(migration) for migration in migrate_schema(engine)]
    if json:
        context.output.json({"dry_run": dry_run, "migrations": applied})
        return
    title = "Would apply" if dry_run else "Applied"
    empty = "The schema is this version's."
    context.output.table(title, ("migration",), [(migration,) for migration in applied], empty=empty)


@command
def prepare(context: Context, log_level: LogLevelOption = "info") -> None:
    """Of `up`: schema, topics, and a ledger that is new, or carries on the local state."""
    from taximeter.embedded.founding import prepare as prepare_embedded

    start_logging("prepare", log_level)
    asyncio.run(prepare_embedded(context.config()))
