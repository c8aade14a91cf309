"""What a gateway says of its requests: histograms, traces, and the audit of counts; each is bounded, and each can be wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest
import tritonclient.grpc.aio as triton_aio
from hypothesis import given
from hypothesis import strategies as st

from billing.v1.usage_pb2 import OPERATION_CHAT, OUTCOME_CANCELLED, OUTCOME_COMPLETED, OUTCOME_REJECTED, CountDrift, UsageEvent
from serving.gateway import vllm
from serving.gateway.count_audit import AuditSettings, CountAudit
from serving.gateway.genai import GenAiMetrics
from serving.gateway.tracing import own_span
from tests.serving.gateway_support import (
    answers,
    gateway_settings,
    running,
    scripted_back_end,
    settled,
    text_inputs,
    vllm_response,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["00", "cc"])
def test_a_valid_trace_is_taken_up_as_a_span_of_its_own(version: str) -> None:
    span = own_span((("traceparent", f"{version}-{TRACE}-{SPAN}-00"),), begin=False)
    assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-00", span)
    assert SPAN not in span


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
    ],
)
def test_what_is_no_trace_counts_as_none(value: str) -> None:
    assert own_span((("traceparent", value),), begin=False) == ""
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", own_span((("traceparent", value),), begin=True))


async def test_the_back_end_and_the_event_have_the_gateway_s_span(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        seen.append(dict(context.invocation_metadata()))
        yield vllm_response("a", input_tokens=3, new_tokens=1, final=True)

    async with (
        scripted_back_end(script) as address,
        running(gateway_settings(tmp_path, address, models={"smollm2": vllm("smollm2")}, tokenizers={})) as server,
    ):
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            entry = {"model_name": "smollm2", "inputs": text_inputs("hello", stream=True)}
            headers = {
                "authorization": "Bearer secret-of-tenant-a",
                "traceparent": f"00-{TRACE}-{SPAN}-01",
                "tracestate": "a=b",
            }
            await answers(client, entry, headers=headers)
            await answers(client, entry, headers={**headers, "traceparent": f"ff-{TRACE}-{SPAN}-01"})
        traced, untraced = await settled(server, 2)
    assert traced.attributes["traceparent"] == seen[0]["traceparent"]
    assert seen[0]["traceparent"].startswith(f"00-{TRACE}-")
    assert seen[0]["tracestate"] == "a=b"
    assert "traceparent" not in seen[1]
    assert not untraced.attributes


# -- histograms --------------------------------------------------------------------------------------------------------


def observed(*events: UsageEvent) -> dict[str, Any]:
    metrics = GenAiMetrics()
    for event in events:
        metrics.observe(event)
    return {
        histogram.name: {labels: (sum(series.counts), series.total) for labels, series in histogram.series.items()}
        for histogram in metrics.histograms()
    }


def test_a_request_is_observed_as_it_is_billed() -> None:
    event = UsageEvent(
        model="m",
        operation=OPERATION_CHAT,
        outcome=OUTCOME_COMPLETED,
        uncached_input_tokens=100,
        cache_read_tokens=20,
        output_tokens=11,
        reasoning_tokens=4,
        latency_ms=1_500,
        time_to_first_token_ms=500,
    )
    cancelled = UsageEvent(model="m", operation=OPERATION_CHAT, outcome=OUTCOME_CANCELLED, latency_ms=10)
    refused = UsageEvent(model="whatever a client sends", outcome=OUTCOME_REJECTED)
    found = observed(event, cancelled, refused)
    assert found["gen_ai.client.token.usage"] == {("chat", "m", "input"): (2, 120), ("chat", "m", "output"): (2, 15)}
    assert found["gen_ai.server.request.duration"] == {("chat", "m", ""): (1, 1.5), ("chat", "m", "cancelled"): (1, 0.01)}
    assert found["gen_ai.server.time_to_first_token"] == {("chat", "m"): (1, 0.5)}
    assert found["gen_ai.server.time_per_output_token"] == {("chat", "m"): (1, pytest.approx(0.1))}


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50))
def test_each_value_is_in_the_first_bucket_that_holds_it(values: list[int]) -> None:
    metrics = GenAiMetrics()
    for value in values:
        metrics.observe(UsageEvent(model="m", uncached_input_tokens=value))
    tokens = next(iter(metrics.histograms()))
    series = tokens.series["unspecified", "m", "input"]
    for place, bound in enumerate(tokens.bounds):
        assert sum(series.counts[: place + 1]) == sum(value <= bound for value in values)
    assert sum(series.counts) == len(values)


# -- the audit of counts -----------------------------------------------------------------------------------------------


def test_a_drift_is_named_once_when_it_begins_and_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    audit = CountAudit(AuditSettings(drift_max=0.05, samples_min=5))
    for _ in range(9):
        # The token that ends an answer is in no text.
        audit.take("m", 21, 20)
    assert audit.models()["m"].ratio == 0
    for _ in range(9):
        audit.take("m", 10, 20)
    assert audit.models()["m"].alarmed
    assert audit.models()["m"].ratio == pytest.approx(-0.25)
    # What the ledger is told of it: there the token that ends an answer is none either.
    assert audit.drifts() == [CountDrift(model="m", samples=18, backend_tokens=270, tokenizer_tokens=360)]
    for _ in range(256):
        audit.take("m", 20, 20)
    assert not audit.models()["m"].alarmed
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "model m: over its last" in caplog.records[0].getMessage()


@pytest.mark.parametrize("one_in", [1, 3, 20])
def test_one_in_n_is_taken_and_no_more_than_can_be_counted_at_once(one_in: int) -> None:
    random = Random(one_in)
    ids = [UUID(int=random.getrandbits(128)) for _ in range(2_000)]
    audit = CountAudit(AuditSettings(one_in=one_in))
    taken = sum(audit.takes(name.hex) for name in ids)
    assert taken == pytest.approx(2_000 / one_in, rel=0.2)
    for _ in range(4):
        audit.begin()
    assert not any(audit.takes(name.hex) for name in ids)
    assert not any(CountAudit(AuditSettings(one_in=0)).takes(name.hex) for name in ids)


async def test_a_back_end_that_begins_to_count_too_much_is_found(tmp_path: Path) -> None:
    factor = 1

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield vllm_response("The capital of France is Paris.", input_tokens=3, new_tokens=7 * factor, final=True)

    audit = AuditSettings(one_in=1, samples_min=3)
    async with (
        scripted_back_end(script) as address,
        running(gateway_settings(tmp_path, address, audit=audit)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        for number in range(1, 7):
            await answers(client, {"model_name": "smollm2", "inputs": text_inputs("hello", stream=True)})
            await settled(server, number)
            await server.gateway.drain(120)
            drift = server.gateway.audit.models()["smollm2"]
            assert drift.sampled == number
            assert drift.alarmed == (number > 3)
            factor = 1 if number < 3 else 2
        assert server.gateway.audit.models()["smollm2"].ratio == pytest.approx(0.5)
