"""An unmodified tritonclient through the gateway to a real language model: the same answers, and a bill to the token."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from billing.v1.account_pb2 import Limits
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_ESTIMATE,
    COUNT_SOURCE_TOKENIZER,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    OUTCOME_DEADLINE_EXCEEDED,
    OUTCOME_REJECTED,
    REFUSAL_REASON_PROMPT_TOO_LARGE,
    UsageEvent,
)
from serving.gateway import GatewayServer, LimitSettings, generic
from serving.tokenizers import Framing, load_tokenizer
from tests.serving.gateway_support import (
    HEADERS,
    SECRET,
    answers,
    api_key,
    billed,
    gateway_settings,
    journalled,
    known_directory,
    model_server_process,
    now_ms,
    production,
    profiles,
    put_key,
    running,
    settled,
    sync_answers,
    tensor,
    text_inputs,
    texts,
    told,
    trace_inputs,
    without_usage,
)

# What the model server writes at most of one answer.
LONG = 1_024
PROMPTS = ("The capital of France is", "从前有一座山，", "def fibonacci(n):\n", "Grüße 👋🏽 aus")


@pytest.fixture(scope="module")
def production_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model-server")


@pytest.fixture(scope="module")
def back_end(production_folder: Path) -> Iterator[str]:
    with model_server_process(production_folder, models="smollm2,trace") as address:
        yield address


def generate(prompt: str, *, request_id: str = "", **options: Any) -> dict[str, Any]:
    return {"model_name": "smollm2", "inputs": text_inputs(prompt, stream=True, **options), "request_id": request_id}


# -- the same answers, and the bill ------------------------------------------------------------------------------------


@pytest.mark.model
async def test_streams_are_those_of_the_back_end_and_the_bill_is_what_was_told(
    server: GatewayServer, client: Any, direct: Any, production_folder: Path
) -> None:
    for prompt in PROMPTS:
        entry = generate(prompt, request_id="mine")
        through = await answers(client, entry)
        plain = await answers(direct, entry)
        assert [without_usage(response) for response, _ in through] == [response for response, _ in plain]
        usages = [usage for response, _ in through if (usage := told(response)) is not None]
        assert len(usages) == 1
        assert told(through[-1][0]) == usages[0]
        event = journalled(server.meter)[-1]
        assert billed(event) == usages[0][:3]
        assert usages[0][3] == "backend"
        produced = production(production_folder, event.request_id)
        assert (produced["input_tokens"], produced["output_tokens"]) == billed(event)[1:]
    assert len(journalled(server.meter)) == len(PROMPTS)


@pytest.mark.model
async def test_a_unary_answer_is_that_of_the_back_end(server: GatewayServer, client: Any, direct: Any) -> None:
    inputs = text_inputs(PROMPTS[0], stream=False, return_num_output_tokens=True)
    result = await client.infer("smollm2-unary", inputs, headers=HEADERS, request_id="mine")
    plain = await direct.infer("smollm2-unary", inputs, request_id="mine")
    assert without_usage(result.get_response()) == plain.get_response()
    (event,) = journalled(server.meter)
    usage = told(result.get_response())
    assert usage is not None
    assert usage[:3] == billed(event)
    assert usage[2] == result.as_numpy("num_output_tokens")[0]
    assert event.outcome == OUTCOME_COMPLETED
    assert event.count_source == COUNT_SOURCE_BACKEND
    assert (event.tenant_id, event.project_id, event.user_id, event.api_key_id) == (
        "tenant-a",
        "project",
        "user",
        "key-a",
    )
    assert (event.server_id, event.region, event.client_request_id) == ("gateway-1", "here", "mine")
    assert event.request_id != "mine"
    assert event.time_to_first_token_ms > 0
    assert event.started_ms <= event.ended_ms <= now_ms()


@pytest.mark.model
async def test_the_sync_client_works_too(server: GatewayServer) -> None:
    address = f"127.0.0.1:{server.port}"

    def work() -> Any:
        with triton.InferenceServerClient(address) as sync_client:
            inputs = text_inputs(PROMPTS[0], stream=False)
            return sync_client.infer(
                "smollm2-unary", inputs, headers={"x-api-key": SECRET}, compression_algorithm="gzip", client_timeout=240
            )

    result = await asyncio.to_thread(work)
    found = await sync_answers(address, generate(PROMPTS[0]), empty_final=False)
    events = journalled(server.meter)
    assert [billed(event) for event in events] == [
        usage[:3] for response in (result.get_response(), found[-1][0]) if (usage := told(response)) is not None
    ]


@pytest.mark.parametrize("back_end_empty", [False, True])
@pytest.mark.parametrize("client_asks", [False, True])
async def test_the_client_sees_an_empty_final_response_only_if_it_asked(
    server: GatewayServer, back_end: str, back_end_empty: bool, client_asks: bool
) -> None:
    inputs = trace_inputs(5, 7, chunk_tokens=2, empty_final=back_end_empty)
    entry = {"model_name": "trace", "inputs": inputs, "request_id": "mine"}
    through = await sync_answers(f"127.0.0.1:{server.port}", entry, empty_final=client_asks)
    plain = await sync_answers(back_end, entry, empty_final=client_asks)
    assert [without_usage(response) for response, _ in through] == [response for response, _ in plain]
    assert len(through) == (5 if client_asks and back_end_empty else 4)
    assert [told(response) is not None for response, _ in through] == [False] * (len(through) - 1) + [True]
    assert billed(journalled(server.meter)[0])[1:] == (5, 7)


@pytest.mark.model
async def test_without_counts_the_models_own_tokenizer_counts(tmp_path: Path, back_end: str, production_folder: Path) -> None:
    model = generic("smollm2", tokenizer="smollm2")
    settings = gateway_settings(tmp_path, back_end, models=profiles() | {"smollm2": model})
    async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        found = await answers(client, generate(PROMPTS[2]))
        (event,) = journalled(server.meter)
        assert event.count_source == COUNT_SOURCE_TOKENIZER
        tokenizer = load_tokenizer(settings.tokenizers["smollm2"])
        assert event.tokenizer == tokenizer.fingerprint
        assert event.output_tokens == tokenizer.count(texts(found), Framing.OUTPUT)
        assert event.uncached_input_tokens == production(production_folder, event.request_id)["input_tokens"]
        usage = told(found[-1][0])
        assert usage is not None
        assert usage[:3] == billed(event)


@pytest.mark.model
async def test_an_answer_of_which_nothing_is_said_ends_where_its_key_s_limit_does(
    tmp_path: Path, back_end: str, production_folder: Path
) -> None:
    directory = known_directory()
    put_key(directory, api_key(limits=Limits(output_tokens_max=4)))
    settings = gateway_settings(tmp_path, back_end, models={"smollm2": generic("smollm2", tokenizer="smollm2")})
    async with (
        running(settings, directory) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        inputs = [tensor("text_input", PROMPTS[0]), tensor("stream", True)]
        found = await answers(client, {"model_name": "smollm2", "inputs": inputs})
        assert [error for _, error in found if error is not None] == []
        (event,) = await settled(server)
    # By itself it writes 16 tokens.
    assert production(production_folder, event.request_id)["output_tokens"] == 4
    assert (event.outcome, event.output_tokens) == (OUTCOME_COMPLETED, 4)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
async def test_compressed_requests_are_taken(server: GatewayServer, client: Any, compression: str) -> None:
    await client.infer("trace-unary", trace_inputs(5, 7, stream=False), headers=HEADERS, compression_algorithm=compression)
    entry = {"model_name": "trace", "inputs": trace_inputs(5, 7)}
    assert await answers(client, entry, compression_algorithm=compression)
    assert [billed(event)[1:] for event in journalled(server.meter)] == [(5, 7), (5, 7)]


@pytest.mark.model
async def test_interleaved_requests_on_one_stream_keep_their_ids_and_bills(server: GatewayServer, client: Any) -> None:
    entries = [generate(prompt, request_id=f"r{index}", max_tokens=4) for index, prompt in enumerate(PROMPTS)]
    found = await answers(client, *entries)
    by_client_id = {event.client_request_id: billed(event) for event in journalled(server.meter)}
    usages = {response.id: usage[:3] for response, _ in found if (usage := told(response)) is not None}
    assert usages == by_client_id
    assert len(usages) == len(PROMPTS)


async def test_a_client_that_uses_its_id_again_is_charged_again(server: GatewayServer, client: Any) -> None:
    for _ in range(2):
        await client.infer("trace-unary", trace_inputs(5, 7, stream=False), headers=HEADERS, request_id="same")
    first, second = journalled(server.meter)
    assert first.client_request_id == second.client_request_id == "same"
    assert first.request_id != second.request_id
    assert billed(first)[1:] == billed(second)[1:] == (5, 7)


async def test_models_that_are_not_decoupled_answer_in_order(client: Any) -> None:
    entries = [
        {
            "model_name": "trace-unary",
            "inputs": trace_inputs(1, 1, stream=False, chunk_delay_ms=delay_ms),
            "request_id": str(index),
        }
        for index, delay_ms in enumerate((200, 0, 100, 0))
    ]
    assert [response.id for response, _ in await answers(client, *entries)] == ["0", "1", "2", "3"]


# -- how long the prompt may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "source"),
    [("word " * 300, COUNT_SOURCE_TOKENIZER), ("word " * 1_200_000, COUNT_SOURCE_ESTIMATE)],
    ids=["tokens", "6-megabytes"],
)
async def test_an_oversized_prompt_is_refused_before_the_back_end_sees_it(
    server: GatewayServer, client: Any, direct: Any, prompt: str, source: int
) -> None:
    before = await direct.get_inference_statistics("smollm2-unary")
    with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*prompt: .*at most 200"):
        await client.infer("smollm2-unary", text_inputs(prompt, stream=False), headers=HEADERS)
    assert await direct.get_inference_statistics("smollm2-unary") == before
    (event,) = journalled(server.meter)
    assert (event.outcome, event.refusal_reason) == (OUTCOME_REJECTED, REFUSAL_REASON_PROMPT_TOO_LARGE)
    assert event.uncached_input_tokens >= 300
    assert event.count_source == source
    assert bool(event.tokenizer) == (source == COUNT_SOURCE_TOKENIZER)


@pytest.mark.model
async def test_a_prompt_that_bytes_do_not_settle_is_counted(server: GatewayServer, client: Any) -> None:
    # 199 tokens of five bytes each: over the limit by bytes, under it by tokens.
    await client.infer("smollm2-unary", text_inputs(" word" * 199, stream=False, max_tokens=1), headers=HEADERS)
    assert journalled(server.meter)[0].uncached_input_tokens == 199


# -- what ends a request early -----------------------------------------------------------------------------------------


@pytest.mark.model
async def test_a_cancel_mid_stream_is_billed_for_what_was_produced(
    server: GatewayServer, client: Any, production_folder: Path
) -> None:
    # Longer than any machine stands still: it is the cancel that ends it.
    inputs = [tensor("text_input", PROMPTS[0]), tensor("stream", True)]
    inputs.append(tensor("sampling_parameters", json.dumps({"temperature": 0, "max_tokens": LONG, "ignore_eos": True})))
    stream = client.stream_infer(one({"model_name": "smollm2", "inputs": inputs}), headers=HEADERS)
    received = 0
    async for result, _ in stream:
        received += bool(result)
        if received == 3:
            stream.cancel()
            break
    (event,) = await settled(server)
    assert event.outcome == OUTCOME_CANCELLED
    produced = await asyncio.to_thread(production, production_folder, event.request_id)
    assert produced["outcome"] == "cancelled"
    assert event.uncached_input_tokens == produced["input_tokens"]
    # The back end goes on until it hears of the cancel, and nobody can tell the gateway about those tokens.
    assert received <= event.output_tokens <= produced["output_tokens"] < LONG


async def test_a_cancel_reaches_exactly_one_request(server: GatewayServer, client: Any, production_folder: Path) -> None:
    # One that would go on for longer than any machine stands still, and one that goes to its end.
    slow, quick = (
        {"model_name": "trace", "inputs": trace_inputs(3, tokens, chunk_tokens=1, chunk_delay_ms=20), "request_id": "same"}
        for tokens in (100_000, 20)
    )
    cancelled = client.stream_infer(one(slow), headers=HEADERS)
    other = asyncio.create_task(answers(client, quick))
    async for _ in cancelled:
        cancelled.cancel()
        break
    found = await other
    events = {event.outcome: event for event in await settled(server, 2)}
    assert told(found[-1][0])[:3] == billed(events[OUTCOME_COMPLETED])  # type: ignore[index]
    assert events[OUTCOME_COMPLETED].output_tokens == 20
    assert 1 <= events[OUTCOME_CANCELLED].output_tokens < 100_000
    produced = await asyncio.to_thread(production, production_folder, events[OUTCOME_CANCELLED].request_id)
    assert produced["outcome"] == "cancelled"


async def test_no_request_escapes_its_bill_when_clients_go_at_random(
    server: GatewayServer, client: Any, production_folder: Path
) -> None:
    """Also while a chunk is being written: each request that reached the back end is closed, once, for what came of it."""
    chance = random.Random(7)
    requests = 0
    wanted = {OUTCOME_COMPLETED, OUTCOME_CANCELLED, OUTCOME_DEADLINE_EXCEEDED}

    async def go(number: int, slowness: float) -> None:
        inputs = trace_inputs(5, 60, chunk_tokens=1, chunk_delay_ms=1)
        ends = chance.choice(("cancel", "deadline", "complete"))
        after_s = chance.uniform(0.01, 0.15) * slowness
        entry = {"model_name": "trace", "inputs": inputs, "request_id": str(number)}
        stream = client.stream_infer(one(entry), headers=HEADERS, stream_timeout=after_s if ends == "deadline" else 240)
        if ends == "cancel":
            asyncio.get_running_loop().call_later(after_s, stream.cancel)
        try:
            async for _ in stream:
                pass
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            assert ends != "complete"

    events: list[UsageEvent] = []
    # On a busy machine all of the first may go before they are forwarded: the later ones go later.
    while requests < 60 or (requests < 400 and not wanted <= {event.outcome for event in events}):
        await asyncio.gather(*(go(requests + number, max(1.0, requests / 60)) for number in range(10)))
        requests += 10
        events = await settled(server, 0)
    assert {event.outcome for event in events} == wanted
    assert len({event.request_id for event in events}) == len(events) <= requests
    for event in events:
        # A request that was cancelled before it was forwarded has no line there, and costs nothing.
        if event.output_tokens:
            line = await asyncio.to_thread(production, production_folder, event.request_id)
            assert event.output_tokens <= line["output_tokens"]
        if event.outcome == OUTCOME_COMPLETED:
            assert event.output_tokens == 60


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_is_billed_as_a_cancel(
    server: GatewayServer, client: Any, stream: bool, production_folder: Path
) -> None:
    events: list[UsageEvent] = []
    produced: dict[str, Any] = {}
    # Until one was met at the back end, on a stream with an answer on its way: a busy machine may need longer to come so far.
    for deadline_s in (0.45, 1.5, 5.0, 15.0, 45.0):
        tokens = int(40 * deadline_s)
        inputs = trace_inputs(3, tokens, stream=stream, chunk_tokens=1, chunk_delay_ms=100 if stream else 1_000)
        if stream:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answers(client, {"model_name": "trace", "inputs": inputs}, stream_timeout=deadline_s)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:
            with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
                await client.infer("trace-unary", inputs, headers=HEADERS, client_timeout=deadline_s)
        events = await settled(server, 0)
        # Of a client that is gone before the gateway's own clock says that it is late, all that is known is that it is gone.
        assert {event.outcome for event in events} <= {OUTCOME_DEADLINE_EXCEEDED, OUTCOME_CANCELLED}
        if events and events[-1].outcome == OUTCOME_DEADLINE_EXCEEDED and (events[-1].output_tokens or not stream):
            with suppress(TimeoutError):  # one that was over before it could be forwarded
                produced = await asyncio.to_thread(production, production_folder, events[-1].request_id, 10.0)
                break
    event = events[-1]
    assert event.outcome == OUTCOME_DEADLINE_EXCEEDED
    assert produced["outcome"] == "cancelled"
    if stream:
        assert event.uncached_input_tokens == 3
        assert 1 <= event.output_tokens <= produced["output_tokens"]


@pytest.mark.model
async def test_a_back_ends_refusal_costs_nothing(server: GatewayServer, client: Any) -> None:
    with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
        await client.infer("smollm2-unary", [tensor("text_input", "hi"), tensor("sampling_parameters", "{")], headers=HEADERS)
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        await client.infer("smollm2", text_inputs("hi", stream=False), headers=HEADERS)
    assert [event.outcome for event in await settled(server, 2)] == [OUTCOME_BACKEND_ERROR] * 2


async def test_no_back_end_is_unavailable_and_recorded(tmp_path: Path) -> None:
    async with (
        # Where nobody begins to listen meanwhile.
        running(gateway_settings(tmp_path, "127.0.0.1:1")) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answers(client, {"model_name": "trace", "inputs": trace_inputs(1, 1)})
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert [event.outcome for event in await settled(server, 2)] == [OUTCOME_BACKEND_ERROR] * 2


async def test_a_stop_bills_what_it_cuts_off(tmp_path: Path, back_end: str) -> None:
    settings = gateway_settings(tmp_path, back_end, limits=LimitSettings(shutdown_grace_s=0.1))
    async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        entry = {"model_name": "trace", "inputs": trace_inputs(3, 100_000, chunk_tokens=1, chunk_delay_ms=20)}
        stream = client.stream_infer(one(entry), headers=HEADERS)
        await anext(aiter(stream))
        await server.stop()
    async with running(settings) as again:
        (event,) = journalled(again.meter)
        assert again.recovered == 0
    assert event.uncached_input_tokens == 3
    assert 1 <= event.output_tokens < 100_000


async def one(entry: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield entry


async def test_a_stop_waits_for_bills_that_begin_while_it_waits(server: GatewayServer) -> None:
    written: list[str] = []

    async def bill() -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        written.append("bill")

    async def request() -> None:
        await asyncio.sleep(0)
        server.gateway.spawn(bill())

    server.gateway.spawn(request())
    await server.gateway.drain(180)
    assert written == ["bill"]
