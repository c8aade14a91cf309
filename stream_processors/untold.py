"""What a takeover refused and no record has told yet: how many, the first few, and the last.

Promise: memory does not grow with what somebody writes to the ledger topic, and `records` counts all of it. What a record
tells is not told again, unless more was refused between the takeover and that record than is named here: then all of it is
told once more, rather than some of it never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from billing.limits import REFUSED_RECORDS_NAMED
from billing.v1.ledger_pb2 import RefusedRecord

__all__ = ["Untold"]


@dataclass(slots=True)
class Untold:
    """Of one partition, in the order of its log."""

    records: int = 0
    # The last of them is the last that was refused: up to its offset all is told by whoever tells this.
    named: list[RefusedRecord] = field(default_factory=list)

    def add(self, refused: RefusedRecord) -> bool:
        """Whether it is one of the first few."""
        self.records += 1
        if len(self.named) == REFUSED_RECORDS_NAMED:
            self.named[-1] = refused
            return False
        self.named.append(refused)
        return True

    def leave_told(self, told: Sequence[RefusedRecord]) -> None:
        """A record of the log tells of all up to the last of `told`."""
        beyond = [refused for refused in self.named if refused.offset > told[-1].offset]
        if not beyond or self.records == len(self.named):
            self.named, self.records = beyond, len(beyond)
