"""Spans of requests and the GenAI metrics to an OpenTelemetry collector, over OTLP/gRPC: the extra `otlp`.

Promise: it never holds up or fails a request. A span is made when its request has its bill, from what the bill says; it waits
in a bounded queue, of which the oldest are dropped when it is full, and a thread sends it, each attempt with a timeout. The
histograms are those that Prometheus is told, read by a thread of their own. A collector that is away costs what it was not
told of, and a stop no longer than `close` is given.

A span has the IDs that the request's `traceparent` has in the ledger, and the client's span as its parent. OpenTelemetry's own
variables hold for all that has no setting here: OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE and _TIMEOUT, OTEL_BSP_*,
OTEL_METRIC_EXPORT_INTERVAL, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.environment_variables import OTEL_METRIC_EXPORT_INTERVAL
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, set_span_in_context

from billing.v1.usage_pb2 import OUTCOME_COMPLETED, CountSource
from serving.gateway.genai import operation_name, outcome_name
from serving.gateway.tracing import TRACEPARENT, parent_span_id
from serving.otlp_spans import SpanSender, close_within

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.sdk.resources import Resource

    from billing.v1.usage_pb2 import UsageEvent
    from serving.gateway.genai import GenAiMetrics, Histogram

__all__ = ["OtlpExport"]

_LOG = logging.getLogger(__name__)
_SCOPE: Final = "taximeter.gateway"
_SERVICE: Final = "taximeter-gateway"
# What the gateway speaks with the back end; who made the model it cannot know.
_PROVIDER: Final = "kserve"
_NS_PER_MS: Final = 1_000_000
# As the SDK has it.
_INTERVAL_MS: Final = 60_000
_UNITS: Final = {"seconds": "s", "": "{token}"}
_SOURCES: Final = {number: name.removeprefix("COUNT_SOURCE_").lower() for name, number in CountSource.items()}


class _GivenIds(IdGenerator):
    """The IDs that a request already has."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _HistogramSender:
    """Tells the collector of the gateway's histograms, from a thread of its own."""

    def __init__(self, exporter: OTLPMetricExporter, resource: Resource, genai: GenAiMetrics) -> None:
        self._exporter = exporter
        self._resource = resource
        self._genai = genai
        self._began_ns = time.time_ns()
        self._interval_s = float(os.environ.get(OTEL_METRIC_EXPORT_INTERVAL, _INTERVAL_MS)) / 1_000
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._send()
        self._send()

    def _send(self) -> None:
        try:
            metrics = [self._metric(histogram) for histogram in self._genai.histograms() if histogram.series]
            if metrics:
                scope = ScopeMetrics(InstrumentationScope(_SCOPE), metrics, "")
                self._exporter.export(MetricsData([ResourceMetrics(self._resource, [scope], "")]))
        except Exception:  # noqa: BLE001  the next time tells all of it
            _LOG.exception("metrics could not be sent")

    def close(self) -> None:
        """Send them a last time; returns when that is done."""
        self._stopping.set()
        self._thread.join()
        self._exporter.shutdown()

    def _metric(self, histogram: Histogram) -> Metric:
        points = HistogramData(list(self._points(histogram)), AggregationTemporality.CUMULATIVE)
        return Metric(histogram.name, histogram.text, _UNITS[histogram.unit], points)

    def _points(self, histogram: Histogram) -> Iterable[HistogramDataPoint]:
        now_ns = time.time_ns()
        for labels, series in list(histogram.series.items()):
            counts = list(series.counts)
            yield HistogramDataPoint(
                # An empty one says that there was no error.
                attributes={name: value for name, value in zip(histogram.label_names, labels, strict=True) if value},
                start_time_unix_nano=self._began_ns,
                time_unix_nano=now_ns,
                count=sum(counts),
                sum=series.total,
                bucket_counts=counts,
                explicit_bounds=histogram.bounds,
                # The protocol has them as options, and they are not kept.
                min=None,  # type: ignore[arg-type]
                max=None,  # type: ignore[arg-type]
            )


class OtlpExport:
    """What one gateway tells a collector. `ended` belongs to its event loop; `close` it once."""

    def __init__(self, endpoint: str, server_id: str, genai: GenAiMetrics) -> None:
        self._ids = _GivenIds()
        self._spans = SpanSender(endpoint, _SERVICE, server_id, self._ids)
        self._exporter = OTLPMetricExporter(endpoint=endpoint)
        self._histograms = _HistogramSender(self._exporter, self._spans.resource, genai)

    def ended(self, event: UsageEvent) -> None:
        """A request has its bill, or its refusal is on record."""
        if TRACEPARENT not in event.attributes:
            return
        try:
            self._make_span(event, event.attributes[TRACEPARENT])
        except Exception:  # noqa: BLE001  the request is answered and billed, whatever comes of its span
            _LOG.exception("a span could not be made of request %s", event.request_id)

    def _make_span(self, event: UsageEvent, traceparent: str) -> None:
        _, trace_id, span_id, flags = traceparent.split("-")
        self._ids.trace_id, self._ids.span_id = int(trace_id, 16), int(span_id, 16)
        context = Context()
        parent_id = parent_span_id()
        if parent_id:
            parent = SpanContext(self._ids.trace_id, int(parent_id, 16), True, TraceFlags(int(flags, 16)))
            context = set_span_in_context(NonRecordingSpan(parent), context)
        operation = operation_name(event.operation)
        span = self._spans.tracer.start_span(
            f"{operation} {event.model}", context, SpanKind.SERVER, start_time=event.started_ms * _NS_PER_MS
        )
        if span.is_recording():
            span.set_attributes(_attributes(event, operation))
            if event.outcome != OUTCOME_COMPLETED:
                outcome = outcome_name(event.outcome)
                span.set_attribute("error.type", outcome)
                span.set_status(Status(StatusCode.ERROR, outcome))
        span.end(event.ended_ms * _NS_PER_MS)

    def close(self, timeout_s: float) -> None:
        """Tell the collector what it was not told yet, for so long at most."""
        closing = (self._spans.close, self._spans.give_up), (self._histograms.close, self._exporter.shutdown)
        close_within(timeout_s, *closing)


def _attributes(event: UsageEvent, operation: str) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": event.model,
        "gen_ai.response.id": event.request_id,
        # As the conventions have it, all classes of a prompt are input, and reasoning is output.
        "gen_ai.usage.input_tokens": event.uncached_input_tokens + event.cache_read_tokens + event.cache_write_tokens,
        "gen_ai.usage.output_tokens": event.output_tokens + event.reasoning_tokens,
        "taximeter.tenant_id": event.tenant_id,
        "taximeter.project_id": event.project_id,
        "taximeter.outcome": outcome_name(event.outcome),
        "taximeter.count_source": _SOURCES.get(event.count_source, "unspecified"),
    }
    classes = {
        "gen_ai.usage.cache_read.input_tokens": event.cache_read_tokens,
        "gen_ai.usage.cache_creation.input_tokens": event.cache_write_tokens,
        "gen_ai.usage.reasoning.output_tokens": event.reasoning_tokens,
    }
    if event.time_to_first_token_ms:
        # Spans have no name of their own for it: it is that of the metric.
        found["gen_ai.server.time_to_first_token"] = event.time_to_first_token_ms / 1_000
    return found | {name: tokens for name, tokens in classes.items() if tokens}
