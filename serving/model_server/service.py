"""KServe v2 over grpc.aio, with the part of Triton's dialect that a client of a language model meets.

A decoupled model is asked by ModelStreamInfer only; unary ModelInfer on it is refused in Triton's words. On a stream,
requests are answered side by side, each response has the id of its request and says whether it is the last one, and
errors come in band with the id, unless the header `triton_grpc_error: true` asks that they close the stream. When the
client cancels or its deadline passes, everything on that call is cancelled in the models too. A request that says `stop` ends
the one that has its ID, wherever that was asked: its last response has all that was produced, which a cancelled call's cannot.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

from serving import kserve
from serving.model_server.errors import RequestError
from serving.model_server.models import STOP_INPUT, VERSION, Model, ModelStatistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from serving.kserve import ModelInferRequest, ModelInferResponse
    from serving.model_server.models import Answer

__all__ = ["InferenceService"]

_NAME: Final = "taximeter-model-server"
_EXTENSIONS: Final = ("model_configuration", "statistics", "parameters")
_DATATYPE: Final = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL", "UINT32": "TYPE_UINT32"}


class InferenceService:
    """The RPCs. `handlers` gives what a grpc.aio server registers."""

    def __init__(self, models: Mapping[str, Model], *, version: str, max_stream_requests: int) -> None:
        self._models = models
        self._version = version
        self._max_stream_requests = max_stream_requests
        self._statistics = {name: ModelStatistics() for name in models}
        # By ID, the requests that run: several may have the same one.
        self._stops: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.ready = True
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The table of RPCs. What is not in it is UNIMPLEMENTED, by gRPC itself."""
        unary = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "ModelInfer": self.model_infer,
        }
        table: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                method,
                request_deserializer=getattr(service_pb2, f"{name}Request").FromString,
                response_serializer=getattr(service_pb2, f"{name}Response").SerializeToString,
            )
            for name, method in unary.items()
        }
        table["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.model_stream_infer,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(kserve.SERVICE_NAME, table)

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        await self._idle.wait()

    # -- state and description -----------------------------------------------------------------------------------------

    async def server_live(self, _request: Any, _context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _request: Any, _context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.ready)

    async def model_ready(self, request: Any, _context: Any) -> Any:
        known = request.name in self._models and request.version in ("", VERSION)
        return service_pb2.ModelReadyResponse(ready=known and self.ready)

    async def server_metadata(self, _request: Any, _context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name=_NAME, version=self._version, extensions=_EXTENSIONS)

    async def model_metadata(self, request: Any, context: Any) -> Any:
        card = (await self._find_or_abort(request.name, request.version, context)).card
        response = service_pb2.ModelMetadataResponse(name=card.name, versions=[VERSION], platform=card.platform)
        for spec in card.inputs:
            response.inputs.add(name=spec.name, datatype=spec.datatype, shape=[1])
        for spec in card.outputs:
            response.outputs.add(name=spec.name, datatype=spec.datatype, shape=[-1])
        return response

    async def model_config(self, request: Any, context: Any) -> Any:
        card = (await self._find_or_abort(request.name, request.version, context)).card
        config = model_config_pb2.ModelConfig(name=card.name, platform=card.platform, backend=card.platform)
        config.model_transaction_policy.decoupled = card.decoupled
        config.instance_group.add(kind=model_config_pb2.ModelInstanceGroup.KIND_CPU, count=1)
        for spec in card.inputs:
            config.input.add(name=spec.name, data_type=_data_type(spec.datatype), dims=[1], optional=spec.optional)
        for spec in card.outputs:
            config.output.add(name=spec.name, data_type=_data_type(spec.datatype), dims=[-1])
        for name, value in card.parameters.items():
            config.parameters[name].string_value = value
        return service_pb2.ModelConfigResponse(config=config)

    async def model_statistics(self, request: Any, context: Any) -> Any:
        if request.name:
            await self._find_or_abort(request.name, request.version, context)
        response = service_pb2.ModelStatisticsResponse()
        for name, counts in self._statistics.items():
            if request.name in ("", name):
                entry = response.model_stats.add(
                    name=name,
                    version=VERSION,
                    last_inference=counts.last_inference_ms,
                    inference_count=counts.succeeded,
                    execution_count=counts.succeeded,
                )
                entry.inference_stats.success.count, entry.inference_stats.success.ns = (
                    counts.succeeded,
                    counts.succeeded_ns,
                )
                entry.inference_stats.fail.count, entry.inference_stats.fail.ns = counts.failed, counts.failed_ns
        return response

    async def _find_or_abort(self, name: str, version: str, context: Any) -> Model:
        try:
            return self._find(name, version)
        except RequestError as error:
            await context.abort(error.code, error.message)
            raise

    def _find(self, name: str, version: str) -> Model:
        model = self._models.get(name)
        if model is None:
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if version not in ("", VERSION):
            raise RequestError(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        return model

    # -- inference -----------------------------------------------------------------------------------------------------

    async def model_infer(self, request: ModelInferRequest, context: Any) -> ModelInferResponse:
        response = None
        try:
            model = self._find(request.model_name, request.model_version)
            if model.card.decoupled:
                raise RequestError(
                    grpc.StatusCode.UNIMPLEMENTED,
                    "ModelInfer RPC doesn't support models with decoupled transaction policy",
                )
            if self._stops_another(request):
                return self._named(service_pb2.ModelInferResponse(), model, request)
            async with aclosing(self._answers(model, request)) as answers:
                async for answer in answers:
                    response = answer.response
        except RequestError as error:
            await context.abort(error.code, error.message)
        return response

    async def model_stream_infer(self, requests: AsyncIterator[ModelInferRequest], context: Any) -> None:
        closing = ("triton_grpc_error", "true") in (tuple(pair) for pair in context.invocation_metadata() or ())
        writing = asyncio.Lock()
        slots = asyncio.Semaphore(self._max_stream_requests)

        async def write(response: Any) -> None:
            async with writing:
                await context.write(response)

        async def answer(request: ModelInferRequest) -> None:
            try:
                await self._answer_on_stream(request, write)
            except RequestError as error:
                if closing:
                    raise
                failed = service_pb2.ModelStreamInferResponse(error_message=error.message)
                failed.infer_response.id = request.id
                await write(failed)
            finally:
                slots.release()

        refusal: RequestError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await slots.acquire()
                    group.create_task(answer(request))
        except* RequestError as errors:
            refusal = _first(errors)
        if refusal is not None:
            await context.abort(refusal.code, refusal.message)

    async def _answer_on_stream(self, request: ModelInferRequest, write: Any) -> None:
        model = self._find(request.model_name, request.model_version)
        wants_empty = kserve.get_parameter(request, kserve.EMPTY_FINAL_PARAMETER)
        if wants_empty is not None and not isinstance(wants_empty, bool):
            raise RequestError.invalid(
                f"invalid value type for '{kserve.EMPTY_FINAL_PARAMETER}' parameter, expected bool_param."
            )
        final = False
        if self._stops_another(request):
            await write(self._empty_final(model, request))
            return
        async with aclosing(self._answers(model, request)) as answers:
            async for answer in answers:
                final = answer.final or not model.card.decoupled
                kserve.set_parameter(answer.response, kserve.FINAL_PARAMETER, final)
                await write(service_pb2.ModelStreamInferResponse(infer_response=answer.response))
        if not final and wants_empty:
            await write(self._empty_final(model, request))

    def _empty_final(self, model: Model, request: ModelInferRequest) -> Any:
        last = self._named(service_pb2.ModelInferResponse(), model, request)
        kserve.set_parameter(last, kserve.FINAL_PARAMETER, True)
        return service_pb2.ModelStreamInferResponse(infer_response=last)

    def _stops_another(self, request: ModelInferRequest) -> bool:
        """Whether the request is one that stops those of its ID; then it has. One that is not known yet goes on."""
        try:
            stops = bool(kserve.read_bool_input(request, STOP_INPUT))
        except kserve.TensorError as error:
            raise RequestError.invalid(str(error)) from error
        if stops:
            for stop in self._stops.get(request.id, ()):
                stop.set()
        return stops

    async def _answers(self, model: Model, request: ModelInferRequest) -> AsyncGenerator[Answer, None]:
        """The model's answers with names and id, counted; malformed tensors become refusals."""
        counts = self._statistics[model.card.name]
        self._active += 1
        self._idle.clear()
        stop = asyncio.Event()
        self._stops[request.id].add(stop)
        started_ns = time.monotonic_ns()
        try:
            async with aclosing(model.infer(request, stop)) as answers:
                async for answer in answers:
                    self._named(answer.response, model, request)
                    counts.responses += 1
                    yield answer
        except kserve.TensorError as error:
            counts.failed += 1
            counts.failed_ns += time.monotonic_ns() - started_ns
            raise RequestError.invalid(str(error)) from error
        except RequestError:
            counts.failed += 1
            counts.failed_ns += time.monotonic_ns() - started_ns
            raise
        except (asyncio.CancelledError, GeneratorExit):
            counts.cancelled += 1
            raise
        finally:
            named = self._stops[request.id]
            named.discard(stop)
            if not named:
                del self._stops[request.id]
            self._active -= 1
            if not self._active:
                self._idle.set()
        counts.succeeded += 1
        counts.succeeded_ns += time.monotonic_ns() - started_ns
        counts.last_inference_ms = time.time_ns() // 1_000_000

    @staticmethod
    def _named(response: ModelInferResponse, model: Model, request: ModelInferRequest) -> ModelInferResponse:
        response.model_name = model.card.name
        response.model_version = VERSION
        response.id = request.id
        return response


def _data_type(datatype: str) -> Any:
    return getattr(model_config_pb2, _DATATYPE[datatype])


def _first(errors: ExceptionGroup[RequestError]) -> RequestError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RequestError)
    return error
