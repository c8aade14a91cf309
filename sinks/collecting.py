"""The batch that a sink collects: when it is due, and which of its balances are to be shown before it is.

Promise: every record that was added is in exactly one `take`, in order. No clock of its own: each call is told the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sinks.columns import Accepted
from sinks.settings import SinkSettings

__all__ = ["Collected"]


class Collected:
    """Records that were read and not handed on yet."""

    def __init__(self, settings: SinkSettings) -> None:
        self._linger_s = settings.linger_ms / 1000
        self._collect_s = settings.collect_ms / 1000
        self._preview_s = settings.preview_ms / 1000
        self._bytes_max = settings.batch_bytes
        self._begin()

    def _begin(self) -> None:
        self._batch: list[Accepted] = []
        self._bytes = 0
        self._shown = 0
        self._old_s = self._due_s = self._show_s = math.inf

    def add(self, found: Sequence[Accepted], now_s: float) -> None:
        """Records that were just read."""
        if not found:
            return
        if not self._batch:
            self._old_s = now_s + self._collect_s
        self._due_s = min(self._old_s, now_s + self._linger_s)
        if self._shown == len(self._batch):
            self._show_s = now_s + self._preview_s
        self._batch += found
        self._bytes += sum(len(accepted.stored) for accepted in found)

    def wait_s(self, now_s: float) -> float:
        """For how long nothing is to be done; negative where something is, infinite where nothing will be."""
        return min(self._due_s, self._show_s) - now_s

    @property
    def is_full(self) -> bool:
        return self._bytes >= self._bytes_max

    def is_due(self, now_s: float) -> bool:
        return now_s >= self._due_s

    def is_to_show(self, now_s: float) -> bool:
        return now_s >= self._show_s

    def take(self) -> list[Accepted]:
        """The batch; another one begins."""
        batch = self._batch
        self._begin()
        return batch

    def show(self) -> list[Accepted]:
        """What was added since the last time. It stays in the batch."""
        new = self._batch[self._shown :]
        self._shown = len(self._batch)
        self._show_s = math.inf
        return new
