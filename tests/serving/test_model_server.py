"""The model server answers an unmodified tritonclient as Triton would, and its log says what was really produced."""

from __future__ import annotations

import asyncio
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from serving import kserve
from serving.model_server import EngineSettings, ModelServer, ServerSettings, find_smollm2_weights
from serving.tokenizers import Framing, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.model

PROMPT = "The capital of France is"
# A machine that stands still in the wrong moment shows nothing of what the server does: then it is asked again.
ATTEMPTS = 10
FLAGS = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")


class Served:
    """A running server: its address and its production log."""

    def __init__(self, server: ModelServer, loop: asyncio.AbstractEventLoop, log: Path) -> None:
        self.url = f"127.0.0.1:{server.port}"
        self._server = server
        self._loop = loop
        self._log = log

    def rest(self) -> None:
        """Wait until the model works for nobody: it lets go of a request a moment after the answer."""
        engine = self._server._engine
        assert engine is not None
        asyncio.run_coroutine_threadsafe(engine._idle.wait(), self._loop).result(180)

    def production(self, request_id: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """The request's line; waits for it, since it is written when the model has stopped."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self._log.read_text().splitlines():
                entry: dict[str, Any] = json.loads(line)
                if entry["request_id"] == request_id:
                    return entry
            threading.Event().wait(0.02)
        raise TimeoutError(f"no production line for {request_id}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("model-server")
    settings = ServerSettings(
        port=0,
        production_log=folder / "production.jsonl",
        engine=EngineSettings(context_tokens=256, max_concurrent=2, max_queued=4, max_output_tokens=200),
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(ModelServer.start(settings), loop).result(240)
        yield Served(server, loop, folder / "production.jsonl")
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(120)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def client(served: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.url) as one:
        yield one


def tensor(name: str, value: bytes | bool) -> triton.InferInput:
    datatype = "BYTES" if isinstance(value, bytes) else "BOOL"
    one = triton.InferInput(name, [1], datatype)
    one.set_data_from_numpy(np.array([value], dtype=np.object_ if datatype == "BYTES" else np.bool_))
    return one


def inputs(text: str, *, stream: bool = True, flags: tuple[str, ...] = FLAGS, **sampling: Any) -> list[Any]:
    return [
        tensor("text_input", text.encode()),
        tensor("stream", stream),
        tensor("sampling_parameters", json.dumps(sampling).encode()),
        *(tensor(name, True) for name in flags),
    ]


class Answer:
    """The responses of one streamed request."""

    def __init__(self, responses: list[Any]) -> None:
        self.finals = [kserve.get_parameter(one, kserve.FINAL_PARAMETER) for one in responses]
        self.ids = {one.id for one in responses}
        data = [one for one in responses if one.outputs]
        self.texts = [(kserve.read_bytes_output(one, "text_output") or [b""])[0].decode() for one in data]
        self.input_tokens = {kserve.read_integer_output(one, "num_input_tokens") for one in data}
        self.output_tokens = [kserve.read_integer_output(one, "num_output_tokens") or 0 for one in data]
        self.reasons = [(kserve.read_bytes_output(one, "finish_reason") or [b""])[0] for one in data]


def ask_stream(client: Any, model: str, request_id: str, tensors: list[Any], **options: Any) -> Answer:
    """One request on a stream of the blocking client, to its end."""
    results: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: results.put(error or result.get_response()))
    try:
        client.async_stream_infer(model, tensors, request_id=request_id, **options)
        client.stop_stream()
    finally:
        client.stop_stream(cancel_requests=True)
    responses = list(results.queue)
    for one in responses:
        if isinstance(one, Exception):
            raise one
    return Answer(responses)


def test_describes_itself(client: triton.InferenceServerClient, served: Served) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("smollm2")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata().name == "taximeter-model-server"
    metadata = client.get_model_metadata("smollm2")
    assert {"text_input", "sampling_parameters"} <= {one.name for one in metadata.inputs}
    assert [one.name for one in metadata.outputs] == [
        "text_output",
        "finish_reason",
        "num_input_tokens",
        "num_output_tokens",
    ]
    assert client.get_model_config("smollm2").config.model_transaction_policy.decoupled
    assert not client.get_model_config("smollm2-unary").config.model_transaction_policy.decoupled
    with pytest.raises(InferenceServerException, match="unknown model: 'other'"):
        client.get_model_metadata("other")
    with grpc.insecure_channel(served.url) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=120)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_streams_token_by_token(client: triton.InferenceServerClient, served: Served) -> None:
    answer = ask_stream(client, "smollm2", "stream-1", inputs(PROMPT, max_tokens=6, temperature=0))
    assert "".join(answer.texts).startswith(" Paris")
    assert answer.input_tokens == {5}
    assert answer.output_tokens[:-1] == [1] * 6
    assert sum(answer.output_tokens) == 6
    assert answer.reasons == [b"None"] * 6 + [b"length"]
    assert answer.finals == [False] * 6 + [True]
    assert answer.ids == {"stream-1"}
    assert served.production("stream-1") == {
        "request_id": "stream-1",
        "model": "smollm2",
        "input_tokens": 5,
        "output_tokens": 6,
        "delivered_tokens": 6,
        "outcome": "completed",
        "error": None,
    }
    counts = client.get_inference_statistics("smollm2").model_stats[0]
    assert counts.inference_stats.success.count >= 1


def test_unary_twin_answers_whole(client: triton.InferenceServerClient) -> None:
    sampling: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    result = client.infer("smollm2-unary", inputs(PROMPT, stream=False, **sampling), request_id="u")
    text = result.as_numpy("text_output")[0].decode()
    assert text.startswith(f"{PROMPT} Paris")
    assert int(result.as_numpy("num_input_tokens")) == 5
    assert result.as_numpy("num_input_tokens").shape == ()
    assert list(result.as_numpy("num_output_tokens")) == [6]
    assert result.get_response().id == "u"
    without = client.infer(
        "smollm2-unary",
        [*inputs(PROMPT, stream=False, flags=(), **sampling), tensor("exclude_input_in_output", True)],
    )
    assert without.as_numpy("text_output")[0].decode() == text.removeprefix(PROMPT)
    assert without.as_numpy("num_input_tokens") is None
    # The same text by the decoupled model, in one response.
    answer = ask_stream(client, "smollm2", "whole", inputs(PROMPT, stream=False, **sampling))
    assert (answer.texts, answer.output_tokens, answer.finals) == ([text], [6], [True])


def test_unary_infer_on_a_decoupled_model_is_refused_as_triton_does(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="decoupled transaction policy") as refused:
        client.infer("smollm2", inputs(PROMPT, stream=False))
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


SAMPLES = {
    "english": "It's 12,345 o'clock, isn't it?",
    "chinese": "北京是中国的首都，人口约2189万。",
    "code": "def f(x):\n\treturn  x ** 2\n",
    "emoji": "😀🏳️‍🌈 🇩🇪",
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("chat", [False, True])
def test_our_tokenizer_counts_what_the_model_saw(client: triton.InferenceServerClient, name: str, chat: bool) -> None:
    text = SAMPLES[name].strip() if chat else SAMPLES[name]
    tensors = [*inputs(text, max_tokens=1, temperature=0), tensor("chat_template", chat)]
    answer = ask_stream(client, "smollm2", f"count-{name}-{chat}", tensors)
    ours = load_tokenizer(find_smollm2_weights())
    assert answer.input_tokens == {ours.count(text, Framing.CHAT if chat else Framing.PROMPT)}


def test_end_of_answer_counts_though_it_is_not_in_the_text(client: triton.InferenceServerClient) -> None:
    tensors = [*inputs("Say hi", max_tokens=60, temperature=0), tensor("chat_template", True)]
    answer = ask_stream(client, "smollm2", "eos", tensors)
    assert answer.reasons[-1] == b"stop"
    ours = load_tokenizer(find_smollm2_weights())
    assert sum(answer.output_tokens) == ours.count("".join(answer.texts), Framing.OUTPUT) + 1


def test_stop_text_is_cut_and_counted(client: triton.InferenceServerClient) -> None:
    answer = ask_stream(client, "smollm2", "stop", inputs(PROMPT, max_tokens=20, temperature=0, stop="\n\n"))
    assert "".join(answer.texts) == " Paris."
    assert (answer.reasons[-1], sum(answer.output_tokens)) == (b"stop", 4)


async def test_cancel_stops_the_model_within_a_token(served: Served) -> None:
    over = []
    for number in range(ATTEMPTS):
        received = await receive_and_cancel(served, f"cancelled-{number}")
        entry = await asyncio.to_thread(served.production, f"cancelled-{number}")
        assert received <= entry["delivered_tokens"] <= entry["output_tokens"]
        over.append(entry["output_tokens"] - received)
        # What was on its way when the cancel left, and one token more.
        if entry["outcome"] == "cancelled" and over[-1] <= 20:
            return
    raise AssertionError(f"tokens after a cancel: {over}")


async def receive_and_cancel(served: Served, request_id: str) -> int:
    """Ask for a long answer, and go: how many tokens had come."""
    async with triton_aio.InferenceServerClient(served.url) as client:

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": "smollm2",
                "inputs": inputs(PROMPT, max_tokens=200, temperature=0, ignore_eos=True),
                "request_id": request_id,
            }
            await asyncio.Event().wait()

        stream = client.stream_infer(requests())
        received = 0
        async for result, error in stream:
            assert error is None
            received += int(result.as_numpy("num_output_tokens")[0])
            if received >= 5:
                break
        stream.cancel()
    return received


def test_deadline_stops_the_model(served: Served) -> None:
    for number in range(ATTEMPTS):
        request = service_pb2.ModelInferRequest(model_name="smollm2-unary", id=f"deadline-{number}")
        for one in inputs(PROMPT, stream=False, max_tokens=200, temperature=0, ignore_eos=True):
            request.inputs.append(one._get_tensor())
            request.raw_input_contents.append(one._get_content())
        with grpc.insecure_channel(served.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            # The channel stands, so that the deadline meets the model and not the way there.
            stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=120)
            with pytest.raises(grpc.RpcError) as late:
                stub.ModelInfer(request, timeout=0.3)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with suppress(TimeoutError):  # one that was over before it was sent
            entry = served.production(request.id, 10.0)
            if entry["outcome"] == "cancelled":
                assert entry["output_tokens"] < 200
                return
    raise AssertionError("no request was stopped by its deadline")


@pytest.mark.parametrize("wanted", [False, True])
def test_empty_final_response_comes_only_when_asked(client: triton.InferenceServerClient, wanted: bool) -> None:
    answer = ask_stream(
        client,
        "trace",
        f"empty-{wanted}",
        inputs("x", context_tokens=70, output_tokens=100, chunk_tokens=40, empty_final=True),
        enable_empty_final_response=wanted,
    )
    assert answer.output_tokens == [40, 40, 20]
    assert answer.input_tokens == {70}
    assert answer.finals == [False, False, False] + [True] * wanted


def test_trace_reports_what_it_is_told(client: triton.InferenceServerClient, served: Served) -> None:
    answer = ask_stream(client, "trace", "trace-1", inputs("", context_tokens=4808, output_tokens=10, chunk_tokens=4))
    assert (answer.input_tokens, answer.output_tokens, answer.finals) == ({4808}, [4, 4, 2], [False, False, True])
    assert served.production("trace-1")["delivered_tokens"] == 10
    nothing = ask_stream(client, "trace", "trace-0", inputs("", context_tokens=1, output_tokens=0))
    assert (nothing.output_tokens, nothing.finals) == ([0], [True])
    whole = client.infer("trace-unary", inputs("", stream=False, context_tokens=3, output_tokens=9))
    assert list(whole.as_numpy("num_output_tokens")) == [9]


@pytest.mark.parametrize(
    ("model", "sampling", "message"),
    [
        ("smollm2", {"max_tokens": 0}, "max_tokens: 0: must be between 1 and 200"),
        ("smollm2", {"max_tokens": 10_000}, "between 1 and 200"),
        ("smollm2", {"max_tokenz": 5}, "max_tokenz: 5: unknown"),
        ("smollm2", {"temperature": "hot"}, "must be a number"),
        ("smollm2", {"stop": [""]}, "stop"),
        ("smollm2", {"n": 2}, "n: 2"),
        ("trace", {"context_tokens": 1}, "output_tokens: missing"),
        ("trace", {"context_tokens": -1, "output_tokens": 1}, "context_tokens: -1"),
        ("other", {}, "unknown model: 'other'"),
    ],
)
def test_bad_requests_are_refused_in_band(
    client: triton.InferenceServerClient, model: str, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceServerException, match=message):
        ask_stream(client, model, "bad", inputs(PROMPT, **sampling))


def test_prompt_beyond_the_context_is_refused_by_its_limit(client: triton.InferenceServerClient, served: Served) -> None:
    with pytest.raises(InferenceServerException, match="401 tokens: must be fewer than context_tokens = 256"):
        ask_stream(client, "smollm2", "too-long", inputs("word " * 400, max_tokens=1))
    assert served.production("too-long")["outcome"] == "refused"
    with pytest.raises(InferenceServerException, match="max_prompt_bytes") as refused:
        client.infer("smollm2-unary", inputs("x" * ((1 << 20) + 1), stream=False, max_tokens=1))
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def raw_stream(served: Served, requests: list[Any], **options: Any) -> list[Any]:
    with grpc.insecure_channel(served.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return list(stub.ModelStreamInfer(iter(requests), timeout=240, **options))


def malformed(request_id: str, raw: bytes) -> Any:
    request = service_pb2.ModelInferRequest(model_name="smollm2", id=request_id, raw_input_contents=[raw])
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    return request


def test_malformed_tensors_name_themselves_and_the_stream_lives_on(served: Served) -> None:
    good = malformed("good", kserve.pack_bytes([PROMPT.encode()]))
    kserve.add_bool_input(good, "return_num_input_tokens", True)
    responses = raw_stream(served, [malformed("bad", b"\xff\xff\xff\x7fabc"), malformed("utf8", b"\1\0\0\0\xff"), good])
    errors = {one.infer_response.id: one.error_message for one in responses if one.error_message}
    assert set(errors) == {"bad", "utf8"}
    assert "'text_input'" in errors["bad"]
    assert "claims 2147483647 bytes" in errors["bad"]
    assert "not UTF-8" in errors["utf8"]
    (answer,) = (one.infer_response for one in responses if not one.error_message)
    assert kserve.read_integer_output(answer, "num_input_tokens") == 5


def test_header_makes_errors_close_the_stream(served: Served) -> None:
    with pytest.raises(grpc.RpcError) as closed:
        raw_stream(served, [malformed("bad", b"\1")], metadata=(("triton_grpc_error", "true"),))
    assert closed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "text_input" in (closed.value.details() or "")


async def test_more_than_run_and_wait_are_refused(served: Served) -> None:
    async with triton_aio.InferenceServerClient(served.url) as client:

        async def one() -> str:
            try:
                await client.infer("smollm2-unary", inputs(PROMPT, stream=False, max_tokens=8, ignore_eos=True))
            except InferenceServerException as error:
                return str(error.status())
            return "answered"

        refused: list[int] = []
        while 3 not in refused:
            # Where some come only when the first are answered, there is room for them.
            assert len(refused) < ATTEMPTS, f"refused of nine at once: {refused}"
            await asyncio.to_thread(served.rest)
            outcomes = await asyncio.gather(*(one() for _ in range(9)))
            assert set(outcomes) <= {"answered", "StatusCode.RESOURCE_EXHAUSTED"}
            refused.append(9 - outcomes.count("answered"))
            assert refused[-1] <= 3, "two run and four wait"


def test_two_streamed_requests_run_side_by_side(served: Served) -> None:
    for _ in range(ATTEMPTS):
        requests = []
        for name in ("a", "b"):
            request = service_pb2.ModelInferRequest(model_name="smollm2", id=name)
            for one in inputs(PROMPT, max_tokens=12, temperature=0, ignore_eos=True):
                request.inputs.append(one._get_tensor())
                request.raw_input_contents.append(one._get_content())
            requests.append(request)
        ids = [one.infer_response.id for one in raw_stream(served, requests)]
        last_start = max(ids.index("a"), ids.index("b"))
        if last_start < min(len(ids) - 1 - ids[::-1].index("a"), len(ids) - 1 - ids[::-1].index("b")):
            return
    raise AssertionError("one always began when the other had ended")


def test_command_serves_and_stops_cleanly_on_sigterm(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "serving.model_server", "--port", "0", "--port-file", str(port_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert "model server on 127.0.0.1:" in process.stdout.readline()
            with triton.InferenceServerClient(f"127.0.0.1:{port_file.read_text().strip()}") as client:
                answer = ask_stream(client, "smollm2", "x", inputs(PROMPT, max_tokens=2, temperature=0))
                assert sum(answer.output_tokens) == 2
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()


def test_command_says_why_it_cannot_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.model_server", "--port", "0", "--weights", str(tmp_path / "no.gguf")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 1
    assert "no.gguf: not a file" in result.stderr
