"""Whether the gateway leaks: its resident memory over 100,000 requests, most of them unary, some streamed, some cancelled.

`python -m benchmarks.gateway_memory` takes half an hour on a busy machine and is not among what `make bench` runs; a number
behind it is how many requests instead.

What is kept for every request (a slot, a task, a call of gRPC) would show as growth from the first tenth of the run, when
caches and pools are full, to its last. The series is printed to stderr as it goes: requests so far, MiB.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import grpc

from benchmarks.gateway import METADATA, STREAM, UNARY, request_bytes, serving_process
from benchmarks.measure import Measurement
from serving.gateway import new_event_loop

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


async def _measure(address: str, process: int, requests: int) -> list[float]:
    """The memory after each fiftieth of the requests."""
    series: list[float] = []
    async with grpc.aio.insecure_channel(address) as channel:
        for part in range(SAMPLES):
            numbers = iter(range(part * requests // SAMPLES, (part + 1) * requests // SAMPLES))

            async def client() -> None:
                for number in numbers:  # noqa: B023
                    await _ask(channel, number)

            await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
            series.append(_resident_mib(process))
            print(f"{(part + 1) * requests // SAMPLES:>7,} requests {series[-1]:.1f} MiB", file=sys.stderr, flush=True)
    return series


def run(requests: int = REQUESTS) -> list[Measurement]:
    """The table's row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ["serving.model_server", "--models", "trace", "--port", "0", "--port-file", str(folder / "model.port")]
        with serving_process("back end", model, folder / "model.port") as back_end:
            command = ["benchmarks.gateway", "gateway", back_end.address, str(folder)]
            with (
                serving_process("gateway", command, folder / "gateway.port") as gateway,
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                series = runner.run(_measure(gateway.address, gateway.process, requests))
    tenth = SAMPLES // 10
    warm, end = statistics.median(series[tenth : 2 * tenth]), statistics.median(series[-tenth:])
    name = f"gateway: memory grown over {requests:,} requests, 5% of them cancelled"
    return [Measurement(name, 100 * (end / warm - 1), "%", f"{warm:.1f} MiB when warm", end / warm, f"<= {GROWTH_MAX_PERCENT}")]


if __name__ == "__main__":
    print(run(int(sys.argv[1]) if len(sys.argv) > 1 else REQUESTS))
