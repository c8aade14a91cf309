"""kill -9 of the gateway mid-stream: its journal bills what had been delivered, to the group of chunks that was leaving."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc.aio as triton_aio

from billing.v1.usage_pb2 import COUNT_SOURCE_BACKEND, OUTCOME_COMPLETED, OUTCOME_INTERRUPTED, UsageEvent
from producers.meter import MeterSettings, UsageMeter
from tests.serving.gateway_process import REQUEST_CHUNKS_MAX
from tests.serving.gateway_support import (
    HEADERS,
    PARTITIONS,
    await_file,
    journalled,
    model_server_process,
    told,
    trace_inputs,
    wire,
)

CHUNK_TOKENS = 3
STREAMS = 8
UNDELIVERED_MAX = (REQUEST_CHUNKS_MAX + 1) * CHUNK_TOKENS


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[str]:
    with model_server_process(tmp_path, models="trace") as address:
        yield address


@pytest.mark.chaos
@pytest.mark.parametrize("chunks_before_kill", [1, 7])
async def test_a_killed_gateway_bills_what_was_delivered(tmp_path: Path, back_end: str, chunks_before_kill: int) -> None:
    command = [sys.executable, "-m", "tests.serving.gateway_process", str(tmp_path), back_end]
    process = await asyncio.to_thread(subprocess.Popen, command)
    try:
        port = await asyncio.to_thread(await_file, tmp_path / "gateway-port", process)
        delivered: dict[str, int] = {}
        arrived = asyncio.Event()

        async def read(client: Any, name: str, reached: asyncio.Event) -> None:
            inputs = trace_inputs(11, 100_000, chunk_tokens=CHUNK_TOKENS, chunk_delay_ms=10)
            entry = {"model_name": "trace", "inputs": inputs, "request_id": name}
            with suppress(grpc.aio.AioRpcError):
                async for result, _ in client.stream_infer(one(entry), headers=HEADERS):
                    delivered[name] = delivered.get(name, 0) + len(result.as_numpy("text_output")[0])
                    arrived.set()
                    if delivered[name] >= chunks_before_kill * CHUNK_TOKENS:
                        reached.set()
                raise AssertionError("the stream ended although its gateway was killed")

        # gRPC throws away what has come and was not read yet when it hears of the end: the wire does not tell it.
        async with wire(int(port)) as (wire_port, cut), triton_aio.InferenceServerClient(f"127.0.0.1:{wire_port}") as client:
            done = await client.infer("trace-unary", trace_inputs(5, 6, stream=False), headers=HEADERS)
            reached = [asyncio.Event() for _ in range(STREAMS)]
            reading = [asyncio.create_task(read(client, f"r{i}", event)) for i, event in enumerate(reached)]
            async with asyncio.timeout(180):
                await asyncio.gather(*(event.wait() for event in reached))
            process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(process.wait, 180)
            events = await asyncio.to_thread(recover, tmp_path / "journal.sqlite")
            # Durable before it leaves: of what is billed, at most one group of chunks was still to leave.
            with suppress(TimeoutError):
                async with asyncio.timeout(60):
                    while any(event.output_tokens > delivered.get(name, 0) + UNDELIVERED_MAX for name, event in events.items()):
                        arrived.clear()
                        await arrived.wait()
            cut()
            await asyncio.gather(*reading)
    finally:
        process.kill()
        process.wait(180)

    completed = events.pop("")
    assert completed.outcome == OUTCOME_COMPLETED
    usage = told(done.get_response())
    assert usage is not None
    assert usage[1:3] == (completed.uncached_input_tokens, completed.output_tokens) == (5, 6)
    assert events.keys() == delivered.keys()
    for name, event in events.items():
        assert event.outcome == OUTCOME_INTERRUPTED
        assert event.count_source == COUNT_SOURCE_BACKEND
        assert event.uncached_input_tokens == 11
        # All that arrived is billed.
        assert delivered[name] <= event.output_tokens <= delivered[name] + UNDELIVERED_MAX
        assert event.ended_ms >= event.started_ms


def recover(journal: Path) -> dict[str, UsageEvent]:
    """The bills after the recovery, by the client's ID."""
    meter = UsageMeter(MeterSettings(journal, PARTITIONS))
    try:
        assert meter.recover() == STREAMS
        assert meter.recover() == 0
        return {event.client_request_id: event for event in journalled(meter)}
    finally:
        meter.close()


async def one(entry: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield entry
