"""Limits, shadow mode, test keys and prices through a gateway, as tritonclient and a bare gRPC client see them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as triton_aio
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from billing.amounts import PICO
from billing.v1.account_pb2 import BILLING_MODE_PREPAID, KEY_SCOPE_READ, Limits, ModelLimits, Plan
from billing.v1.command_pb2 import Price, PriceBook
from billing.v1.usage_pb2 import (
    OUTCOME_BACKEND_ERROR,
    OUTCOME_COMPLETED,
    OUTCOME_REJECTED,
    OUTCOME_TRUNCATED,
    REFUSAL_REASON_BALANCE,
    REFUSAL_REASON_KEY,
    REFUSAL_REASON_OUTPUT_TOO_LARGE,
    REFUSAL_REASON_RATE,
    SERVICE_CLASS_STANDARD,
    SERVICE_CLASS_TEST,
)
from serving import kserve
from serving.gateway import GatewayServer
from serving.gateway.directory import Directory
from serving.gateway.settings import LeaseSettings, LimitSettings
from serving.gateway.spending import Spending
from serving.gateway.worth import Worth
from tests.serving.gateway_support import (
    HEADERS,
    account,
    answers,
    api_key,
    gateway_settings,
    journalled,
    known_directory,
    profiles,
    put_account,
    put_key,
    running,
    scripted_back_end,
    settled,
    tensor,
    told,
    trace_inputs,
    vllm_response,
)

MODELS = {name: profile for name, profile in profiles().items() if name.startswith("trace")}


def plan(**fields: Any) -> Plan:
    return Plan(billing_mode=BILLING_MODE_PREPAID, **fields)


@asynccontextmanager
async def serving(folder: Path, back_end: str, directory: Directory) -> AsyncIterator[tuple[GatewayServer, Any]]:
    settings = gateway_settings(folder, back_end, models=MODELS, tokenizers={})
    async with running(settings, directory) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield server, client


async def infer(client: Any, *, context: int = 10, output: int = 5, model: str = "trace-unary", **more: Any) -> Any:
    return await client.infer(model, trace_inputs(context, output, stream=False, **more), headers=HEADERS)


async def refusal(client: Any, **options: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        await infer(client, **options)
    assert str(caught.value.status()) == "StatusCode.RESOURCE_EXHAUSTED"
    return str(caught.value.message())


@pytest.mark.parametrize("whose", ["key", "tenant", "model"])
async def test_limits_of_key_tenant_and_model_hold(tmp_path: Path, back_end: str, whose: str) -> None:
    limits = Limits(requests_per_minute=3, output_tokens_max=50)
    directory = known_directory()
    if whose == "key":
        put_key(directory, api_key(limits=limits))
    plans = {
        "key": plan(),
        "tenant": plan(limits=limits),
        "model": plan(model_limits=[ModelLimits(model="trace-unary", limits=limits)]),
    }
    put_account(directory, account(sequence=2, plan=plans[whose]))
    async with serving(tmp_path, back_end, directory) as (server, client):
        assert "max_tokens: 51: at most 50" in await refusal(client, max_tokens=51)
        await infer(client, max_tokens=50)
        await infer(client)
        message = await refusal(client)
        assert "requests per minute: 3 of " in message
        assert whose in message
        reasons = [event.refusal_reason for event in journalled(server.meter) if event.outcome == OUTCOME_REJECTED]
        assert reasons == [REFUSAL_REASON_OUTPUT_TOO_LARGE, REFUSAL_REASON_RATE]
        if whose == "model":
            # Another model's traffic is not counted.
            found = await answers(client, {"model_name": "trace", "inputs": trace_inputs(1, 2)})
            assert found[-1][1] is None


@pytest.mark.parametrize("counts", [True, False], ids=["the back end counts", "the tokenizer counts"])
@pytest.mark.parametrize("stated", [8, None], ids=["stated", "unstated"])
async def test_an_answer_longer_than_it_may_be_ends_there_and_says_so(tmp_path: Path, stated: int | None, counts: bool) -> None:
    cancelled = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            for _ in range(100):
                response = vllm_response(" one", input_tokens=3, new_tokens=1, final=False)
                if not counts:
                    kserve.strip_output(response.infer_response, "num_output_tokens")
                yield response
            # It hears of the end of its call alone.
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    directory = known_directory()
    put_key(directory, api_key(limits=Limits(output_tokens_max=8)))
    sampling = {} if stated is None else {"max_tokens": stated}
    inputs = [
        tensor("text_input", "hello"),
        tensor("stream", True),
        tensor("sampling_parameters", json.dumps(sampling)),
    ]
    async with (
        scripted_back_end(script) as address,
        running(gateway_settings(tmp_path, address), directory) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        found = await answers(client, {"model_name": "smollm2", "inputs": inputs, "request_id": "mine"})
        assert "max_tokens: at most 8 are allowed: the answer ends here" in str(found[-1][1])
        async with asyncio.timeout(60):
            await cancelled.wait()
        [event] = await settled(server)
        delivered = sum(response is not None and bool(response.outputs) for response, _ in found)
        assert (event.outcome, event.output_tokens) == (OUTCOME_TRUNCATED, delivered)
        # What was counted again may be a token longer.
        assert 8 <= delivered <= (8 if counts else 9)
        assert server.gateway.metrics["requests_cut_off"] == 1
        assert server.gateway.metrics["requests_completed"] == 0


@pytest.mark.parametrize("shadow", [False, True], ids=["within the limit", "over it, and only watched"])
async def test_an_answer_within_its_limit_and_one_that_is_only_watched_end_as_they_would(
    tmp_path: Path, back_end: str, shadow: bool
) -> None:
    directory = known_directory()
    put_account(directory, account(sequence=2, plan=plan(shadow=shadow, limits=Limits(output_tokens_max=8))))
    async with serving(tmp_path, back_end, directory) as (server, client):
        tokens = 12 if shadow else 8
        found = await answers(client, {"model_name": "trace", "inputs": trace_inputs(1, tokens, chunk_tokens=1)})
        assert found[-1][1] is None
        [event] = await settled(server)
        assert (event.outcome, event.output_tokens) == (OUTCOME_COMPLETED, tokens)


async def test_messages_over_the_limit_do_not_pass_on_either_side(tmp_path: Path, back_end: str) -> None:
    limits = LimitSettings(message_bytes_max=4_096)
    settings = gateway_settings(tmp_path, back_end, models=MODELS, tokenizers={}, limits=limits)
    async with (
        running(settings, known_directory()) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        inputs = [*trace_inputs(1, 5, stream=False), tensor("text_input", "x" * 4_096)]
        with pytest.raises(InferenceServerException, match="larger than max"):
            await client.infer("trace-unary", inputs, headers=HEADERS)
        assert "larger than max" in await refusal(client, output=4_096)
        await infer(client)
        # Nobody has seen the first; the answer of the second costs nothing.
        assert [event.outcome for event in await settled(server, 2)] == [OUTCOME_BACKEND_ERROR, OUTCOME_COMPLETED]


async def test_tokens_are_counted_as_they_were_used(tmp_path: Path, back_end: str) -> None:
    directory = known_directory()
    put_account(directory, account(sequence=2, plan=plan(limits=Limits(tokens_per_minute=100))))
    async with serving(tmp_path, back_end, directory) as (_, client):
        # Each uses 30, whatever it had reserved.
        for _ in range(3):
            await infer(client, context=20, output=10, max_tokens=10)
        assert "tokens per minute: 100 of tenant tenant-a" in await refusal(client, max_tokens=20)
        await infer(client, context=1, output=1, max_tokens=5)


def google_rpc() -> Any:
    """google.rpc's two messages as their own files describe them: an oracle beside the bytes that the gateway writes."""
    file = descriptor_pb2.FileDescriptorProto(name="oracle.proto", package="google.rpc", syntax="proto3")
    file.dependency.extend([any_pb2.DESCRIPTOR.name, duration_pb2.DESCRIPTOR.name])
    kinds = FieldDescriptor
    status, info = file.message_type.add(name="Status"), file.message_type.add(name="RetryInfo")
    status.field.add(name="code", number=1, type=kinds.TYPE_INT32, label=kinds.LABEL_OPTIONAL)
    status.field.add(name="message", number=2, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    status.field.add(
        name="details", number=3, type=kinds.TYPE_MESSAGE, type_name=".google.protobuf.Any", label=kinds.LABEL_REPEATED
    )
    info.field.add(
        name="retry_delay", number=1, type=kinds.TYPE_MESSAGE, type_name=".google.protobuf.Duration", label=kinds.LABEL_OPTIONAL
    )
    pool = descriptor_pool.DescriptorPool()
    for made in (any_pb2, duration_pb2):
        pool.AddSerializedFile(made.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    names = ("google.rpc.Status", "google.rpc.RetryInfo")
    return [message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names]


async def test_who_is_refused_is_told_when_to_try_again(tmp_path: Path, back_end: str) -> None:
    status_class, info_class = google_rpc()
    directory = known_directory()
    put_account(directory, account(sequence=2, plan=plan(limits=Limits(requests_per_minute=1))))
    async with serving(tmp_path, back_end, directory) as (server, client):
        began_s = time.monotonic()
        await infer(client)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="trace-unary")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request, metadata=tuple(HEADERS.items()))
        metadata: Any = caught.value.trailing_metadata()
        trailers = dict(metadata)
        wait_s = int(str(trailers["retry-after"]))
        # The minute began with the first request.
        assert 59 - (time.monotonic() - began_s) <= wait_s <= 60
        status = status_class.FromString(trailers["grpc-status-details-bin"])
        assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], caught.value.details())
        assert status.details[0].type_url == "type.googleapis.com/google.rpc.RetryInfo"
        assert info_class.FromString(status.details[0].value).retry_delay.seconds == wait_s
        # On a stream it is in band, like the refusal.
        found = await answers(
            client, {"model_name": "trace", "inputs": trace_inputs(1, 1)}, {"model_name": "trace", "inputs": trace_inputs(1, 1)}
        )
        assert all("requests per minute" in str(error) for _, error in found)


