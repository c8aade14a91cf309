"""What is known against the versions that the locks name: `python -m tests.requirements.advisories`.

Promise: exits 1, naming package, version, advisory and mend, if an advisory has no exception or its exception is over; an
exception that meets nothing is named too. Where the package index has no advisories (a mirror without PyPI's JSON interface),
it says how much was not looked at, and finds nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
# What is installed where Taximeter runs; what only tests need is left out.
LOCKS: Final = ("producer", "worker", "sink", "gateway", "api", "notifier", "model")
_TIMEOUT_S: Final = 300


def main() -> int:
    exceptions = tomllib.loads((ROOT / "requirements" / "advisories.toml").read_text()).get("exception", [])
    files = [part for name in LOCKS for part in ("--requirement", str(ROOT / "requirements" / f"{name}.txt"))]
    argv = ["pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json", *files]
    ended = subprocess.run(
        [sys.executable, "-m", *argv], capture_output=True, text=True, timeout=_TIMEOUT_S, cwd=ROOT, check=False
    )
    if not ended.stdout.startswith("{"):
        print(f"pip-audit said nothing that can be read:\n{ended.stderr[-2000:]}", file=sys.stderr)
        return 1
    dependencies = json.loads(ended.stdout)["dependencies"]
    unknown = sorted({each["name"] for each in dependencies if "skip_reason" in each})
    if unknown:
        print(f"not looked at, since the index has no advisories of them: {len(unknown)} of {len(dependencies)} packages")
    found = list(problems(dependencies, exceptions, datetime.now(UTC).date(), is_whole=not unknown))
    print("\n".join(found) or "no advisory without an exception")
    return 1 if found else 0


def problems(
    dependencies: Iterable[Mapping[str, Any]], exceptions: Iterable[Mapping[str, Any]], today: date, *, is_whole: bool
) -> Iterator[str]:
    """A sentence for each advisory that is not excepted today, and, if all packages were looked at, for each idle exception."""
    allowed = {each["id"]: each for each in exceptions}
    met = set()
    for dependency in dependencies:
        for advisory in dependency.get("vulns", ()):
            names = [advisory["id"], *advisory.get("aliases", ())]
            exception = next((allowed[name] for name in names if name in allowed), None)
            what = f"{dependency['name']} {dependency['version']}: {advisory['id']}"
            mend = f"mended in {', '.join(advisory['fix_versions'])}" if advisory.get("fix_versions") else "no version mends it"
            if exception is None:
                yield f"{what}, {mend}: run make lock, or write an exception into requirements/advisories.toml"
                continue
            met.add(exception["id"])
            if exception["until"] < today:
                yield f"{what}, {mend}: its exception ended on {exception['until']} ({exception['why']})"
    if is_whole:
        for name in sorted(allowed.keys() - met):
            yield f"the exception {name} meets nothing any more: remove it from requirements/advisories.toml"


if __name__ == "__main__":
    sys.exit(main())
