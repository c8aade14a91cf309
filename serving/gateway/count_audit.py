"""The continuous audit of counts: 1 in n answers that the back end counted is counted again, by the model's own tokenizer.

Promise: a back end (or a tokenizer) whose counts drift is named, by model: in the log when it begins and when it ends, in the
metrics as a ratio, and to the ledger, which raises an alert. Nothing waits for it: a request is long answered and billed, and
answers that come while some are being counted already are left out.

A back end counts the token that ends an answer, which is not in its text: one more than the text has is no drift.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from billing.v1.usage_pb2 import CountDrift

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["AuditSettings", "CountAudit", "Drift"]

_LOG = logging.getLogger(__name__)

_WINDOW_SAMPLES: Final = 256
_AT_ONCE_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """How many answers are looked at, and what is too much."""

    one_in: int = 100
    """0: none."""
    drift_max: float = 0.02
    """Of a model's tokens, over its last samples."""
    samples_min: int = 20
    """Before anything is said of a model."""

    def __post_init__(self) -> None:
        if self.one_in < 0 or self.samples_min < 1:
            raise ValueError(f"one_in: {self.one_in}, samples_min: {self.samples_min}: must be at least 0 and 1")
        if not 0 < self.drift_max <= 1:
            raise ValueError(f"drift_max: {self.drift_max}: must be more than 0 and at most 1")


@dataclass(slots=True)
class Drift:
    """One model's last samples."""

    samples: deque[tuple[int, int]]
    """What the back end counted, and the tokenizer."""
    sampled: int = 0
    """In all."""
    alarmed: bool = False

    @property
    def ratio(self) -> float:
        """By how much of the tokenizer's count the back end's is off: above 0, it counts more."""
        told = sum(tokens for _, tokens in self.samples)
        return sum(_difference(*sample) for sample in self.samples) / max(told, 1)


class CountAudit:
    """All models of one gateway. Belongs to one event loop."""

    def __init__(self, settings: AuditSettings) -> None:
        self._settings = settings
        self._models: dict[str, Drift] = {}
        self._running = 0

    def takes(self, request_id: str) -> bool:
        """Whether the request is one in n, by its ID: a random number that the gateway gave it."""
        one_in = self._settings.one_in
        return bool(one_in) and self._running < _AT_ONCE_MAX and int(request_id[:12], 16) % one_in == 0

    def begin(self) -> None:
        """An answer is being counted again; `end` when it is."""
        self._running += 1

    def end(self) -> None:
        self._running -= 1

    def take(self, model: str, backend_tokens: int, tokenizer_tokens: int) -> None:
        """An answer was counted again."""
        drift = self._models.get(model)
        if drift is None:
            drift = self._models[model] = Drift(deque(maxlen=_WINDOW_SAMPLES))
        drift.samples.append((backend_tokens, tokenizer_tokens))
        drift.sampled += 1
        if len(drift.samples) < self._settings.samples_min:
            return
        ratio = drift.ratio
        is_off = abs(ratio) > self._settings.drift_max
        if is_off and not drift.alarmed:
            _LOG.error(
                "model %s: over its last %d sampled answers the back end is off the tokenizer's count by %+.1f%%; the bill "
                "follows the back end: see that the tokenizer is the model's, and the back end's counts what its profile says",
                model,
                len(drift.samples),
                ratio * 100,
            )
        elif drift.alarmed and not is_off:
            _LOG.warning("model %s: back end and tokenizer count alike again (%+.1f%%)", model, ratio * 100)
        drift.alarmed = is_off

    def drifts(self) -> list[CountDrift]:
        """What the ledger is told, which raises an alert; from any thread."""
        found = []
        for model, drift in list(self._models.items()):
            samples = list(drift.samples)
            tokenizer_tokens = sum(tokens for _, tokens in samples)
            backend_tokens = tokenizer_tokens + sum(_difference(*sample) for sample in samples)
            found.append(
                CountDrift(model=model, samples=len(samples), backend_tokens=backend_tokens, tokenizer_tokens=tokenizer_tokens)
            )
        return found

    def models(self) -> Mapping[str, Drift]:
        """By model, those of which there are samples."""
        return self._models


def _difference(backend_tokens: int, tokenizer_tokens: int) -> int:
    difference = backend_tokens - tokenizer_tokens
    return 0 if difference == 1 else difference
