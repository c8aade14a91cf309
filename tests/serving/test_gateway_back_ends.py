"""vLLM's and TensorRT-LLM's back ends, as they are documented, behind the gateway: every combination of streaming and flags is
billed for what it used, and the client sees what it would have seen without a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_TOKENIZER,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    UsageEvent,
)
from serving import kserve
from serving.gateway import GatewaySettings, LimitSettings
from serving.gateway.profiles import (
    ModelProfile,
    classification,
    embeddings,
    ocr,
    speech_to_text,
    tensorrt_llm,
    tensorrt_llm_ids,
    text_to_image,
    vllm,
)
from serving.model_server import find_smollm2_weights
from serving.tokenizers import Framing, load_tokenizer
from tests.serving.fake_back_ends import (
    ANSWER,
    Canned,
    FakeModel,
    TensorRtLlm,
    TensorRtLlmIds,
    Vllm,
    Wide,
    prompt_tokens,
    serving_models,
)
from tests.serving.gateway_support import (
    HEADERS,
    account,
    answers,
    api_key,
    billed,
    gateway_settings,
    known_directory,
    put_account,
    put_key,
    running,
    settled,
    text_inputs,
    told,
    without_usage,
)

PROMPT = "tell me five words"
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
BOTH = (False, True)


def settings(folder: Path, address: str, *models: ModelProfile, **fields: Any) -> GatewaySettings:
    fields.setdefault("limits", LimitSettings(tenant_requests_max=1_000))
    return gateway_settings(folder, address, models={model.model: model for model in models}, **fields)


def ask(model: str, number: int, shape: tuple[int, ...], *, typed: bool, **flags: bool | None) -> Any:
    """A request with its flags in the model's shape; None: the flag is not there."""
    request = service_pb2.ModelInferRequest(model_name=model, id=f"mine-{number}")
    if typed:
        prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
        prompt.contents.bytes_contents.append(PROMPT.encode())
    else:
        kserve.add_bytes_input(request, "text_input", [PROMPT.encode()])
        request.inputs[0].shape[:] = shape
    for name, value in flags.items():
        if value is not None:
            kserve.add_bool_input(request, name, value, shape=shape)
    return request


async def stream(address: str, request: Any, metadata: tuple[tuple[str, str], ...] = ()) -> list[Any]:
    async def one() -> AsyncIterator[Any]:
        yield request

    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(one(), metadata=metadata)
        return [response async for response in call]


async def through_and_direct(gateway: str, direct: str, requests: list[Any]) -> list[tuple[list[Any], list[Any]]]:
    """What a client of the gateway gets and what one of the back end itself gets, a few requests at a time."""
    metadata = (("x-api-key", HEADERS["authorization"].removeprefix("Bearer ")),)
    found: list[tuple[list[Any], list[Any]]] = []
    for first in range(0, len(requests), 32):
        some = requests[first : first + 32]
        through = await asyncio.gather(*(stream(gateway, request, metadata) for request in some))
        plain = await asyncio.gather(*(stream(direct, request) for request in some))
        found += zip(through, plain, strict=True)
    return found


def hidden_usage(response: Any) -> Any:
    copy = type(response)()
    copy.CopyFrom(response)
    copy.infer_response.CopyFrom(without_usage(response.infer_response))
    return copy


async def check(
    folder: Path, profile: ModelProfile, back_ends: Mapping[str, FakeModel], asked: list[tuple[Any, tuple[int, int]]]
) -> None:
    """Each request through the gateway and past it; `asked` has what each uses."""
    profiles = [replace(profile, model=name) for name in back_ends]
    async with serving_models(back_ends) as address, running(settings(folder, address, *profiles)) as server:
        found = await through_and_direct(f"127.0.0.1:{server.port}", address, [request for request, _ in asked])
        events = {event.client_request_id: event for event in await settled(server, len(asked))}
    assert len(events) == len(asked)
    for (request, used), (through, plain) in zip(asked, found, strict=True):
        event = events[request.id]
        assert billed(event)[1:] == used, request
        assert (event.outcome, event.count_source) == (OUTCOME_COMPLETED, COUNT_SOURCE_BACKEND)
        assert [hidden_usage(response) for response in through] == plain, request
        assert told(through[-1].infer_response)[:3] == billed(event)  # type: ignore[index]
        assert all(told(response.infer_response) is None for response in through[:-1])


