"""What requests were like, as OpenTelemetry's GenAI conventions name it: tokens, duration, time to the first token and between
tokens, by model and operation. Where used and billable counts differ, these are the billable ones.

Histograms in memory, in the buckets that the conventions advise. How many there are is bounded by the models that the gateway
serves, the operations and the outcomes: nothing that a client sends becomes a label.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from billing.v1.usage_pb2 import OUTCOME_COMPLETED, OUTCOME_REJECTED, Operation, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from billing.v1.usage_pb2 import UsageEvent

__all__ = ["GenAiMetrics", "Histogram", "operation_name", "outcome_name"]

_TOKEN_BUCKETS: Final = tuple(float(4**power) for power in range(14))
_DURATION_BUCKETS_S: Final = tuple(0.01 * 2**power for power in range(14))
_FIRST_TOKEN_BUCKETS_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_OUTPUT_TOKEN_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_OPERATIONS: Final[dict[int, str]] = {number: name.removeprefix("OPERATION_").lower() for name, number in Operation.items()}
_OUTCOMES: Final[dict[int, str]] = {number: name.removeprefix("OUTCOME_").lower() for name, number in Outcome.items()}
Labels = tuple[str, ...]


def operation_name(operation: int) -> str:
    """As metrics and spans call it."""
    return _OPERATIONS.get(operation, "unspecified")


def outcome_name(outcome: int) -> str:
    """As metrics and spans call it, where it is an error."""
    return _OUTCOMES.get(outcome, "unspecified")


@dataclass(slots=True)
class _Series:
    counts: list[int]
    total: float = 0.0


@dataclass(slots=True)
class Histogram:
    """One metric, by its labels."""

    name: str
    unit: str
    text: str
    label_names: Labels
    bounds: Sequence[float]
    series: dict[Labels, _Series] = field(default_factory=dict)

    def observe(self, value: float, *labels: str) -> None:
        found = self.series.get(labels)
        if found is None:
            found = self.series[labels] = _Series([0] * (len(self.bounds) + 1))
        found.counts[bisect_left(self.bounds, value)] += 1
        found.total += value


class GenAiMetrics:
    """All histograms of one gateway. Written by its event loop, read by whoever scrapes."""

    def __init__(self) -> None:
        model = ("gen_ai.operation.name", "gen_ai.request.model")
        self._tokens = Histogram(
            "gen_ai.client.token.usage",
            "",
            "Tokens of prompts and answers, as they are billed.",
            (*model, "gen_ai.token.type"),
            _TOKEN_BUCKETS,
        )
        self._duration = Histogram(
            "gen_ai.server.request.duration",
            "seconds",
            "From the request's admission to its bill.",
            (*model, "error.type"),
            _DURATION_BUCKETS_S,
        )
        self._first_token = Histogram(
            "gen_ai.server.time_to_first_token", "seconds", "To the first response.", model, _FIRST_TOKEN_BUCKETS_S
        )
        self._per_token = Histogram(
            "gen_ai.server.time_per_output_token",
            "seconds",
            "Between tokens, behind the first.",
            model,
            _OUTPUT_TOKEN_BUCKETS_S,
        )

    def histograms(self) -> Iterable[Histogram]:
        return self._tokens, self._duration, self._first_token, self._per_token

    def observe(self, event: UsageEvent) -> None:
        """A request that was forwarded has its bill."""
        if event.outcome == OUTCOME_REJECTED:
            return
        labels = operation_name(event.operation), event.model
        # As the conventions have it, the classes of a prompt are one type.
        input_tokens = event.uncached_input_tokens + event.cache_read_tokens + event.cache_write_tokens
        self._tokens.observe(input_tokens, *labels, "input")
        self._tokens.observe(event.output_tokens + event.reasoning_tokens, *labels, "output")
        error = "" if event.outcome == OUTCOME_COMPLETED else outcome_name(event.outcome)
        self._duration.observe(event.latency_ms / 1_000, *labels, error)
        if event.time_to_first_token_ms:
            self._first_token.observe(event.time_to_first_token_ms / 1_000, *labels)
            if event.output_tokens > 1:
                rest_ms = max(0, event.latency_ms - event.time_to_first_token_ms)
                self._per_token.observe(rest_ms / 1_000 / (event.output_tokens - 1), *labels)
