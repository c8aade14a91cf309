"""The RPCs that are no inferences: each by its policy, for the keys that it is for, as the back end answers them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from billing.v1.account_pb2 import KEY_SCOPE_OPERATE, KeyScope
from serving.gateway import GatewayServer
from serving.gateway.directory import Directory
from serving.gateway.policy import POLICIES, REFLECTION_SERVICES, Access
from tests.serving.gateway_support import (
    HEADERS,
    SECRET,
    api_key,
    journalled,
    now_ms,
    put_key,
    trace_inputs,
)


def status_of(address: str, service: str, method: str, secret: str | None) -> grpc.StatusCode:
    """How a call with an empty message ends."""
    with grpc.insecure_channel(address) as channel:
        kind = channel.stream_stream if service in REFLECTION_SERVICES else channel.unary_unary
        open_call: Any = kind(f"/{service}/{method}", None, None)
        metadata = () if secret is None else (("x-api-key", secret),)
        try:
            if service in REFLECTION_SERVICES:
                list(open_call(iter([b""]), metadata=metadata, timeout=120))
            else:
                open_call(b"", metadata=metadata, timeout=120)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_every_rpc_follows_its_policy(server: GatewayServer, back_end: str, directory: Directory) -> None:
    """A key that is missing, unknown, expired, revoked or of the wrong scope goes nowhere; the right one goes to the back
    end."""
    scopes = KeyScope.values()
    for scope in scopes:
        put_key(directory, api_key(key_id=f"of-{scope}", secret=f"of-{scope}", scopes=[scope]))
    put_key(directory, api_key(key_id="expired", secret="expired", scopes=scopes, expires_ms=now_ms() - 1))
    put_key(directory, api_key(key_id="revoked", secret="revoked", scopes=scopes, revoked=True))
    address = f"127.0.0.1:{server.port}"
    for (service, method), policy in POLICIES.items():
        refused = [
            await asyncio.to_thread(status_of, address, service, method, secret)
            for secret in (None, "unknown", "expired", "revoked")
        ]
        by_scope = {scope: await asyncio.to_thread(status_of, address, service, method, f"of-{scope}") for scope in scopes}
        if policy.access is Access.OPEN:
            assert {*refused, *by_scope.values()} == {grpc.StatusCode.OK}, method
            continue
        if policy.access is Access.ABSENT:
            assert {*refused, *by_scope.values()} == {grpc.StatusCode.UNIMPLEMENTED}, method
            continue
        assert set(refused) == {grpc.StatusCode.UNAUTHENTICATED}, method
        if policy.access is Access.METERED:
            # No model is named: refused for that, and not for the key.
            there = grpc.StatusCode.OK if method == "ModelStreamInfer" else grpc.StatusCode.NOT_FOUND
        elif service in REFLECTION_SERVICES:
            there = grpc.StatusCode.OK
        else:
            there = await asyncio.to_thread(status_of, back_end, service, method, None)
        for scope, status in by_scope.items():
            expected = there if scope in policy.scopes else grpc.StatusCode.PERMISSION_DENIED
            assert status is expected, f"{method}: {KeyScope.Name(scope)}"


async def test_reflection_describes_what_the_gateway_serves(server: GatewayServer) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = [found async for found in stub.ServerReflectionInfo(asked, metadata=(("x-api-key", SECRET),))]
    assert {service.name for service in answer.list_services_response.service} == {service for service, _ in POLICIES}


async def test_metadata_passes_as_it_is_and_control_is_denied_by_name(client: Any, direct: Any) -> None:
    assert await client.get_server_metadata(headers=HEADERS) == await direct.get_server_metadata()
    assert await client.get_model_config("trace", headers=HEADERS) == await direct.get_model_config("trace")
    assert await client.is_model_ready("trace", headers=HEADERS)
    for work, policy in (
        (client.load_model("trace", headers=HEADERS), "repository-control"),
        (client.register_system_shared_memory("r", "k", 1, headers=HEADERS), "shared-memory"),
        (client.update_log_settings({}, headers=HEADERS), "server-settings"),
    ):
        with pytest.raises(InferenceServerException, match=f"PERMISSION_DENIED.*denied by policy {policy}"):
            await work


async def test_no_tenant_s_key_tells_what_others_asked(client: Any, directory: Directory) -> None:
    """The back end's statistics are one count for all: who reads them twice knows how much others asked in between."""
    put_key(directory, api_key(scopes=[scope for scope in KeyScope.values() if scope != KEY_SCOPE_OPERATE]))
    with pytest.raises(InferenceServerException, match=r"PERMISSION_DENIED.*denied by policy model-statistics.*billing API"):
        await client.get_inference_statistics("trace", headers=HEADERS)


async def test_health(server: GatewayServer) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        server.gateway.ready = False
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_key_that_is_revoked_mid_stream_starts_nothing_more(server: GatewayServer, directory: Directory) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(metadata=(("x-api-key", SECRET),), timeout=180)
        request = service_pb2.ModelInferRequest(model_name="trace", id="first")
        for made in trace_inputs(1, 1):
            request.inputs.append(made._get_tensor())
            request.raw_input_contents.append(made._get_content())
        await call.write(request)
        assert (await call.read()).infer_response.id == "first"
        # Of a request that is alone on its stream the status is the stream's.
        await server.gateway.drain(120)
        directory.on_key(b"key-a", b"", 0)
        await call.write(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert len(journalled(server.meter)) == 1
