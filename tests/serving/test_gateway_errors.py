"""Back ends that fail: what the client is told, what is billed, and who else on the stream notices (nobody)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_ESTIMATE,
    COUNT_SOURCE_TOKENIZER,
    OUTCOME_BACKEND_ERROR,
    OUTCOME_BACKEND_ERROR_PARTIAL,
    OUTCOME_CANCELLED,
    OUTCOME_COMPLETED,
    OUTCOME_INTERRUPTED,
    OUTCOME_TRUNCATED,
    UsageEvent,
)
from serving import kserve
from serving.gateway import GatewaySettings, LimitSettings, generic, vllm
from tests.serving.gateway_support import (
    HEADERS,
    billed,
    gateway_settings,
    journalled,
    profiles,
    running,
    scripted_back_end,
    settled,
    tensor,
    texts,
    told,
    vllm_response,
    wire,
)

ENTRY = {"model_name": "trace", "inputs": [tensor("text_input", "a prompt")], "request_id": "mine"}


async def play(
    settings: GatewaySettings,
    *entries: dict[str, Any],
    headers: dict[str, str] | None = None,
    told_error: asyncio.Event | None = None,
    **options: Any,
) -> tuple[list[tuple[Any, Any]], list[UsageEvent], grpc.StatusCode | None]:
    """What a client gets of one stream, the bills, and the status if the stream ended with one. `told_error` is set when it is
    told an error in band."""
    found: list[tuple[Any, Any]] = []
    status = None
    async with running(settings) as server, triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        try:
            async with asyncio.timeout(180):
                headers = {**HEADERS, **(headers or {})}
                async for result, error in client.stream_infer(_each(entries), headers=headers, **options):
                    found.append((None if result is None else result.get_response(), error))
                    if error is not None and told_error is not None:
                        told_error.set()
        except grpc.aio.AioRpcError as error:
            status = error.code()
        return found, await settled(server, len(entries)), status


async def _each(entries: tuple[dict[str, Any], ...]) -> AsyncIterator[dict[str, Any]]:
    for entry in entries:
        yield dict(entry)


async def failing_in_band(_: Any, context: Any) -> AsyncIterator[Any]:
    for text in ("one ", "two ", "three "):
        yield vllm_response(text, input_tokens=4, new_tokens=2, final=False)
    yield service_pb2.ModelStreamInferResponse(error_message="the model fell over")


async def failing_with_status(request: Any, context: Any) -> AsyncIterator[Any]:
    yield vllm_response("one ", input_tokens=4, new_tokens=2, final=False)
    await context.abort(grpc.StatusCode.INTERNAL, "the server fell over")


async def failing_at_once(_: Any, context: Any) -> AsyncIterator[Any]:
    yield service_pb2.ModelStreamInferResponse(error_message="no such thing")


async def test_an_error_in_band_mid_stream_bills_what_was_delivered(tmp_path: Path) -> None:
    async with scripted_back_end(failing_in_band) as address:
        found, (event,), status = await play(gateway_settings(tmp_path, address), ENTRY)
    assert texts(found) == "one two three "
    assert str(found[-1][1]) == "the model fell over"
    assert status is None
    assert event.outcome == OUTCOME_BACKEND_ERROR_PARTIAL
    assert billed(event)[1:] == (4, 6)
    assert told(found[-2][0])[:3] == billed(event)  # type: ignore[index]


async def test_the_setting_records_a_partial_answer_at_price_0(tmp_path: Path) -> None:
    async with scripted_back_end(failing_in_band) as address:
        _, (event,), _ = await play(gateway_settings(tmp_path, address, bill_partial_answers=False), ENTRY)
    assert event.outcome == OUTCOME_BACKEND_ERROR
    assert event.output_tokens == 6


async def test_a_status_mid_stream_is_told_in_band_with_what_came_before(tmp_path: Path) -> None:
    async with scripted_back_end(failing_with_status) as address:
        found, (event,), status = await play(gateway_settings(tmp_path, address), ENTRY)
    assert texts(found) == "one "
    assert str(found[-1][1]) == "the server fell over"
    assert status is None
    assert (event.outcome, event.output_tokens) == (OUTCOME_BACKEND_ERROR_PARTIAL, 2)


async def test_a_client_that_wants_the_status_gets_it(tmp_path: Path) -> None:
    async with scripted_back_end(failing_with_status) as address:
        found, _, status = await play(gateway_settings(tmp_path, address), ENTRY, headers={"triton_grpc_error": "true"})
    assert texts(found) == "one "
    assert status is grpc.StatusCode.INTERNAL


async def test_an_error_before_the_first_token_is_recorded_at_price_0(tmp_path: Path) -> None:
    async with scripted_back_end(failing_at_once) as address:
        found, (event,), _ = await play(gateway_settings(tmp_path, address), ENTRY)
    assert [str(error) for _, error in found] == ["no such thing"]
    assert (event.outcome, event.output_tokens) == (OUTCOME_BACKEND_ERROR, 0)


async def test_an_error_of_one_request_leaves_the_others_of_its_stream_alone(tmp_path: Path) -> None:
    bad_is_told = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        if kserve.read_text_input(request, "text_input") == "bad":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield vllm_response("good ", input_tokens=1, new_tokens=1, final=False)
        # Whoever is alone on a stream ends it: the other one is still there.
        await bad_is_told.wait()
        yield vllm_response("good ", input_tokens=1, new_tokens=1, final=True)

    good = {**ENTRY, "inputs": [tensor("text_input", "good")], "request_id": "good"}
    bad = {**ENTRY, "inputs": [tensor("text_input", "bad")], "request_id": "bad"}
    async with scripted_back_end(script) as address:
        found, events, status = await play(gateway_settings(tmp_path, address), good, bad, told_error=bad_is_told)
    assert texts(found) == "good good "
    assert [str(error) for _, error in found if error] == ["gone"]
    assert status is None
    outcomes = {event.client_request_id: event.outcome for event in events}
    assert outcomes == {"good": OUTCOME_COMPLETED, "bad": OUTCOME_BACKEND_ERROR}


async def test_what_a_back_end_says_before_it_has_read_the_request_is_told(tmp_path: Path) -> None:
    """One that is at its limit ends a stream when it begins, also while the request is on its way there."""

    def refuse(_: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room here")

    # Threads, which do not wait for the gateway's event loop.
    server = grpc.server(ThreadPoolExecutor(2))
    handlers = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(kserve.SERVICE_NAME, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    settings = gateway_settings(tmp_path, f"127.0.0.1:{port}", tokenizers={}, models={"trace": vllm("trace")})
    try:
        found, events, _ = await play(settings, *(ENTRY for _ in range(100)))
    finally:
        await asyncio.to_thread(server.stop(None).wait)
    assert Counter(str(error) for _, error in found) == {"no room here": 100}
    assert Counter(event.outcome for event in events) == {OUTCOME_BACKEND_ERROR: 100}


async def test_a_back_end_without_final_flags_still_tells_the_usage_on_the_last_chunk(tmp_path: Path) -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(3):
            yield vllm_response("x", input_tokens=2, new_tokens=1, final=None)

    async with scripted_back_end(script) as address:
        found, (event,), _ = await play(gateway_settings(tmp_path, address), ENTRY)
    assert [told(response) is not None for response, _ in found] == [False, False, True]
    assert billed(event)[1:] == (2, 3)


async def test_a_prompt_that_the_back_end_truncated_is_billed_by_its_count(tmp_path: Path) -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield vllm_response("x", input_tokens=50, new_tokens=1, final=True)

    # Bytes do not settle the limit of 200 tokens, so the prompt was counted before.
    entry = {"model_name": "smollm2", "inputs": [tensor("text_input", " word" * 150)]}
    async with scripted_back_end(script) as address:
        _, (event,), _ = await play(gateway_settings(tmp_path, address), entry)
    assert (event.outcome, event.uncached_input_tokens) == (OUTCOME_TRUNCATED, 50)


async def test_an_answer_that_cannot_be_metered_is_not_delivered(tmp_path: Path) -> None:
    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        response = vllm_response("secret", input_tokens=50, new_tokens=1, final=True)
        response.infer_response.raw_output_contents[1] = b"\x01"
        yield response

    async with scripted_back_end(script) as address:
        found, (event,), _ = await play(gateway_settings(tmp_path, address), ENTRY)
    assert texts(found) == ""
    assert "cannot be metered" in str(found[-1][1])
    assert event.outcome == OUTCOME_BACKEND_ERROR


async def test_only_one_upstream_request_a_stream_and_no_credentials_in_it(tmp_path: Path) -> None:
    seen: list[Any] = []
    metadata: list[tuple[str, Any]] = []

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        metadata.extend(context.invocation_metadata())
        yield vllm_response("x", input_tokens=1, new_tokens=1, final=True)

    async with scripted_back_end(script, seen) as address:
        settings = gateway_settings(tmp_path, address)
        _, events, _ = await play(settings, ENTRY, ENTRY, headers={"x-trace": "kept"})
    assert {request.id for request in seen} == {event.request_id for event in events}
    assert len(seen) == 2
    assert ("x-trace", "kept") in metadata
    assert not {"authorization", "x-api-key"} & {key for key, _ in metadata}
    assert not any(HEADERS["authorization"] in str(value) for _, value in metadata)


@pytest.mark.parametrize("deadline_s", [90.0, None], ids=["the client's", "the setting's"])
async def test_the_back_end_is_told_how_long_the_client_waits(tmp_path: Path, deadline_s: float | None) -> None:
    left_s: list[float] = []

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        left_s.append(context.time_remaining())
        yield vllm_response("x", input_tokens=1, new_tokens=1, final=True)

    async with scripted_back_end(script) as address:
        settings = gateway_settings(tmp_path, address, limits=LimitSettings(upstream_timeout_s=500.0))
        await play(settings, ENTRY, stream_timeout=deadline_s)
    [told_s] = left_s
    # On the wire a time is rounded up, to a second where it is so long.
    assert 0 < told_s <= 91 if deadline_s else 91 < told_s <= 501


async def test_whose_a_request_is_its_key_says_and_nothing_else(tmp_path: Path) -> None:
    names = ("tenant", "tenant_id", "taximeter_tenant_id", "project_id", "user_id", "api_key_id", "test")
    forged = {**ENTRY, "parameters": dict.fromkeys(names, "tenant-b")}
    headers = {form.format(name): "tenant-b" for name in names for form in ("{}", "x-{}", "x-taximeter-{}")}

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield vllm_response("x", input_tokens=1, new_tokens=1, final=True)

    async with scripted_back_end(script) as address:
        _, (event,), _ = await play(gateway_settings(tmp_path, address), forged, headers=headers)
    assert (event.tenant_id, event.api_key_id, event.project_id, event.user_id) == ("tenant-a", "key-a", "project", "user")
    assert "tenant-b" not in str(event)


async def test_more_metadata_than_has_room_is_refused(tmp_path: Path) -> None:
    settings = gateway_settings(tmp_path, "127.0.0.1:1", tokenizers={}, models={})
    async with running(settings) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ServerLive(service_pb2.ServerLiveRequest(), metadata=(("x-large", "x" * 64_000),), timeout=60)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # The connection goes on.
        with pytest.raises(grpc.aio.AioRpcError) as answered:
            await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=60)
        assert answered.value.code() is grpc.StatusCode.UNAVAILABLE, "there is no back end"


async def test_progress_says_what_has_left_and_a_held_chunk_has_not(tmp_path: Path) -> None:
    """What a crash would bill: neither more than left, nor less. Without counts it is the tokenizer's, as an estimate."""
    go_on = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        for text in ("one two", " three", " four"):
            yield vllm_response(text, input_tokens=7, new_tokens=1, final=False)
        await go_on.wait()
        yield vllm_response(" five", input_tokens=7, new_tokens=1, final=True)

    models = profiles(generic("counted-here", tokenizer="smollm2"), vllm("counted-there"))
    async with scripted_back_end(script) as address:
        for model, source in (("counted-there", 0), ("counted-here", COUNT_SOURCE_ESTIMATE)):
            folder = tmp_path / model
            go_on.clear()
            async with (
                running(gateway_settings(folder, address, models=models)) as server,
                triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
            ):
                got: list[str] = []
                stream = client.stream_infer(_each(({**ENTRY, "model_name": model},)), headers=HEADERS)
                async for result, _ in stream:
                    got.append(result.as_numpy("text_output")[0].decode())
                    if len(got) == 2:
                        break
                (row,) = await asyncio.to_thread(server.meter.journal._store.open_rows)
                left = UsageEvent.FromString(row.event)
                assert left.outcome == OUTCOME_INTERRUPTED
                if source:
                    assert (left.count_source, left.output_tokens) == (source, 3)
                else:
                    assert (left.uncached_input_tokens, left.output_tokens) == (7, 2)
                go_on.set()
                rest = [result.as_numpy("text_output")[0].decode() async for result, _ in stream]
                assert "".join(got + rest) == "one two three four five"
                (event,) = journalled(server.meter)
                assert event.output_tokens == (5 if source else 4)
                assert event.count_source != COUNT_SOURCE_TOKENIZER or source


