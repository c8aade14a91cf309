"""`replay`, `import` and `sync`: usage from files and journals into the ledger."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from billing.v1.usage_pb2 import UsageEvent
from sinks.earlier_charges import charged_before
from sinks.engine import Reader
from taximeter.commands.common import Context, JsonOption, command
from taximeter.compose import meter_settings, open_reader, publisher_settings
from taximeter.config import Config
from taximeter.errors import EXIT_WRONG, MisuseError, TaximeterError
from taximeter.feeding import Fed, Feed
from taximeter.times import now_ms, parse_time_ms, show_time, yesterday_ms
from taximeter.traces import read_trace
from taximeter.usage_lines import read_lines

__all__ = ["import_", "replay", "sync"]

_PROBLEMS_SHOWN: Final = 20
_DAY_MS: Final = 86_400_000
# Lines whose backfills are looked for in one go.
_LINES_TOGETHER: Final = 2_000
StalledOption = Annotated[float, typer.Option(min=1, help="Give up when the ledger takes nothing for so many seconds.")]


@command
def replay(
    context: Context,
    file: Annotated[Path, typer.Argument(help="A CSV file with TIMESTAMP,ContextTokens,GeneratedTokens.")],
    tenants: Annotated[int, typer.Option(min=1, max=100_000, help="Spread the requests over so many tenants.")] = 50,
    start: Annotated[str | None, typer.Option(help="When the first request happens (default: 00:00 UTC of yesterday).")] = None,
    speed: Annotated[float, typer.Option(min=0, help="1: as in the trace; 10: ten times; 0: as fast as possible.")] = 0,
    model: Annotated[str, typer.Option(help="The model's name (default: trace; through the gateway: trace-unary).")] = "",
    through: Annotated[
        Literal["journal", "gateway"],
        typer.Option(help="As usage events, or as requests to the gateway's model of that name."),
    ] = "journal",
    concurrency: Annotated[int, typer.Option(min=1, max=512, help="Requests at the same time, through the gateway.")] = 16,
    stalled_s: StalledOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Replay a trace. The same file, tenants and start are the same events: a second run is all duplicates."""
    model = model or ("trace-unary" if through == "gateway" else "trace")
    trace = read_trace(file)
    now = now_ms()
    start_ms = yesterday_ms(now) if start is None else parse_time_ms("--start", start, now=now)
    config = context.config()
    folder = context.data_dir.path / "replays" / f"{trace.digest}-{start_ms}-{tenants}-{_slug(model)}"
    result: dict[str, object] = {
        "requests": len(trace.rows),
        "context_tokens": trace.context_tokens,
        "generated_tokens": trace.generated_tokens,
        "tenants": tenants,
        "start": show_time(start_ms),
    }
    if through == "gateway":
        from taximeter.gateway_replay import replay_through_gateway

        result |= replay_through_gateway(
            config, context.output, trace, folder, tenants=tenants, start_ms=start_ms, model=model, concurrency=concurrency
        )
    else:
        fed = _feed(
            context,
            config,
            folder,
            lambda skip: trace.events(tenants=tenants, start_ms=start_ms, model=model, skip=skip),
            total=len(trace.rows),
            stalled_s=stalled_s,
            due_s=None if speed == 0 else lambda event: (event.ended_ms - start_ms) / 1_000 / speed,
        )
        result |= fed_values(fed)
    _tell(context, result, json=json)


