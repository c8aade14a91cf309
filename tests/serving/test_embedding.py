"""A server that meters itself bills what a gateway would: one SmolLM2 server, asked through the gateway, the interceptors
(grpc.aio and grpc) and the middlewares (ASGI and WSGI); every bill is the same, to the token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from billing.v1.usage_pb2 import COUNT_SOURCE_BACKEND, OUTCOME_COMPLETED, UsageEvent
from producers.asgi import AsgiMetering
from producers.calls import CallMeter, Identity, bearer_secret
from producers.grpc_aio import AioMeteringInterceptor
from producers.grpc_calls import GrpcMetering
from producers.grpc_sync import MeteringInterceptor
from producers.meter import MeterSettings, UsageMeter
from producers.openai_http import OpenAIMetering
from producers.wsgi import WsgiMetering
from serving import kserve
from serving.gateway import vllm
from serving.kserve import SERVICE_NAME
from serving.kserve_usage import kserve_readers
from tests.serving.gateway_support import (
    HEADERS,
    PARTITIONS,
    SECRET,
    answers,
    gateway_settings,
    journalled,
    model_server_process,
    running,
    settled,
    text_inputs,
    texts,
)

PROMPT: Final = "从前有一座山，山里有座庙 👋🏽"
TOKENS: Final = 6


@pytest.fixture(scope="module")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with model_server_process(tmp_path_factory.mktemp("model-server"), models="smollm2") as address:
        yield address


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[UsageMeter]:
    made = UsageMeter(MeterSettings(tmp_path / "embedded.sqlite", PARTITIONS))
    yield made
    made.close()


def identify(credentials: Mapping[str, str]) -> Identity | None:
    return Identity("tenant-a", "project", "user", "key-a") if bearer_secret(credentials) == SECRET else None


def billed(event: UsageEvent) -> tuple[Any, ...]:
    """What the bill is made of, and for whom."""
    assert event.outcome == OUTCOME_COMPLETED
    assert event.count_source == COUNT_SOURCE_BACKEND
    who = event.tenant_id, event.project_id, event.user_id, event.api_key_id
    return *who, event.uncached_input_tokens, event.output_tokens, event.context_tokens


def entry(*, stream: bool, **flags: bool) -> dict[str, Any]:
    name = "smollm2" if stream else "smollm2-unary"
    return {"model_name": name, "inputs": text_inputs(PROMPT, stream=stream, max_tokens=TOKENS, **flags)}


async def ask(address: str, *, stream: bool, headers: Mapping[str, str] = HEADERS) -> str:
    """The answer's text, by an unmodified tritonclient."""
    async with triton_aio.InferenceServerClient(address) as client:
        if stream:
            return texts(await answers(client, entry(stream=True), headers=headers))
        result = await client.infer(**entry(stream=False, exclude_input_in_output=True), headers=headers)
        return result.as_numpy("text_output")[0].decode()  # type: ignore[no-any-return]


MODELS: Final = {name: vllm(name, decoupled=name == "smollm2") for name in ("smollm2", "smollm2-unary")}
Bills = Mapping[bool, tuple[str, tuple[Any, ...]]]


@pytest.fixture(scope="module")
def through_the_gateway(tmp_path_factory: pytest.TempPathFactory, back_end: str) -> Bills:
    """The answer's text and the bill, by whether it is a stream."""

    async def work() -> Bills:
        settings = gateway_settings(tmp_path_factory.mktemp("gateway"), back_end, models=MODELS, tokenizers={})
        found = {}
        async with running(settings) as server:
            for number, stream in enumerate((False, True), start=1):
                text = await ask(f"127.0.0.1:{server.port}", stream=stream)
                found[stream] = text, billed((await settled(server, number))[-1])
        return found

    return asyncio.run(work())


def _handlers(infer: Callable[..., Any], stream_infer: Callable[..., Any]) -> Any:
    unary = grpc.unary_unary_rpc_method_handler(
        infer,
        request_deserializer=service_pb2.ModelInferRequest.FromString,
        response_serializer=service_pb2.ModelInferResponse.SerializeToString,
    )
    stream = grpc.stream_stream_rpc_method_handler(
        stream_infer,
        request_deserializer=service_pb2.ModelInferRequest.FromString,
        response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE_NAME, {"ModelInfer": unary, "ModelStreamInfer": stream})


def _calls(channel: Any) -> tuple[Any, Any]:
    """The shared model server's two methods."""
    unary = channel.unary_unary(
        f"/{SERVICE_NAME}/ModelInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelInferResponse.FromString,
    )
    stream = channel.stream_stream(
        f"/{SERVICE_NAME}/ModelStreamInfer",
        request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
    )
    return unary, stream


def grpc_metering(meter: UsageMeter) -> GrpcMetering:
    return GrpcMetering(CallMeter(meter), identify, kserve_readers(MODELS))


