"""What is billed beside tokens: read off a request or its answer, refused where it cannot be, and set aside before it is
used."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import np_to_triton_dtype

from billing.v1.usage_pb2 import (
    OPERATION_CLASSIFICATION,
    OPERATION_EMBEDDINGS,
    OPERATION_OCR,
    OPERATION_SPEECH_TO_TEXT,
    OPERATION_TEXT_TO_IMAGE,
)
from serving import kserve
from serving.gateway.counting import AnswerCounter, Counted, prepare, reserved_units
from serving.gateway.profiles import (
    ModelProfile,
    classification,
    embeddings,
    ocr,
    speech_to_text,
    tensorrt_llm_ids,
    text_to_image,
    token_ids,
    vllm_embeddings,
)
from serving.gateway.units import count_characters
from serving.kserve import TensorError


def request(outputs: tuple[str, ...] = (), /, **inputs: Any) -> Any:
    """As tritonclient makes one."""
    made = service_pb2.ModelInferRequest(model_name="m", id="client")
    for name, value in inputs.items():
        array = np.array(value, dtype=np.object_) if np.asarray(value).dtype.kind in "OSU" else np.asarray(value)
        tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.inputs.append(tensor._get_tensor())
        made.raw_input_contents.append(tensor._get_content())
    for name in outputs:
        made.outputs.add(name=name)
    return made


def texts(name: str, *elements: str | bytes) -> Any:
    made = service_pb2.ModelInferResponse()
    kserve.add_bytes_output(made, name, [part.encode() if isinstance(part, str) else part for part in elements])
    return made


def ids(output: list[list[int]], lengths: list[int] | None = None, **counts: int) -> Any:
    """One response of TensorRT-LLM's inner model: its beams padded to the longest."""
    made = service_pb2.ModelInferResponse()
    array = np.array([output], dtype=np.int32)
    made.outputs.add(name="output_ids", datatype="INT32", shape=array.shape)
    made.raw_output_contents.append(array.tobytes())
    if lengths is not None:
        made.outputs.add(name="sequence_length", datatype="INT32", shape=[1, len(lengths)])
        made.raw_output_contents.append(np.array(lengths, dtype=np.int32).tobytes())
    for name, value in counts.items():
        kserve.add_integer_output(made, name, value, dtype="INT32", shape=(1, 1))
    return made


def count(profile: ModelProfile, made: Any, *responses: Any) -> Counted:
    counter = AnswerCounter(profile, prepare(made, profile, "ours", stream=True))
    for response in responses:
        counter.take(response)
    return counter.counted()


# -- units -------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.text(), st.lists(st.integers(0, 60), max_size=5))
def test_characters_are_code_points_wherever_the_text_is_cut(text: str, cuts: list[int]) -> None:
    raw = text.encode(errors="replace")
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[start:end] for start, end in pairwise(edges)]
    assert sum(map(count_characters, pieces)) == len(raw.decode())


def test_ocr_counts_the_characters_of_all_lines_and_no_tokens() -> None:
    profile = ocr("m", text_output="lines")
    found = count(profile, request(image=np.zeros(4, np.uint8)), texts("lines", "Grüße", "总计"), texts("lines"))
    assert (found.input_tokens, found.output_tokens, found.units) == (0, 0, (7, 1))
    assert profile.operation == OPERATION_OCR


@pytest.mark.parametrize(
    ("samples", "rate_hz", "expected_ms"), [(16_000, 16_000, 1_000), (1, 16_000, 1), (16_001, 16_000, 1_001), (0, 8_000, 0)]
)
def test_audio_is_rounded_up_to_the_millisecond_once(samples: int, rate_hz: int, expected_ms: int) -> None:
    profile = speech_to_text("m", tokenizer="t", sample_rate_hz=rate_hz)
    found = count(profile, request(audio=np.zeros((1, samples), np.float32)), texts("text_output", "hi"))
    assert (found.input_tokens, found.output_tokens, found.units) == (0, None, (expected_ms,))
    assert profile.operation == OPERATION_SPEECH_TO_TEXT


def test_padded_audio_is_as_long_as_it_says() -> None:
    profile = speech_to_text("m", tokenizer="t", audio_input="WAV", audio_lengths_input="WAV_LENS")
    padded = request(WAV=np.zeros((2, 16_000), np.float32), WAV_LENS=np.array([[8_000], [16_000]], np.int32))
    assert count(profile, padded).units == (1_500,)
    with pytest.raises(TensorError, match=r"WAV_LENS.*WAV has 100"):
        count(profile, request(WAV=np.zeros((1, 100), np.float32), WAV_LENS=np.array([[101]], np.int32)))


def test_audio_must_be_there_and_fit_its_shape() -> None:
    profile = speech_to_text("m", tokenizer="t")
    with pytest.raises(TensorError, match=r"audio.*missing"):
        count(profile, request(other=np.zeros(1, np.float32)))
    lying = request(audio=np.zeros((1, 100), np.float32))
    lying.inputs[0].shape[1] = 10
    with pytest.raises(TensorError, match="100 elements for shape"):
        count(profile, lying)


@pytest.mark.parametrize(
    ("inputs", "steps"),
    [({}, 50), ({"steps": np.array([20], np.int32)}, 20), ({"steps": [[30]], "samples": np.array([[4]], np.int32)}, 120)],
)
def test_images_cost_their_steps_and_the_prompts_tokens(inputs: dict[str, Any], steps: int) -> None:
    profile = text_to_image("m", tokenizer="t")
    made = request(prompt=[b"a cat"], negative_prompt=[b"no dog"], **inputs)
    prepared = prepare(made, profile, "ours", stream=False)
    assert (prepared.prompts, prepared.units, prepared.input_tokens) == (("a cat", "no dog"), (steps,), None)
    assert AnswerCounter(profile, prepared).counted().output_tokens == 0
    assert profile.operation == OPERATION_TEXT_TO_IMAGE


