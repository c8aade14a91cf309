"""An unmodified tritonclient, a real Triton and real models, with the gateway between them: the same bytes, and the right
bill."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_sync
import tritonclient.grpc.aio as triton_aio

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_TOKENIZER,
    OPERATION_OCR,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
)
from serving.gateway import GatewayServer
from serving.gateway.policy import POLICIES
from serving.gateway.profiles import generic, ocr, vllm
from serving.model_server import find_smollm2_weights
from serving.tokenizers import Framing, load_tokenizer
from taximeter.model_trial import TrialRequest, try_profile
from tests.services.triton import TritonServer
from tests.serving.gateway_support import (
    HEADERS,
    answers,
    billed,
    journalled,
    requests,
    settled,
    sync_answers,
    text_inputs,
    told,
    without_usage,
)
from tests.serving.triton.conformance import CASES, DIFFERENCES, OPERATOR, compare

pytestmark = [pytest.mark.triton, pytest.mark.model]

PROMPTS = ("The capital of France is", "从前有一座山，", "Grüße 👋🏽 aus")
PAGE = ["INVOICE", "2026-11-26", "1,234 tokens"]


def produced(triton: TritonServer, request_id: str) -> dict[str, Any]:
    """What Triton's model says that it made for a request, once it has ended there."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for line in triton.production_log.read_text().splitlines():
            entry: dict[str, Any] = json.loads(line)
            if entry["request_id"] == request_id:
                return entry
        time.sleep(0.02)
    raise TimeoutError(f"Triton's model has no line for {request_id}")


def texts(*prompts: str) -> list[Any]:
    """The batch model's inputs; four tokens for each prompt."""
    words = triton_sync.InferInput("text_input", [len(prompts), 1], "BYTES")
    words.set_data_from_numpy(np.array([[prompt.encode()] for prompt in prompts], dtype=np.object_))
    limit = triton_sync.InferInput("max_tokens", [len(prompts), 1], "INT32")
    limit.set_data_from_numpy(np.full((len(prompts), 1), 4, dtype=np.int32))
    return [words, limit]


def image(name: str) -> list[Any]:
    data = np.frombuffer(Path(__file__).with_name(name).read_bytes(), dtype=np.uint8)
    tensor = triton_sync.InferInput("image", [len(data)], "UINT8")
    tensor.set_data_from_numpy(data)
    return [tensor]


async def test_every_rpc_answers_as_triton_does_but_for_the_listed_differences(
    triton: TritonServer, server: GatewayServer
) -> None:
    metadata = (("x-api-key", OPERATOR),)
    found = {}
    async for name, direct, through in compare(triton.address, f"127.0.0.1:{server.port}", metadata):
        if direct != through:
            found[name] = f"{name}\n  Triton:  {direct}\n  gateway: {through}"
    unlisted = [found[name] for name in found if name not in DIFFERENCES]
    assert not unlisted, "\n".join(unlisted)
    assert set(found) == set(DIFFERENCES), "a difference that is listed is none"


def test_the_conformance_suite_has_every_rpc() -> None:
    asked = {name.partition(",")[0].rpartition("/")[2] for name in CASES}
    assert asked | {"ServerReflectionInfo"} >= {method for _, method in POLICIES}


@pytest.mark.parametrize("prompt", PROMPTS)
async def test_a_stream_is_triton_s_own_and_its_bill_what_the_model_made(
    triton: TritonServer, server: GatewayServer, prompt: str
) -> None:
    entry = {
        "model_name": "smollm2",
        "inputs": text_inputs(prompt, stream=True, return_finish_reason=True),
        "request_id": "mine",
    }
    address = f"127.0.0.1:{server.port}"
    found = [await sync_answers(address, entry, empty_final=empty) for empty in (False, True)]
    plain = [await sync_answers(triton.address, entry, empty_final=empty) for empty in (False, True)]
    async with triton_aio.InferenceServerClient(address) as client, triton_aio.InferenceServerClient(triton.address) as direct:
        found.append(await answers(client, entry))
        plain.append(await answers(direct, entry))
    for through, itself in zip(found, plain, strict=True):
        assert [without_usage(response).SerializeToString(deterministic=True) for response, _ in through] == [
            response.SerializeToString(deterministic=True) for response, _ in itself
        ]
    events = journalled(server.meter)
    assert [told(through[-1][0])[:3] for through in found] == [billed(event) for event in events]  # type: ignore[index]
    for event in events:
        made = await asyncio.to_thread(produced, triton, event.request_id)
        assert billed(event)[1:] == (made["input_tokens"], made["output_tokens"])
        assert (event.outcome, event.count_source) == (OUTCOME_COMPLETED, COUNT_SOURCE_BACKEND)