@pytest.mark.parametrize("hold_back", [True, False])
async def test_without_hold_back_no_chunk_waits_for_the_next(tmp_path: Path, hold_back: bool) -> None:
    first_seen = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        yield vllm_response("one", input_tokens=1, new_tokens=1, final=False)
        if not hold_back:
            await first_seen.wait()
        yield vllm_response("two", input_tokens=1, new_tokens=1, final=True)

    async with (
        scripted_back_end(script) as address,
        running(gateway_settings(tmp_path, address, hold_back_last_chunk=hold_back)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        async with asyncio.timeout(180):
            async for _ in client.stream_infer(_each((ENTRY,)), headers=HEADERS):
                first_seen.set()
    assert first_seen.is_set()


async def test_no_chunk_leaves_that_the_journal_does_not_take(tmp_path: Path) -> None:
    journal_gone = asyncio.Event()

    async def script(request: Any, context: Any) -> AsyncIterator[Any]:
        for text in ("one", "two"):
            yield vllm_response(text, input_tokens=1, new_tokens=1, final=False)
        await journal_gone.wait()
        for final in (False, False, True):
            yield vllm_response("unpaid", input_tokens=1, new_tokens=1, final=final)

    async with (
        scripted_back_end(script) as address,
        running(gateway_settings(tmp_path, address)) as server,
        triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client,
    ):
        got: list[str] = []

        async def read() -> None:
            async for result, _ in client.stream_infer(_each((ENTRY,)), headers=HEADERS):
                got.append(result.as_numpy("text_output")[0].decode())
                await asyncio.to_thread(server.meter.journal.close)
                journal_gone.set()

        with pytest.raises(grpc.aio.AioRpcError, match="usage cannot be recorded"):
            await read()
        assert got == ["one"]
    async with running(gateway_settings(tmp_path, address)) as again:
        assert again.recovered == 1
        (event,) = journalled(again.meter)
    assert (event.outcome, billed(event)[1:]) == (OUTCOME_INTERRUPTED, (1, 1))


async def endless(_: Any, context: Any) -> AsyncIterator[Any]:
    while True:
        yield vllm_response("word ", input_tokens=4, new_tokens=1, final=False)
        await asyncio.sleep(0.02)


async def test_a_connection_that_breaks_mid_stream_is_billed_as_a_cancel(tmp_path: Path) -> None:
    """The client says nothing any more: its connection is reset, as by a crash of its machine's network."""
    async with (
        scripted_back_end(endless) as address,
        running(gateway_settings(tmp_path, address)) as server,
        wire(server.port) as (port, cut),
        triton_aio.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        stream = aiter(client.stream_infer(_each((ENTRY,)), headers=HEADERS))
        received = len([await anext(stream) for _ in range(3)])
        cut()
        with pytest.raises(grpc.aio.AioRpcError):
            [_ async for _ in stream]
        (event,) = await settled(server)
    assert event.outcome == OUTCOME_CANCELLED
    assert event.uncached_input_tokens == 4
    assert event.output_tokens >= received == 3
