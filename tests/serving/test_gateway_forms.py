"""Requests and answers of a form that was seen before say what they said when everything was looked at."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.gateway import counting, generic, tensorrt_llm, vllm
from serving.gateway.counting import AnswerCounter, PreparedRequest, prepare
from serving.gateway.layout import Forms
from serving.gateway.profiles import ModelProfile
from serving.gateway.request_form import form_of
from serving.kserve import TensorError

PROFILES = (vllm("m"), vllm("m", tokenizer="t"), tensorrt_llm("m", tokenizer="t"), generic("m", tokenizer="t"))
# What a request's data may be, each where a text and where a flag is asked for.
TEXT, FLAG = kserve.pack_bytes([b"a prompt"]), b"\1"
DATA = (TEXT, FLAG, b"\0", kserve.pack_bytes([b""]), b"\5\0\0\0ab", b"\2\0\0\0\xff\xfe", b"", b"\1\1")
NAMES = ["text_input", "stream", "exclude_input_in_output", "chat_template", "return_num_input_tokens", "text_input", "stop"]
DATATYPES = ("BYTES", "BOOL", "BOOL", "INT32")
SHAPES: tuple[list[int], ...] = ([1], [1], [1, 1], [2], [])


def some_request(chance: random.Random) -> Any:
    made = service_pb2.ModelInferRequest(model_name="m", id=chance.choice(["", "client"]))
    for name in chance.sample(NAMES, chance.randint(0, 4)):
        datatype = chance.choice(DATATYPES) if chance.random() < 0.2 else "BYTES" if name == "text_input" else "BOOL"
        made.inputs.add(name=name, datatype=datatype, shape=chance.choice(SHAPES))
        fits = TEXT if datatype == "BYTES" else FLAG
        made.raw_input_contents.append(chance.choice(DATA) if chance.random() < 0.2 else fits)
    if chance.random() < 0.1:
        made.outputs.add(name="text_output")
    if chance.random() < 0.1:
        wants_final: bool | str = True if chance.random() < 0.5 else "yes"
        kserve.set_parameter(made, kserve.EMPTY_FINAL_PARAMETER, wants_final)
    if made.inputs and chance.random() < 0.1:
        kserve.set_parameter(made.inputs[0], "shared_memory_region", "r")
    return made


def prepared_or_refused(request: Any, profile: ModelProfile, stream: bool) -> tuple[PreparedRequest | str, bytes]:
    """What comes of it, and what the back end would get."""
    try:
        prepared: PreparedRequest | str = prepare(request, profile, "ours", stream=stream)
    except TensorError as error:
        return str(error), b""
    return prepared, request.SerializeToString(deterministic=True)


@pytest.mark.parametrize("profile", PROFILES, ids=["counts", "counts and a tokenizer", "TensorRT-LLM", "a tokenizer"])
def test_a_request_says_the_same_whether_its_form_is_known_or_not(
    profile: ModelProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(7)
    forms_read = 0
    for _ in range(400):
        request, stream = some_request(chance), chance.random() < 0.5
        other = service_pb2.ModelInferRequest()
        other.CopyFrom(request)
        form = form_of(request, profile)
        forms_read += form is not None and form.read(request.raw_input_contents) is not None
        known = prepared_or_refused(request, profile, stream)
        with monkeypatch.context() as patch:
            patch.setattr(counting, "form_of", lambda *_: None)
            assert known == prepared_or_refused(other, profile, stream)
    # Otherwise nothing was compared.
    assert (forms_read > 20) is (profile.counts is not None)


def some_response(chance: random.Random) -> Any:
    made = service_pb2.ModelInferResponse(model_name="m", id="ours")
    texts = [b"some text", b"", b"more"][: chance.choice([1, 1, 1, 2])]
    if chance.random() < 0.9:
        kserve.add_bytes_output(made, "text_output", texts)
    for name in ("num_input_tokens", "num_output_tokens", "num_output_tokens")[: chance.choice([0, 2, 2, 2, 3])]:
        dtype, shape = chance.choice(["UINT32", "INT32", "INT32", "INT64"]), chance.choice([(1,), (1,), (1, 1), ()])
        low = -1 if dtype.startswith("INT") else 0
        kserve.add_integer_output(made, name, chance.choice([low, 0, 3, 5, 2**31 - 1]), dtype=dtype, shape=shape)
    if chance.random() < 0.2:
        kserve.add_integer_output(made, "logprob", 1)
    if made.raw_output_contents and chance.random() < 0.1:
        made.raw_output_contents[0] = chance.choice([b"", b"\1\0\0\0", b"\x09\0\0\0ab"])
    if made.raw_output_contents and chance.random() < 0.05:
        del made.raw_output_contents[-1]
    return made


def counted_or_refused(counter: AnswerCounter, response: Any) -> tuple[Any, ...]:
    try:
        counter.take(response)
    except TensorError as error:
        return (str(error),)
    return counter.counted(), counter.texts(), counter.responses, response.SerializeToString(deterministic=True)


@pytest.mark.parametrize("profile", PROFILES, ids=["counts", "counts and a tokenizer", "TensorRT-LLM", "a tokenizer"])
def test_an_answer_counts_the_same_whether_its_form_is_known_or_not(
    profile: ModelProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(7)
    for _ in range(300):
        request = service_pb2.ModelInferRequest(model_name="m")
        kserve.add_bytes_input(request, "text_input", [b"a prompt"])
        if chance.random() < 0.3:
            kserve.add_bool_input(request, "exclude_input_in_output", True)
        prepared = prepare(request, profile, "ours", stream=False)
        known, unknown = AnswerCounter(profile, prepared), AnswerCounter(profile, prepared)
        for response in [some_response(chance) for _ in range(chance.randint(1, 3))]:
            other = service_pb2.ModelInferResponse()
            other.CopyFrom(response)
            found = counted_or_refused(known, response)
            with monkeypatch.context() as patch:
                patch.setattr(AnswerCounter, "_known_plan", lambda *_: None)
                assert found == counted_or_refused(unknown, other)
            if len(found) == 1:
                break
    assert any(plan is not None for forms in profile.answer_forms for plan in forms.values())


def test_forms_are_forgotten_when_there_are_too_many_and_large_ones_never_kept() -> None:
    forms: Forms[int] = Forms()
    for number in range(600):
        forms.keep((b"%d" % number,), number)
    assert 0 < len(forms) <= 256
    assert forms[(b"599",)] == 599
    forms.keep((bytes(300),), 1)
    forms.keep((b"",) * 300, 1)
    assert (bytes(300),) not in forms
    assert (b"",) * 300 not in forms
