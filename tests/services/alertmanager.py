"""Prometheus' Alertmanager as a process: Debian's package `prometheus-alertmanager` has it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from taximeter.embedded.process import Child, accepts_connections
from tests.services.ports import free_port

__all__ = ["MISSING_MESSAGE", "Alertmanager", "alertmanager_command"]

MISSING_MESSAGE: Final = "alertmanager is not here: apt-get install prometheus-alertmanager, or take it from its release"
_START_TIMEOUT_S: Final = 180.0


def alertmanager_command() -> str | None:
    """Where it is."""
    return shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")


class Alertmanager:
    """One, alone, that sends nobody anything."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        config = folder / "alertmanager.yml"
        config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
        command = [
            alertmanager_command() or sys.exit(MISSING_MESSAGE),
            f"--config.file={config}",
            f"--storage.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
        ]
        self._child = Child("alertmanager", command, log_path=folder / "alertmanager.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v2/alerts"

    def start(self) -> None:
        self._child.start()
        self._child.wait_until(lambda: accepts_connections("127.0.0.1", self.port), _START_TIMEOUT_S)

    def stop(self) -> None:
        self._child.stop(20.0)
