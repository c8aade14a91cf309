"""TLS on both sides of the gateway: without a certificate, or with a stranger's, nobody gets in; nothing goes in the clear."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from serving.gateway import GatewaySettings, TlsSettings, UpstreamTls
from serving.kserve import SERVICE_NAME
from tests.services.certificates import Authority
from tests.serving.gateway_support import gateway_settings, running

pytestmark = pytest.mark.timeout(300)
LIVE = f"/{SERVICE_NAME}/ServerLive"


@asynccontextmanager
async def back_end(authority: Authority) -> AsyncIterator[str]:
    """A back end that speaks only to who shows a certificate of the authority's."""

    async def live(_: bytes, __: Any) -> bytes:
        answer: bytes = service_pb2.ServerLiveResponse(live=True).SerializeToString()
        return answer

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(SERVICE_NAME, {"ServerLive": grpc.unary_unary_rpc_method_handler(live)})
    server.add_generic_rpc_handlers((handler,))
    own = authority.issue("back-end")
    credentials = grpc.ssl_server_credentials(
        [(own.key.read_bytes(), own.certificate.read_bytes())], authority.certificate.read_bytes(), require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def ask(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    """What a client is told."""
    channel = grpc.aio.insecure_channel(address) if credentials is None else grpc.aio.secure_channel(address, credentials)
    async with channel:
        try:
            call: Any = channel.unary_unary(LIVE)  # type: ignore[call-arg]  # bytes stay bytes
            answer = await call(b"", timeout=120)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "live" if service_pb2.ServerLiveResponse.FromString(answer).live else "not live"


def settings_with(folder: Path, upstream: str, authority: Authority) -> GatewaySettings:
    ours, outwards = authority.issue("gateway"), authority.issue("gateway-as-client")
    trusted = authority.certificate.read_bytes()
    return gateway_settings(
        folder,
        upstream,
        tokenizers={},
        models={},
        tls=TlsSettings(ours.certificate.read_bytes(), ours.key.read_bytes(), trusted),
        upstream_tls=UpstreamTls(trusted, outwards.certificate.read_bytes(), outwards.key.read_bytes()),
    )


async def test_both_sides_show_certificates_and_strangers_stay_outside(tmp_path: Path) -> None:
    authority, strangers = Authority(tmp_path / "ca"), Authority(tmp_path / "strangers", "stranger")
    async with (
        back_end(authority) as upstream,
        running(settings_with(tmp_path, upstream, authority)) as server,
    ):
        address = f"127.0.0.1:{server.port}"
        assert await ask(address, authority.credentials(authority.issue("client"))) == "live"
        assert await ask(address, authority.credentials()) == "UNAVAILABLE", "no certificate"
        assert await ask(address, authority.credentials(strangers.issue("thief"))) == "UNAVAILABLE", "another authority's"
        assert await ask(address, strangers.credentials(authority.issue("other"))) == "UNAVAILABLE", "it is not whom I trust"
        assert await ask(address, None) == "UNAVAILABLE", "in the clear"


@pytest.mark.parametrize("wrong", ["no certificate is shown", "the back end is not who is trusted", "in the clear"])
async def test_a_back_end_that_is_not_reached_as_it_must_be_is_not_reached(tmp_path: Path, wrong: str) -> None:
    authority, strangers = Authority(tmp_path / "ca"), Authority(tmp_path / "strangers", "stranger")
    async with back_end(authority) as upstream:
        right = settings_with(tmp_path, upstream, authority)
        assert right.upstream_tls is not None
        settings = replace(
            right,
            upstream_tls={
                "no certificate is shown": replace(right.upstream_tls, certificate=None, key=None),
                "the back end is not who is trusted": replace(
                    right.upstream_tls, root_certificates=strangers.certificate.read_bytes()
                ),
                "in the clear": None,
            }[wrong],
        )
        async with running(settings) as server:
            answer = await ask(f"127.0.0.1:{server.port}", authority.credentials(authority.issue("client")))
        assert answer in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_keys_are_not_shown(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, "127.0.0.1:1", Authority(tmp_path / "ca"))
    assert "PRIVATE KEY" not in repr(settings)
