"""A real OTLP receiver for tests, which keeps what it is sent, and addresses of collectors that take nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = ["Collector", "deaf_collector", "values"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        # By the ID of each: who told of it.
        self.tellers: dict[bytes, str] = {}
        self.services: set[str] = set()
        self.histograms: dict[str, Any] = {}
        self._server = grpc.server(ThreadPoolExecutor(2))
        # What they generate has no types.
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            for group in request.resource_spans:
                service = values(group.resource.attributes)["service.name"]
                self.services.add(service)
                for scope in group.scope_spans:
                    self.tellers |= dict.fromkeys([span.span_id for span in scope.spans], service)
                    self.spans += scope.spans
            return trace_service_pb2.ExportTraceServiceResponse()
        for group in request.resource_metrics:
            for scope in group.scope_metrics:
                # They are cumulative: the last word holds.
                self.histograms |= {metric.name: metric.histogram.data_points for metric in scope.metrics}
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def close(self) -> None:
        self._server.stop(None).wait()


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def deaf_collector(kind: str) -> Iterator[str]:
    """The address of a collector that is not there ("away"), or takes connections and says nothing ("silent")."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # At the first port nobody begins to listen meanwhile.
        port = 1 if kind == "away" else listening.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
