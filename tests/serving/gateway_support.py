"""What the gateway's tests share: tenants in a directory, settings, requests as tritonclient makes them, the journal's
events, and a back end that plays a script over real gRPC."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from billing.amounts import PICO, to_amount
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    BILLING_MODE_PREPAID,
    KEY_SCOPE_METER,
    Account,
    AccountUpdate,
    ApiKey,
    LedgerPosition,
    LedgerTick,
    Plan,
)
from billing.v1.usage_pb2 import UsageEvent
from producers.meter import MeterSettings, UsageMeter
from serving import kserve
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
from serving.model_server import find_smollm2_weights

PARTITIONS: Final = 4
PEPPER: Final = b"pepper of the gateway's tests, 32"
SECRET: Final = "secret-of-tenant-a"
HEADERS: Final = {"authorization": f"Bearer {SECRET}"}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def api_key(key_id: str = "key-a", secret: str = SECRET, tenant_id: str = "tenant-a", **fields: Any) -> ApiKey:
    fields.setdefault("scopes", [KEY_SCOPE_METER])
    fields.setdefault("version", LedgerPosition(generation=b"g", sequence=1))
    return ApiKey(
        key_id=key_id,
        tenant_id=tenant_id,
        project_id="project",
        user_id="user",
        secret_hash=hash_secret(PEPPER, secret),
        **fields,
    )


def account(tenant_id: str = "tenant-a", *, balance_pico: int = PICO, sequence: int = 1, **fields: Any) -> AccountUpdate:
    plan = fields.pop("plan", Plan(billing_mode=BILLING_MODE_PREPAID, prompt_tokens_max=200))
    fields.setdefault("status", ACCOUNT_STATUS_ACTIVE)
    fields.setdefault("log_time_ms", now_ms())
    return AccountUpdate(
        account=Account(
            tenant_id=tenant_id,
            currency="USD",
            plan=plan,
            credit=to_amount(10 * PICO),
            spend=to_amount(10 * PICO - balance_pico),
            version=LedgerPosition(generation=b"g", sequence=sequence),
            **fields,
        )
    )


def tick(partition: int, log_time_ms: int) -> AccountUpdate:
    return AccountUpdate(tick=LedgerTick(partition=partition, log_time_ms=log_time_ms))


def put_key(directory: Directory, key: ApiKey) -> None:
    directory.on_key(key.key_id.encode(), key.SerializeToString(), 0)


def put_account(directory: Directory, update: AccountUpdate) -> None:
    directory.on_account(update.account.tenant_id.encode(), update.SerializeToString(), 0)


def known_directory() -> Directory:
    """One tenant with a key, a balance and a limit of 200 prompt tokens."""
    directory = Directory(PARTITIONS)
    put_key(directory, api_key())
    put_account(directory, account())
    return directory


def profiles(*more: ModelProfile) -> dict[str, ModelProfile]:
    known = (
        vllm("smollm2", tokenizer="smollm2"),
        vllm("smollm2-unary", tokenizer="smollm2", decoupled=False),
        vllm("trace"),
        vllm("trace-unary", decoupled=False),
        *more,
    )
    return {profile.model: profile for profile in known}


def gateway_settings(folder: Path, upstream: str, **fields: Any) -> GatewaySettings:
    fields.setdefault("models", profiles())
    fields.setdefault("tokenizers", {"smollm2": find_smollm2_weights()})
    fields.setdefault("directory", DirectorySettings("127.0.0.1:1", PEPPER, PARTITIONS))
    fields.setdefault("meter", MeterSettings(folder / "journal.sqlite", PARTITIONS))
    # No ledger tells the time here, and on a busy machine a test takes longer than what its directory says may be old.
    fields.setdefault("admission", AdmissionSettings(state_age_max_ms=24 * 3_600_000))
    return GatewaySettings(port=0, upstream=upstream, server_id="gateway-1", region="here", **fields)


@asynccontextmanager
async def running(settings: GatewaySettings, directory: Directory | None = None) -> AsyncIterator[GatewayServer]:
    server = GatewayServer(settings, directory or known_directory())
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def journalled(meter: UsageMeter) -> list[UsageEvent]:
    """All durable events, those that ended first first."""
    events = [
        UsageEvent.FromString(event)
        for partition in range(PARTITIONS)
        for event in meter.journal.read(partition, 0, 1_000, 1_000_000).events
    ]
    return sorted(events, key=lambda event: (event.ended_ms, event.started_ms))


def journalled_all(meter: UsageMeter) -> list[UsageEvent]:
    """The same of a journal of any length, by partition and number."""
    events: list[UsageEvent] = []
    for partition in range(PARTITIONS):
        after = 0
        while page := meter.journal.read(partition, after, 1_000, 1_000_000).events:
            events += map(UsageEvent.FromString, page)
            after += len(page)
    return events


async def settled(server: GatewayServer, events: int = 1) -> list[UsageEvent]:
    """The journal's events once there are so many and no request is open: a cut-off request is billed after its end."""
    committed = threading.Event()
    server.meter.journal.subscribe(committed)
    async with asyncio.timeout(180):
        while len(found := journalled(server.meter)) < events or server.meter.metrics()["open_requests"]:
            # The journal wakes whoever waits after each commit; one that came before is found by looking again.
            await asyncio.to_thread(committed.wait, 0.1)
            committed.clear()
    return found


def tensor(name: str, value: str | bytes | bool) -> triton.InferInput:
    if isinstance(value, bool):
        data, kind = np.array([value], dtype=bool), "BOOL"
    else:
        encoded = value.encode() if isinstance(value, str) else value
        data, kind = np.array([encoded], dtype=np.object_), "BYTES"
    made = triton.InferInput(name, [1], kind)
    made.set_data_from_numpy(data)
    return made


