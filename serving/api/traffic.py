"""What the API was asked and how it ended, for metrics: by protocol, method and status, and how long answers took.

Promise: the number of series is bounded. A method is an RPC of the contract, whatever stands in its path, or "other" (the
dashboard, the document, probes, what there is not); a status is one of the protocol's. Nothing that a client sends is a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

from serving.api.access import SERVICE
from serving.gateway.genai import Histogram

__all__ = ["OTHER", "Traffic"]

OTHER: Final = "other"
_BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STATUSES: Final = {"grpc": ("OK", "INTERNAL"), "http": ("200", "500")}


class Traffic:
    """Written by the event loop, read by whoever scrapes."""

    def __init__(self) -> None:
        self._ended: Counter[tuple[str, str, str]] = Counter()
        # What has not happened yet is 0: the first failure would else be no increase.
        for method in SERVICE.methods:
            for protocol, statuses in _STATUSES.items():
                for status in statuses:
                    self._ended[protocol, method.name, status] = 0
        self.durations = Histogram(
            "taximeter_api_request_duration",
            "seconds",
            "From a request to the end of its answer; watches, which end when somebody goes, are left out.",
            ("protocol", "method"),
            _BOUNDS_S,
        )

    def ended(self, protocol: str, method: str, status: str, took_s: float) -> None:
        """A request has its answer, or a watch is over."""
        self._ended[protocol, method, status] += 1
        found = SERVICE.methods_by_name.get(method)
        if found is None or not found.server_streaming:
            self.durations.observe(took_s, protocol, method)

    def counts(self) -> Iterator[tuple[tuple[str, str, str], int]]:
        """How many ended, by protocol, method and status."""
        yield from list(self._ended.items())