@asynccontextmanager
async def aio_server(back_end: str, meter: UsageMeter) -> AsyncIterator[str]:
    """A model server with the interceptor in it."""
    async with grpc.aio.insecure_channel(back_end) as channel:
        infer, stream_infer = _calls(channel)

        async def model_infer(request: Any, context: Any) -> Any:
            return await infer(request)

        async def model_stream_infer(requests: Any, context: Any) -> Any:
            async for response in stream_infer(requests):
                yield response

        server: Any = grpc.aio.server(interceptors=[AioMeteringInterceptor(grpc_metering(meter))])
        server.add_generic_rpc_handlers((_handlers(model_infer, model_stream_infer),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield f"127.0.0.1:{port}"
        await server.stop(None)


@asynccontextmanager
async def sync_server(back_end: str, meter: UsageMeter) -> AsyncIterator[str]:
    """The same with threads."""
    with grpc.insecure_channel(back_end) as channel, ThreadPoolExecutor(4) as pool:
        infer, stream_infer = _calls(channel)
        server: Any = grpc.server(pool, interceptors=[MeteringInterceptor(grpc_metering(meter))])
        server.add_generic_rpc_handlers(
            (_handlers(lambda request, context: infer(request), lambda requests, context: stream_infer(requests)),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        await asyncio.to_thread(server.stop(None).wait)


SERVERS: Final = {"aio": aio_server, "sync": sync_server}


@pytest.mark.model
@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("server", SERVERS)
async def test_an_interceptor_bills_what_the_gateway_bills(
    through_the_gateway: Bills, back_end: str, meter: UsageMeter, server: str, stream: bool
) -> None:
    async with SERVERS[server](back_end, meter) as address:
        text = await ask(address, stream=stream)
    (event,) = journalled(meter)
    assert (text, billed(event)) == through_the_gateway[stream]
    assert event.output_tokens == TOKENS


@pytest.mark.model
@pytest.mark.parametrize("server", SERVERS)
async def test_a_key_that_nobody_knows_reaches_no_model(back_end: str, meter: UsageMeter, server: str) -> None:
    async with SERVERS[server](back_end, meter) as address:
        for stream in (False, True):
            with pytest.raises((InferenceServerException, grpc.aio.AioRpcError)) as caught:
                await ask(address, stream=stream, headers={"authorization": "Bearer another"})
            # On a stream, grpc.aio's client may stumble over the end while it still sends, and then says only that.
            assert stream or "UNAUTHENTICATED" in str(caught.value)
    assert not journalled(meter)


# -- OpenAI-shaped, over the same model server -------------------------------------------------------------------------


class OpenAIServer:
    """An OpenAI-shaped answer from the shared KServe server's own counts, as ASGI and as WSGI application."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def _complete(self, body: Mapping[str, Any]) -> list[tuple[str, int, int]]:
        flags = {"return_num_input_tokens": True, "return_num_output_tokens": True}
        async with triton_aio.InferenceServerClient(self._address) as client:
            inputs = text_inputs(body["prompt"], stream=True, max_tokens=body["max_tokens"], **flags)
            found = await answers(client, {"model_name": "smollm2", "inputs": inputs}, headers={})
        return [
            (
                texts([(response, None)]),
                kserve.read_integer_output(response, "num_input_tokens") or 0,
                kserve.read_integer_output(response, "num_output_tokens") or 0,
            )
            for response, _ in found
        ]

    async def answer(self, raw: bytes) -> tuple[str, list[bytes]]:
        body = json.loads(raw)
        parts = await self._complete(body)
        prompt, completion = parts[-1][1], sum(tokens for _, _, tokens in parts)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        if not body.get("stream"):
            choice = {"index": 0, "text": "".join(text for text, _, _ in parts), "finish_reason": "length"}
            return "application/json", [json.dumps({"choices": [choice], "usage": usage}).encode()]
        chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "text": text}]} for text, _, _ in parts]
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks = [{**chunk, "usage": None} for chunk in chunks] + [{"choices": [], "usage": usage}]
        events = [f"data: {json.dumps(chunk, separators=(',', ':'), ensure_ascii=False)}\n\n".encode() for chunk in chunks]
        return "text/event-stream", [*events, b"data: [DONE]\n\n"]

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        kind, parts = await self.answer((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    def wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        kind, parts = asyncio.run(self.answer(environ["wsgi.input"].read()))
        start_response("200 OK", [("content-type", kind)])
        return parts


async def post(server: str, back_end: str, meter: UsageMeter, body: Mapping[str, Any]) -> str:
    metering = OpenAIMetering(CallMeter(meter), identify)
    app = OpenAIServer(back_end)
    if server == "asgi":
        transport = httpx.ASGITransport(AsgiMetering(app.asgi, metering))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.post("/v1/completions", json=body, headers=HEADERS)).text

    def work() -> str:
        with httpx.Client(transport=httpx.WSGITransport(WsgiMetering(app.wsgi, metering)), base_url="http://server") as client:
            return client.post("/v1/completions", json=body, headers=HEADERS).text

    return await asyncio.to_thread(work)


@pytest.mark.model
@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
@pytest.mark.parametrize("server", ["asgi", "wsgi"])
async def test_a_middleware_bills_what_the_gateway_bills(
    through_the_gateway: Bills, back_end: str, meter: UsageMeter, server: str, stream: bool
) -> None:
    body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": TOKENS, "stream": stream}
    shown = await post(server, back_end, meter, body)
    (event,) = journalled(meter)
    text, bill = through_the_gateway[True]
    assert billed(event) == bill
    if stream:
        lines = [json.loads(line[6:]) for line in shown.splitlines() if line.startswith("data: {")]
        assert "".join(line["choices"][0]["text"] for line in lines) == text
        # The usage was asked for by the middleware, so the client does not see it.
        assert "usage" not in shown
        assert shown.endswith("data: [DONE]\n\n")
    else:
        assert json.loads(shown)["choices"][0]["text"] == text