async def test_a_tenant_in_shadow_mode_is_metered_and_refused_nothing(tmp_path: Path, back_end: str) -> None:
    directory = known_directory()
    limits = Limits(requests_per_minute=1, output_tokens_max=1, prompt_tokens_max=1)
    put_account(directory, account(sequence=2, balance_pico=-PICO, plan=plan(limits=limits, shadow=True)))
    async with serving(tmp_path, back_end, directory) as (server, client):
        for _ in range(3):
            await infer(client, max_tokens=9)
        assert [event.outcome for event in journalled(server.meter)] == [OUTCOME_COMPLETED] * 3
        metrics = server.metrics()
        assert (metrics["shadow_balance"], metrics["shadow_rate"], metrics["shadow_output_too_large"]) == (3, 2, 3)
        # A key is needed all the same.
        with pytest.raises(InferenceServerException, match="unknown, revoked or expired"):
            await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers={"authorization": "Bearer other"})


async def test_a_test_key_s_usage_is_metered_free_and_needs_no_balance(tmp_path: Path, back_end: str) -> None:
    directory = known_directory()
    put_account(directory, account(sequence=2, balance_pico=0, plan=plan()))
    async with serving(tmp_path, back_end, directory) as (server, client):
        assert "balance" in await refusal(client)
        put_key(directory, api_key(test=True))
        await infer(client)
        refused, free = journalled(server.meter)
        assert (refused.service_class, refused.refusal_reason) == (SERVICE_CLASS_STANDARD, REFUSAL_REASON_BALANCE)
        assert (free.service_class, free.outcome, free.output_tokens) == (SERVICE_CLASS_TEST, OUTCOME_COMPLETED, 5)