async def test_vllm_is_billed_right_in_every_combination(tmp_path: Path) -> None:
    asked: list[tuple[Any, tuple[int, int]]] = []
    for combination in product(
        ((False, None), (False, True), (False, False), (True, None), (True, True)), BOTH, BOTH, BOTH, BOTH, BOTH, (1, 2)
    ):
        (streaming, excluded), input_count, output_count, ends_empty, wants_empty, typed, n = combination
        request = ask(
            "empty-end" if ends_empty else "full-end",
            len(asked),
            (1,),
            typed=typed,
            stream=streaming,
            exclude_input_in_output=excluded,
            return_num_input_tokens=input_count or None,
            return_num_output_tokens=output_count,
        )
        kserve.add_bytes_input(request, "sampling_parameters", [b'{"n": %d}' % n])
        if wants_empty:
            kserve.set_parameter(request, kserve.EMPTY_FINAL_PARAMETER, True)
        asked.append((request, (prompt_tokens(PROMPT), n * len(ANSWER))))
    await check(tmp_path, vllm("m"), {"full-end": Vllm(), "empty-end": Vllm(empty_final=True)}, asked)


async def test_tensorrt_llm_is_billed_right_in_every_combination(tmp_path: Path) -> None:
    asked: list[tuple[Any, tuple[int, int]]] = []
    for combination in product(BOTH, (None, True, False), BOTH, BOTH, BOTH, BOTH, BOTH, (1, 2)):
        streaming, excluded, input_count, output_count, ends_empty, wants_empty, typed, beams = combination
        if streaming and beams > 1:
            # The back end refuses it.
            continue
        request = ask(
            "empty-end" if ends_empty else "full-end",
            len(asked),
            (1, 1),
            typed=typed,
            stream=streaming,
            exclude_input_in_output=excluded,
            return_num_input_tokens=input_count,
            return_num_output_tokens=output_count or None,
        )
        kserve.add_integer_input(request, "beam_width", beams, dtype="INT32", shape=(1, 1))
        if wants_empty:
            kserve.set_parameter(request, kserve.EMPTY_FINAL_PARAMETER, True)
        asked.append((request, (prompt_tokens(PROMPT), beams * len(ANSWER))))
    await check(tmp_path, tensorrt_llm("m"), {"full-end": TensorRtLlm(), "empty-end": TensorRtLlm(empty_final=True)}, asked)


async def test_tensorrt_llms_inner_model_is_billed_right_in_every_combination(tmp_path: Path) -> None:
    asked: list[tuple[Any, tuple[int, int]]] = []
    for streaming, excluded, repeats, output_count, listed, ends_empty, beams in product(
        BOTH, (None, True, False), BOTH, BOTH, BOTH, BOTH, (1, 2)
    ):
        if beams > 1 and streaming and not repeats:
            # Beams change while they grow, so the back end wants all of them repeated.
            continue
        request = service_pb2.ModelInferRequest(model_name="empty-end" if ends_empty else "full-end", id=f"mine-{len(asked)}")
        ids = np.array([[7, 8, 9, 2, 2]], dtype=np.int32)
        request.inputs.add(name="input_ids", datatype="INT32", shape=ids.shape)
        request.raw_input_contents.append(ids.tobytes())
        for name, value in (("input_lengths", 3), ("beam_width", beams), ("request_output_len", 10)):
            kserve.add_integer_input(request, name, value, dtype="INT32", shape=(1, 1))
        flags = {
            "streaming": streaming,
            "exclude_input_in_output": excluded,
            "return_all_generated_tokens": repeats,
            "return_num_output_tokens": output_count,
        }
        for name, flag in flags.items():
            if flag is not None:
                kserve.add_bool_input(request, name, flag, shape=(1, 1))
        if listed:
            request.outputs.add(name="sequence_length")
        asked.append((request, (3, len(ANSWER) + (len(ANSWER) - 1) * (beams - 1))))
    fakes = {"full-end": TensorRtLlmIds(), "empty-end": TensorRtLlmIds(empty_final=True)}
    await check(tmp_path, tensorrt_llm_ids("m"), fakes, asked)


async def test_what_vllm_refuses_costs_nothing_and_is_told_in_its_own_words(tmp_path: Path) -> None:
    request = ask("m", 0, (1,), typed=False, stream=True, exclude_input_in_output=False)
    async with serving_models({"m": Vllm()}) as address, running(settings(tmp_path, address, vllm("m"))) as server:
        ((through, plain),) = await through_and_direct(f"127.0.0.1:{server.port}", address, [request])
        (event,) = await settled(server)
    kserve.drop_parameter(through[0].infer_response, "taximeter_status")
    assert through == plain
    assert event.outcome == OUTCOME_BACKEND_ERROR


