"""Alerts: what there is, what comes, and taking one on."""

import time
from typing import Annotated, Final

import typer

from billing.limits import ALERT_NOTE_CHARS_MAX
from billing.v1.alert_pb2 import AlertRule, AlertState, Severity
from sinks import queries
from sinks.engine import Reader
from sinks.queries import AlertRow
from taximeter.commanding import Commander
from taximeter.commands.accounts import issuer, tell
from taximeter.commands.common import Context, JsonOption, command
from taximeter.commands.reading import OptionalTenant
from taximeter.compose import open_reader
from taximeter.errors import MisuseError
from taximeter.reports import alert_values, print_alerts
from taximeter.times import now_ms, parse_time_ms, show_time

__all__ = ["acknowledge", "alerts"]

_FOLLOW_INTERVAL_S: Final = 0.5


def _names(names: list[str], prefix: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(prefix).lower() for name in names[1:])


_CHOICES: Final = {
    "severity": _names(Severity.keys(), "SEVERITY_"),
    "rule": _names(AlertRule.keys(), "ALERT_RULE_"),
    "state": _names(AlertState.keys(), "ALERT_STATE_"),
}


@command
def alerts(
    context: Context,
    tenant: OptionalTenant = None,
    since: Annotated[str, typer.Option(help="From then, or for so long: 1h, 7d.")] = "7d",
    severity: Annotated[str, typer.Option(help=f"Only these: {', '.join(_CHOICES['severity'])}.")] = "",
    rule: Annotated[str, typer.Option(help="Only of this rule, such as token_burst.")] = "",
    state: Annotated[str, typer.Option(help=f"Only those that are {', '.join(_CHOICES['state'])}.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, and print what is told as it comes.")] = False,
    json: JsonOption = False,
) -> None:
    """Show alerts of which something was told, each as it is now, oldest first."""
    since_ms = parse_time_ms("--since", since, now=now_ms())
    filters = {"severity": severity, "rule": rule, "state": state}
    for name, value in filters.items():
        if value and value not in _CHOICES[name]:
            raise MisuseError(f"--{name} {value[:40]!r} is not known: write one of {', '.join(_CHOICES[name])}")
    with open_reader(context.config()) as reader:
        rows = queries.all_alerts(reader, tenant, since_ms, filters)
        if follow:
            _follow(context, reader, tenant, since_ms, filters, rows, json=json)
        elif json:
            context.output.json([alert_values(row) for row in rows])
        else:
            print_alerts(context.output, rows)


def _follow(
    context: Context,
    reader: Reader,
    tenant: str | None,
    since_ms: int,
    filters: dict[str, str],
    rows: list[AlertRow],
    *,
    json: bool,
) -> None:
    after: dict[int, int] = {}
    while True:
        for row in rows:
            if json:
                context.output.json_line(alert_values(row))
            else:
                what = f"{row.state} {row.severity} {row.rule} {row.tenant_id}: {row.summary}"
                context.output.say(f"{show_time(row.updated_ms)} {what}")
            after[row.partition] = max(after.get(row.partition, 0), row.version)
        time.sleep(_FOLLOW_INTERVAL_S)
        rows = queries.alerts(reader, tenant, since_ms, after, filters=filters)


@command
def acknowledge(
    context: Context,
    alert: Annotated[str, typer.Argument(help="The alert's ID, as `taximeter alerts` shows it.")],
    note: Annotated[str, typer.Option(help="For the others who read it.")] = "",
    json: JsonOption = False,
) -> None:
    """Take an alert on: it is not told again until it becomes more severe or is resolved."""
    if len(note) > ALERT_NOTE_CHARS_MAX:
        raise MisuseError(f"--note: {len(note)} characters: write at most {ALERT_NOTE_CHARS_MAX}")
    config = context.config()
    commander = Commander(config, issuer())
    with open_reader(config) as reader:
        commander.give([commander.acknowledgement(alert, note)], reader)
    tell(context, {"alert_id": alert, "acknowledged_by": issuer(), "note": note}, json=json)
