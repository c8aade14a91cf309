"""What is injected into requests, what is taken out of responses, and what the known traps make of counts."""

from __future__ import annotations

from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.gateway import generic, tensorrt_llm, vllm
from serving.gateway.counting import AnswerCounter, prepare
from serving.gateway.profiles import ModelProfile
from serving.kserve import TensorError
from serving.tokenizers import Framing

VLLM = vllm("m", tokenizer="t")


def request(**flags: bool) -> Any:
    made = service_pb2.ModelInferRequest(model_name="m", id="client")
    kserve.add_bytes_input(made, "text_input", [b"a prompt"])
    for name, value in flags.items():
        kserve.add_bool_input(made, name, value)
    return made


def response(text: bytes, input_tokens: int | None = None, output_tokens: int | None = None, shape: Any = ()) -> Any:
    made = service_pb2.ModelInferResponse()
    kserve.add_bytes_output(made, "text_output", [text])
    if input_tokens is not None:
        kserve.add_integer_output(made, "num_input_tokens", input_tokens, dtype="INT32", shape=shape)
    if output_tokens is not None:
        kserve.add_integer_output(made, "num_output_tokens", output_tokens, dtype="INT32", shape=shape)
    return made


def count(profile: ModelProfile, made: Any, *responses: Any) -> AnswerCounter:
    counter = AnswerCounter(profile, prepare(made, profile, "ours", stream=True))
    for one in responses:
        counter.take(one)
    return counter


def test_the_back_end_gets_our_id_and_the_flags_and_the_client_never_sees_them() -> None:
    made = request()
    prepared = prepare(made, VLLM, "ours", stream=True)
    assert made.id == "ours"
    assert prepared.client_id == "client"
    assert kserve.read_bool_input(made, "return_num_input_tokens") is True
    assert kserve.read_bool_input(made, "return_num_output_tokens") is True
    assert kserve.get_parameter(made, kserve.EMPTY_FINAL_PARAMETER) is True
    answer = response(b"hi", 3, 1)
    AnswerCounter(VLLM, prepared).take(answer)
    assert [output.name for output in answer.outputs] == ["text_output"]
    assert len(answer.raw_output_contents) == 1


def test_what_the_client_asked_for_stays() -> None:
    made = request(return_num_input_tokens=True, return_num_output_tokens=False)
    prepared = prepare(made, VLLM, "ours", stream=False)
    assert prepared.hidden_outputs == ("num_output_tokens",)
    assert kserve.read_bool_input(made, "return_num_output_tokens") is True
    assert kserve.get_parameter(made, kserve.EMPTY_FINAL_PARAMETER) is None
    answer = response(b"hi", 3, 1)
    AnswerCounter(VLLM, prepared).take(answer)
    assert [output.name for output in answer.outputs] == ["text_output", "num_input_tokens"]


def test_a_list_of_outputs_is_extended_and_the_extension_hidden() -> None:
    made = request(return_num_input_tokens=True)
    made.outputs.add(name="text_output")
    prepared = prepare(made, VLLM, "ours", stream=False)
    assert [output.name for output in made.outputs] == ["text_output", "num_input_tokens", "num_output_tokens"]
    assert prepared.hidden_outputs == ("num_input_tokens", "num_output_tokens")


def test_typed_requests_get_typed_flags() -> None:
    made = service_pb2.ModelInferRequest(model_name="m")
    tensor = made.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"a prompt")
    assert prepare(made, VLLM, "ours", stream=True).prompts == ("a prompt",)
    assert not made.raw_input_contents


def test_vllm_deltas_are_summed_and_the_input_is_not() -> None:
    counter = count(VLLM, request(stream=True), response(b"a", 5, 1), response(b"b", 5, 2), response(b"", 5, 1))
    counted = counter.counted()
    assert (counted.input_tokens, counted.output_tokens) == (5, 4)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(("flags", "output_tokens"), [({}, 4), ({"exclude_input_in_output": True}, 9), ({"stream": True}, 9)])
def test_tensorrt_llm_counts_the_prompt_as_output_unless_excluded(
    shape: Any, flags: dict[str, bool], output_tokens: int
) -> None:
    counter = count(tensorrt_llm("m"), request(**flags), response(b"a prompt and more", 5, 9, shape))
    assert counter.counted().output_tokens == output_tokens