async def test_a_batch_is_triton_s_own_and_every_text_of_it_is_counted(triton: TritonServer, server: GatewayServer) -> None:
    address = f"127.0.0.1:{server.port}"
    tokenizer = load_tokenizer(find_smollm2_weights())

    def sync_infer(where: str) -> Any:
        with triton_sync.InferenceServerClient(where) as client:
            return client.infer("smollm2-batch", texts(*PROMPTS), headers=HEADERS, request_id="mine").get_response()

    async def aio_infer(where: str) -> Any:
        async with triton_aio.InferenceServerClient(where) as client:
            result = await client.infer("smollm2-batch", texts(*PROMPTS), headers=HEADERS, request_id="mine")
            return result.get_response()

    through = [await asyncio.to_thread(sync_infer, address), await aio_infer(address)]
    plain = [await asyncio.to_thread(sync_infer, triton.address), await aio_infer(triton.address)]
    assert [without_usage(response).SerializeToString(deterministic=True) for response in through] == [
        response.SerializeToString(deterministic=True) for response in plain
    ]
    output = triton_sync.InferResult(plain[0]).as_numpy("text_output").flatten()
    expected = (
        sum(tokenizer.count(prompt, Framing.PROMPT) for prompt in PROMPTS),
        sum(tokenizer.count(answer.decode(errors="replace"), Framing.OUTPUT) for answer in output),
    )
    for event in journalled(server.meter):
        assert (event.count_source, event.tokenizer) == (COUNT_SOURCE_TOKENIZER, tokenizer.fingerprint)
        assert billed(event)[1:] == expected


async def test_a_cancel_reaches_triton_s_model_and_is_billed_for_what_it_made(
    triton: TritonServer, server: GatewayServer
) -> None:
    entry = {"model_name": "smollm2", "inputs": text_inputs(PROMPTS[0], stream=True, max_tokens=1_000)}
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        stream = client.stream_infer(requests(entry), headers=HEADERS)
        received = 0
        async for _ in stream:
            received += 1
            if received == 3:
                stream.cancel()
                break
        (event,) = await settled(server)
    made = await asyncio.to_thread(produced, triton, event.request_id)
    assert made["cancelled"]
    assert event.outcome == OUTCOME_CANCELLED
    assert event.uncached_input_tokens == made["input_tokens"]
    # The model stops within a few tokens of the cancel, and nobody can tell the gateway about those.
    assert received <= event.output_tokens <= made["output_tokens"] < 1_000


async def test_ocr_is_billed_by_the_character(triton: TritonServer, server: GatewayServer) -> None:
    async with (
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
        triton_aio.InferenceServerClient(triton.address) as direct,
    ):
        through = await client.infer("ocr", image("page.png"), headers=HEADERS, request_id="mine")
        plain = await direct.infer("ocr", image("page.png"), request_id="mine")
        blank = await client.infer("ocr", image("blank.png"), headers=HEADERS)
        with pytest.raises(triton_aio.InferenceServerException, match="not an image file"):
            await client.infer("ocr", image("conftest.py"), headers=HEADERS)
    assert without_usage(through.get_response()) == plain.get_response()
    lines = [line.decode() for line in plain.as_numpy("lines")]
    assert lines == PAGE
    read, nothing, refused = await settled(server, 3)
    characters = sum(map(len, PAGE))
    assert {unit.unit: unit.quantity for unit in read.units} == {"characters": characters, "requests": 1}
    assert through.get_response().parameters["taximeter_characters"].int64_param == characters
    assert (read.uncached_input_tokens, read.output_tokens, read.operation) == (0, 0, OPERATION_OCR)
    assert read.count_source == COUNT_SOURCE_BACKEND
    assert blank.as_numpy("lines").size == 0
    assert {unit.unit: unit.quantity for unit in nothing.units} == {"requests": 1}
    assert refused.outcome == OUTCOME_BACKEND_ERROR


async def test_a_profile_is_tried_on_a_live_triton(triton: TritonServer) -> None:
    tokenizers = {"smollm2": find_smollm2_weights()}
    page = Path(__file__).with_name("page.png").read_bytes()
    read = await try_profile(ocr("ocr", text_output="lines"), {}, triton.address, TrialRequest("", 1, {"image": [page]}))
    assert (read.problems, read.error, read.answer) == ((), "", "".join(PAGE))
    assert read.event is not None
    assert {unit.unit: unit.quantity for unit in read.event.units} == {"characters": sum(map(len, PAGE)), "requests": 1}
    batch = generic("smollm2-batch", tokenizer="smollm2", decoupled=False)
    written = await try_profile(batch, tokenizers, triton.address, TrialRequest(PROMPTS[0], 4, {}))
    assert written.event is not None
    assert billed(written.event)[1:] == (written.tokenizer_input, written.tokenizer_output)
    # Triton says which inputs a model can do without, and how it answers.
    wrong = await try_profile(vllm("smollm2-batch"), {}, triton.address, TrialRequest(PROMPTS[0], 4, {}))
    assert wrong.event is not None
    assert wrong.event.outcome == OUTCOME_BACKEND_ERROR
    assert [problem.partition(":")[0] for problem in wrong.problems] == [
        "input return_num_input_tokens",
        "input return_num_output_tokens",
        "output num_input_tokens",
        "output num_output_tokens",
        "decoupled = true",
    ]
