"""Start, run and stop a model server.

`ModelServer.start` returns when the port accepts calls and the models are loaded. `stop` refuses new calls, lets what
runs finish within the grace, cancels the rest, and frees the model. Nothing outlives it.
"""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serving import kserve
from serving.model_server.engine import Engine
from serving.model_server.production import ProductionLog
from serving.model_server.service import InferenceService
from serving.model_server.text_backend import TextModel
from serving.model_server.trace_backend import TraceModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.model_server.models import Model
    from serving.model_server.settings import ServerSettings

__all__ = ["ModelServer", "serve"]

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", kserve.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", kserve.MAX_MESSAGE_BYTES),
    # A port that another process has is an error, not half of its calls.
    ("grpc.so_reuseport", 0),
)


def _version() -> str:
    try:
        return metadata.version("taximeter")
    except metadata.PackageNotFoundError:
        return "0"


class ModelServer:
    """A server that runs. Made by `start`."""

    def __init__(
        self,
        server: Any,
        port: int,
        service: InferenceService,
        engine: Engine | None,
        log: ProductionLog,
        grace_s: float,
    ) -> None:
        self.port = port
        self._server = server
        self._service = service
        self._engine = engine
        self._log = log
        self._grace_s = grace_s
        self._stopped = False

    @classmethod
    async def start(cls, settings: ServerSettings) -> ModelServer:
        """Load the models, bind the port, serve."""
        log = ProductionLog(settings.production_log)
        engine: Engine | None = None
        try:
            models: list[Model] = []
            if "smollm2" in settings.models:
                engine = await Engine.load(settings.engine)
                models += [
                    TextModel("smollm2", engine, log, decoupled=True, empty_final=settings.empty_final),
                    TextModel("smollm2-unary", engine, log, decoupled=False),
                ]
            if "trace" in settings.models:
                models += [
                    TraceModel("trace", log, decoupled=True, empty_final=settings.empty_final),
                    TraceModel("trace-unary", log, decoupled=False),
                ]
            service = InferenceService(
                {model.card.name: model for model in models},
                version=_version(),
                max_stream_requests=settings.max_stream_requests,
            )
            server: Any = grpc.aio.server(options=_OPTIONS)
            server.add_generic_rpc_handlers((service.handlers(),))
            await _add_health(server)
            # RuntimeError where the address cannot be had.
            port: int = server.add_insecure_port(f"{settings.host}:{settings.port}")
            await server.start()
        except BaseException:
            if engine is not None:
                await engine.close()
            log.close()
            raise
        return cls(server, port, service, engine, log, settings.grace_s)

    async def stop(self) -> None:
        """Stop serving. Does nothing the second time."""
        if self._stopped:
            return
        self._stopped = True
        self._service.ready = False
        await self._server.stop(self._grace_s)
        # gRPC cancels what outlived the grace without waiting for it; every request's line belongs in the log.
        await self._service.wait_idle()
        if self._engine is not None:
            await self._engine.close()
        self._log.close()


async def _add_health(server: Any) -> None:
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack it
    for name in ("", kserve.SERVICE_NAME):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


async def serve(settings: ServerSettings, ready: Callable[[int], None] | None = None) -> None:
    """Serve until cancelled; `ready(port)` is called when calls are accepted."""
    server = await ModelServer.start(settings)
    try:
        if ready is not None:
            ready(server.port)
        await asyncio.Event().wait()
    finally:
        await server.stop()
