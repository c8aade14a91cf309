"""What a running sink says about itself, for metrics and for people; written by its threads, read by others."""

from __future__ import annotations

import threading

from sinks.writer import Position

__all__ = ["SinkStatus"]


class SinkStatus:
    """Positions, what was ignored, and what it waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._positions: dict[int, Position] = {}
        self._ignored: dict[int, int] = {}
        self._refused: dict[int, int] = {}
        self._waiting = ""
        self._stored_records = 0
        self._stored_batches = 0
        self._storing_s = 0.0
        self._changed = threading.Condition(self._lock)

    def at(self, partition: int, position: Position | None) -> None:
        with self._changed:
            if position is not None:
                self._positions[partition] = position
            self._changed.notify_all()

    def stored(self, records: int, took_s: float) -> None:
        """A batch is in the database, after so long."""
        with self._lock:
            self._stored_records += records
            self._stored_batches += 1
            self._storing_s += took_s

    def ignored(self, partition: int, records: int, refused: int) -> None:
        """How many in all, and how many of them the ledger's key did not seal."""
        with self._lock:
            self._ignored[partition] = records
            self._refused[partition] = refused

    def waiting(self, reason: str) -> None:
        """Empty: not any more."""
        with self._changed:
            self._waiting = reason
            self._changed.notify_all()

    @property
    def waiting_for(self) -> str:
        """Empty: nothing."""
        with self._lock:
            return self._waiting

    def wait_for(self, sequences: dict[int, int], timeout_s: float) -> bool:
        """Whether every partition named came to its sequence within the time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(
                    (position := self._positions.get(partition)) is not None and position.sequence >= sequence
                    for partition, sequence in sequences.items()
                ),
                timeout_s,
            )

    def snapshot(self) -> dict[str, object]:
        """As JSON would have it."""
        with self._lock:
            return {
                "positions": {
                    str(partition): {
                        "generation": position.generation.hex(),
                        "sequence": position.sequence,
                        "ledger_offset": position.ledger_offset,
                        "log_time_ms": position.log_time_ms,
                    }
                    for partition, position in sorted(self._positions.items())
                },
                "ignored_records": {str(partition): count for partition, count in sorted(self._ignored.items())},
                "refused_records": {str(partition): count for partition, count in sorted(self._refused.items())},
                "waiting_for": self._waiting,
                "stored_records": self._stored_records,
                "stored_batches": self._stored_batches,
                "storing_s": self._storing_s,
            }
