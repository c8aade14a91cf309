"""What metering costs: the gateway beside a bare grpc.aio byte proxy and beside no proxy, in the same run.

Both proxies are processes of their own before the same trace back end, on the same event loop, and rounds take turns, so a
busy machine slows both. Client, proxy and back end share the machine's cores; therefore the rates "a core" are requests or
chunks per second of the proxy's own processor time, and those decide the ratio. The journal's thread is in it, and shown apart:
it is what durable records cost, whoever meters. Latencies are those that a client sees at half of the rate that the gateway
reached, request after request at even intervals, counted from when each was due. The back end counts, so no tokenizer runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import grpc
from tritonclient.grpc import service_pb2

from benchmarks.measure import Measurement
from billing.amounts import PICO, to_amount
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    BILLING_MODE_PREPAID,
    KEY_SCOPE_METER,
    Account,
    AccountUpdate,
    ApiKey,
    Plan,
)
from producers.meter import MeterSettings
from serving import kserve
from serving.event_loops import new_event_loop
from serving.gateway import (
    AdmissionSettings,
    DirectorySettings,
    GatewayServer,
    GatewaySettings,
    ModelProfile,
    hash_secret,
    vllm,
)
from serving.gateway.directory import Directory

PARTITIONS: Final = 4
SECRET: Final = "benchmark"
PEPPER: Final = b"pepper of a benchmark"
METADATA: Final = (("x-api-key", SECRET),)
UNARY, STREAM = (f"/{kserve.SERVICE_NAME}/{method}" for method in ("ModelInfer", "ModelStreamInfer"))
ROUNDS: Final = 4
UNARY_REQUESTS: Final = 1_500
UNARY_IN_FLIGHT: Final = 32
LATENCY_REQUESTS: Final = 400
UNARY_TARGET, STREAM_TARGET = ">= 0.6", ">= 0.75"
LATENCY_TARGETS: Final = ((0.5, "p50", "<= 1"), (0.99, "p99", "<= 5"))
STREAMS: Final = 16
CHUNKS: Final = 400


# -- the processes -----------------------------------------------------------------------------------------------------


def known_tenant(prompt_tokens_max: int = 1_000) -> Directory:
    """A directory that knows one tenant, who has money, and its key."""
    directory = Directory(PARTITIONS)
    key = ApiKey(key_id="k", tenant_id="t", scopes=[KEY_SCOPE_METER], secret_hash=hash_secret(PEPPER, SECRET))
    directory.on_key(b"k", key.SerializeToString(), 0)
    plan = Plan(billing_mode=BILLING_MODE_PREPAID, prompt_tokens_max=prompt_tokens_max)
    account = Account(tenant_id="t", status=ACCOUNT_STATUS_ACTIVE, plan=plan, credit=to_amount(PICO))
    account.log_time_ms = time.time_ns() // 1_000_000
    directory.on_account(b"t", AccountUpdate(account=account).SerializeToString(), 0)
    return directory


def gateway_settings(
    upstream: str, folder: Path, *, models: Mapping[str, ModelProfile], tokenizers: Mapping[str, Path] = MappingProxyType({})
) -> GatewaySettings:
    """A gateway that is told of keys and accounts by nobody but its directory."""
    return GatewaySettings(
        meter=MeterSettings(folder / "journal.sqlite", PARTITIONS),
        directory=DirectorySettings("not.followed:1", PEPPER, PARTITIONS),
        models=models,
        tokenizers=tokenizers,
        port=0,
        upstream=upstream,
        admission=AdmissionSettings(state_age_max_ms=3_600_000),
    )


async def _serve_gateway(upstream: str, folder: Path) -> int:
    models = {"trace": vllm("trace"), "trace-unary": vllm("trace-unary", decoupled=False)}
    server = GatewayServer(gateway_settings(upstream, folder, models=models), known_tenant())
    await server.start()
    _KEPT.append(server)
    writer = next(thread for thread in threading.enumerate() if thread.name == "journal-writer")
    _publish(folder / "gateway.journal", writer.native_id or 0)
    return server.port


async def _serve_bare(upstream: str, folder: Path) -> int:
    """The least that a proxy can do: bytes in, bytes out."""
    channel: Any = grpc.aio.insecure_channel(upstream)
    unary, stream = channel.unary_unary(UNARY), channel.stream_stream(STREAM)

    async def infer(request: bytes, context: Any) -> bytes:
        response: bytes = await unary(request)
        return response

    async def stream_infer(requests: AsyncIterator[bytes], context: Any) -> None:
        call = stream(requests)
        while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            await context.write(response)

    handlers: dict[str, Any] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(stream_infer),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(kserve.SERVICE_NAME, handlers),))
    port: int = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _KEPT.append(server)
    return port


_SERVERS: Final[dict[str, Callable[[str, Path], Awaitable[int]]]] = {"gateway": _serve_gateway, "bare": _serve_bare}
# A server that nobody holds is collected, and a collected one is stopped.
_KEPT: Final[list[Any]] = []


def serve(start: Callable[[str, Path], Awaitable[int]], name: str, upstream: str, folder: Path) -> None:
    """Serve until the process is ended; the port stands in a file of this name."""

    async def run_on() -> None:
        port = await start(upstream, folder)
        _publish(folder / f"{name}.port", port)
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run_on())


def _publish(path: Path, number: int) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(str(number))
    partial.replace(path)


def _processor_s(path: Path) -> float:
    fields = path.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Target:
    """What is measured, and how much processor time it used for how much work."""

    name: str
    address: str
    process: int
    journal: int | None = None
    """The thread that writes it."""
    rates: dict[str, list[float]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    journal_s: dict[str, float] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)

    def used_s(self) -> float:
        """Processor time of the process so far, all threads."""
        return _processor_s(Path(f"/proc/{self.process}/stat"))

    def journal_used_s(self) -> float:
        """Of it, what the thread used that writes the journal."""
        return 0.0 if self.journal is None else _processor_s(Path(f"/proc/{self.process}/task/{self.journal}/stat"))

    async def measure(self, kind: str, work: int, run: Callable[[], Awaitable[None]]) -> None:
        used_s, journal_s, started = self.used_s(), self.journal_used_s(), time.perf_counter()
        await run()
        self.rates.setdefault(kind, []).append(work / (time.perf_counter() - started))
        self.work[kind] = self.work.get(kind, 0) + work
        self.cpu_s[kind] = self.cpu_s.get(kind, 0) + self.used_s() - used_s
        self.journal_s[kind] = self.journal_s.get(kind, 0) + self.journal_used_s() - journal_s

    def rate(self, kind: str) -> float:
        return statistics.median(self.rates[kind])

    def rate_a_core(self, kind: str) -> float:
        return self.work[kind] / max(self.cpu_s[kind], 0.01)

    def latency_ms(self, share: float) -> float:
        return sorted(self.latencies_ms)[int(share * (len(self.latencies_ms) - 1))]


@contextmanager
def serving_process(name: str, command: list[str], port_file: Path) -> Iterator[Target]:
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: exit code {process.returncode}")
            time.sleep(0.02)
        yield Target(name, f"127.0.0.1:{port_file.read_text().strip()}", process.pid)
    finally:
        process.terminate()
        process.wait(20)


# -- the load ----------------------------------------------------------------------------------------------------------


def request_bytes(model: str, output_tokens: int) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=model, id="client")
    kserve.add_bytes_input(request, "text_input", [b"a prompt of some words"])
    kserve.add_bool_input(request, "stream", model == "trace")
    sampling = {"context_tokens": 5, "output_tokens": output_tokens, "chunk_tokens": 1}
    kserve.add_bytes_input(request, "sampling_parameters", [json.dumps(sampling).encode()])
    data: bytes = request.SerializeToString()
    return data


async def _unary(channel: Any, requests: int, in_flight: int) -> None:
    call, request = channel.unary_unary(UNARY), request_bytes("trace-unary", 5)
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            await call(request, metadata=METADATA)

    await asyncio.gather(*(client() for _ in range(in_flight)))


async def _paced(channel: Any, requests: int, a_second: float, latencies_ms: list[float]) -> None:
    call, request = channel.unary_unary(UNARY), request_bytes("trace-unary", 5)
    begun = time.perf_counter()

    async def client(number: int) -> None:
        due = begun + number / a_second
        await asyncio.sleep(due - time.perf_counter())
        await call(request, metadata=METADATA)
        latencies_ms.append((time.perf_counter() - due) * 1000)

    await asyncio.gather(*(client(number) for number in range(requests)))


async def _stream(channel: Any) -> None:
    call, request = channel.stream_stream(STREAM), request_bytes("trace", CHUNKS)

    async def client() -> None:
        stream = call(metadata=METADATA)
        await stream.write(request)
        await stream.done_writing()
        chunks = 0
        while await stream.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
            chunks += 1
        assert chunks == CHUNKS, chunks

    await asyncio.gather(*(client() for _ in range(STREAMS)))


async def _measure(targets: list[Target]) -> None:
    channels: list[Any] = [grpc.aio.insecure_channel(target.address) for target in targets]
    for channel in channels:
        await _unary(channel, 50, 4)
        await _stream(channel)
    for _ in range(ROUNDS):
        for target, channel in zip(targets, channels, strict=True):
            await target.measure("unary", UNARY_REQUESTS, lambda: _unary(channel, UNARY_REQUESTS, UNARY_IN_FLIGHT))  # noqa: B023
            await target.measure("stream", STREAMS * CHUNKS, lambda: _stream(channel))  # noqa: B023
        # The last of the targets is the gateway.
        half_load = targets[-1].rates["unary"][-1] / 2
        for target, channel in zip(targets, channels, strict=True):
            await _paced(channel, LATENCY_REQUESTS, half_load, target.latencies_ms)
    for channel in channels:
        await channel.close()


def run() -> list[Measurement]:
    """The table's rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = ["serving.model_server", "--models", "trace", "--port", "0", "--port-file", str(folder / "model.port")]
        with serving_process("back end", model, folder / "model.port") as direct:
            proxies = {proxy: ["benchmarks.gateway", proxy, direct.address, str(folder)] for proxy in ("bare", "gateway")}
            with (
                serving_process("bare", proxies["bare"], folder / "bare.port") as bare,
                serving_process("gateway", proxies["gateway"], folder / "gateway.port") as gateway,
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                gateway.journal = int((folder / "gateway.journal").read_text())
                runner.run(_measure([direct, bare, gateway]))
    rows = []
    for kind, what, target in (("unary", "requests", UNARY_TARGET), ("stream", "chunks", STREAM_TARGET)):
        ratio = gateway.rate_a_core(kind) / bare.rate_a_core(kind)
        journal_us = gateway.journal_s[kind] / gateway.work[kind] * 1_000_000
        rows += [
            Measurement(f"gateway: {kind}, a core, of the bare byte proxy's", ratio, "", target=target),
            Measurement(
                f"gateway: {kind}, processor time of one of the {what}",
                1_000_000 / gateway.rate_a_core(kind),
                "µs",
                f"bare byte proxy {1_000_000 / bare.rate_a_core(kind):,.0f}",
                1 / ratio,
            ),
            Measurement(f"gateway: {kind}, of it the journal's thread", journal_us, "µs"),
            Measurement(
                f"gateway: {kind}, a core",
                gateway.rate_a_core(kind),
                f"{what}/s",
                f"bare byte proxy {bare.rate_a_core(kind):,.0f}",
                ratio,
            ),
            Measurement(
                f"gateway: {kind}, client and back end on the same cores",
                gateway.rate(kind),
                f"{what}/s",
                f"bare byte proxy {bare.rate(kind):,.0f}, none {direct.rate(kind):,.0f}",
                gateway.rate(kind) / bare.rate(kind),
            ),
        ]
    for share, name, target in LATENCY_TARGETS:
        added_ms = gateway.latency_ms(share) - bare.latency_ms(share)
        baseline = f"bare byte proxy {bare.latency_ms(share):.2f} in all"
        name = f"gateway: added latency at half load, unary, {name}"
        rows.append(Measurement(name, added_ms, "ms", baseline, target=target))
    return rows


if __name__ == "__main__":
    serve(_SERVERS[sys.argv[1]], sys.argv[1], sys.argv[2], Path(sys.argv[3]))
