"""Targets around what peers send: inference requests and answers, and the embedded database's loopback."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
from functools import cache

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from billing.v1.usage_pb2 import UsageEvent
from producers.journal import EVENT_BYTES_MAX
from producers.openai_usage import EventStream, read_answer
from producers.openai_usage import prepare as prepare_openai
from serving import kserve
from serving.gateway.counting import AnswerCounter, prepare
from serving.gateway.credentials import find_secret, hash_secret
from serving.gateway.profiles import generic, ocr, speech_to_text, tensorrt_llm, tensorrt_llm_ids, text_to_image, vllm
from serving.kserve import TensorError
from sinks.embedded import LoopbackServer
from sinks.engines.json_rows import decode_rows
from sinks.errors import EngineError
from tests.fuzz.target import Reader, Target

__all__ = ["TARGETS"]

PROFILES = (
    vllm("m"),
    tensorrt_llm("m", tokenizer="t"),
    generic("m", tokenizer="t"),
    tensorrt_llm_ids("m"),
    ocr("m"),
    speech_to_text("m", tokenizer="t", audio_lengths_input="lengths"),
    text_to_image("m", tokenizer="t", text_inputs=("text_input",)),
)
_TOKEN = "t" * 32
# Both sides are this process: no answer comes while it stands still.
_ANSWER_TIMEOUT_S = 60


def meter(data: bytes) -> None:
    """A request and its answers through what the gateway reads of them; what was taken can be sent on and counted."""
    reader = Reader(data)
    profile, stream = PROFILES[reader.number() % len(PROFILES)], bool(reader.number() % 2)
    request = service_pb2.ModelInferRequest.FromString(reader.piece())
    prepared = prepare(request, profile, "id", stream=stream)
    request.SerializeToString()
    counter = AnswerCounter(profile, prepared)
    while reader.more:
        response = service_pb2.ModelInferResponse.FromString(reader.piece())
        with contextlib.suppress(TensorError):
            counter.take(response)
        response.SerializeToString()
    counted = counter.counted()
    counter.texts()
    event = UsageEvent(uncached_input_tokens=counted.input_tokens or 0, output_tokens=counted.output_tokens or 0)
    for rule, quantity in zip(profile.units, counted.units, strict=True):
        event.units.add(unit=rule.unit, quantity=quantity)
    assert EVENT_BYTES_MAX > 0


def openai(data: bytes) -> None:
    """An OpenAI-shaped request and its stream, cut anywhere: what is shown can be read again, and no class is negative."""
    reader = Reader(data)
    hides = bool(reader.number() % 2)
    asked = prepare_openai("/v1/chat/completions", reader.piece(), continuous=hides)
    UsageEvent(model=asked.model)
    stream = EventStream(hides_usage=hides)
    shown = b""
    while reader.more:
        shown += b"".join(event.data for event in stream.feed(reader.piece()))
    shown += b"".join(event.data for event in stream.finish())
    again = EventStream(hides_usage=False)
    assert b"".join(event.data for event in (*again.feed(shown), *again.finish())) == shown
    for used in (stream.used, read_answer(shown)):
        if used is not None:
            used.fill(UsageEvent())


def _openai() -> list[bytes]:
    request = b'{"model": "m", "stream": true, "stream_options": {"other": 1}}'
    usage = b'{"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}'
    events = [
        b'data: {"choices": [{"delta": {"content": "h\\u00e9"}}], "usage": null}\n\n',
        b'data: {"choices": [], "usage": ' + usage + b"}\r\n\r\n",
        b'event: x\ndata: {"error": {"message": "m"}}\n\n',
        b"data: [DONE]\n\n",
    ]
    deep = b'{"stream": true, "a": ' + b"[" * 900 + b"]" * 900 + b"}"
    half = b'{"model": "\\ud800", "stream": true}'
    return [Reader.join(hides, asked, *events) for hides in (0, 1) for asked in (request, deep, half)]


def _metered() -> list[bytes]:
    request = service_pb2.ModelInferRequest(model_name="m", id="mine")
    kserve.add_bytes_input(request, "text_input", [b"hello"])
    kserve.add_bool_input(request, "stream", True)
    typed = service_pb2.ModelInferRequest(model_name="m")
    tensor = typed.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append("hé".encode())
    kserve.add_bool_input(typed, "return_num_input_tokens", True)
    kserve.set_parameter(typed, kserve.EMPTY_FINAL_PARAMETER, True)
    numbers = service_pb2.ModelInferRequest(model_name="m")
    for name, values in (("input_ids", [1, 2, 3]), ("input_lengths", [2]), ("audio", [0] * 160), ("steps", [20])):
        numbers.inputs.add(name=name, datatype="INT32", shape=[1, len(values)])
        numbers.raw_input_contents.append(struct.pack(f"<{len(values)}i", *values))
    kserve.add_bytes_input(numbers, "text_input", [b"hello"])
    broad = service_pb2.ModelInferRequest(model_name="m")
    broad.inputs.add(name="text_input", datatype="BYTES", shape=[2**62] * 200)
    broad.raw_input_contents.append(b"")
    response = service_pb2.ModelInferResponse(model_name="m")
    kserve.add_bytes_output(response, "text_output", [b"hello world"])
    kserve.add_integer_output(response, "num_input_tokens", 3)
    kserve.add_integer_output(response, "num_output_tokens", 4, dtype="INT64", shape=(1, 1))
    for name, values in (("output_ids", [4, 5, -1]), ("sequence_length", [2])):
        response.outputs.add(name=name, datatype="INT32", shape=[1, 1, len(values)])
        response.raw_output_contents.append(struct.pack(f"<{len(values)}i", *values))
    answer = response.SerializeToString()
    return [
        Reader.join(profile, stream, asked.SerializeToString(), answer, answer)
        for profile in range(len(PROFILES))
        for stream, asked in enumerate((request, typed, broad, numbers))
    ]


def read_metadata(data: bytes) -> None:
    reader = Reader(data)
    metadata = [
        (("authorization", "x-api-key", "other")[reader.number() % 3], reader.piece().decode("ascii", "replace"))
        for _ in range(4)
    ]
    secret = find_secret(metadata)
    if secret is not None:
        assert 0 < len(secret) <= 512
        assert len(hash_secret(b"pepper", secret)) == 32


class _NoDatabase:
    def query_json(self, bound_sql: str, *, timeout_s: float) -> bytes:
        if bound_sql == "refuse":
            raise EngineError("no")
        return b"{}"


@cache
def _loopback() -> tuple[str, int]:
    server = LoopbackServer(_NoDatabase(), _TOKEN).start()
    # The server's own way is to print what went wrong in a handler: here it is a finding.
    server._server.handle_error = _note  # type: ignore[method-assign, assignment]
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


_wrong: list[BaseException] = []


def _note(*_: object) -> None:
    error = sys.exc_info()[1]
    # A client that hangs up is no finding.
    if error is not None and not isinstance(error, ConnectionError):
        _wrong.append(error)


def ask_loopback(data: bytes) -> None:
    """Bytes of anybody on this machine: answered by a status, or hung up on."""
    with socket.create_connection(_loopback(), timeout=_ANSWER_TIMEOUT_S) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65_536):
                answer += chunk
    assert not _wrong, repr(_wrong.pop())
    assert not answer or answer.startswith((b"HTTP/", b"<!DOCTYPE", b"there are", b"the token", b"{"))


def _asked() -> list[bytes]:
    head = f"POST /query HTTP/1.1\r\nAuthorization: Bearer {_TOKEN}\r\nContent-Length: "

    def query(body: bytes) -> bytes:
        return f"{head}{len(body)}\r\n\r\n".encode() + body

    return [
        query(json.dumps({"sql": "SELECT 1", "timeout_s": 1}).encode()),
        query(json.dumps({"sql": "refuse", "timeout_s": 1}).encode()),
        query(b"[" * 100_000),
        query(b'{"sql": "x", "timeout_s": 1' + b"0" * 400 + b"}"),
        f"{head}{'9' * 5_000}\r\n\r\n".encode(),
        f"GET /status HTTP/1.1\r\nAuthorization: Bearer {_TOKEN}\r\n\r\n".encode(),
        b"GET / HTTP/0.9\r\n\r\n",
    ]


def _answers() -> list[bytes]:
    document = {
        "meta": [
            {"name": "n", "type": "UInt64"},
            {"name": "d", "type": "Array(Decimal(38, 12))"},
            {"name": "e", "type": "Decimal(38, 12)"},
        ],
        "data": [["1", ["0.5"], "1.25"]],
    }
    return [json.dumps(document).encode(), b"", b"[" * 100_000, b'{"meta": [{"name": 1, "type": "Decimal"}], "data": [["x"]]}']


TARGETS = {
    "inference": Target(meter, _metered, (TensorError, DecodeError), mutations=500),
    "openai": Target(openai, _openai, mutations=300),
    "metadata": Target(read_metadata, lambda: [Reader.join(0, b"Bearer abc", 1, b"key", 2, b"x")]),
    "loopback": Target(ask_loopback, _asked, mutations=60),
    "loopback-answer": Target(decode_rows, _answers, (EngineError,)),
}
