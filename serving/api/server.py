"""The billing API as a part: gRPC and HTTP in one process, on the same calls.

Promise: `start` returns when both servers listen, the keys are known, and the database has answered what a page asks first, or
has not in time; `stop` lets running calls finish within the grace, and closes what they used.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
import uvicorn

from serving.addresses import authority, bare_host
from serving.api.calls import Calls
from serving.api.grpc_server import make_grpc_server
from serving.api.http_connections import bounded_connection
from serving.api.http_server import make_http_app
from serving.api.keys import Keys
from serving.api.service import HANDLERS, WATCHERS

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from serving.api.settings import ApiSettings

__all__ = ["ApiServer", "run_api"]

_LOG = logging.getLogger(__name__)

_HEADER_BYTES_MAX: Final = 32 * 1024
_KEEP_ALIVE_S: Final = 30


class _Http(uvicorn.Server):
    """Ends when it is told to; signals are the process's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """Made, then `start`ed; `stop` it."""

    def __init__(self, settings: ApiSettings, keys: Keys | None = None, routes: Sequence[BaseRoute] = ()) -> None:
        """With `keys` that someone else fills, no topic is followed. `routes` are served over HTTP beside the API's own."""
        self._settings = settings
        self._follows = keys is None
        self.calls = Calls(settings, keys or Keys(settings.keys.partitions), HANDLERS, WATCHERS)
        self.app = make_http_app(self.calls, routes)
        self._grpc: Any = None
        self._http: _Http | None = None
        self._serving: asyncio.Task[None] | None = None
        self.grpc_port = self.http_port = 0

    async def start(self) -> None:
        """Listen, and read the keys. Raises OSError for an address that is taken, TimeoutError if the keys cannot be read."""
        settings = self._settings
        self._grpc = make_grpc_server(self.calls)
        address = authority(settings.host, settings.grpc_port)
        if settings.tls is None:
            self.grpc_port = self._grpc.add_insecure_port(address)
        else:
            pair = (settings.tls.key.read_bytes(), settings.tls.certificate.read_bytes())
            self.grpc_port = self._grpc.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        host = bare_host(settings.host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, settings.http_port), family=family)
        self.http_port = listener.getsockname()[1]
        limits = settings.limits
        self._http = _Http(
            uvicorn.Config(
                self.app,
                access_log=False,
                h11_max_incomplete_event_size=_HEADER_BYTES_MAX,
                http=bounded_connection(limits.connections.opening_s),
                lifespan="off",
                log_config=None,
                proxy_headers=False,
                server_header=False,
                ssl_certfile=None if settings.tls is None else str(settings.tls.certificate),
                ssl_keyfile=None if settings.tls is None else str(settings.tls.key),
                timeout_graceful_shutdown=int(limits.shutdown_grace_s),
                timeout_keep_alive=_KEEP_ALIVE_S,
                ws="none",
            )
        )
        await self._grpc.start()
        self._serving = asyncio.ensure_future(self._http.serve([listener]))
        warming = asyncio.ensure_future(self.calls.warm_up(limits.warm_up_timeout_s))
        try:
            if self._follows:
                await self._follow()
            await warming
        finally:
            warming.cancel()

    async def _follow(self) -> None:
        settings = self._settings
        await asyncio.to_thread(self.calls.keys.follow, settings.keys)
        if settings.alerts is not None and not await asyncio.to_thread(self.calls.alerts.follow, settings.alerts):
            _LOG.warning("topic %s is not read to its end yet: watches of alerts wait for it", settings.alerts.topic)

    def behind_s(self) -> dict[str, float]:
        """Of each topic that is followed, for how long its end has not been reached."""
        behind_s = {self._settings.keys.topic: self.calls.keys.behind_s()}
        if self._settings.alerts is not None:
            behind_s[self._settings.alerts.topic] = self.calls.alerts.behind_s()
        return behind_s

    async def stop(self) -> None:
        """Stop serving."""
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await self._serving
        if self._grpc is not None:
            await self._grpc.stop(self._settings.limits.shutdown_grace_s)
        await asyncio.to_thread(self.calls.keys.close)
        await asyncio.to_thread(self.calls.alerts.close)
        await asyncio.to_thread(self.calls.close)


async def run_api(
    settings: ApiSettings,
    *,
    ready: Callable[[ApiServer], None] | None = None,
    watch: Callable[[ApiServer], None] | None = None,
    routes: Sequence[BaseRoute] = (),
) -> None:
    """Serve until cancelled; `ready` is called when keys are known, `watch` with the server before it starts."""
    server = ApiServer(settings, routes=routes)
    if watch is not None:
        watch(server)
    try:
        await server.start()
        if ready is not None:
            ready(server)
        await asyncio.Event().wait()
    finally:
        await server.stop()
