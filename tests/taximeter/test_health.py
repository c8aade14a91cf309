"""`taximeter doctor` at a gateway that speaks TLS, whoever its certificate is for. The rest of it: test_up.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from serving.gateway import TlsSettings
from serving.kserve import SERVICE_NAME
from taximeter.config import load
from taximeter.health import Check, State, _gateway
from tests.services.certificates import Authority, Issued
from tests.serving.gateway_support import gateway_settings, running

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def back_end() -> AsyncIterator[str]:
    """One that is ready."""

    async def ready(_: bytes, __: Any) -> bytes:
        answer: bytes = service_pb2.ServerReadyResponse(ready=True).SerializeToString()
        return answer

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(SERVICE_NAME, {"ServerReady": grpc.unary_unary_rpc_method_handler(ready)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def looked_at(folder: Path, shows: Issued, expected: Issued, client_ca: Path | None = None) -> Check:
    """What the doctor finds at a gateway that shows one certificate, and is to show another."""
    authority = None if client_ca is None else client_ca.read_bytes()
    tls = TlsSettings(shows.certificate.read_bytes(), shows.key.read_bytes(), authority)
    async with (
        back_end() as upstream,
        running(gateway_settings(folder, upstream, tokenizers={}, models={}, tls=tls)) as server,
    ):
        flags = [
            f"gateway.port={server.port}",
            f"gateway.tls_certificate_file={expected.certificate}",
            f"gateway.tls_key_file={expected.key}",
            "models.profiles.m.backend=vllm",
        ]
        if client_ca is not None:
            flags.append(f"gateway.tls_client_ca_file={client_ca}")
        return await asyncio.to_thread(_gateway, load(flags=flags))


@pytest.mark.parametrize("hosts", ["DNS:gateway.example", "DNS:*.example", "IP:127.0.0.1"])
async def test_a_gateway_is_asked_over_tls_whoever_its_certificate_is_for(tmp_path: Path, hosts: str) -> None:
    own = Authority(tmp_path / "ca").issue("gateway", hosts)
    assert (await looked_at(tmp_path, own, own)).state is State.WELL


async def test_one_that_asks_clients_for_certificates_is_well_when_it_shows_its_own(tmp_path: Path) -> None:
    own, clients = Authority(tmp_path / "ca").issue("gateway", "DNS:gateway.example"), Authority(tmp_path / "clients")
    assert (await looked_at(tmp_path, own, own, clients.certificate)).state is State.WELL


async def test_one_that_shows_another_certificate_is_ill(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    check = await looked_at(tmp_path, authority.issue("old"), authority.issue("new"), authority.certificate)
    assert (check.state, "certificate verify failed" in check.detail) == (State.ILL, True), check


async def test_one_that_is_not_there_is_ill(tmp_path: Path) -> None:
    own = Authority(tmp_path / "ca").issue("gateway")
    flags = [
        "gateway.port=1",
        f"gateway.tls_certificate_file={own.certificate}",
        f"gateway.tls_key_file={own.key}",
        "models.profiles.m.backend=vllm",
    ]
    check = await asyncio.to_thread(_gateway, load(flags=flags))
    assert (check.state, "taximeter gateway" in check.mend) == (State.ILL, True), check
