"""Limits of the answer where a request states none: the back end is told, in its own words, and what comes of one that does not
listen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from billing.v1.account_pb2 import BILLING_MODE_PREPAID, Limits, ModelLimits, Plan
from billing.v1.usage_pb2 import OUTCOME_COMPLETED
from serving import kserve
from serving.gateway.directory import Directory
from serving.gateway.output_limits import limit_output, read_output_asked
from serving.gateway.profiles import ModelProfile, generic, ocr, tensorrt_llm, tensorrt_llm_ids, token_ids, vllm
from serving.kserve import ModelInferRequest
from tests.serving.fake_back_ends import ANSWER, FakeModel, TensorRtLlm, TensorRtLlmIds, Vllm, serving_models
from tests.serving.gateway_support import (
    HEADERS,
    account,
    api_key,
    gateway_settings,
    known_directory,
    put_account,
    put_key,
    running,
    settled,
)

LIMIT = 4
METADATA = (("x-api-key", HEADERS["authorization"].removeprefix("Bearer ")),)
VLLM, TENSORRT_LLM, IDS = vllm("m"), tensorrt_llm("m"), tensorrt_llm_ids("m")
COUNTLESS, OWN_IDS = generic("m", tokenizer="smollm2"), token_ids("m")


def request_of(profile: ModelProfile, sampling: dict[str, Any] | None = None, *, typed: bool = False) -> ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="m")
    if profile.ids is not None:
        kserve.add_integer_input(request, profile.ids.input_ids, 5, dtype="INT32", shape=(1, 1))
        if profile.ids.input_lengths:
            kserve.add_integer_input(request, profile.ids.input_lengths, 1, dtype="INT32", shape=(1, 1))
    elif typed:
        prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=(1,))
        prompt.contents.bytes_contents.append(b"hello")
    else:
        kserve.add_bytes_input(request, "text_input", [b"hello"])
    if sampling is not None:
        kserve.add_bytes_input(request, "sampling_parameters", [json.dumps(sampling).encode()])
    return request


def with_tensor(profile: ModelProfile, tokens: int) -> ModelInferRequest:
    request = request_of(profile)
    kserve.add_integer_input(request, profile.output_limit_input, tokens, dtype="INT64", shape=(1, 1))
    return request


def with_parameter(value: int) -> ModelInferRequest:
    request = request_of(VLLM)
    kserve.set_parameter(request, "max_tokens", value)
    return request


def with_unreadable(profile: ModelProfile, text: bytes) -> ModelInferRequest:
    request = request_of(profile)
    kserve.add_bytes_input(request, "sampling_parameters", [text])
    return request


@pytest.mark.parametrize(
    ("profile", "request_"),
    [
        (VLLM, request_of(VLLM)),
        (VLLM, request_of(VLLM, {"temperature": 0.5})),
        (VLLM, request_of(VLLM, {"temperature": 0.5}, typed=True)),
        (VLLM, request_of(VLLM, {"max_tokens": -1})),
        (VLLM, with_parameter(-1)),
        (COUNTLESS, request_of(COUNTLESS)),
        (TENSORRT_LLM, request_of(TENSORRT_LLM)),
        (TENSORRT_LLM, request_of(TENSORRT_LLM, typed=True)),
        (TENSORRT_LLM, with_tensor(TENSORRT_LLM, -1)),
        (IDS, request_of(IDS)),
        (OWN_IDS, with_tensor(OWN_IDS, -1)),
    ],
)
def test_a_request_that_states_no_limit_is_given_it_in_its_back_ends_words(
    profile: ModelProfile, request_: ModelInferRequest
) -> None:
    asked = read_output_asked(request_, profile.output_limit, profile.output_limit_input)
    assert asked.tokens is None
    is_raw = bool(request_.raw_input_contents)
    sampling = kserve.read_text_input(request_, "sampling_parameters")
    told = limit_output(request_, profile, asked, LIMIT)
    assert told == read_output_asked(request_, profile.output_limit, profile.output_limit_input) == (LIMIT, 1, True)
    # What it said beside is there still, in the form that it had.
    after = kserve.read_text_input(request_, "sampling_parameters")
    assert (after and json.loads(after)) == (sampling and {**json.loads(sampling), "max_tokens": LIMIT})
    assert profile.ids is not None or kserve.read_text_input(request_, "text_input") == "hello"
    assert bool(request_.raw_input_contents) == is_raw


@pytest.mark.parametrize(
    ("profile", "request_", "limit"),
    [
        # vLLM writes 16 tokens where nothing is said: more would be asked than the client did.
        (VLLM, request_of(VLLM), 16),
        (VLLM, request_of(VLLM, {"temperature": 0.5}), 4_096),
        # A tensor that the model may not have.
        (OWN_IDS, request_of(OWN_IDS), LIMIT),
        (ocr("m"), request_of(VLLM), LIMIT),
        # The back end refuses them, and is to.
        (VLLM, with_unreadable(VLLM, b"{"), LIMIT),
        (COUNTLESS, with_unreadable(COUNTLESS, b"[7]"), LIMIT),
    ],
)
def test_no_answer_becomes_longer_and_no_model_is_given_what_it_may_not_have(
    profile: ModelProfile, request_: ModelInferRequest, limit: int
) -> None:
    before = request_.SerializeToString(deterministic=True)
    asked = read_output_asked(request_, profile.output_limit, profile.output_limit_input)
    assert limit_output(request_, profile, asked, limit) == asked
    assert request_.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("value", "tokens"),
    [(7, 7), ("7", 7), (" 7 ", 7), (7.9, 7), (1e9, 10**9), (0, 0), (-7, None), (None, None), ("many", None), ([7], None)],
)
def test_numbers_in_json_are_read_as_a_back_end_reads_them(value: object, tokens: int | None) -> None:
    request = request_of(VLLM, {"max_tokens": value, "n": "3"})
    asked = read_output_asked(request, VLLM.output_limit)
    assert asked == (tokens, 3, True)


def limited(whose: str) -> Directory:
    directory = known_directory()
    limits = Limits(output_tokens_max=LIMIT)
    plans = {
        "tenant": Plan(billing_mode=BILLING_MODE_PREPAID, limits=limits),
        "model": Plan(billing_mode=BILLING_MODE_PREPAID, model_limits=[ModelLimits(model="m", limits=limits)]),
        "shadow": Plan(billing_mode=BILLING_MODE_PREPAID, limits=limits, shadow=True),
    }
    if whose == "key":
        put_key(directory, api_key(limits=limits))
    else:
        put_account(directory, account(sequence=2, plan=plans[whose]))
    return directory


async def infer(port: int, request: ModelInferRequest, *, stream: bool) -> list[Any]:
    """The data responses that the client gets."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        if not stream:
            return [await stub.ModelInfer(request, metadata=METADATA)]
        found = [response async for response in stub.ModelStreamInfer(iter([request]), metadata=METADATA)]
        assert not any(response.error_message for response in found)
        return [response.infer_response for response in found]


