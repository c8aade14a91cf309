"""Chunks as bytes: what is read and written of them is what reading and writing the whole message says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.gateway.chunks import Arrivals, ChunkForm, learn_form, read_response, serialize
from serving.gateway.counting import AnswerCounter, Counted, prepare
from serving.gateway.profiles import ModelProfile, vllm
from serving.kserve import FINAL_PARAMETER, TensorError

PROFILE = vllm("m", tokenizer="t")


def counter(profile: ModelProfile = PROFILE) -> AnswerCounter:
    request = service_pb2.ModelInferRequest(model_name="m", id="client")
    kserve.add_bytes_input(request, "text_input", [b"prompt"])
    kserve.add_bool_input(request, "stream", True)
    return AnswerCounter(profile, prepare(request, profile, "upstream", stream=True))


def chunk(text: bytes = b" word", *, inputs: int = 5, outputs: int = 1, final: bool | None = False, name: str = "m") -> Any:
    response = service_pb2.ModelStreamInferResponse()
    infer = response.infer_response
    infer.model_name, infer.model_version, infer.id = name, "1", "upstream"
    if final is not None:
        kserve.set_parameter(infer, FINAL_PARAMETER, final)
    kserve.add_bytes_output(infer, "text_output", [text])
    kserve.add_integer_output(infer, "num_input_tokens", inputs, dtype="UINT32")
    kserve.add_integer_output(infer, "num_output_tokens", outputs, dtype="UINT32")
    return response


def read_whole(data: bytes, into: AnswerCounter) -> Any:
    """What the client gets of a chunk that is read as a message."""
    response = read_response(data)
    into.take(response.infer_response)
    response.infer_response.id = "client"
    return response


def learnt(data: bytes, into: AnswerCounter) -> ChunkForm | None:
    plan = into.plan(read_response(data).infer_response)
    response = read_whole(data, into)
    return None if plan is None else learn_form(data, response, plan)


def read_fast(form: ChunkForm, data: bytes, into: AnswerCounter) -> Any:
    found = form.read(data)
    if found is None or not into.take_data(form.plan, found[0]):
        return None
    return read_response(found[1])


def agrees(first: bytes, second: bytes) -> bool:
    """Whether the second chunk was read as one of the first's form; then all must be as if it had been read in full."""
    fast, slow = counter(), counter()
    form = learnt(first, fast)
    assert form is not None
    read_whole(first, slow)
    response = read_fast(form, second, fast)
    if response is None:
        return False
    assert response == read_whole(second, slow)
    assert fast.counted() == slow.counted()
    assert fast.texts() == slow.texts()
    return True


FIRST = chunk().SerializeToString()


def message_of(response: bytes) -> bytes:
    """The message that has this response."""
    length = len(response)
    return bytes((0x12, length & 0x7F | 0x80, length >> 7)) + response


@given(st.binary(max_size=20_000), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_of_chunks_with_one_front_only_the_data_is_read(text: bytes, inputs: int, outputs: int) -> None:
    assert agrees(FIRST, chunk(text, inputs=inputs, outputs=outputs).SerializeToString())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_bytes_come_they_say_what_the_message_says_or_are_read_in_full(data: st.DataObject) -> None:
    whole = chunk(b"some other text", outputs=7)
    # Else what is put in or taken out nearly always shows in the length that stands in front.
    keeps_length = data.draw(st.booleans())
    second = bytearray(whole.infer_response.SerializeToString() if keeps_length else whole.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(second)))
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "end"]))
        if kind == "insert":
            second[place:place] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "delete":
            del second[place : place + data.draw(st.integers(1, 4))]
        elif kind == "end":
            second += data.draw(st.binary(min_size=1, max_size=4))
        elif place < len(second):
            second[place] = data.draw(st.integers(0, 255))
    try:
        agrees(FIRST, message_of(bytes(second)) if keeps_length else bytes(second))
    except TensorError as error:
        raise AssertionError("taken as data, where the message cannot be read") from error


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (chunk(name="n"), False),
        (chunk(final=True), False),
        (chunk(final=None), False),
        (chunk(), True),
        (service_pb2.ModelStreamInferResponse(error_message="gone"), False),
        (service_pb2.ModelStreamInferResponse(), False),
    ],
)
def test_a_chunk_that_begins_otherwise_is_read_in_full(other: Any, same: bool) -> None:
    assert agrees(FIRST, other.SerializeToString()) is same


def test_an_error_beside_the_response_is_never_passed_over() -> None:
    data = chunk().SerializeToString() + service_pb2.ModelStreamInferResponse(error_message="gone").SerializeToString()
    assert not agrees(FIRST, data)
    form_counter = counter()
    assert learnt(data, form_counter) is None, "and nothing is learnt of it"


def test_outputs_that_the_client_sees_behind_hidden_ones_are_read_in_full() -> None:
    response = chunk()
    kserve.add_integer_output(response.infer_response, "more", 1, dtype="INT32")
    assert learnt(response.SerializeToString(), counter()) is None


def test_an_output_beside_its_data_is_no_form_for_others() -> None:
    extra = service_pb2.ModelStreamInferResponse()
    extra.infer_response.outputs.add(name="more", datatype="BOOL", shape=[1])
    data = message_of(chunk().infer_response.SerializeToString() + extra.infer_response.SerializeToString() + b"\x32\x01\x00")
    assert [tensor.name for tensor in read_response(data).infer_response.outputs][-1] == "more"
    assert learnt(data, counter()) is None


@pytest.mark.parametrize("behind", [b"\x32\x01\x00", b"\x1a\x02id"], ids=["data", "an id"])
def test_a_chunk_with_more_behind_its_data_is_read_in_full(behind: bytes) -> None:
    assert not agrees(FIRST, message_of(chunk().infer_response.SerializeToString() + behind))


def test_counts_that_cannot_be_and_texts_that_do_not_fit_are_left_to_the_full_way() -> None:
    into = counter()
    form = learnt(FIRST, into)
    assert form is not None
    before = into.counted()
    assert before == Counted(5, 1, 1)
    broken = chunk()
    broken.infer_response.raw_output_contents[0] = b"\x09\x00\x00\x00text"
    assert read_fast(form, broken.SerializeToString(), into) is None
    broken = chunk()
    broken.infer_response.raw_output_contents[1] = b"\x09\x00"
    assert read_fast(form, broken.SerializeToString(), into) is None
    assert into.counted() == before


def test_bytes_that_are_no_response_are_an_error() -> None:
    with pytest.raises(TensorError, match="3 bytes that are no response"):
        read_response(b"\x12\xff\xff")


def test_what_leaves_is_bytes() -> None:
    assert serialize(FIRST) is FIRST
    assert serialize(chunk()) == FIRST


async def test_arrivals_are_taken_together_and_hold_up_whoever_puts_too_many() -> None:
    arrivals: Arrivals[int] = Arrivals(2)
    taking = asyncio.ensure_future(arrivals.take())
    await asyncio.sleep(0)
    assert arrivals.put(1)
    assert not arrivals.put(2)
    waiting = asyncio.ensure_future(arrivals.room())
    await asyncio.sleep(0)
    assert await taking == [1, 2]
    await waiting
    assert arrivals.take_now() == []
    taking = asyncio.ensure_future(arrivals.take())
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait({taking})
    arrivals.put(3)
    assert await arrivals.take() == [3]
