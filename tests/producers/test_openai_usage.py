"""OpenAI's sums become disjoint classes, however a stream is cut, and a client sees what it asked for and no more."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.limits import QUANTITY_MAX
from producers.calls import Used
from producers.openai_usage import EventStream, prepare, read_answer

USAGE: dict[str, Any] = {
    "prompt_tokens": 1_000,
    "completion_tokens": 300,
    "total_tokens": 1_300,
    "prompt_tokens_details": {"cached_tokens": 640, "audio_tokens": 60},
    "completion_tokens_details": {"reasoning_tokens": 250, "audio_tokens": 20},
}
CLASSES = Used(
    uncached_input_tokens=300,
    cache_read_tokens=640,
    audio_input_tokens=60,
    output_tokens=30,
    reasoning_tokens=250,
    audio_output_tokens=20,
)


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


TEXT = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in ("Hé", "山", "\n\n", "👋🏽")]
ASKED = b"".join([event({**chunk, "usage": None}) for chunk in TEXT] + [event({"choices": [], "usage": USAGE})])
PLAIN = b"".join(map(event, TEXT))
DONE = b"data: [DONE]\n\n"


def test_sums_become_disjoint_classes() -> None:
    assert read_answer(json.dumps({"usage": USAGE}).encode()) == CLASSES


def test_the_responses_api_names_them_otherwise() -> None:
    usage = {
        "input_tokens": 1_000,
        "output_tokens": 300,
        "input_tokens_details": {"cached_tokens": 640, "audio_tokens": 60},
        "output_tokens_details": {"reasoning_tokens": 250, "audio_tokens": 20},
    }
    assert read_answer(json.dumps({"usage": usage}).encode()) == CLASSES
    stream = EventStream(hides_usage=False)
    stream.feed(b"event: response.completed\n" + event({"type": "response.completed", "response": {"usage": usage}}))
    assert stream.used == CLASSES


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"{}", b'{"usage": null}', b'{"usage": 3}', b"[" * 100_000])
def test_an_answer_without_usage_says_none(body: bytes) -> None:
    assert read_answer(body) is None


@pytest.mark.parametrize("wrong", [-1, 1.5, "7", True, None, QUANTITY_MAX + 1, [1]])
def test_what_is_no_count_counts_nothing(wrong: object) -> None:
    usage = {"prompt_tokens": wrong, "completion_tokens": 2}
    assert read_answer(json.dumps({"usage": usage}).encode()) == Used(output_tokens=2)


@given(
    prompt=st.integers(0, 10**6),
    completion=st.integers(0, 10**6),
    parts=st.tuples(*[st.integers(0, 2 * 10**6)] * 4),
)
def test_classes_add_up_to_the_sums_whatever_the_parts_say(prompt: int, completion: int, parts: tuple[int, ...]) -> None:
    cached, audio_in, reasoning, audio_out = parts
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": audio_in},
        "completion_tokens_details": {"reasoning_tokens": reasoning, "audio_tokens": audio_out},
    }
    used = read_answer(json.dumps({"usage": usage}).encode())
    assert used is not None
    assert used.uncached_input_tokens + used.cache_read_tokens + used.audio_input_tokens == prompt
    assert used.output_tokens + used.reasoning_tokens + used.audio_output_tokens == completion


@given(st.lists(st.integers(0, len(ASKED + DONE)), max_size=12), st.booleans())
def test_however_a_stream_is_cut_the_client_sees_the_same_and_the_usage_is_read(cuts: list[int], hidden: bool) -> None:
    stream = EventStream(hides_usage=hidden)
    places = [0, *sorted(cuts), len(ASKED + DONE)]
    events = [e for a, b in pairwise(places) for e in stream.feed((ASKED + DONE)[a:b])]
    assert b"".join(e.data for e in events) == (PLAIN + DONE if hidden else ASKED + DONE)
    assert stream.used == CLASSES
    assert [e.ends for e in events] == [False] * (len(events) - 1) + [True]


def test_usage_beside_text_is_taken_out_alone() -> None:
    # llama.cpp's server says it on the last chunk that has choices.
    stream = EventStream(hides_usage=True)
    (shown,) = stream.feed(event({**TEXT[0], "usage": USAGE}))
    assert shown.data == event(TEXT[0])
    assert stream.used == CLASSES


def test_lines_of_other_kinds_and_ends_pass() -> None:
    stream = EventStream(hides_usage=True)
    raw = b": a comment\r\n\r\nevent: ping\r\ndata: {}\r\n\r\n"
    assert b"".join(e.data for e in stream.feed(raw)) == raw
    stream.feed(b"data: [DO")
    stream.feed(b"NE]")
    assert [e.ends for e in stream.finish()] == [True]


def test_a_request_asks_for_its_usage_once() -> None:
    asked = prepare("/v1/chat/completions", b'{"model": "m", "stream": true, "stream_options": {"other": 1}}', continuous=True)
    assert asked.model == "m"
    assert asked.hides_usage
    options = json.loads(asked.body)["stream_options"]
    assert options == {"other": 1, "include_usage": True, "continuous_usage_stats": True}
    own = b'{"model": "m", "stream": true, "stream_options": {"include_usage": true}}'
    assert prepare("/v1/chat/completions", own, continuous=True).body == own
    assert not prepare("/v1/chat/completions", own, continuous=True).hides_usage
    for body in (b'{"model": "m"}', b'{"model": "m", "stream": false}', b"no JSON"):
        assert prepare("/v1/chat/completions", body, continuous=True).body == body
    assert prepare("/v1/responses", b'{"stream": true}', continuous=False).body == b'{"stream": true}'


@pytest.mark.parametrize("said", [True, 1, 1.0, "true", "True", "1", "yes", "on", "t", "y"])
def test_whatever_a_server_takes_for_true_streams_and_is_asked_for_its_usage(said: object) -> None:
    """pydantic, with which vLLM and most others read requests, takes all of these: who sends another than `true` streams for
    nothing where the usage was not asked for."""
    found = prepare("/v1/chat/completions", json.dumps({"model": "m", "stream": said}).encode(), continuous=False)
    assert json.loads(found.body) == {"model": "m", "stream": said, "stream_options": {"include_usage": True}}
    assert found.hides_usage


@pytest.mark.parametrize("said", [False, None, 0, "false", "no", "off", [], {}, 2, "maybe"])
def test_what_no_server_takes_for_true_is_left_as_it_is(said: object) -> None:
    body = json.dumps({"model": "m", "stream": said}).encode()
    assert prepare("/v1/chat/completions", body, continuous=False).body == body
