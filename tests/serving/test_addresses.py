"""An IPv6 address is listened on, with its brackets or without, by all that listens."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.addresses import authority, bare_host
from serving.api.server import ApiServer
from serving.api.settings import ApiLimits
from tests.serving.api.worlds import KeysOnly
from tests.serving.gateway_support import gateway_settings, profiles, running


@pytest.fixture
def ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "bare", "whole"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:80"),
        ("localhost", "localhost", "localhost:80"),
        ("::1", "::1", "[::1]:80"),
        ("[::1]", "::1", "[::1]:80"),
    ],
)
def test_a_host_stands_beside_its_port_so_that_both_can_be_read(host: str, bare: str, whole: str) -> None:
    assert (bare_host(host), authority(host, 80)) == (bare, whole)


async def serves(port: int) -> bool:
    async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        return bool((await check).status)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_the_billing_api_listens_on_ipv6(ipv6: None, host: str) -> None:
    world = KeysOnly(ApiLimits(warm_up_timeout_s=0.01))
    server = ApiServer(replace(world.calls.settings, host=host), world.keys)
    await server.start()
    try:
        assert await serves(server.grpc_port)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://[::1]:{server.http_port}/healthz", timeout=60)).status_code == 200
    finally:
        await server.stop()
        world.calls.close()


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_the_gateway_listens_on_ipv6(ipv6: None, tmp_path: Path, host: str) -> None:
    models = {"trace": profiles()["trace"]}
    async with running(replace(gateway_settings(tmp_path, "127.0.0.1:1", models=models, tokenizers={}), host=host)) as server:
        server.gateway.ready = False
        assert await serves(server.port)