@command
def import_(
    context: Context,
    file: Annotated[Path, typer.Argument(help="JSON lines of usage, each with its request_id.")],
    rejects: Annotated[
        Path | None,
        typer.Option(help="Import the good lines, and put the bad ones here as they are, with their reasons beside."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Import nothing if one line is bad (without --rejects: so).")
    ] = False,
    stalled_s: StalledOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Import usage. The same line again is a duplicate; a bad line is named, and never lost. A line with "backfill": true may
    be older than the ledger remembers: what the database has as charged is left out."""
    if strict and rejects is not None:
        raise MisuseError("--strict and --rejects exclude each other: import all or nothing, or put the bad lines aside")
    good, backfills, problems = 0, 0, []
    digest = hashlib.sha256()
    for line in read_lines(file):
        digest.update(line.raw)
        if line.event is None:
            problems.append((line.raw, line.problem))
        else:
            good += 1
            backfills += line.event.backfill
    if problems and rejects is None:
        shown = [problem for _, problem in problems[:_PROBLEMS_SHOWN]]
        more = f"\nand {len(problems) - len(shown):,} more" if len(problems) > len(shown) else ""
        raise TaximeterError(
            f"{file}: {len(problems):,} of {good + len(problems):,} lines are bad, and nothing was imported: mend them, "
            f"or set them aside with --rejects FILE\n" + "\n".join(shown) + more
        )
    if problems and rejects is not None:
        _set_aside(rejects, problems)
    config = context.config()
    folder = context.data_dir.path / "imports" / digest.hexdigest()[:16]
    with open_reader(config) if backfills else nullcontext() as reader:
        fed = _feed(
            context,
            config,
            folder,
            lambda skip: _good_events(file, skip, reader),
            total=good,
            stalled_s=stalled_s,
            due_s=None,
        )
    values = {"events": good, "rejected": len(problems), "charged_before": fed.left_out, **fed_values(fed)}
    _tell(context, values, json=json)
    if problems:
        context.output.note(f"{len(problems):,} bad lines are in {rejects}, with their reasons in {rejects}.reasons")
        raise typer.Exit(EXIT_WRONG)


@command
def sync(
    context: Context,
    journal: Annotated[Path, typer.Argument(help="The journal of a producer that is not running, or a copy of it.")],
    too_old: Annotated[
        bool, typer.Option("--too-old", help="Also where the ledger will refuse the oldest as older than its horizon.")
    ] = False,
    stalled_s: StalledOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Send what a producer without a network has journaled. The same journal again sends only what the ledger has not."""
    if not journal.is_file():
        raise MisuseError(f"JOURNAL {journal} is no file: name the journal of a producer")
    config = context.config()
    feed = Feed(journal.parent, meter_settings(config, journal), publisher_settings(config))
    try:
        horizon_days = config.ledger.dedupe_horizon_days
        age_days = feed.oldest_ms() // _DAY_MS
        if age_days >= horizon_days and not too_old:
            raise TaximeterError(
                f"{journal} holds events of {age_days} days ago, and the ledger refuses what is older than {horizon_days} days "
                "(ledger.dedupe_horizon_days): pass --too-old to send them all and have those recorded as refused"
            )
        recovered, events = feed.sync(stalled_s)
    finally:
        feed.close()
    _tell(context, {"events": events, "left_open_by_a_kill": recovered}, json=json)


def _feed(
    context: Context,
    config: Config,
    folder: Path,
    events: Callable[[int], Iterable[UsageEvent | None]],
    *,
    total: int,
    stalled_s: float,
    due_s: Callable[[UsageEvent], float] | None,
) -> Fed:
    feed = Feed(folder, meter_settings(config, folder / "journal.sqlite"), publisher_settings(config))
    try:
        skipped = feed.place()
        if skipped:
            context.output.note(f"going on behind the first {skipped:,} events, which are in the journal already")
        with context.output.progress("recorded in the journal", total) as advance:
            advance(skipped)
            return feed.run(events, due_s=due_s, stalled_s=stalled_s, on_recorded=advance)
    finally:
        feed.close()


def _good_events(file: Path, skip: int, reader: Reader | None) -> Iterable[UsageEvent | None]:
    """The events of the file; None in the place of a backfill that `reader` has as charged."""
    events = islice((line.event for line in read_lines(file) if line.event is not None), skip, None)
    return events if reader is None else _without_charged(events, reader)


def _without_charged(events: Iterator[UsageEvent], reader: Reader) -> Iterator[UsageEvent | None]:
    while some := list(islice(events, _LINES_TOGETHER)):
        known = charged_before(reader, [(event.tenant_id, event.request_id) for event in some if event.backfill])
        yield from (None if event.backfill and (event.tenant_id, event.request_id) in known else event for event in some)


def _set_aside(rejects: Path, problems: list[tuple[bytes, str]]) -> None:
    """Before anything is imported, on disk: the lines as they were, and why each was refused."""
    if rejects.exists():
        raise MisuseError(f"--rejects {rejects} is there already: name a new file, so that nothing is overwritten")
    reasons = rejects.with_name(f"{rejects.name}.reasons")
    for path, lines in (
        (rejects, [raw if raw.endswith(b"\n") else raw + b"\n" for raw, _ in problems]),
        (reasons, [f"{problem}\n".encode() for _, problem in problems]),
    ):
        with path.open("wb") as output:
            output.writelines(lines)
            output.flush()
            os.fsync(output.fileno())


def fed_values(fed: Fed) -> dict[str, object]:
    """A run for programs."""
    rate = fed.recorded / fed.covered_s if fed.covered_s > 0 else 0.0
    return {
        "recorded": fed.recorded,
        "already_in_journal": fed.skipped,
        "recorded_s": round(fed.recorded_s, 3),
        "in_ledger_s": round(fed.covered_s, 3),
        "events_per_s": round(rate),
    }


def _tell(context: Context, result: dict[str, object], *, json: bool) -> None:
    if json:
        context.output.json(result)
    else:
        context.output.pairs("In the ledger", {name.replace("_", " "): value for name, value in result.items()})


def _slug(name: str) -> str:
    kept = "".join(character if character.isalnum() or character in "-_." else "_" for character in name)
    return f"{kept[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
