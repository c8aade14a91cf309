"""Spans and metrics as a collector gets them: a real OTLP receiver, and gateways whose collector is away or never answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc.aio as triton_aio
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.serving.gateway_support import (
    HEADERS,
    answers,
    gateway_settings,
    journalled,
    profiles,
    running,
    settled,
    trace_inputs,
)
from tests.serving.otlp_collector import Collector, deaf_collector, values

MODELS = {name: profile for name, profile in profiles().items() if name.startswith("trace")}
TRACE_ID, CLIENT_SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = {**HEADERS, "traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


async def test_a_request_is_a_span_of_its_clients_trace_and_of_the_ledgers_and_the_metrics_are_the_bills(
    tmp_path: Path, back_end: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-gateway")
    # Whoever is slow here is the machine.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "120")
    monkeypatch.setattr("serving.gateway.server._OTLP_CLOSE_S", 120.0)
    settings = gateway_settings(tmp_path, back_end, models=MODELS, tokenizers={}, otlp_endpoint=collector.endpoint)
    async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        entry = {"model_name": "trace", "inputs": trace_inputs(7, 3)}
        # Two requests on one stream, one call, one that is refused, and two that nobody traces.
        await answers(client, entry, entry, headers=TRACED)
        await client.infer("trace-unary", trace_inputs(5, 2, stream=False), headers=TRACED)
        await answers(client, {**entry, "model_name": "nobody"}, headers=TRACED)
        await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)
        unsampled = {**TRACED, "traceparent": TRACED["traceparent"][:-1] + "0"}
        await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=unsampled)
        events = {event.request_id: event for event in await settled(server, 6)}
    # A stop tells what was not told yet.
    assert collector.services == {"our-gateway"}
    traced = {values(span.attributes)["gen_ai.response.id"]: span for span in collector.spans}
    assert len(collector.spans) == len(traced) == 4
    assert len({span.span_id for span in traced.values()}) == 4
    for request_id, span in traced.items():
        event = events[request_id]
        # What the ledger has of it.
        assert event.attributes["traceparent"] == f"00-{TRACE_ID}-{span.span_id.hex()}-01"
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, CLIENT_SPAN_ID)
        assert (span.kind, span.name) == (
            Span.SPAN_KIND_SERVER,
            f"{'generate' if event.operation else 'unspecified'} {event.model}",
        )
        assert (span.start_time_unix_nano, span.end_time_unix_nano) == (event.started_ms * 10**6, event.ended_ms * 10**6)
        told = values(span.attributes)
        assert told["gen_ai.request.model"] == event.model
        assert told["gen_ai.usage.input_tokens"] == event.uncached_input_tokens
        assert told["gen_ai.usage.output_tokens"] == event.output_tokens
        assert told.get("gen_ai.server.time_to_first_token", 0) * 1_000 == pytest.approx(event.time_to_first_token_ms)
        refused = event.model == "nobody"
        assert (told.get("error.type"), span.status.code) == (
            ("rejected", Status.STATUS_CODE_ERROR) if refused else (None, Status.STATUS_CODE_UNSET)
        )
    tokens = {
        (values(point.attributes)["gen_ai.request.model"], values(point.attributes)["gen_ai.token.type"]): (
            point.count,
            point.sum,
        )
        for point in collector.histograms["gen_ai.client.token.usage"]
    }
    assert tokens == {
        ("trace", "input"): (2, 14),
        ("trace", "output"): (2, 6),
        ("trace-unary", "input"): (3, 7),
        ("trace-unary", "output"): (3, 4),
    }
    durations = collector.histograms["gen_ai.server.request.duration"]
    assert sum(point.count for point in durations) == 5
    assert all(sum(point.bucket_counts) == point.count for point in durations)


@pytest.fixture(params=["away", "silent"])
def deaf(request: pytest.FixtureRequest) -> Iterator[str]:
    with deaf_collector(request.param) as endpoint:
        yield endpoint


async def test_requests_and_a_stop_do_not_wait_for_a_collector(
    tmp_path: Path, back_end: str, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    # Nothing that this is about ends by itself while the test runs.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")
    monkeypatch.setattr("serving.gateway.server._OTLP_CLOSE_S", 0.1)
    monkeypatch.setattr("serving.otlp_spans._GIVE_UP_S", 60.0)
    others = set(threading.enumerate())
    settings = gateway_settings(tmp_path, back_end, models=MODELS, tokenizers={}, trace=True, otlp_endpoint=deaf)
    async with asyncio.timeout(120), running(settings) as server:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            # More than may wait.
            for _ in range(20):
                await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)
        assert len(journalled(server.meter)) == 20
        await server.stop()
    # Nothing goes on behind it.
    left = set(threading.enumerate()) - others
    assert not [thread.name for thread in left if thread.name.startswith(("otlp", "Otel"))]
