"""Spans of one part of an installation to an OpenTelemetry collector, over OTLP/gRPC: the extra `otlp`.

Promise: whoever makes a span waits for nobody. Spans stand in a bounded queue, of which the oldest are dropped when it is full;
a thread sends them, each attempt with a timeout. What OpenTelemetry's own variables say goes before what is said here.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.trace.id_generator import IdGenerator

__all__ = ["SpanSender", "close_within"]

# How long a thread may take to see that it is to give up.
_GIVE_UP_S: Final = 5.0


class SpanSender:
    """What one part makes spans with. `close_within` it once."""

    def __init__(self, endpoint: str, service: str, instance: str = "", ids: IdGenerator | None = None) -> None:
        attributes = {"service.name": service, **({"service.instance.id": instance} if instance else {})}
        self.resource = Resource.create(attributes).merge(OTELResourceDetector().detect())
        # Not at the interpreter's exit: a stop closes it, and waits no longer than it is told.
        self._provider = TracerProvider(resource=self.resource, id_generator=ids, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.tracer = self._provider.get_tracer(service.replace("-", ".", 1))

    def close(self) -> None:
        """Send what was not sent yet; returns when that is done, or was given up."""
        self._provider.shutdown()

    def give_up(self) -> None:
        """What is on its way is not waited for."""
        self._exporter.shutdown()


def close_within(timeout_s: float, *closing: tuple[Callable[[], None], Callable[[], None]]) -> None:
    """Close each (how, and how it is given up) beside the others, for so long at most."""
    threads = [threading.Thread(target=close, name="otlp-close", daemon=True) for close, _ in closing]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread, (_, give_up) in zip(threads, closing, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            # It waits for a collector: what it has on its way is given up.
            give_up()
            thread.join(_GIVE_UP_S)
