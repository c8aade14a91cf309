"""What an operator does once in a while: topics, schema, and, inside `up`, both and the founding of the ledger."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taximeter import compose
from taximeter.commands.common import Context, JsonOption, all_is_imported, command
from taximeter.commands.parts import LogLevelOption
from taximeter.errors import EXIT_WRONG, MisuseError
from taximeter.logs import start_logging

if TYPE_CHECKING:
    from stream_processors import topics

__all__ = ["DryRunOption", "apply_topics", "diff_ledger", "migrate", "prepare", "print_changes"]

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would change, and change nothing.")]


@command
def apply_topics(
    context: Context,
    dry_run: DryRunOption = False,
    found_again_on: Annotated[
        Path | None,
        typer.Option(
            "--found-again-on",
            exists=True,
            file_okay=False,
            help="Where the ledger is gone for good: found it again on the workers' local stores (partition-N) in this folder.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make the topics right, and found the ledger where there is none."""
    from stream_processors import topics

    config = context.config()
    if found_again_on is not None:
        lacking = [
            str(number) for number in range(config.ledger.partitions) if not (found_again_on / f"partition-{number}").is_dir()
        ]
        if lacking:
            raise MisuseError(
                f"--found-again-on {found_again_on}: partitions {', '.join(lacking)} have no store there and would begin with "
                "nothing: gather a partition-N of each, from a worker's ledger.state_dir or a snapshot"
            )
    settings = compose.apply_settings(config, embedded=False, found_again_on=found_again_on)
    changes = asyncio.run(topics.plan(settings) if dry_run else topics.apply(settings))
    print_changes(context, changes, dry_run=dry_run, as_json=json)


def print_changes(context: Context, changes: Sequence["topics.Change"], *, dry_run: bool, as_json: bool) -> None:
    """What would be done, or was, to topics and what is in them."""
    if as_json:
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
    from sinks.migrate import migrate as migrate_schema
    from sinks.migrate import pending

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
def diff_ledger(
    context: Context,
    partition: Annotated[int | None, typer.Option("--partition", min=0, help="One partition; without: all.")] = None,
    records_max: Annotated[int, typer.Option("--records-max", min=1, help="Stop after so many records that differ.")] = 100,
    json: JsonOption = False,
) -> None:
    """Take every input of the ledger again with this version, and name each difference. Changes nothing; exit code 1 if there
    is one."""
    from stream_processors.kafka_ports import KafkaLogReader
    from stream_processors.ledger_diff import LedgerDiff, compare

    config = context.config()
    names, keys = compose.topic_names(config), compose.ledger_keys(config)
    found = LedgerDiff()

    async def run() -> None:
        reader = KafkaLogReader(compose.kafka_settings(config))
        for number in range(config.ledger.partitions) if partition is None else [partition]:
            await compare(reader, names, number, keys, found, differing_records_max=records_max, on_record=lambda: advance(1))

    with context.output.progress("ledger records taken again", None) as advance:
        asyncio.run(run())
    counts: dict[str, object] = {
        "records": found.records,
        "not repeatable": found.skipped,
        "records that differ": found.differing_records,
    }
    if json:
        differences = [
            {
                "partition": each.partition,
                "sequence": each.sequence,
                "field": each.field,
                "stored": each.stored,
                "made": each.made,
            }
            for each in found.differences
        ]
        context.output.json({**{name.replace(" ", "_"): count for name, count in counts.items()}, "differences": differences})
    else:
        for difference in found.differences:
            context.output.say(str(difference))
        title = "This version would have written other records" if found.differences else "This version writes the same records"
        context.output.pairs(title, counts)
    if found.differences:
        raise typer.Exit(EXIT_WRONG)


@partial(command, imports_more=True)
def prepare(context: Context, log_level: LogLevelOption = "info") -> None:
    """Of `up`: schema, topics, and a ledger that is new, or carries on the local state."""
    from taximeter.embedded.founding import prepare as prepare_embedded

    all_is_imported()
    start_logging("prepare", log_level)
    asyncio.run(prepare_embedded(context.config()))