@pytest.mark.parametrize("steps", [-1, 2**41])
def test_steps_that_cannot_be_are_refused(steps: int) -> None:
    with pytest.raises(TensorError, match="steps"):
        count(text_to_image("m", tokenizer="t"), request(prompt=[b"a"], steps=np.array([steps], np.int64)))


@pytest.mark.parametrize(
    ("profile", "operation"),
    [(embeddings("m", tokenizer="t"), OPERATION_EMBEDDINGS), (classification("m", tokenizer="t"), OPERATION_CLASSIFICATION)],
)
def test_embeddings_and_classification_count_all_texts_and_the_request(profile: ModelProfile, operation: int) -> None:
    prepared = prepare(request(text_input=[[b"one"], [b"two"]]), profile, "ours", stream=False)
    assert (prepared.prompts, prepared.units) == (("one", "two"), (1,))
    assert AnswerCounter(profile, prepared).counted().output_tokens == 0
    assert (profile.operation, profile.decoupled) == (operation, False)


def test_vllms_embeddings_are_counted_by_the_back_end() -> None:
    made = request(embedding_request=[b'{"input": "hello"}'])
    prepared = prepare(made, vllm_embeddings("m"), "ours", stream=True)
    assert kserve.read_bool_input(made, "return_num_input_tokens") is True
    assert kserve.find_input(made, "return_num_output_tokens") is None
    answer = texts("text_output", "[0.5]")
    kserve.add_integer_output(answer, "num_input_tokens", 3, shape=())
    counter = AnswerCounter(vllm_embeddings("m"), prepared)
    counter.take(answer)
    assert (counter.counted().input_tokens, counter.counted().output_tokens) == (3, 0)
    assert [output.name for output in answer.outputs] == ["text_output"]


def test_what_an_answer_may_use_is_set_aside() -> None:
    profile = ocr("m", characters_reserved=500)
    prepared = prepare(request(image=np.zeros(4, np.uint8)), profile, "ours", stream=False)
    assert reserved_units(profile, prepared) == {"characters": 500, "requests": 1}


def test_a_client_that_lists_outputs_gets_those_alone() -> None:
    made = request(("boxes",), image=np.zeros(4, np.uint8))
    prepared = prepare(made, ocr("m", text_output="lines"), "ours", stream=False)
    assert [output.name for output in made.outputs] == ["boxes", "lines"]
    assert prepared.hidden_outputs == ("lines",)


# -- token ids ---------------------------------------------------------------------------------------------------------

INNER = tensorrt_llm_ids("m")
PROMPT = np.array([[5, 6, 7, 2, 2]], np.int32)
LENGTHS = np.array([[3]], np.int32)


@pytest.mark.parametrize(
    ("flags", "responses", "output_tokens"),
    [
        # Without streaming the prompt is among the ids, unless it is excluded; what pads a beam is not counted.
        ({}, [ids([[5, 6, 7, 8, 9]], [5], num_output_tokens=5)], 2),
        ({"exclude_input_in_output": True}, [ids([[8, 9, -1]], [2], num_output_tokens=3)], 2),
        ({"streaming": True}, [ids([[8]], [1]), ids([[9]], [1]), ids([[2]], [1])], 3),
        # Two beams, each with the prompt in front, the second one shorter.
        ({}, [ids([[5, 6, 7, 8, 9], [5, 6, 7, 8, -1]], [5, 4], num_output_tokens=10)], 3),
        # All tokens so far, in each response.
        (
            {"streaming": True, "return_all_generated_tokens": True},
            [ids([[8]], [1]), ids([[8, 9]], [2]), ids([[8, 9, 3]], [3])],
            3,
        ),
    ],
    ids=["whole", "excluded", "streamed", "beams", "all-generated"],
)
def test_token_ids_of_the_inner_model(flags: dict[str, bool], responses: list[Any], output_tokens: int) -> None:
    inputs: dict[str, Any] = {name: [[value]] for name, value in flags.items()}
    made = request((), input_ids=PROMPT, input_lengths=LENGTHS, **inputs)
    found = count(INNER, made, *responses)
    assert (found.input_tokens, found.output_tokens) == (3, output_tokens)


def test_without_ids_in_the_answer_the_inner_models_own_count_holds() -> None:
    answer = service_pb2.ModelInferResponse()
    kserve.add_integer_output(answer, "num_input_tokens", 3, dtype="INT32", shape=(1, 1))
    kserve.add_integer_output(answer, "num_output_tokens", 9, dtype="INT32", shape=(1, 1))
    assert count(INNER, request(input_ids=PROMPT, input_lengths=LENGTHS), answer).output_tokens == 6


def test_plain_token_ids() -> None:
    found = count(token_ids("m"), request(input_ids=[[1, 2, 3]]), ids([[4, 5]]), ids([[6, -1]]))
    assert (found.input_tokens, found.output_tokens) == (3, 3)
    with pytest.raises(TensorError, match=r"input_ids.*missing"):
        count(token_ids("m"), request(other=[[1]]))


def test_lengths_beyond_the_ids_are_refused() -> None:
    with pytest.raises(TensorError, match="input_lengths"):
        count(INNER, request(input_ids=PROMPT, input_lengths=np.array([[6]], np.int32)))