def text_inputs(prompt: str, *, stream: bool, max_tokens: int = 5, **flags: bool) -> list[triton.InferInput]:
    sampling = json.dumps({"temperature": 0, "max_tokens": max_tokens})
    return [
        tensor("text_input", prompt),
        tensor("stream", stream),
        tensor("sampling_parameters", sampling),
        *(tensor(name, value) for name, value in flags.items()),
    ]


def trace_inputs(context_tokens: int, output_tokens: int, *, stream: bool = True, **more: Any) -> list[triton.InferInput]:
    sampling = json.dumps({"context_tokens": context_tokens, "output_tokens": output_tokens, **more})
    return [tensor("stream", stream), tensor("sampling_parameters", sampling)]


async def requests(*entries: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for entry in entries:
        yield dict(entry)


async def answers(client: Any, *entries: Mapping[str, Any], **options: Any) -> list[tuple[Any, Any]]:
    """All (response, error) of one stream."""
    options.setdefault("headers", HEADERS)
    found = []
    async for result, error in client.stream_infer(requests(*entries), **options):
        found.append((None if result is None else result.get_response(), error))
    return found


async def sync_answers(address: str, entry: Mapping[str, Any], *, empty_final: bool) -> list[tuple[Any, Any]]:
    """The same with tritonclient's threads: it alone can ask for an empty final response."""

    def work() -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        with triton.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: found.append((result, error)), headers=HEADERS)
            client.async_stream_infer(**entry, enable_empty_final_response=empty_final)
            # Waits for what was asked, because nothing is cancelled.
            client.stop_stream()
        return [(None if result is None else result.get_response(), error) for result, error in found]

    return await asyncio.to_thread(work)


def told(response: Any) -> tuple[str, int, int, str] | None:
    """The usage in a response: request ID, input, output, who counted."""
    names = ("request_id", "input_tokens", "output_tokens", "count_source")
    values = [kserve.get_parameter(response, f"taximeter_{name}") for name in names]
    return None if values[0] is None else (str(values[0]), int(values[1] or 0), int(values[2] or 0), str(values[3]))


def billed(event: UsageEvent) -> tuple[str, int, int]:
    return event.request_id, event.uncached_input_tokens, event.output_tokens


def without_usage(response: Any) -> Any:
    """The response as a client that talks to the back end directly gets it."""
    copy = type(response)()
    copy.CopyFrom(response)
    for name in list(copy.parameters):
        if name.startswith("taximeter_"):
            kserve.drop_parameter(copy, name)
    return copy


def vllm_response(text: str, *, input_tokens: int, new_tokens: int, final: bool | None) -> Any:
    """A stream's response with counts, as a script's back end sends it."""
    response = service_pb2.ModelStreamInferResponse()
    kserve.add_bytes_output(response.infer_response, "text_output", [text.encode()])
    kserve.add_integer_output(response.infer_response, "num_input_tokens", input_tokens, shape=())
    kserve.add_integer_output(response.infer_response, "num_output_tokens", new_tokens)
    if final is not None:
        kserve.set_parameter(response.infer_response, kserve.FINAL_PARAMETER, final)
    return response


Script = Callable[[Any, Any], AsyncIterator[Any]]


@asynccontextmanager
async def scripted_back_end(script: Script, seen: list[Any] | None = None) -> AsyncIterator[str]:
    """A gRPC server whose ModelStreamInfer plays `script(request, context)`; `seen` collects requests."""

    async def stream(incoming: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in incoming:
            if seen is not None:
                seen.append(request)
            async for response in script(request, context):
                response.infer_response.id = request.id
                yield response

    handler = grpc.stream_stream_rpc_method_handler(
        stream,
        request_deserializer=service_pb2.ModelInferRequest.FromString,
        response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(kserve.SERVICE_NAME, {"ModelStreamInfer": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def wire(target: int | Callable[[], int]) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """A relay of bytes to a port: its own port, and what resets every connection through it. A `target` that says 0 is nowhere
    yet: connections end at once."""
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_port = target() if callable(target) else target
        if not target_port:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target_port)
        writers.extend((writer, far_writer))
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], cut
    finally:
        server.close()
        cut()


def texts(found: Sequence[tuple[Any, Any]]) -> str:
    parts = [kserve.read_bytes_output(response, "text_output") for response, _ in found if response is not None]
    return b"".join(part for chunk in parts if chunk for part in chunk).decode()


@contextmanager
def model_server_process(folder: Path, *, models: str, empty_final: bool = False) -> Iterator[str]:
    """The small model server as a process of its own; gives its address. Its log of what it produced is production.jsonl."""
    port_file = folder / "port"
    command = [sys.executable, "-m", "serving.model_server", "--port", "0", "--port-file", str(port_file)]
    # One thread: two that share a busy machine's cores with others wait for each other more than they compute.
    command += ["--threads", "1", "--models", models, "--production-log"]
    command += [str(folder / "production.jsonl")]
    command += ["--empty-final"] if empty_final else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        port = await_file(port_file, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(180)


def await_file(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 180.0) -> str:
    """What a process writes into the file when it is ready."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was not written; exit code {process.returncode}")
        time.sleep(0.02)
    return path.read_text().strip()


def production_lines(folder: Path) -> list[dict[str, Any]]:
    """What the back end says that it produced, a line a request that has ended there."""
    return [json.loads(line) for line in (folder / "production.jsonl").read_text().splitlines()]


def production(folder: Path, request_id: str, timeout_s: float = 180.0) -> dict[str, Any]:
    """What the back end says that it produced for a request; waits until it has ended there."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for entry in production_lines(folder):
            if entry["request_id"] == request_id:
                return entry
        time.sleep(0.02)
    raise TimeoutError(f"the back end has no line for {request_id}")