@pytest.mark.parametrize(
    ("whose", "profile", "make"),
    [("key", VLLM, Vllm), ("tenant", TENSORRT_LLM, TensorRtLlm), ("model", IDS, TensorRtLlmIds)],
    ids=["vllm", "tensorrt_llm", "tensorrt_llm_ids"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
async def test_a_back_end_writes_no_more_than_the_limit(
    tmp_path: Path, whose: str, profile: ModelProfile, make: Callable[[], FakeModel], stream: bool
) -> None:
    back_end = make()
    request = request_of(profile)
    if profile.exclude_input is not None:
        kserve.add_bool_input(request, profile.exclude_input, True, shape=(1, 1))
    if stream and profile.stream_input is not None:
        kserve.add_bool_input(request, profile.stream_input, True, shape=(1, 1))
    async with serving_models({"m": back_end}) as address:
        settings = gateway_settings(tmp_path, address, models={"m": profile}, tokenizers={})
        async with running(settings, limited(whose)) as server:
            found = await infer(server.port, request, stream=stream)
            [event] = await settled(server)
            assert server.gateway.metrics["answers_over_limit"] == 0
    # The back end worked for no more than what is delivered and billed.
    assert back_end.made == [LIMIT]
    assert (event.outcome, event.output_tokens) == (OUTCOME_COMPLETED, LIMIT)
    assert not event.attributes
    assert found
    assert "taximeter_output_tokens_max" not in found[-1].parameters


@pytest.mark.parametrize("whose", ["tenant", "shadow"])
async def test_an_answer_in_one_piece_that_is_too_long_all_the_same_is_delivered_billed_and_flagged(
    tmp_path: Path, whose: str
) -> None:
    back_end = Vllm(obeys=False)
    async with serving_models({"m": back_end}) as address:
        settings = gateway_settings(tmp_path, address, models={"m": VLLM}, tokenizers={})
        async with running(settings, limited(whose)) as server:
            request = request_of(VLLM)
            kserve.add_bool_input(request, "exclude_input_in_output", True)
            [response] = await infer(server.port, request, stream=False)
            [event] = await settled(server)
            flagged = server.gateway.metrics["answers_over_limit"]
    assert kserve.read_bytes_output(response, "text_output") == ["".join(ANSWER).encode()]
    assert (event.outcome, event.output_tokens) == (OUTCOME_COMPLETED, len(ANSWER))
    told = kserve.get_parameter(response, "taximeter_output_tokens_max")
    # Who is only watched is told nothing.
    assert (flagged, told, dict(event.attributes)) == (
        (1, LIMIT, {"output_tokens_max": str(LIMIT)}) if whose == "tenant" else (0, None, {})
    )
