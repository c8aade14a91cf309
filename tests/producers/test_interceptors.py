"""The interceptors: each kind of method, in threads and in asyncio; what is refused reaches no code of the server's."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from billing.v1.usage_pb2 import (
    OPERATION_GENERATE,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_BACKEND_ERROR_PARTIAL,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    UsageEvent,
)
from producers.calls import CallMeter, Identity, Used, bearer_secret
from producers.grpc_aio import AioMeteringInterceptor
from producers.grpc_calls import GrpcMetering, RpcRefused, UsageReader
from producers.grpc_sync import MeteringInterceptor
from producers.meter import UsageMeter
from tests.producers.support import journaled, open_meter

METADATA = [("authorization", "Bearer secret")]
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def events_of(meter: UsageMeter) -> list[UsageEvent]:
    return [event for numbers in journaled(meter.journal).values() for event in numbers.values()]


def dump(message: Any) -> bytes:
    # grpc.aio encodes a text before it hands it to its serializer.
    return json.dumps(message.decode() if isinstance(message, bytes) else message).encode()


class Reader(UsageReader):
    """Each request and each response counts one; a request may be one that cannot be metered."""

    def __init__(self) -> None:
        self.model, self.operation, self.failed, self.total = "", OPERATION_GENERATE, False, Used()

    def take_request(self, request: Any) -> Any:
        if request == "unreadable":
            raise RpcRefused(grpc.StatusCode.INVALID_ARGUMENT, "cannot be metered")
        self.model = "small"
        self.total += Used(uncached_input_tokens=1)
        return request

    def take_response(self, response: Any) -> Any:
        self.total += Used(output_tokens=1)
        return response

    def used(self) -> Used:
        return self.total


class SyncModel:
    """Answers a request with itself; "fail" ends with an error, "wait" does not end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def one(self, request: Any, context: Any) -> Any:
        self.seen.append(request)
        if request == "fail":
            context.abort(grpc.StatusCode.INTERNAL, "failed")
        return request

    def unary_unary(self, request: Any, context: Any) -> Any:
        return self.one(request, context)

    def unary_stream(self, request: Any, context: Any) -> Iterator[Any]:
        yield self.one(request, context)
        if request == "fail later":
            context.abort(grpc.StatusCode.INTERNAL, "failed")
        while request == "wait" and context.is_active():
            yield request

    def stream_unary(self, requests: Iterator[Any], context: Any) -> Any:
        return [self.one(request, context) for request in requests][-1]

    def stream_stream(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            yield from self.unary_stream(request, context)


class AioModel:
    """The same in asyncio, once with `yield` and once with `context.write`."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def unary_unary(self, request: Any, context: Any) -> Any:
        self.seen.append(request)
        if request == "fail":
            await context.abort(grpc.StatusCode.INTERNAL, "failed")
        return request

    async def unary_stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield await self.unary_unary(request, context)
        if request == "fail later":
            await context.abort(grpc.StatusCode.INTERNAL, "failed")
        while request == "wait":
            await asyncio.sleep(0.01)
            yield request

    async def stream_unary(self, requests: AsyncIterator[Any], context: Any) -> Any:
        return [await self.unary_unary(request, context) async for request in requests][-1]

    async def stream_stream(self, _: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
            async for response in self.unary_stream(request, context):
                await context.write(response)


@asynccontextmanager
async def serving(kind: str, meter: UsageMeter) -> AsyncIterator[tuple[str, list[Any]]]:
    """A metered server's address, and what its code has seen."""
    metering = GrpcMetering(
        CallMeter(meter),
        lambda metadata: Identity("acme") if bearer_secret(metadata) == "secret" else None,
        {f"/demo.Model/{name}": Reader for name in KINDS},
    )
    model: Any = AioModel() if kind == "aio" else SyncModel()
    pool = ThreadPoolExecutor(4)
    server: Any = (
        grpc.aio.server(interceptors=[AioMeteringInterceptor(metering)])
        if kind == "aio"
        else grpc.server(pool, interceptors=[MeteringInterceptor(metering)])
    )
    handlers = {name: getattr(grpc, f"{name}_rpc_method_handler")(getattr(model, name), json.loads, dump) for name in KINDS}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("demo.Model", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    if kind == "aio":
        await server.start()
    else:
        server.start()
    yield f"127.0.0.1:{port}", model.seen
    await (server.stop(None) if kind == "aio" else asyncio.to_thread(server.stop(None).wait))
    pool.shutdown()


async def ask(address: str, name: str, *requests: Any, metadata: Any = METADATA) -> list[Any]:
    """All responses of one call, by a client of threads: grpc.aio's may stumble over a call that ends while it still sends."""

    def work() -> list[Any]:
        with grpc.insecure_channel(address) as channel:
            call = getattr(channel, name)(f"/demo.Model/{name}", dump, json.loads)
            made = call(iter(requests) if name.startswith("stream") else requests[0], metadata=metadata)
            return list(made) if name.endswith("stream") else [made]

    return await asyncio.to_thread(work)


both = pytest.mark.parametrize("kind", ["aio", "sync"])


@both
async def test_each_kind_of_method_is_one_bill(tmp_path: Path, kind: str) -> None:
    meter = open_meter(tmp_path)
    async with serving(kind, meter) as (address, _):
        for name in KINDS:
            requests = ["a", "b"] if name.startswith("stream") else ["a"]
            found = await ask(address, name, *requests)
            assert found == (requests if name.endswith("stream") else requests[-1:])
            event = events_of(meter)[-1]
            assert (event.tenant_id, event.model, event.outcome) == ("acme", "small", OUTCOME_COMPLETED)
            assert (event.uncached_input_tokens, event.output_tokens) == (len(requests), len(found))
    assert len(events_of(meter)) == len(KINDS)
    meter.close()


@both
@pytest.mark.parametrize("name", KINDS)
async def test_what_is_refused_reaches_no_code_of_the_server(tmp_path: Path, kind: str, name: str) -> None:
    meter, full = open_meter(tmp_path / "a"), open_meter(tmp_path / "b", journal_bytes_max=1)
    for made, request, metadata, status in (
        (meter, "a", [("authorization", "Bearer other")], "UNAUTHENTICATED"),
        (meter, "unreadable", METADATA, "INVALID_ARGUMENT"),
        (full, "a", METADATA, "RESOURCE_EXHAUSTED"),
    ):
        async with serving(kind, made) as (address, seen):
            with pytest.raises(grpc.RpcError) as caught:
                await ask(address, name, request, metadata=metadata)
            assert caught.value.code().name == status
            assert not seen
            assert not events_of(made)
            assert made.metrics()["open_requests"] == 0
    meter.close()
    full.close()


@both
async def test_a_request_on_a_stream_that_cannot_be_metered_ends_it(tmp_path: Path, kind: str) -> None:
    meter = open_meter(tmp_path)
    async with serving(kind, meter) as (address, seen):
        with pytest.raises(grpc.RpcError) as caught:
            await ask(address, "stream_stream", "a", "unreadable")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert seen == ["a"]
    meter.close()
    again = open_meter(tmp_path)
    (event,) = events_of(again)
    assert (event.outcome, event.output_tokens) == (OUTCOME_BACKEND_ERROR_PARTIAL, 1)
    again.close()


@both
@pytest.mark.parametrize(
    ("name", "request_", "outcome", "tokens"),
    [
        ("unary_unary", "fail", OUTCOME_BACKEND_ERROR, 0),
        ("unary_stream", "fail", OUTCOME_BACKEND_ERROR, 0),
        ("unary_stream", "fail later", OUTCOME_BACKEND_ERROR_PARTIAL, 1),
        ("stream_stream", "fail later", OUTCOME_BACKEND_ERROR_PARTIAL, 1),
    ],
)
async def test_an_error_is_billed_as_far_as_it_came(
    tmp_path: Path, kind: str, name: str, request_: str, outcome: int, tokens: int
) -> None:
    meter = open_meter(tmp_path)
    async with serving(kind, meter) as (address, _):
        with pytest.raises(grpc.RpcError, match="failed"):
            await ask(address, name, request_)
    meter.close()
    again = open_meter(tmp_path)
    (event,) = events_of(again)
    assert (event.outcome, event.output_tokens) == (outcome, tokens)
    again.close()


@both
async def test_a_client_that_cancels_pays_for_what_was_made(tmp_path: Path, kind: str) -> None:
    meter = open_meter(tmp_path)
    committed = threading.Event()
    meter.journal.subscribe(committed)
    async with serving(kind, meter) as (address, _), grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_stream("/demo.Model/unary_stream", dump, json.loads)("wait", metadata=METADATA)
        for _unused in range(3):
            await call.read()
        call.cancel()
        async with asyncio.timeout(180):
            while meter.metrics()["open_requests"]:
                # The journal wakes whoever waits after each commit; one that came before is found by looking again.
                await asyncio.to_thread(committed.wait, 0.1)
                committed.clear()
    (event,) = events_of(meter)
    assert event.outcome == OUTCOME_CANCELLED
    assert event.output_tokens >= 3
    meter.close()
