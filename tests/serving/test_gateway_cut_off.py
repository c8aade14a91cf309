"""A client that is gone: what it is billed for is what the back end's own log says that it produced until it stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as triton_aio

from billing.v1.usage_pb2 import OUTCOME_CANCELLED, UsageEvent
from serving.gateway import LimitSettings, tensorrt_llm, vllm
from tests.serving import cut_off_trial
from tests.serving.fake_back_ends import TensorRtLlm, Vllm, prompt_tokens, serving_models
from tests.serving.gateway_support import (
    HEADERS,
    billed,
    gateway_settings,
    model_server_process,
    production,
    running,
    settled,
    text_inputs,
    trace_inputs,
)

PROMPT = "tell me five words"


async def test_clients_that_go_at_random_are_billed_for_what_the_back_end_produced(tmp_path: Path) -> None:
    """`python -m tests.serving.cut_off_trial` does the same with a thousand, and asks a language model too."""
    seen = await cut_off_trial.run(cut_off_trial.Trial(requests=100, language_model_in=0), tmp_path)
    assert seen.differences == []
    assert (seen.twice, seen.never) == (0, 0)
    assert seen.gateway["cancels_confirmed"] > 0
    assert seen.gateway.get("cancels_unconfirmed", 0) == 0


@pytest.mark.model
async def test_a_language_model_that_is_stopped_mid_stream_is_billed_to_the_token(tmp_path: Path) -> None:
    profile = vllm("smollm2", tokenizer="smollm2", stop_input="stop")
    with model_server_process(tmp_path, models="smollm2") as address:
        settings = gateway_settings(tmp_path, address, models={"smollm2": profile}, limits=LimitSettings(stop_timeout_s=60))
        # Longer than any machine stands still.
        inputs = text_inputs("The capital of France is", stream=True, max_tokens=1_024)
        event = await _cancelled(settings, {"model_name": "smollm2", "inputs": inputs}, after=3)
        produced = await asyncio.to_thread(production, tmp_path, event.request_id)
    assert event.outcome == OUTCOME_CANCELLED
    assert produced["outcome"] == "cancelled"
    assert billed(event)[1:] == (produced["input_tokens"], produced["output_tokens"])
    assert 3 <= event.output_tokens < 1_024


async def test_tensorrt_llm_is_told_to_stop_when_its_client_is_gone(tmp_path: Path) -> None:
    """The request goes again, with the same ID and the word to stop; what comes before the last response is billed."""
    fake = TensorRtLlm(stall_after=2)
    event = await _cancelled_of(tmp_path, fake, tensorrt_llm("m"), LimitSettings(stop_timeout_s=60))
    assert fake.stopped[event.request_id].is_set()
    assert set(fake.asked) == {event.request_id}
    assert (event.outcome, billed(event)[1:]) == (OUTCOME_CANCELLED, (prompt_tokens(PROMPT), 4))


async def test_a_back_end_that_does_not_stop_in_time_is_cancelled(tmp_path: Path) -> None:
    fake = Vllm(stall_after=2, hears_stops=False)
    event = await _cancelled_of(tmp_path, fake, vllm("m", stop_input="stop"), LimitSettings(stop_timeout_s=0.3))
    assert (event.outcome, billed(event)[1:]) == (OUTCOME_CANCELLED, (prompt_tokens(PROMPT), 4))


@pytest.mark.parametrize("chunks_max", [1, 64])
async def test_nobody_reads_on_from_a_back_end_whose_clients_are_gone(tmp_path: Path, chunks_max: int) -> None:
    """A read is never broken off, or gRPC would keep what it has read: the end of the call ends it, its queue full or not."""

    def readers() -> list[Any]:
        return [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") == "_RequestFlow._read"]

    async def go_after_one(client: Any, streams: int) -> None:
        for _ in range(streams):

            async def one() -> AsyncIterator[dict[str, Any]]:
                yield {"model_name": "trace", "inputs": trace_inputs(1, 1_000_000, chunk_tokens=1)}

            stream = client.stream_infer(one(), headers=HEADERS)
            await anext(stream)
            stream.cancel()

    with model_server_process(tmp_path, models="trace") as address:
        limits = LimitSettings(request_chunks_max=chunks_max)
        settings = gateway_settings(tmp_path, address, models={"trace": vllm("trace")}, tokenizers={}, limits=limits)
        async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            await go_after_one(client, 5)
            events = await settled(server, 5)
            if left := readers():
                await asyncio.wait(left, timeout=120)
            assert readers() == []
    assert {event.outcome for event in events} == {OUTCOME_CANCELLED}
    assert all(0 < event.output_tokens < 1_000_000 for event in events)


async def _cancelled_of(folder: Path, fake: Any, profile: Any, limits: LimitSettings) -> UsageEvent:
    async with serving_models({"m": fake}) as address:
        settings = gateway_settings(folder, address, models={"m": profile}, tokenizers={}, limits=limits)
        return await _cancelled(settings, {"model_name": "m", "inputs": text_inputs(PROMPT, stream=True)}, after=1)


async def _cancelled(settings: Any, entry: dict[str, Any], *, after: int) -> UsageEvent:
    """The bill of a stream whose client goes after so many responses."""

    async def one() -> AsyncIterator[dict[str, Any]]:
        yield entry

    async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        stream = client.stream_infer(one(), headers=HEADERS)
        received = 0
        async for _ in stream:
            received += 1
            if received == after:
                stream.cancel()
                break
        (event,) = await settled(server)
        unconfirmed = server.metrics().get("cancels_unconfirmed", 0)
        assert server.metrics().get("cancels_confirmed", 0) + unconfirmed == 1
        return event
