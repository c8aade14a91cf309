"""Whoever only connects is let go, on every port that strangers reach; whoever has something to ask is served all the same."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.api.server import ApiServer
from serving.api.settings import ApiLimits
from serving.connections import ConnectionLimits
from serving.gateway.settings import LimitSettings
from taximeter import metrics
from taximeter.metrics import serve_metrics
from tests.serving.api.worlds import KeysOnly
from tests.serving.gateway_support import gateway_settings, profiles, running

QUICK = ConnectionLimits(opening_s=0.3, idle_s=0.3)
# Nobody waits so long where it is as it should be.
WAIT_S = 60.0


@pytest.fixture
async def gateway_port(tmp_path: Path) -> AsyncIterator[int]:
    settings = gateway_settings(
        tmp_path,
        "127.0.0.1:1",
        models={"trace": profiles()["trace"]},
        tokenizers={},
        limits=LimitSettings(connections=QUICK),
    )
    async with running(settings) as server:
        server.gateway.ready = False
        yield server.port


@contextlib.asynccontextmanager
async def api_server(connections: ConnectionLimits) -> AsyncIterator[ApiServer]:
    world = KeysOnly(ApiLimits(warm_up_timeout_s=0.01, connections=connections))
    server = ApiServer(world.calls.settings, world.keys)
    await server.start()
    yield server
    await server.stop()
    world.calls.close()


async def is_let_go(port: int, *, said: bytes = b"", goes_on: bool = False) -> bool:
    """Whether the server closes a connection on which nothing more comes, or a byte now and then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)

    async def trickle() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.05)

    trickling = asyncio.ensure_future(trickle()) if goes_on else None
    try:
        async with asyncio.timeout(WAIT_S):
            # gRPC greets first.
            with contextlib.suppress(ConnectionError):
                while await reader.read(1_024):
                    pass
    except TimeoutError:
        return False
    finally:
        if trickling is not None:
            trickling.cancel()
            await asyncio.gather(trickling, return_exceptions=True)
        writer.close()
    return True


async def check(channel: Any) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(), timeout=WAIT_S, wait_for_ready=True
    )
    return int(answer.status)


async def is_idle_let_go(port: int) -> bool:
    """Whether a client of gRPC without a call is let go, and served when it asks again."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        served = await check(channel)
        async with asyncio.timeout(WAIT_S):
            while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
        return served == await check(channel)


async def test_a_gateway_lets_go_of_who_says_nothing(gateway_port: int) -> None:
    assert await is_let_go(gateway_port)
    assert await is_idle_let_go(gateway_port)


async def test_the_billing_api_lets_go_of_who_says_nothing() -> None:
    async with api_server(QUICK) as api:
        assert await is_let_go(api.grpc_port)
        assert await is_idle_let_go(api.grpc_port)
        assert await is_let_go(api.http_port)
        assert await is_let_go(api.http_port, said=b"GET /healthz HTTP/1.1\r\nx-slow: ", goes_on=True)
        # Behind an answer.
        assert await is_let_go(api.http_port, said=b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\nGET", goes_on=True)


async def test_an_api_does_not_call_a_request_under_way_silent() -> None:
    """Its head came in time; what it takes after that has bounds of its own."""
    async with api_server(ConnectionLimits()) as api:
        assert api._http is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", api.http_port)
        open_connections: set[Any] = api._http.server_state.connections
        await until(lambda: bool(open_connections))
        [connection] = open_connections
        assert connection._head_due is not None
        writer.write(b"GET /v1/balance HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n")
        await until(lambda: connection.conn.trailing_data[0] != b"")
        assert connection._head_due is not None, "its head is not whole"
        due = connection._head_due
        writer.write(b"\r\n")
        await until(lambda: connection.cycle is not None)
        async with asyncio.timeout(WAIT_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        assert due.cancelled()
        writer.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  a server's own state tells nobody
            await asyncio.sleep(0.01)


@pytest.fixture
def metrics_port(monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]) -> Iterator[int]:
    monkeypatch.setattr(metrics._Handler, "timeout", QUICK.opening_s)
    port = free_port()
    close = serve_metrics("gateway.metrics_address", f"127.0.0.1:{port}", lambda: ())
    yield port
    close()


async def test_a_metrics_port_lets_go_of_who_says_nothing(metrics_port: int) -> None:
    assert await is_let_go(metrics_port)


def test_what_is_set_is_what_grpc_is_told() -> None:
    assert dict(replace(QUICK, idle_s=2.0).grpc_options()) == {
        "grpc.server_handshake_timeout_ms": 300,
        "grpc.max_connection_idle_ms": 2_000,
    }