async def test_price_and_balance_are_told_where_the_plan_says_so(tmp_path: Path, back_end: str) -> None:
    directory = known_directory()
    async with serving(tmp_path, back_end, directory) as (server, client):
        # Prices are known where leases are kept; this tenant owes nothing to anyone, so that none are needed.
        price = Price(model="*", uncached_input_pico=100_000, output_pico=2_000_000)
        book = PriceBook(version=1, currency="USD", prices=[price])
        leases = LeaseSettings("127.0.0.1:1", b"key")
        server.gateway.spending = Spending(leases, None, Worth([book]))  # type: ignore[arg-type]  # nobody asks it for money
        put_account(directory, account(sequence=2, balance_pico=PICO, plan=plan(shadow=True, tell_price=True)))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.ModelInferRequest(model_name="trace-unary")
            kserve.add_bytes_input(request, "sampling_parameters", [b'{"context_tokens": 10, "output_tokens": 5}'])
            call = stub.ModelInfer(request, metadata=tuple(HEADERS.items()))
            await call
            trailers = dict(await call.trailing_metadata())
        (event,) = journalled(server.meter)
        cost = (event.uncached_input_tokens * 100_000 + event.output_tokens * 2_000_000) / PICO
        assert float(str(trailers["taximeter-price"]).split()[0]) == pytest.approx(cost)
        assert float(str(trailers["taximeter-balance"]).split()[0]) == pytest.approx(1 - cost)
        ((response, _),) = [
            (response, error)
            for response, error in await answers(client, {"model_name": "trace", "inputs": trace_inputs(3, 1)})
            if response is not None and told(response) is not None
        ]
        assert response.parameters["taximeter_price"].string_param == "0.0000023 USD"


async def test_a_key_that_may_not_be_used_leaves_a_record_and_one_that_nobody_knows_a_count(
    tmp_path: Path, back_end: str
) -> None:
    directory = known_directory()
    refused: dict[str, dict[str, Any]] = {
        "revoked": {"revoked": True},
        "expired": {"expires_ms": 1},
        "reads": {"scopes": [KEY_SCOPE_READ]},
    }
    for name, fields in refused.items():
        put_key(directory, api_key(key_id=name, secret=name, **fields))
    async with serving(tmp_path, back_end, directory) as (server, client):
        for secret in (*refused, "unknown"):
            headers = {"x-api-key": secret}
            with pytest.raises(InferenceServerException):
                await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=headers, request_id=secret)
            with pytest.raises(grpc.aio.AioRpcError):
                await answers(client, {"model_name": "trace", "inputs": trace_inputs(1, 1)}, headers=headers)
            # What costs nothing leaves no record: anybody may ask.
            assert await client.is_server_live(headers=headers)
        events = await settled(server, 6)
        assert server.metrics()["refused_key"] == 8
    assert sorted((event.api_key_id, event.model, event.client_request_id) for event in events) == sorted(
        place for name in refused for place in ((name, "trace-unary", name), (name, "-", ""))
    )
    assert {(event.tenant_id, event.outcome, event.refusal_reason) for event in events} == {
        ("tenant-a", OUTCOME_REJECTED, REFUSAL_REASON_KEY)
    }
