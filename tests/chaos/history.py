"""What the load driver did and heard, noted outside of everything that is killed.

Promise: `add` returns when its lines are synced to disk, so an attempt is on record before it is made, and a receipt before
anything is concluded from it. A torn last line, of a driver that was killed itself, is left out by `read`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO

__all__ = ["Attempt", "History", "Outcome", "Receipt", "read"]


class Outcome(StrEnum):
    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request as it was asked for. `exact`: its usage is known beforehand; else, of a stream, it is a bound."""

    request_id: str
    tenant_id: str
    tokens: dict[str, int]
    # Of one token of each class.
    prices_pico: dict[str, int]
    exact: bool = True
    # Of a stream that broke: how much may be charged in each class beyond what had been delivered; else all that was asked.
    slack: dict[str, int] = field(default_factory=dict)
    at_ms: int = 0
    kind: str = "attempt"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the driver was told. Several for one request are possible: unknown, then, sent again, ok."""

    request_id: str
    outcome: Outcome
    # Of a stream: what had arrived when it was cut. At least this much was used.
    delivered: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    at_ms: int = 0
    kind: str = "receipt"


class History:
    """One file, in the order of time. From any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: dict[str, Attempt] = {}
        self.receipts: list[Receipt] = []
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w")

    def add(self, entries: Sequence[Attempt | Receipt]) -> None:
        """Note them, and return when they are on disk."""
        with self._lock:
            for entry in entries:
                self._file.write(json.dumps(asdict(entry)) + "\n")
                if isinstance(entry, Attempt):
                    assert self.attempts.setdefault(entry.request_id, entry) == entry, f"{entry.request_id} is another request"
                else:
                    self.receipts.append(entry)
            self._file.flush()
            os.fsync(self._file.fileno())

    def outcomes(self) -> dict[str, Receipt]:
        """What is known of each request by now: an ok or a refusal stands, else the receipt with most delivered."""
        with self._lock:
            return outcomes(self.receipts)

    def close(self) -> None:
        self._file.close()


def outcomes(receipts: Iterable[Receipt]) -> dict[str, Receipt]:
    """One receipt a request. Ok outweighs everything: whoever was told ok once must be charged."""
    weight = {Outcome.OK: 2, Outcome.UNKNOWN: 1, Outcome.FAILED: 0}
    found: dict[str, Receipt] = {}
    for receipt in receipts:
        known = found.get(receipt.request_id)
        if known is None or weight[receipt.outcome] >= weight[known.outcome]:
            found[receipt.request_id] = receipt
    return found


def read(path: Path) -> tuple[list[Attempt], list[Receipt]]:
    """What a history file says."""
    attempts: list[Attempt] = []
    receipts: list[Receipt] = []
    with path.open() as file:
        for line in file:
            if not line.endswith("\n"):
                break
            fields = json.loads(line)
            if fields["kind"] == "attempt":
                attempts.append(Attempt(**fields))
            else:
                receipts.append(Receipt(**{**fields, "outcome": Outcome(fields["outcome"])}))
    return attempts, receipts
