"""Prometheus' own checker of rules: Debian's package `prometheus` has it."""

from __future__ import annotations

import shutil
from typing import Final

__all__ = ["MISSING_MESSAGE", "promtool"]

MISSING_MESSAGE: Final = "promtool is not here: apt-get install prometheus, or take it from Prometheus' release"


def promtool() -> str | None:
    """Where it is."""
    return shutil.which("promtool")
