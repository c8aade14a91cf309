"""Requests that a gateway refuses, by name and on record: key, account, budget, model, concurrency, journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from billing.amounts import PICO, to_amount
from billing.v1.account_pb2 import ACCOUNT_STATUS_SUSPENDED, AccountUpdate, BudgetState, Project
from billing.v1.usage_pb2 import (
    OUTCOME_REJECTED,
    REFUSAL_REASON_BALANCE,
    REFUSAL_REASON_BUDGET,
    REFUSAL_REASON_MODEL,
    REFUSAL_REASON_RATE,
    REFUSAL_REASON_SUSPENDED,
)
from producers.meter import MeterSettings
from serving import kserve
from serving.gateway import AdmissionSettings, GatewayServer, LimitSettings
from serving.gateway.directory import Directory
from serving.kserve import SERVICE_NAME
from tests.serving.gateway_support import (
    HEADERS,
    PARTITIONS,
    SECRET,
    account,
    answers,
    api_key,
    gateway_settings,
    journalled,
    known_directory,
    now_ms,
    put_account,
    put_key,
    requests,
    running,
    scripted_back_end,
    settled,
    told,
    trace_inputs,
    vllm_response,
)


@pytest.mark.parametrize("headers", [None, {"authorization": "Bearer wrong"}, {"x-api-key": ""}])
async def test_without_a_valid_key_nothing_goes_through(
    server: GatewayServer, client: Any, headers: dict[str, str] | None
) -> None:
    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
        await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=headers)
    with pytest.raises(grpc.aio.AioRpcError):
        await answers(client, {"model_name": "trace", "inputs": trace_inputs(1, 1)}, headers=headers)
    # It is refused before it says anything, and grpc.aio has its own words for a client that still writes then.
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        open_stream: Any = channel.stream_stream(f"/{SERVICE_NAME}/ModelStreamInfer", None, None)
        call = open_stream(metadata=tuple((headers or {}).items()))
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert journalled(server.meter) == []
    assert server.metrics()["refused_key"] == 3


async def test_no_balance_or_no_account_is_refused_and_recorded(
    server: GatewayServer, client: Any, directory: Directory
) -> None:
    async def refusal(match: str) -> int:
        with pytest.raises(InferenceServerException, match=match):
            await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)
        event = journalled(server.meter)[-1]
        assert event.outcome == OUTCOME_REJECTED
        return event.refusal_reason

    put_account(directory, account(balance_pico=0, sequence=2))
    assert await refusal("RESOURCE_EXHAUSTED.*balance") == REFUSAL_REASON_BALANCE
    put_account(directory, account(status=ACCOUNT_STATUS_SUSPENDED, sequence=3))
    assert await refusal("PERMISSION_DENIED.*not active") == REFUSAL_REASON_SUSPENDED
    directory.on_account(b"tenant-a", b"", 0)
    assert await refusal("PERMISSION_DENIED.*does not exist") == REFUSAL_REASON_SUSPENDED
    put_account(directory, account(sequence=4))
    await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)


async def test_a_budget_that_is_used_up_and_a_closed_project_are_refused_by_name_and_recorded(
    server: GatewayServer, client: Any, directory: Directory
) -> None:
    async def refusal(update: AccountUpdate, match: str) -> int:
        directory.on_account(b"update", update.SerializeToString(), 0)
        with pytest.raises(InferenceServerException, match=match):
            await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)
        event = journalled(server.meter)[-1]
        assert event.outcome == OUTCOME_REJECTED
        return event.refusal_reason

    budget = BudgetState(tenant_id="tenant-a", project_id="project", amount=to_amount(25 * PICO), used_up=True, hard_stop=True)
    budget.period_end_ms = 4_102_444_800_000
    told = "RESOURCE_EXHAUSTED.*budget of project project: 25.00 USD is used up until 2100-01-01T00:00:00Z"
    assert await refusal(AccountUpdate(budget=budget), told) == REFUSAL_REASON_BUDGET
    left_s = budget.period_end_ms // 1_000 - time.time()
    assert left_s - 60 < await retry_after_s(server.port) <= left_s + 60
    budget.gone = True
    directory.on_account(b"update", AccountUpdate(budget=budget).SerializeToString(), 0)
    project = Project(tenant_id="tenant-a", project_id="project", closed=True)
    assert await refusal(AccountUpdate(project=project), "PERMISSION_DENIED.*project project: is closed") == (
        REFUSAL_REASON_SUSPENDED
    )
    project.closed = False
    directory.on_account(b"update", AccountUpdate(project=project).SerializeToString(), 0)
    await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)


async def test_stale_state_is_unavailable(tmp_path: Path, back_end: str) -> None:
    directory = Directory(PARTITIONS)
    put_key(directory, api_key())
    put_account(directory, account(log_time_ms=now_ms() - 120_000))
    async with (
        running(gateway_settings(tmp_path, back_end, admission=AdmissionSettings()), directory) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*older than 60000 ms"):
            await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)


async def test_an_unknown_model_is_not_found_and_recorded(server: GatewayServer, client: Any) -> None:
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        await client.infer("no-such-model", trace_inputs(1, 1, stream=False), headers=HEADERS)
    ((_, error),) = await answers(client, {"model_name": "no-such-model", "inputs": trace_inputs(1, 1)})
    assert "is not served" in str(error)
    assert [event.refusal_reason for event in journalled(server.meter)] == [REFUSAL_REASON_MODEL] * 2


async def test_malformed_tensors_are_invalid_arguments(server: GatewayServer, client: Any) -> None:
    broken = triton.InferInput("text_input", [2], "BYTES")
    broken._raw_content = b"\xff\xff\xff\xff"
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*text_input"):
        await client.infer("smollm2-unary", [broken], headers=HEADERS)
    assert server.meter.metrics()["open_requests"] == 0


async def test_concurrency_is_bounded_per_tenant(tmp_path: Path) -> None:
    is_refused = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        await is_refused.wait()
        yield vllm_response("x", input_tokens=1, new_tokens=1, final=True)

    limits = LimitSettings(tenant_requests_max=1)
    async with (
        scripted_back_end(script) as address,
        running(gateway_settings(tmp_path, address, limits=limits)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        slow = {"model_name": "trace", "inputs": trace_inputs(1, 1), "request_id": "slow"}
        found: list[tuple[Any, Any]] = []
        async with asyncio.timeout(180):
            async for result, error in client.stream_infer(requests(slow, {**slow, "request_id": "refused"}), headers=HEADERS):
                found.append((result, error))
                if error is not None:
                    is_refused.set()
        (refused,) = [error for _, error in found if error is not None]
        assert "concurrent requests: 1 of this tenant" in str(refused)
        reasons = {event.client_request_id: event.refusal_reason for event in await settled(server, 2)}
        assert reasons == {"slow": 0, "refused": REFUSAL_REASON_RATE}
        assert told((await answers(client, slow))[-1][0]) is not None


async def test_idle_streams_of_one_tenant_take_no_place_from_others(tmp_path: Path, back_end: str) -> None:
    """gRPC bounds the calls of a process, probes included, whether or not anything is asked on them."""
    directory = known_directory()
    put_key(directory, api_key("key-b", "secret-b", "tenant-b"))
    put_account(directory, account("tenant-b"))
    settings = gateway_settings(tmp_path, back_end, limits=LimitSettings(requests_max=4, tenant_requests_max=3))
    async with running(settings, directory) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        open_stream: Any = channel.stream_stream(f"/{SERVICE_NAME}/ModelStreamInfer", None, None)

        def stream_of(secret: str) -> Any:
            return open_stream(metadata=(("x-api-key", secret),))

        # More than there are places in the whole process, and at no moment more than gRPC itself lets in.
        ends: list[asyncio.Future[grpc.StatusCode]] = []
        async with asyncio.timeout(180):
            for opened in (100, 200, 300):
                ends += [asyncio.ensure_future(call.code()) for call in [stream_of(SECRET) for _ in range(100)]]
                while sum(end.done() for end in ends) < opened - 3:
                    await asyncio.wait([end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED)
        assert {end.result() for end in ends if end.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            headers = {"x-api-key": "secret-b"}
            entry = {"model_name": "trace", "inputs": trace_inputs(1, 1)}
            assert told((await answers(client, entry, headers=headers))[-1][0]) is not None
        assert server.gateway.metrics["refused_rate"] == 297
        for end in ends:
            end.cancel()


async def test_a_full_journal_refuses_before_the_inference(tmp_path: Path, back_end: str, direct: Any) -> None:
    meter = MeterSettings(tmp_path / "journal.sqlite", PARTITIONS, journal_bytes_max=2_000)
    before = await direct.get_inference_statistics("trace-unary")
    async with (
        running(gateway_settings(tmp_path, back_end, meter=meter)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*usage cannot be recorded"):
            await infer_until_refused(client)
        assert await retry_after_s(server.port) == 1
        done = len(journalled(server.meter))
        assert done > 0
    after = await direct.get_inference_statistics("trace-unary")
    counts = [statistics.model_stats[0].inference_count for statistics in (before, after)]
    assert counts[1] - counts[0] == done


async def retry_after_s(port: int) -> int:
    """What the refusal of an inference says; 0: nothing."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = service_pb2.ModelInferRequest(model_name="trace-unary")
        kserve.add_bytes_input(request, "sampling_parameters", [b'{"context_tokens": 1, "output_tokens": 1}'])
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=tuple(HEADERS.items()))
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        return int(str(dict(await call.trailing_metadata()).get("retry-after", 0)))


async def infer_until_refused(client: Any) -> None:
    for _ in range(100):
        await client.infer("trace-unary", trace_inputs(1, 1, stream=False), headers=HEADERS)
