"""What a client sees of a server, RPC by RPC: each case is asked of Triton itself and through the gateway, and compared.

`compare` gives every case's outcomes as text: the response, or the responses of a stream, or the status. What the gateway says
of usage is taken out first, and nothing else. `DIFFERENCES` lists the cases in which the two differ, and why they are to.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving import kserve
from tests.serving.gateway_support import without_usage

__all__ = ["CASES", "DIFFERENCES", "OPERATOR", "compare"]

# The secret of a key that may use the back end's controls.
OPERATOR: Final = "secret-of-an-operator"

TIMEOUT_S: Final = 120.0
Outcome = str
Metadata = tuple[tuple[str, str], ...]
Call = Callable[["Client"], Awaitable[Outcome]]


class Client:
    """The stubs that the protocol's own files generate, on one channel."""

    def __init__(self, address: str, channel: Any, metadata: Metadata) -> None:
        self.address = address
        self.channel = channel
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.metadata = metadata

    async def unary(self, method: str, request: Any, **options: Any) -> Outcome:
        """What a unary RPC of the inference service gives."""
        options.setdefault("timeout", TIMEOUT_S)
        return await told(getattr(self.stub, method)(request, metadata=self.metadata, **options))

    async def stream(self, *requests: Any, extra: Metadata = (), **options: Any) -> Outcome:
        """All responses of one stream, then how it ended."""
        options.setdefault("timeout", TIMEOUT_S)

        async def each() -> AsyncIterator[Any]:
            for request in requests:
                yield request

        call = self.stub.ModelStreamInfer(each(), metadata=(*self.metadata, *extra), **options)
        found = []
        try:
            async for response in call:
                kserve.drop_parameter(response.infer_response, "taximeter_status")
                response.infer_response.CopyFrom(without_usage(response.infer_response))
                found.append(text_format.MessageToString(response, as_one_line=True))
        except grpc.aio.AioRpcError as error:
            found.append(f"{error.code().name}: {error.details()}")
        return "\n".join(found)


async def told(call: Any) -> Outcome:
    try:
        response = await call
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    if isinstance(response, service_pb2.ModelInferResponse):
        response = without_usage(response)
    return text_format.MessageToString(response, as_one_line=True)


# -- requests ----------------------------------------------------------------------------------------------------------


def text(prompt: str = "The capital of France is", model: str = "smollm2", **flags: bool) -> Any:
    """A request of the decoupled model; five tokens."""
    request = service_pb2.ModelInferRequest(model_name=model, id="mine")
    kserve.add_bytes_input(request, "text_input", [prompt.encode()])
    kserve.add_bytes_input(request, "sampling_parameters", [b'{"max_tokens": 5}'])
    for name, value in flags.items():
        kserve.add_bool_input(request, name, value)
    return request


def batch(*prompts: str, typed: bool = False, **fields: Any) -> Any:
    """A request of the batch model; three tokens each."""
    fields.setdefault("id", "mine")
    request = service_pb2.ModelInferRequest(model_name="smollm2-batch", **fields)
    shape = [len(prompts), 1]
    words = request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
    limit = request.inputs.add(name="max_tokens", datatype="INT32", shape=shape)
    encoded = [prompt.encode() for prompt in prompts]
    if typed:
        words.contents.bytes_contents.extend(encoded)
        limit.contents.int_contents.extend([3] * len(prompts))
    else:
        request.raw_input_contents.append(kserve.pack_bytes(encoded))
        request.raw_input_contents.append(struct.pack(f"<{len(prompts)}i", *[3] * len(prompts)))
    return request


def with_parameter(request: Any, name: str, value: Any) -> Any:
    kserve.set_parameter(request, name, value)
    return request


def changed(request: Any, change: Callable[[Any], object]) -> Any:
    change(request)
    return request


def in_shared_memory() -> Any:
    request = service_pb2.ModelInferRequest(model_name="smollm2-batch")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    tensor.parameters["shared_memory_region"].string_param = "nobody's"
    tensor.parameters["shared_memory_byte_size"].int64_param = 8
    return request


# -- cases -------------------------------------------------------------------------------------------------------------


def unary(method: str, request: Any | None = None, **options: Any) -> Call:
    asked = getattr(service_pb2, f"{method}Request")() if request is None else request
    return lambda client: client.unary(method, asked, **options)


def stream(*requests: Any, **options: Any) -> Call:
    return lambda client: client.stream(*requests, **options)


