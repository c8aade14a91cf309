"""Dead letters, alerts that an endpoint did not take in time: where the notifier's journal is, and while it runs."""

from collections.abc import Callable
from typing import Annotated

import typer

from serving.notifier.journal import DeadLetter, Journal
from taximeter.commands.common import Context, JsonOption, command
from taximeter.errors import MisuseError, NotReadyError
from taximeter.times import show_time

__all__ = ["drop", "list_", "retry"]

_EndpointOption = Annotated[str, typer.Option(help="Only of this endpoint.")]
_IdsArgument = Annotated[list[str] | None, typer.Argument(help="Webhook IDs, as `taximeter webhooks dead list` shows them.")]
_AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]
_IDS_MAX = 1_000


@command
def list_(context: Context, endpoint: _EndpointOption = "", json: JsonOption = False) -> None:
    """Show the alerts that an endpoint did not take, oldest first, and why."""
    _tell(context, _with_journal(context, lambda journal: journal.dead(endpoint)), json=json)


@command
def retry(
    context: Context,
    ids: _IdsArgument = None,
    endpoint: _EndpointOption = "",
    all_: _AllOption = False,
    json: JsonOption = False,
) -> None:
    """Deliver them after all, each under its webhook ID; an endpoint that answered 410 Gone is asked again."""
    chosen = _chosen(ids, endpoint, all_=all_)
    _tell(context, _with_journal(context, lambda journal: journal.retry(endpoint, chosen)), json=json)


@command
def drop(
    context: Context,
    ids: _IdsArgument = None,
    endpoint: _EndpointOption = "",
    all_: _AllOption = False,
    json: JsonOption = False,
) -> None:
    """Forget them."""
    chosen = _chosen(ids, endpoint, all_=all_)
    _tell(context, _with_journal(context, lambda journal: journal.drop(endpoint, chosen)), json=json)


def _chosen(ids: list[str] | None, endpoint: str, *, all_: bool) -> list[str]:
    if not (ids or endpoint or all_):
        raise MisuseError("WEBHOOK: none is named: name some, or --endpoint, or --all")
    if len(ids or ()) > _IDS_MAX:
        raise MisuseError(f"WEBHOOK: {len(ids or ())} are named: name at most {_IDS_MAX}, or --endpoint, or --all")
    return ids or []


def _with_journal(context: Context, work: Callable[[Journal], list[DeadLetter]]) -> list[DeadLetter]:
    notifier = context.config().notifier
    if not notifier.journal_path.exists():
        raise NotReadyError(
            f"there is no journal at notifier.journal_path {notifier.journal_path}: run this where the notifier runs, "
            "once it has run"
        )
    journal = Journal(notifier.journal_path, dead_max=notifier.dead_max)
    try:
        return work(journal)
    finally:
        journal.close()


def _tell(context: Context, letters: list[DeadLetter], *, json: bool) -> None:
    if json:
        times = ("taken_ms", "dead_ms")
        rows = [
            {name.removesuffix("_ms"): show_time(value) if name in times else value for name, value in each._asdict().items()}
            for each in letters
        ]
        context.output.json(rows)
        return
    columns = ("endpoint", "webhook", "taken", "dead since", "attempts ", "why")
    cells = [
        (each.endpoint, each.webhook_id, show_time(each.taken_ms), show_time(each.dead_ms), each.attempts, each.reason)
        for each in letters
    ]
    context.output.table("", columns, cells, empty="there are none")
