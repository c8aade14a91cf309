"""Whether the gateway leaks: its resident memory over 100,000 requests, most of them unary, some streamed, some cancelled.
Beside it a bare byte proxy gets the same, because gRPC itself keeps something of calls that are cancelled (grpc#43360).

`python -m benchmarks.gateway_memory` takes half an hour on a busy machine and is not among what `make bench` runs; a number
behind it is how many requests instead.

What is kept for every request (a slot, a task, a call of gRPC) would show as growth from the first tenth of the run, when
caches and pools are full, to its last. The series is printed to stderr as it goes: requests so far, MiB of the gateway, of the
proxy.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks.gateway import METADATA, STREAM, UNARY, Target, request_bytes, serving_process
from benchmarks.measure import Measurement
from serving.event_loops import new_event_loop

REQUESTS: Final = 100_000
SAMPLES: Final = 50
IN_FLIGHT: Final = 32
_CHUNKS: Final = 5
# Of what it has once it is warm.
GROWTH_MAX_PERCENT: Final = 5


def _resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1_024


async def _ask(channel: Any, number: int) -> None:
    if number % 10 < 8:
        await channel.unary_unary(UNARY)(request_bytes("trace-unary", 5), metadata=METADATA)
        return
    cancelled = number % 20 == 9
    call = channel.stream_stream(STREAM)(metadata=METADATA)
    await call.write(request_bytes("trace", 1_000 if cancelled else _CHUNKS))
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        if cancelled:
            call.cancel()
            return


async def _send(channel: Any, first: int, end: int) -> None:
    numbers = iter(range(first, end))

    async def client() -> None:
        for number in numbers:
            await _ask(channel, number)

    await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))


async def _measure(targets: list[Target], requests: int) -> list[list[float]]:
    """Of each target the memory after each fiftieth of the requests."""
    channels: list[Any] = [grpc.aio.insecure_channel(target.address) for target in targets]
    series: list[list[float]] = [[] for _ in targets]
    for part in range(SAMPLES):
        first, end = part * requests // SAMPLES, (part + 1) * requests // SAMPLES
        for target, channel, memory in zip(targets, channels, series, strict=True):
            await _send(channel, first, end)
            memory.append(_resident_mib(target.process))
        told = " ".join(f"{memory[-1]:.1f}" for memory in series)
        print(f"{end:>7,} requests {told} MiB", file=sys.stderr, flush=True)
    for channel in channels:
        await channel.close()
    return series


def run(requests: int = REQUESTS) -> list[Measurement]:
    """The table's row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ["serving.model_server", "--models", "trace", "--port", "0", "--port-file", str(folder / "model.port")]
        with serving_process("back end", model, folder / "model.port") as back_end:
            proxies = {proxy: ["benchmarks.gateway", proxy, back_end.address, str(folder)] for proxy in ("gateway", "bare")}
            with (
                serving_process("gateway", proxies["gateway"], folder / "gateway.port") as gateway,
                serving_process("bare", proxies["bare"], folder / "bare.port") as bare,
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                (warm, end), (bare_warm, bare_end) = map(_grown, runner.run(_measure([gateway, bare], requests)))
    name = f"gateway: memory grown over {requests:,} requests, 5% of them cancelled"
    baseline = f"from {warm:.1f} MiB when warm; bare byte proxy {bare_warm:.1f} to {bare_end:.1f}"
    return [Measurement(name, 100 * (end / warm - 1), "%", baseline, target=f"<= {GROWTH_MAX_PERCENT}")]


def _grown(series: list[float]) -> tuple[float, float]:
    """When it is warm, and at the end."""
    tenth = SAMPLES // 10
    return statistics.median(series[tenth : 2 * tenth]), statistics.median(series[-tenth:])


if __name__ == "__main__":
    print(run(int(sys.argv[1]) if len(sys.argv) > 1 else REQUESTS))
