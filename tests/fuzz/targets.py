"""All targets by name: every place where bytes come in from outside of the process."""

from __future__ import annotations

from tests.fuzz import files, ledger, wire
from tests.fuzz.target import Target

__all__ = ["TARGETS"]

TARGETS: dict[str, Target] = {**ledger.TARGETS, **files.TARGETS, **wire.TARGETS}