def infer(request: Any, **options: Any) -> Call:
    return lambda client: client.unary("ModelInfer", request, **options)


async def _interleaved(client: Client) -> Outcome:
    """Two at a time on one stream: which comes first is nobody's promise, what each says is."""
    first, second = text("One, two,", stream=True), text("A cat", stream=True)
    second.id = "second"
    return "\n".join(sorted((await client.stream(first, second)).splitlines()))


async def _health(client: Client, service: str = "") -> Outcome:
    stub = health_pb2_grpc.HealthStub(client.channel)
    return await told(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S))


async def _watch(client: Client) -> Outcome:
    call: Any = health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return str((await call.code()).name)


async def _reflection(client: Client) -> Outcome:
    def work() -> Outcome:
        with grpc.insecure_channel(client.address) as channel:
            asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            try:
                (answer,) = stub.ServerReflectionInfo(asked, metadata=client.metadata, timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                return str(error.code().name)
            return text_format.MessageToString(answer, as_one_line=True)

    return await asyncio.to_thread(work)


_NAMED: Final = {"name": "smollm2"}
_LOG_ON: Final = service_pb2.LogSettingsRequest(
    settings={"log_verbose_level": service_pb2.LogSettingsRequest.SettingValue(uint32_param=0)}
)
_TRACE: Final = service_pb2.TraceSettingRequest(
    settings={"trace_rate": service_pb2.TraceSettingRequest.SettingValue(value=["1000"])}
)
_REGION: Final = {"name": "nobody's", "key": "/not-there", "byte_size": 8}

CASES: Final[dict[str, Call]] = {
    "ServerLive": unary("ServerLive"),
    "ServerReady": unary("ServerReady"),
    "ServerMetadata": unary("ServerMetadata"),
    "ModelReady": unary("ModelReady", service_pb2.ModelReadyRequest(**_NAMED)),
    "ModelReady, unknown": unary("ModelReady", service_pb2.ModelReadyRequest(name="unknown")),
    "ModelMetadata": unary("ModelMetadata", service_pb2.ModelMetadataRequest(**_NAMED)),
    "ModelMetadata, unknown": unary("ModelMetadata", service_pb2.ModelMetadataRequest(name="unknown")),
    "ModelMetadata, other version": unary("ModelMetadata", service_pb2.ModelMetadataRequest(**_NAMED, version="9")),
    "ModelConfig": unary("ModelConfig", service_pb2.ModelConfigRequest(**_NAMED)),
    "ModelConfig, unknown": unary("ModelConfig", service_pb2.ModelConfigRequest(name="unknown")),
    "ModelStatistics": unary("ModelStatistics", service_pb2.ModelStatisticsRequest(name="ocr")),
    "ModelStatistics, unknown": unary("ModelStatistics", service_pb2.ModelStatisticsRequest(name="unknown")),
    "RepositoryIndex": unary("RepositoryIndex"),
    "RepositoryIndex, ready": unary("RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True)),
    "RepositoryModelUnload": unary("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="ocr")),
    "RepositoryModelLoad": unary("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="ocr")),
    "RepositoryModelLoad, unknown": unary("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="unknown")),
    "SystemSharedMemoryStatus": unary("SystemSharedMemoryStatus"),
    "SystemSharedMemoryRegister": unary("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(**_REGION)),
    "SystemSharedMemoryUnregister": unary("SystemSharedMemoryUnregister"),
    "CudaSharedMemoryStatus": unary("CudaSharedMemoryStatus"),
    "CudaSharedMemoryRegister": unary("CudaSharedMemoryRegister"),
    "CudaSharedMemoryUnregister": unary("CudaSharedMemoryUnregister"),
    "TraceSetting": unary("TraceSetting"),
    "TraceSetting, changed": unary("TraceSetting", _TRACE),
    "LogSettings": unary("LogSettings"),
    "LogSettings, changed": unary("LogSettings", _LOG_ON),
    "ModelInfer": infer(batch("The sky is")),
    "ModelInfer, batch": infer(batch("The sky is", "One, two,", "从前有一座山")),
    "ModelInfer, typed contents": infer(batch("The sky is", typed=True)),
    "ModelInfer, without id": infer(batch("The sky is", id="")),
    "ModelInfer, one output named": infer(
        changed(batch("The sky is"), lambda request: request.outputs.add(name="text_output"))
    ),
    "ModelInfer, unknown output": infer(changed(batch("The sky is"), lambda request: request.outputs.add(name="unknown"))),
    "ModelInfer, a parameter": infer(with_parameter(batch("The sky is"), "priority", 1)),
    "ModelInfer, gzip": infer(batch("The sky is"), compression=grpc.Compression.Gzip),
    "ModelInfer, deflate": infer(batch("The sky is"), compression=grpc.Compression.Deflate),
    "ModelInfer, batch too large": infer(batch(*["The sky is"] * 5)),
    "ModelInfer, wrong type": infer(
        changed(batch("The sky is"), lambda request: setattr(request.inputs[1], "datatype", "UINT32"))
    ),
    "ModelInfer, unknown input": infer(changed(batch("The sky is"), lambda request: kserve.add_bool_input(request, "x", True))),
    "ModelInfer, decoupled model": infer(text()),
    "ModelInfer, other version": infer(batch("The sky is", model_version="9")),
    "ModelInfer, unknown model": infer(text(model="unknown")),
    "ModelInfer, no prompt": infer(service_pb2.ModelInferRequest(model_name="smollm2-batch")),
    "ModelInfer, malformed text": infer(
        changed(batch("The sky is"), lambda request: request.raw_input_contents.__setitem__(0, b"\xff\xff\xff\xff"))
    ),
    "ModelInfer, shared memory": infer(in_shared_memory()),
    "ModelInfer, deadline": infer(batch("A long, long story:", "Another:"), timeout=0.01),
    "ModelStreamInfer": stream(text(stream=True)),
    "ModelStreamInfer, whole": stream(text()),
    "ModelStreamInfer, without the prompt": stream(text(exclude_input_in_output=True)),
    "ModelStreamInfer, all counts": stream(
        text(stream=True, return_num_input_tokens=True, return_num_output_tokens=True, return_finish_reason=True)
    ),
    "ModelStreamInfer, one count": stream(text(stream=True, return_num_output_tokens=True)),
    "ModelStreamInfer, empty final": stream(with_parameter(text(stream=True), kserve.EMPTY_FINAL_PARAMETER, True)),
    "ModelStreamInfer, no empty final": stream(with_parameter(text(stream=True), kserve.EMPTY_FINAL_PARAMETER, False)),
    "ModelStreamInfer, final flag of a wrong type": stream(
        with_parameter(text(stream=True), kserve.EMPTY_FINAL_PARAMETER, "yes")
    ),
    "ModelStreamInfer, nothing": stream(),
    "ModelStreamInfer, interleaved": _interleaved,
    "ModelStreamInfer, in order": stream(*(batch(f"Number {n}", id=str(n)) for n in range(3))),
    "ModelStreamInfer, error of the model": stream(text(stream=True, exclude_input_in_output=False)),
    "ModelStreamInfer, error as status": stream(
        text(stream=True, exclude_input_in_output=False), extra=(("triton_grpc_error", "true"),)
    ),
    "ModelStreamInfer, gzip": stream(text(stream=True), compression=grpc.Compression.Gzip),
    "ModelStreamInfer, deadline": stream(text("A long, long story:", stream=True), timeout=0.01),
    "ModelStreamInfer, unknown model": stream(text(model="unknown", stream=True)),
    "Health/Check": _health,
    "Health/Check, a service": lambda client: _health(client, kserve.SERVICE_NAME),
    "Health/Check, unknown service": lambda client: _health(client, "unknown"),
    "Health/Watch": _watch,
    "ServerReflection": _reflection,
}

DIFFERENCES: Final[dict[str, str]] = {
    "ModelInfer, unknown model": "a model without a profile is refused before the back end, and named",
    "ModelStreamInfer, unknown model": "the same",
    "ModelInfer, no prompt": "a prompt that cannot be counted is refused before the back end; the status is the same",
    "ModelInfer, malformed text": "the same",
    "ModelStreamInfer, final flag of a wrong type": "the gateway sets this flag itself, so it checks the client's",
    "ModelInfer, shared memory": "shared memory hides what is metered, so it is refused",
    "ServerReflection": "the gateway describes what it serves; Triton has no reflection",
}


async def compare(direct: str, through: str, metadata: Metadata) -> AsyncIterator[tuple[str, Outcome, Outcome]]:
    """Each case's outcome at Triton itself, and through the gateway."""
    async with grpc.aio.insecure_channel(direct) as channel, grpc.aio.insecure_channel(through) as other:
        itself, gateway = Client(direct, channel, ()), Client(through, other, metadata)
        for name, call in CASES.items():
            yield name, await call(itself), await call(gateway)