def test_no_counts_is_none_not_zero() -> None:
    counted = count(VLLM, request(), response(b"text")).counted()
    assert (counted.input_tokens, counted.output_tokens) == (None, None)


@pytest.mark.parametrize("implausible", [-1, -(2**31)])
def test_a_count_that_cannot_be_one_is_no_count(implausible: int) -> None:
    assert count(VLLM, request(), response(b"text", implausible, implausible)).counted().output_tokens is None


def test_text_is_joined_before_it_is_read() -> None:
    euro = "€".encode()
    counter = count(generic("m", tokenizer="t"), request(), response(euro[:1]), response(euro[1:]))
    assert counter.texts() == ["€"]


def test_an_echoed_prompt_is_no_output() -> None:
    assert count(VLLM, request(), response(b"a prompt and more")).texts() == [" and more"]
    assert count(VLLM, request(stream=True), response(b"a prompt and more")).texts() == ["a prompt and more"]
    assert count(VLLM, request(exclude_input_in_output=True), response(b"a prompt")).texts() == ["a prompt"]


def test_the_chat_template_is_part_of_the_prompt() -> None:
    assert prepare(request(chat_template=True), VLLM, "ours", stream=True).framing is Framing.CHAT
    assert prepare(request(), VLLM, "ours", stream=True).framing is Framing.PROMPT


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_refused(where: str) -> None:
    made = request()
    tensor = getattr(made, where).add(name="image")
    tensor.parameters["shared_memory_region"].string_param = "region"
    with pytest.raises(TensorError, match="shared memory"):
        prepare(made, VLLM, "ours", stream=True)


def test_a_prompt_must_be_there_where_it_is_counted() -> None:
    empty = service_pb2.ModelInferRequest(model_name="m")
    with pytest.raises(TensorError, match="text_input"):
        prepare(empty, VLLM, "ours", stream=True)
    assert prepare(empty, vllm("m"), "ours", stream=True).prompts == ()


def test_the_empty_final_flag_must_be_a_bool() -> None:
    made = request()
    kserve.set_parameter(made, kserve.EMPTY_FINAL_PARAMETER, "yes")
    with pytest.raises(TensorError, match="bool_param"):
        prepare(made, VLLM, "ours", stream=True)


def test_a_model_that_cannot_be_metered_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="neither counts nor a tokenizer"):
        ModelProfile("m")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("stream", {"raw": b"\x01\x01"}, "2 bytes for BOOL"),
        ("stream", {"raw": b""}, "0 bytes for BOOL"),
        ("stream", {"datatype": "INT8"}, "datatype 'INT8'"),
        ("stream", {"shape": [2]}, "for BOOL of shape"),
        ("text_input", {"raw": b"\x03\0\0\0ab"}, "claims 3 bytes, 2 follow"),
        ("text_input", {"raw": b"\x01\0\0\0ab"}, "more than 1 elements"),
        ("text_input", {"raw": b"\x02\0\0\0\xff\xfe"}, "is not UTF-8"),
        ("text_input", {"shape": [2]}, "elements for shape"),
        ("text_input", {"datatype": "INT8"}, "datatype 'INT8'"),
    ],
)
def test_what_is_not_plainly_a_flag_or_a_text_is_refused_by_name(name: str, change: dict[str, Any], told: str) -> None:
    made = request(stream=True)
    index = [tensor.name for tensor in made.inputs].index(name)
    if "raw" in change:
        made.raw_input_contents[index] = change["raw"]
    if "datatype" in change:
        made.inputs[index].datatype = change["datatype"]
    if "shape" in change:
        made.inputs[index].shape[:] = change["shape"]
    with pytest.raises(TensorError, match=told) as caught:
        prepare(made, VLLM, "ours", stream=True)
    assert caught.value.tensor == name


def test_of_two_inputs_with_one_name_the_first_counts_and_neither_may_be_in_shared_memory() -> None:
    made = request()
    again = made.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    made.raw_input_contents.append(kserve.pack_bytes([b"another"]))
    assert prepare(made, VLLM, "ours", stream=True).prompts == ("a prompt",)
    kserve.set_parameter(again, "shared_memory_region", "r")
    with pytest.raises(TensorError, match="shared memory"):
        prepare(made, VLLM, "ours", stream=True)