@pytest.mark.parametrize("counts_at_end_only", BOTH)
async def test_a_cancel_brings_no_counts_and_is_billed_for_what_came(tmp_path: Path, counts_at_end_only: bool) -> None:
    """Deltas that came are summed; where none had come yet, the tokenizer counts the text that did, in one piece."""
    fake = Vllm(stall_after=2, counts_at_end_only=counts_at_end_only)
    event = await _cancelled(tmp_path, fake, chunks=1)
    assert event.outcome == OUTCOME_CANCELLED
    if counts_at_end_only:
        tokenizer = load_tokenizer(find_smollm2_weights())
        written = tokenizer.count("".join(ANSWER[:4]), Framing.OUTPUT)
        assert billed(event)[1:] == (tokenizer.count(PROMPT, Framing.PROMPT), written)
        assert (event.count_source, event.tokenizer) == (COUNT_SOURCE_TOKENIZER, tokenizer.fingerprint)
    else:
        assert billed(event)[1:] == (prompt_tokens(PROMPT), 4)
        assert event.count_source == COUNT_SOURCE_BACKEND


async def _cancelled(folder: Path, fake: FakeModel, chunks: int) -> UsageEvent:
    """The bill of a request that is cancelled after `chunks` chunks, when the back end had sent all before it stalls."""
    profile = vllm("m", tokenizer="smollm2")
    async with (
        serving_models({"m": fake}) as address,
        running(settings(folder, address, profile)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        entry = {"model_name": "m", "inputs": text_inputs(PROMPT, stream=True)}

        async def one() -> AsyncIterator[dict[str, Any]]:
            yield entry

        call = client.stream_infer(one(), headers=HEADERS)
        received = 0
        async for _ in call:
            received += 1
            if received == chunks:
                # The chunk after it is there: until it was, this one was held back, as it might have been the last.
                call.cancel()
                break
        (event,) = await settled(server)
        return event


@pytest.mark.parametrize("decoupled", BOTH)
async def test_a_request_that_the_gateway_sends_again_is_billed_once(tmp_path: Path, decoupled: bool) -> None:
    fake = Vllm(failures=1)
    profile = vllm("m", decoupled=decoupled)
    async with (
        serving_models({"m": fake}) as address,
        running(settings(tmp_path, address, profile)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        inputs = text_inputs(PROMPT, stream=False, max_tokens=len(ANSWER))
        if decoupled:
            ((response, error),) = await answers(client, {"model_name": "m", "inputs": inputs})
            assert error is None
        else:
            response = (await client.infer("m", inputs, headers=HEADERS)).get_response()
        (event,) = await settled(server)
        assert server.metrics()["upstream_retries"] == 1
    assert fake.asked == [event.request_id] * 2
    assert event.outcome == OUTCOME_COMPLETED
    assert told(response)[:3] == billed(event) == (event.request_id, prompt_tokens(PROMPT), len(ANSWER))  # type: ignore[index]


async def test_a_back_end_that_stays_away_is_told_after_the_last_attempt(tmp_path: Path) -> None:
    fake = Vllm(failures=9)
    limits = LimitSettings(upstream_attempts=3)
    async with (
        serving_models({"m": fake}) as address,
        running(settings(tmp_path, address, vllm("m"), limits=limits)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="being loaded"):
            await answers(client, {"model_name": "m", "inputs": text_inputs(PROMPT, stream=True)})
        (event,) = await settled(server)
    assert len(fake.asked) == 3
    assert (event.outcome, event.uncached_input_tokens, event.output_tokens) == (OUTCOME_BACKEND_ERROR, 0, 0)


async def test_a_stop_by_id_reaches_the_tenants_own_request_and_no_other(tmp_path: Path) -> None:
    """TensorRT-LLM stops the request whose id a `stop` comes with; two tenants chose the same one."""
    directory = known_directory()
    put_key(directory, api_key(key_id="key-b", secret="of-b", tenant_id="tenant-b"))
    put_account(directory, account("tenant-b"))
    metadata = {"tenant-a": (("authorization", HEADERS["authorization"]),), "tenant-b": (("x-api-key", "of-b"),)}
    fake = TensorRtLlm(stall_after=1)
    generate = ask("m", 0, (1, 1), typed=False, stream=True)
    stop = ask("m", 0, (1, 1), typed=False, stop=True)
    async with (
        serving_models({"m": fake}) as address,
        running(settings(tmp_path, address, tensorrt_llm("m")), directory) as server,
    ):
        gateway = f"127.0.0.1:{server.port}"
        running_of = {tenant: asyncio.create_task(stream(gateway, generate, metadata[tenant])) for tenant in metadata}
        async with asyncio.timeout(180):
            for _ in metadata:
                await fake.arrivals.acquire()
            await stream(gateway, stop, metadata["tenant-a"])
            await running_of["tenant-a"]
            assert not running_of["tenant-b"].done()
            await stream(gateway, stop, metadata["tenant-b"])
            await running_of["tenant-b"]
        events = await settled(server, 4)
    assert len(set(fake.asked)) == 2, "each stop came with the id of the request that it stops"
    assert sorted((event.tenant_id, *billed(event)[1:]) for event in events) == [
        *[("tenant-a", 0, 0), ("tenant-a", prompt_tokens(PROMPT), 2)],
        *[("tenant-b", 0, 0), ("tenant-b", prompt_tokens(PROMPT), 2)],
    ]
    assert {event.outcome for event in events} == {OUTCOME_COMPLETED}


SPOKEN = "The quick brown fox"


async def test_speech_images_embeddings_and_classes_are_billed_by_their_units(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_smollm2_weights())
    profiles = (
        speech_to_text("speech", tokenizer="smollm2"),
        text_to_image("image", tokenizer="smollm2"),
        embeddings("embed", tokenizer="smollm2"),
        classification("classify", tokenizer="smollm2"),
    )
    fakes = {"speech": Canned(text=SPOKEN), "image": Canned(), "embed": Canned(), "classify": Canned(text="fine")}
    sent: dict[str, dict[str, Any]] = {
        "speech": {"audio": np.zeros((1, 24_001), np.float32)},
        "image": {"prompt": [[b"a red cat"]], "negative_prompt": [[b"no dog"]], "steps": [[20]], "samples": [[2]]},
        "embed": {"text_input": [[b"one two"], [b"three"]]},
        "classify": {"text_input": [[b"one two"]]},
    }
    async with (
        serving_models(fakes) as address,
        running(settings(tmp_path, address, *profiles)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
        triton_aio.InferenceServerClient(address) as direct,
    ):
        for model, inputs in sent.items():
            tensors = [_tensor(name, value) for name, value in inputs.items()]
            through = await client.infer(model, tensors, headers=HEADERS)
            assert without_usage(through.get_response()) == (await direct.infer(model, tensors)).get_response()
        events = {event.model: event for event in await settled(server, len(sent))}

    def tokens(*texts: str) -> int:
        return sum(tokenizer.count(text, Framing.PROMPT) for text in texts)

    used = {model: (*billed(event)[1:], {unit.unit: unit.quantity for unit in event.units}) for model, event in events.items()}
    assert used == {
        "speech": (0, tokenizer.count(SPOKEN, Framing.OUTPUT), {"audio_ms": 1_501}),
        "image": (tokens("a red cat", "no dog"), 0, {"image_steps": 40}),
        "embed": (tokens("one two", "three"), 0, {"requests": 1}),
        "classify": (tokens("one two"), 0, {"requests": 1}),
    }
    assert {event.count_source for event in events.values()} == {COUNT_SOURCE_TOKENIZER}


def _tensor(name: str, value: Any) -> Any:
    array = np.array(value)
    if array.dtype.kind in "SO":
        array = array.astype(np.object_)
    elif array.dtype == np.int64:
        array = array.astype(np.int32)
    tensor = triton_aio.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_answers_that_a_back_end_compresses_are_billed_and_delivered(
    tmp_path: Path, compression: grpc.Compression
) -> None:
    request = ask("m", 1, (1,), typed=False, stream=True)
    async with (
        serving_models({"m": Vllm()}, compression) as address,
        running(settings(tmp_path, address, vllm("m"))) as server,
    ):
        [(through, plain)] = await through_and_direct(f"127.0.0.1:{server.port}", address, [request])
        (event,) = await settled(server)
    assert [hidden_usage(response) for response in through] == plain
    assert billed(event)[1:] == (prompt_tokens(PROMPT), len(ANSWER))


async def test_messages_far_beyond_grpcs_default_pass_and_are_billed(tmp_path: Path) -> None:
    size = 48 << 20
    profile = ocr("wide", text_output="lines")
    async with (
        serving_models({"wide": Wide()}) as address,
        running(settings(tmp_path, address, profile)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        image = triton_aio.InferInput("image", [size], "UINT8")
        image.set_data_from_numpy(np.zeros(size, dtype=np.uint8))
        result = await client.infer("wide", [image], headers=HEADERS)
        assert len(result.as_numpy("lines")[0]) == size
        (event,) = await settled(server)
    assert {unit.unit: unit.quantity for unit in event.units} == {"characters": size, "requests": 1}
