"""Back ends that speak as the vLLM and the TensorRT-LLM back end are documented to, with their traps, over real gRPC.

Nothing is generated: the answer's tokens are given, so what each request used is known without asking anybody. A prompt has a
token a word and one in front of it that is not in the text; an answer ends with a token that is not in its text either.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from tritonclient.grpc import service_pb2

from serving import kserve

__all__ = ["ANSWER", "Canned", "FakeModel", "TensorRtLlm", "TensorRtLlmIds", "Vllm", "Wide", "prompt_tokens", "serving_models"]

ANSWER: Final = (" one", " two", " three", " vier", " 五", "")
_CHUNK_TOKENS: Final = 2
Response = Any


def prompt_tokens(prompt: str) -> int:
    return len(prompt.split()) + 1


class RefusedError(Exception):
    """The back end's own words about a request that it does not take."""


@dataclass
class FakeModel:
    """What the fakes share: whether the last data or an empty response ends a stream, where one stops to be cancelled, and how
    often it is not there."""

    empty_final: bool = False
    counts_at_end_only: bool = False
    stall_after: int | None = None
    hears_stops: bool = True
    obeys: bool = True
    """It ends where a request says that its answer is to end."""
    failures: int = 0
    """It is not there for so many requests."""
    made: list[int] = field(default_factory=list)
    """The tokens of each answer that was worked on."""
    asked: list[str] = field(default_factory=list)
    """The id of each request that came; `arrivals` lets somebody wait for one."""
    arrivals: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    stopped: dict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    """By id: a request that says `stop` has come with it."""

    def responses(self, request: Any) -> Iterator[Response]:
        raise NotImplementedError

    def chunks(self, stream: bool, tokens_max: int | None) -> list[Sequence[str]]:
        tokens = ANSWER[: tokens_max if self.obeys else None]
        self.made.append(len(tokens))
        size = _CHUNK_TOKENS if stream else len(ANSWER)
        return [tokens[start : start + size] for start in range(0, len(tokens), size)]

    def add_counts(
        self, response: Response, request: Any, counts: Mapping[str, tuple[list[int], str, tuple[int, ...]]]
    ) -> None:
        """Of each count that is asked for and is among the outputs that are: values, datatype, shape."""
        listed = {output.name for output in request.outputs}
        for name, (values, dtype, shape) in counts.items():
            if kserve.read_bool_input(request, f"return_{name}") and (not listed or name in listed):
                assert math.prod(shape) == len(values)
                response.outputs.add(name=name, datatype=dtype, shape=shape)
                response.raw_output_contents.append(b"".join(value.to_bytes(4, "little") for value in values))


def _add_texts(response: Response, texts: list[str], shape: tuple[int, ...]) -> None:
    kserve.add_bytes_output(response, "text_output", [text.encode() for text in texts], shape=shape)


@dataclass
class Vllm(FakeModel):
    """Decoupled. `num_input_tokens` is a scalar that each response repeats; `num_output_tokens` has an element for each text,
    of what is new. Without streaming each text starts with the prompt, unless that is excluded."""

    def responses(self, request: Any) -> Iterator[Response]:
        prompt = kserve.read_text_input(request, "text_input") or ""
        stream = bool(kserve.read_bool_input(request, "stream"))
        excluded = kserve.read_bool_input(request, "exclude_input_in_output")
        prepend = not stream if excluded is None else not excluded
        if prepend and stream:
            raise RefusedError("When streaming, `exclude_input_in_output` = False is not allowed.")
        text = kserve.read_text_input(request, "sampling_parameters")
        # Its SamplingParams: from the tensor, or else from the request's parameters.
        sampling: dict[str, Any] = (
            json.loads(text) if text else {name: kserve.get_parameter(request, name) for name in request.parameters}
        )
        texts = int(sampling.get("n", 1))
        chunks = self.chunks(stream, int(sampling.get("max_tokens", 16)))
        for place, chunk in enumerate(chunks):
            response = service_pb2.ModelInferResponse()
            _add_texts(response, [(prompt if prepend else "") + "".join(chunk)] * texts, (texts,))
            if place == len(chunks) - 1 or not self.counts_at_end_only:
                counts = {
                    "num_input_tokens": ([prompt_tokens(prompt)], "UINT32", ()),
                    "num_output_tokens": ([len(chunk)] * texts, "UINT32", (texts,)),
                }
                self.add_counts(response, request, counts)
            yield response


@dataclass
class TensorRtLlm(FakeModel):
    """The ensemble. Its counts are INT32 of [1, 1]. Without streaming, and unless it is excluded, each beam's text and the
    output count have the prompt inside."""

    def responses(self, request: Any) -> Iterator[Response]:
        prompt = kserve.read_text_input(request, "text_input") or ""
        stream = bool(kserve.read_bool_input(request, "stream"))
        echoed = not stream and not kserve.read_bool_input(request, "exclude_input_in_output")
        beams = kserve.read_integer_input(request, "beam_width") or 1
        for chunk in self.chunks(stream, kserve.read_integer_input(request, "max_tokens")):
            response = service_pb2.ModelInferResponse()
            _add_texts(response, [(prompt if echoed else "") + "".join(chunk)] * beams, (1, beams))
            made = len(chunk) + (prompt_tokens(prompt) if echoed else 0)
            counts = {
                "num_input_tokens": ([prompt_tokens(prompt)], "INT32", (1, 1)),
                "num_output_tokens": ([made * beams], "INT32", (1, 1)),
            }
            self.add_counts(response, request, counts)
            yield response


