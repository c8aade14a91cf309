"""`python -m tests.fuzz`: coverage-guided fuzzing of every target, one after the other, sharing the time.

--seconds 300              all targets
--target NAME              one of them, with all the time
--again NAME FILE          a finding once more, without the fuzzer

Ends with 1 if a target crashed, hung (10 s) or took too much memory (2 GiB); the input that did it is kept and named.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

INPUT_SECONDS_MAX = 10
MEMORY_MIB_MAX = 2_048
INPUT_BYTES_MAX = 200_000
INSTRUMENTED = ["billing", "producers", "serving", "sinks", "stream_processors", "taximeter", "json", "tomllib"]
ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--target")
    parser.add_argument("--findings", type=Path, default=Path(".fuzz"), help="where inputs that fail are kept")
    parser.add_argument("--again", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _fuzz(arguments.child, arguments.seconds, arguments.findings)
    # Only here: in the child they are imported under instrumentation.
    from tests.fuzz.target import attempt
    from tests.fuzz.targets import TARGETS

    if arguments.again:
        name, path = arguments.again
        attempt(TARGETS[name], Path(path).read_bytes())
        print(f"{name}: {path} is taken, or refused as documented")
        return 0
    names = [arguments.target] if arguments.target else list(TARGETS)
    seconds = max(1, arguments.seconds // len(names))
    arguments.findings.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not _run(name, seconds, arguments.findings)]
    print(
        f"{len(names)} targets, {seconds} s each, {len(failed)} with a finding" + (f": {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed))


def _run(name: str, seconds: int, findings: Path) -> bool:
    """One target in a process of its own: a crash of native code is a finding, not the end."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--child", name, "--seconds", str(seconds), "--findings", str(findings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds + 120,
        check=False,
    )
    told = child.stdout + child.stderr
    executed = re.findall(r"stat::number_of_executed_units:\s*(\d+)", told)
    covered = re.findall(r" cov: (\d+)", told)
    print(f"{executed[-1] if executed else '?':>9} executions  {covered[-1] if covered else '?':>5} edges  {name}", flush=True)
    if child.returncode == 0:
        return True
    kept = re.findall(r"Test unit written to (\S+)", told)
    print(told[-4_000:])
    if kept:
        print(f"again: python -m tests.fuzz --again {name} {kept[-1]}")
    return False


def _fuzz(name: str, seconds: int, findings: Path) -> int:
    import atheris  # a development tool of Linux on x86-64: nothing else here needs it

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.target import attempt
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix=f"corpus-{name}-") as corpus:
        for number, seed in enumerate(target.seeds()):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        options = {
            "max_total_time": seconds,
            "timeout": INPUT_SECONDS_MAX,
            "rss_limit_mb": MEMORY_MIB_MAX,
            "max_len": INPUT_BYTES_MAX,
            "print_final_stats": 1,
            "artifact_prefix": f"{findings}/{name}-",
        }
        atheris.Setup(
            [name, corpus, *(f"-{option}={value}" for option, value in options.items())], lambda data: attempt(target, data)
        )
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
