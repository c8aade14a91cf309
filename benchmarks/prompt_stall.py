"""How long one tenant's 400 KB prompt holds up another's stream, where the gateway's tokenizer counts the prompt.

A stream gives a chunk each 10 ms; what its client sees between two chunks is measured alone, and again while prompts of 400 KB
come one after the other, each of another text, so that none of them is counted already. A tokenizer that held the interpreter
while it counts would show as a gap of the length of its count.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import grpc
from tritonclient.grpc import service_pb2

from benchmarks.gateway import METADATA, STREAM, UNARY, gateway_settings, known_tenant, serve, serving_process
from benchmarks.measure import Measurement
from serving import kserve
from serving.event_loops import new_event_loop
from serving.gateway import GatewayServer, generic, vllm
from serving.model_server import find_smollm2_weights

PROMPT_BYTES: Final = 400_000
PROMPTS: Final = 12
_CHUNK_MS: Final = 10
_LINE: Final = "The {} meters of street {} were read at {} o'clock; none of them had stood still.\n"


def _prompt(number: int) -> bytes:
    lines = [_LINE.format(number, line, line % 24) for line in range(PROMPT_BYTES // 70)]
    return "".join(lines).encode()[:PROMPT_BYTES]


def _request(model: str, prompt: bytes, **sampling: int) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model)
    kserve.add_bytes_input(request, "text_input", [prompt])
    kserve.add_bool_input(request, "stream", model == "trace")
    kserve.add_bytes_input(request, "sampling_parameters", [json.dumps({"context_tokens": 5, **sampling}).encode()])
    data: bytes = request.SerializeToString()
    return data


async def _gaps_ms(channel: Any, ends: asyncio.Event) -> list[float]:
    """Between the chunks of a stream that goes on until `ends` is set."""
    call = channel.stream_stream(STREAM)(metadata=METADATA)
    await call.write(_request("trace", b"hello", output_tokens=1_000_000, chunk_tokens=1, chunk_delay_ms=_CHUNK_MS))
    gaps: list[float] = []
    last = 0.0
    while not ends.is_set():
        assert await call.read() is not grpc.aio.EOF, "the stream goes on"  # type: ignore[attr-defined]
        now = time.perf_counter()
        if last:
            gaps.append((now - last) * 1_000)
        last = now
    call.cancel()
    return gaps


async def _measure(address: str) -> tuple[list[float], list[float], list[float]]:
    """The gaps alone, the gaps beside the prompts, and how long each prompt took; in milliseconds."""
    options = [("grpc.max_send_message_length", 4 * PROMPT_BYTES)]
    prompts = [_request("trace-unary", _prompt(number), output_tokens=1) for number in range(PROMPTS)]
    took_ms: list[float] = []
    # Connections of their own, as two tenants have.
    async with grpc.aio.insecure_channel(address) as channel, grpc.aio.insecure_channel(address, options) as other:
        infer: Any = other.unary_unary(UNARY)  # type: ignore[call-arg]  # bytes stay bytes

        async def ask() -> None:
            for prompt in prompts:
                begun = time.perf_counter()
                await infer(prompt, metadata=METADATA)
                took_ms.append((time.perf_counter() - begun) * 1_000)

        gaps: list[list[float]] = []
        for beside in (asyncio.sleep(5), ask()):
            ends = asyncio.Event()
            stream = asyncio.create_task(_gaps_ms(channel, ends))
            await beside
            ends.set()
            gaps.append(await stream)
    return gaps[0], gaps[1], took_ms


def run() -> list[Measurement]:
    """The table's rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ["serving.model_server", "--models", "trace", "--port", "0", "--port-file", str(folder / "model.port")]
        with serving_process("back end", model, folder / "model.port") as back_end:
            command = ["benchmarks.prompt_stall", back_end.address, str(folder)]
            with (
                serving_process("gateway", command, folder / "gateway.port") as gateway,
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                alone, beside, took_ms = runner.run(_measure(gateway.address))
    baseline = f"without prompts {max(alone):.1f}; a prompt took {statistics.median(took_ms):.0f}"
    return [
        Measurement(
            f"prompt_stall: longest gap of a stream beside prompts of 400 KB, a chunk each {_CHUNK_MS} ms",
            max(beside),
            "ms",
            baseline,
        ),
        Measurement("prompt_stall: the same, p99", _p99(beside), "ms", f"without prompts {_p99(alone):.1f}"),
    ]


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


async def _serve(upstream: str, folder: Path) -> int:
    settings = gateway_settings(
        upstream,
        folder,
        models={"trace": vllm("trace"), "trace-unary": generic("trace-unary", tokenizer="smollm2", decoupled=False)},
        tokenizers={"smollm2": find_smollm2_weights()},
    )
    server = GatewayServer(settings, known_tenant(prompt_tokens_max=PROMPT_BYTES))
    await server.start()
    _KEPT.append(server)
    return server.port


_KEPT: Final[list[Any]] = []


if __name__ == "__main__":
    serve(_serve, "gateway", sys.argv[1], Path(sys.argv[2]))
