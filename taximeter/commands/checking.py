"""`audit` and `doctor`: whether the books are right, and whether the parts are well."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sinks.anchors import append_heads, read_anchors
from sinks.audit import AuditReport
from sinks.audit import audit as audit_database
from sinks.completeness import completeness, neighbours
from taximeter.commands.common import Context, JsonOption, command
from taximeter.completeness_report import completeness_values, print_completeness
from taximeter.compose import ledger_keys, open_reader
from taximeter.errors import EXIT_WRONG, MisuseError
from taximeter.health import State, examine
from taximeter.times import now_ms

__all__ = ["anchor", "audit", "doctor"]


@command
def audit(
    context: Context,
    findings_max: Annotated[int, typer.Option(min=1, help="Stop after so many differences.")] = 1_000,
    of_completeness: Annotated[
        bool,
        typer.Option("--completeness", help="Instead: which numbers of each producer are missing, and what came around them."),
    ] = False,
    anchors: Annotated[
        Path | None, typer.Option(help="Chain heads that the archive must have (default: ledger.anchor_file).")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compute everything again from the archived ledger, and name every difference. Exit code 1 if there is one."""
    if of_completeness:
        _audit_completeness(context, json)
        return
    config = context.config()
    with open_reader(config) as reader, context.output.progress("ledger records proved", None) as advance:
        seen = 0

        def on_progress(report: AuditReport) -> None:
            nonlocal seen
            advance(report.records - seen)
            seen = report.records

        seal_key = ledger_keys(config).seal_key
        anchor_file = anchors or config.ledger.anchor_file
        anchored = [] if anchor_file is None else read_anchors(anchor_file, seal_key)
        report = audit_database(reader, seal_key, anchors=anchored, findings_max=findings_max, on_progress=on_progress)
    counts: dict[str, object] = {
        "partitions": report.partitions,
        "ledger records": report.records,
        "redacted records": report.redacted,
        "events": report.events,
        "windows": report.windows,
        "accounts": report.accounts,
        "invoices": report.invoices,
        "anchors": report.anchors,
        "differences": len(report.findings),
    }
    if json:
        findings = [
            {
                "kind": finding.kind,
                "partition": finding.partition,
                "subject": finding.subject,
                "expected": finding.expected,
                "found": finding.found,
            }
            for finding in report.findings
        ]
        context.output.json({**{name.replace(" ", "_"): count for name, count in counts.items()}, "findings": findings})
    else:
        for finding in report.findings:
            context.output.say(str(finding))
        context.output.pairs("Audit: everything agrees" if report.clean else "Audit: there are differences", counts)
    if not report.clean:
        raise typer.Exit(EXIT_WRONG)


def _audit_completeness(context: Context, as_json: bool) -> None:
    with open_reader(context.config()) as reader:
        report = completeness(reader)
        missing = [(state, neighbours(reader, state)) for state in report.incomplete]
    if as_json:
        context.output.json(completeness_values(report, missing))
    else:
        print_completeness(context.output, report, missing)
    if not report.complete:
        raise typer.Exit(EXIT_WRONG)


@command
def anchor(
    context: Context,
    output: Annotated[Path | None, typer.Option(help="The file to append to (default: ledger.anchor_file).")] = None,
    json: JsonOption = False,
) -> None:
    """Append the heads of the ledger's chains to a file away from Kafka and ClickHouse, for audits to come."""
    config = context.config()
    path = output or config.ledger.anchor_file
    if path is None:
        raise MisuseError("name where anchors are kept: --output FILE, or set ledger.anchor_file")
    with open_reader(config) as reader:
        made = append_heads(path, reader, ledger_keys(config).seal_key, now_ms())
    if json:
        context.output.json([asdict(each) for each in made])
    else:
        rows = [[str(each.partition), each.generation[:12], str(each.sequence), each.record_hash] for each in made]
        context.output.table(f"Anchored in {path}", ["partition", "generation", "sequence", "record hash"], rows)


@command
def doctor(context: Context, json: JsonOption = False) -> None:
    """Look at each part, and say what to do where something is wrong. Exit code 1 if something is."""
    checks = []
    for check in examine(context.config()):
        checks.append(check)
        if not json:
            mend = f"\n      do: {check.mend}" if check.mend else ""
            context.output.say(f"{check.state.value:>7}  {check.name}: {check.detail}{mend}")
    if json:
        context.output.json(
            [{"check": check.name, "state": check.state.value, "detail": check.detail, "mend": check.mend} for check in checks]
        )
    if any(check.state is State.ILL for check in checks):
        raise typer.Exit(EXIT_WRONG)