@dataclass
class TensorRtLlmIds(FakeModel):
    """The inner model: ids. Beams are padded to the longest with -1, and the padding is in the output count; the second beam is
    one token shorter. With `return_all_generated_tokens` each response repeats all ids so far."""

    def responses(self, request: Any) -> Iterator[Response]:
        (length,) = kserve.read_integers_input(request, "input_lengths") or [0]
        prompt = (kserve.read_integers_input(request, "input_ids") or [])[:length]
        stream = bool(kserve.read_bool_input(request, "streaming"))
        echoed = not stream and not kserve.read_bool_input(request, "exclude_input_in_output")
        repeat = bool(kserve.read_bool_input(request, "return_all_generated_tokens"))
        beams = kserve.read_integer_input(request, "beam_width") or 1
        before = 0
        for chunk in self.chunks(stream, kserve.read_integer_input(request, "request_output_len")):
            so_far = before + len(chunk)
            ids = [*(prompt if echoed else ()), *range(10 if repeat else 10 + before, 10 + so_far)]
            rows = [ids, [*ids[:-1], -1]][:beams]
            lengths = [len(ids), len(ids) - 1][:beams]
            before = so_far
            response = service_pb2.ModelInferResponse()
            counts = {
                "num_input_tokens": ([length], "INT32", (1, 1)),
                "num_output_tokens": ([len(ids) * beams], "INT32", (1, 1)),
            }
            listed = {output.name for output in request.outputs}
            for name, shape, values in (
                ("output_ids", (1, beams, len(ids)), [value for row in rows for value in row]),
                ("sequence_length", (1, beams), lengths),
            ):
                if not listed or name in listed:
                    response.outputs.add(name=name, datatype="INT32", shape=shape)
                    raw = b"".join(value.to_bytes(4, "little", signed=True) for value in values)
                    response.raw_output_contents.append(raw)
            self.add_counts(response, request, counts)
            yield response


@dataclass
class Canned(FakeModel):
    """Gives one text for whatever is sent: a transcript, a label, or, where there is none, numbers."""

    output: str = "text_output"
    text: str | None = None

    def responses(self, request: Any) -> Iterator[Response]:
        response = service_pb2.ModelInferResponse()
        if self.text is None:
            response.outputs.add(name=self.output, datatype="FP32", shape=[1, 4])
            response.raw_output_contents.append(bytes(16))
        else:
            kserve.add_bytes_output(response, self.output, [self.text.encode()])
        yield response


@dataclass
class Wide(FakeModel):
    """Gives back as many characters as the image has bytes."""

    def responses(self, request: Any) -> Iterator[Response]:
        response = service_pb2.ModelInferResponse()
        size = kserve.count_elements(request, "image") or 0
        kserve.add_bytes_output(response, "lines", [b"." * size])
        yield response


def _handlers(models: Mapping[str, FakeModel]) -> dict[str, Any]:
    async def infer(request: Any, context: Any) -> Response:
        model = models[request.model_name]
        await _arrive(model, request, context)
        (response,) = model.responses(request)
        response.id = request.id
        return response

    async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            model = models[request.model_name]
            await _arrive(model, request, context)
            if kserve.read_bool_input(request, "stop"):
                if model.hears_stops:
                    model.stopped[request.id].set()
                yield _named(service_pb2.ModelInferResponse(), request, final=True)
                continue
            try:
                found = list(model.responses(request))
            except RefusedError as error:
                yield _named(service_pb2.ModelInferResponse(), request, final=True, error=str(error))
                continue
            for place, response in enumerate(found):
                if place == model.stall_after:
                    await model.stopped[request.id].wait()
                    yield _named(service_pb2.ModelInferResponse(), request, final=True)
                    break
                yield _named(response, request, final=place == len(found) - 1 and not model.empty_final)
            if model.empty_final and kserve.get_parameter(request, kserve.EMPTY_FINAL_PARAMETER) is True:
                yield _named(service_pb2.ModelInferResponse(), request, final=True)

    return {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(
            infer,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelInferResponse.SerializeToString,
        ),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
        ),
    }


async def _arrive(model: FakeModel, request: Any, context: Any) -> None:
    model.asked.append(request.id)
    model.arrivals.release()
    if model.failures:
        model.failures -= 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is being loaded")


def _named(response: Response, request: Any, *, final: bool, error: str = "") -> Any:
    response.id = request.id
    response.model_name = request.model_name
    kserve.set_parameter(response, kserve.FINAL_PARAMETER, final)
    return service_pb2.ModelStreamInferResponse(infer_response=response, error_message=error)


@asynccontextmanager
async def serving_models(
    models: Mapping[str, FakeModel], compression: grpc.Compression = grpc.Compression.NoCompression
) -> AsyncIterator[str]:
    """A server with these models, whose answers are compressed so; gives its address."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=options, compression=compression)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(kserve.SERVICE_NAME, _handlers(models)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
