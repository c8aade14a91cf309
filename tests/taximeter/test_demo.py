"""`taximeter demo`, as a newcomer runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from taximeter.demonstration.script import PROMPTS
from tests.taximeter.support import ROOT, environment


@pytest.mark.model
@pytest.mark.timeout(900)
def test_the_demonstration_matches_to_the_token() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "taximeter", "demo"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" yes") == len(PROMPTS)
    assert "prompt_over_limit" in ended.stdout
    assert "Statement of Aurora Books" in ended.stdout
    assert "Everything matched" in ended.stdout
