"""`make bench`: runs the benchmarks, prints a table and writes build/bench.json.

    python -m benchmarks [NAME …]     only those; --list names them

Each benchmark is a module here with `run() -> list[Measurement]`, run in a process of its own, so that none inherits another's
heap. One that takes over 15 minutes is ended, with all that it started, and after an hour none is begun any more. Exit code 1
if one fails, is left out, or misses its target.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measurement

NAMES = (
    "ledger",
    "seen_store",
    "snapshot",
    "meter",
    "sink",
    "freshness",
    "alerts",
    "budgets",
    "gateway",
    "prompt_stall",
    "admission",
    "rerating",
    "month_to_date",
    "dashboard",
)
OUTPUT = Path("build/bench.json")
TIMEOUT_S = 900
ALL_TIMEOUT_S = 3_600


def measure(name: str, timeout_s: float) -> list[Measurement]:
    """Run one benchmark in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "--one", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except BaseException:
            # Its brokers and workers too: they are of its session, and hold on to the pipe.
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    rows = json.loads(output.splitlines()[-1])
    return [Measurement(**{key: value for key, value in row.items() if key != "met"}) for row in rows]


def show(console: Console, rows: list[Measurement]) -> None:
    """The table."""
    table = Table(title=f"Measured on {os.cpu_count()} cores")
    for column, justify in (("name", "left"), ("value", "right"), ("unit", "left"), ("ratio", "right"), ("baseline", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    table.add_column("target", justify="right")
    marks = {True: "met", False: "[bold red]missed[/]", None: ""}
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = f"{row.target} {marks[row.met]}".strip()
        table.add_row(
            row.name, f"{row.value:,.3g}" if row.value < 100 else f"{row.value:,.0f}", row.unit, ratio, row.baseline, target
        )
    console.print(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(NAMES))
        return 0
    if arguments.one:
        found: list[Measurement] = importlib.import_module(f"benchmarks.{arguments.one}").run()
        print(json.dumps([row.to_json() for row in found]))
        return 0
    # Told to end, it ends what it started first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console()
    rows: list[Measurement] = []
    failed: list[str] = []
    ends = time.monotonic() + ALL_TIMEOUT_S
    for name in arguments.names or NAMES:
        console.print(f"[dim]{name} …[/]")
        left_s = ends - time.monotonic()
        if left_s <= 0:
            failed.append(f"{name}: left out, {ALL_TIMEOUT_S / 60:g} minutes are over")
            continue
        try:
            rows += measure(name, min(TIMEOUT_S, left_s))
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            failed.append(f"{name}: {error}")
    show(console, rows)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")
    console.print(f"written to {OUTPUT}")
    for line in failed:
        console.print(f"[bold red]failed[/] {line}")
    return int(bool(failed) or any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
