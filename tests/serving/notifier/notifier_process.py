"""The notifier as a process of its own: `taximeter notifier` on a configuration for a test's topic and receiver."""

from __future__ import annotations

import sys
from pathlib import Path

from taximeter.embedded.process import Child
from tests.serving.notifier.support import secret_line
from tests.taximeter.support import ROOT, environment

__all__ = ["configure", "notifier_process"]


def configure(folder: Path, bootstrap: str, topic_prefix: str, url: str) -> Path:
    """A configuration with one endpoint; its file."""
    (folder / "secret").write_text(secret_line())
    path = folder / "taximeter.toml"
    path.write_text(
        f"""
        [kafka]
        bootstrap = "{bootstrap}"
        topic_prefix = "{topic_prefix}"
        [notifier]
        journal_path = "{folder}/notifier.sqlite"
        [notifier.endpoints.ops]
        url = "{url}"
        secret_file = "{folder}/secret"
        allow_plaintext = true
        allow_private = true
        """
    )
    return path


def notifier_process(config: Path) -> Child:
    """Not started yet. Ready when `notifier.ready` is beside the configuration."""
    command = [sys.executable, "-m", "taximeter", "notifier", "--config", str(config)]
    command += ["--ready-file", str(config.with_name("notifier.ready"))]
    return Child("notifier", command, log_path=config.with_name("notifier.log"), cwd=ROOT, environment=environment())
