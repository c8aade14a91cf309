"""The server: every RPC of the policy table bound to its handler, started and stopped as one.

`run_gateway` serves until it is cancelled or told to stop. A stop refuses new calls, lets those that run finish within the
grace, bills what it then cuts off, and closes the journal last, so that nothing is delivered that is not billed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from tritonclient.grpc import service_pb2

from producers.commands import CommandSettings, LeaseSender
from producers.errors import JournalFull, TopicUnread
from producers.follower import TopicFollower
from producers.meter import UsageMeter
from producers.publisher import Publisher
from serving.addresses import authority
from serving.gateway import chunks, streams, unary
from serving.gateway.directory import Directory
from serving.gateway.errors import CallError
from serving.gateway.gateway import Gateway
from serving.gateway.genai import GenAiMetrics
from serving.gateway.leases import LeaseKeeper
from serving.gateway.metering import MeterParts
from serving.gateway.policy import HEALTH_SERVICE, POLICIES, REFLECTION_SERVICES, Access, Policy
from serving.gateway.spending import Spending
from serving.gateway.tokens import TokenCounts, make_registry
from serving.gateway.upstream import Upstream
from serving.gateway.worth import Worth

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from billing.v1.account_pb2 import Lease
    from serving.gateway.directory import AccountView
    from serving.gateway.otlp import OtlpExport
    from serving.gateway.settings import GatewaySettings, LeaseSettings

__all__ = ["GatewayServer", "run_gateway"]

_LOG = logging.getLogger(__name__)
# Calls that are no inferences: probes and metadata.
_CONTROL_CALLS_MAX = 256
_READY_POLL_S = 0.1
_RECOVER_RETRY_S = 1.0
# What a stop waits for a collector.
_OTLP_CLOSE_S = 3.0


def _make_absent(policy: Policy) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def absent(_: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{policy.name}: is not there: {policy.message}")
        raise AssertionError("abort raises")

    return absent


def _make_reflection(gateway: Gateway, policy: Policy) -> Callable[[Any, Any], AsyncIterator[Any]]:
    """Describes what the gateway serves, whatever the back end says of itself."""
    servicer: Any = reflection.aio.ReflectionServicer(sorted({service for service, _ in POLICIES}))  # type: ignore[attr-defined]

    async def reflect(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            gateway.authenticate(gateway.caller(context), policy)
        except CallError as error:
            await context.abort(error.status, error.message)
        async for response in servicer.ServerReflectionInfo(requests, context):
            yield response

    return reflect


def _make_proxied(gateway: Gateway, policy: Policy, service: str, method: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
    forward = gateway.upstream.raw(service, method)

    async def proxied(request: bytes, context: Any) -> bytes:
        caller = gateway.caller(context)
        if service == HEALTH_SERVICE and not gateway.ready:
            serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)
            status: bytes = serving.SerializeToString()
            return status
        if method == "ServerReady" and not gateway.ready:
            # Whoever spreads requests over gateways asks this.
            unready: bytes = service_pb2.ServerReadyResponse(ready=False).SerializeToString()
            return unready
        try:
            if policy.access is not Access.OPEN:
                key = gateway.authenticate(caller, policy)
                if policy.message:
                    _LOG.warning("%s: key %s of tenant %s calls %s", policy.name, key.key_id, key.tenant_id, method)
            limit_s = gateway.settings.limits.control_timeout_s
            left_s = caller.time_left_s()
            timeout_s = limit_s if left_s is None else min(limit_s, left_s)
            response: bytes = await forward(request, timeout=timeout_s, metadata=caller.metadata)
            return response
        except CallError as error:
            await error.abort(context)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "the back end gave no reason")
            raise AssertionError("abort raises") from error

    return proxied


def _method_handlers(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """By service and method, one handler for each line of the policy table."""
    services: dict[str, dict[str, Any]] = {}
    for (service, method), policy in POLICIES.items():
        if (service, method) == unary.METHOD:
            handler = grpc.unary_unary_rpc_method_handler(
                unary.make_model_infer(gateway, policy),
                request_deserializer=service_pb2.ModelInferRequest.FromString,
                response_serializer=service_pb2.ModelInferResponse.SerializeToString,
            )
        elif (service, method) == streams.METHOD:
            handler = grpc.stream_stream_rpc_method_handler(
                streams.make_model_stream_infer(gateway, policy),
                request_deserializer=service_pb2.ModelInferRequest.FromString,
                response_serializer=chunks.serialize,
            )
        elif policy.access is Access.ABSENT:
            handler = grpc.unary_unary_rpc_method_handler(_make_absent(policy))
        elif service in REFLECTION_SERVICES:
            handler = grpc.stream_stream_rpc_method_handler(
                _make_reflection(gateway, policy),
                request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
                response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
            )
        else:
            proxied = _make_proxied(gateway, policy, service, method)
            handler = grpc.unary_unary_rpc_method_handler(proxied)
        services.setdefault(service, {})[method] = handler
    return services


class GatewayServer:
    """A gateway that serves. Made by `start`; `stop` it."""

    def __init__(self, settings: GatewaySettings, directory: Directory | None = None) -> None:
        """With a `directory` that someone else fills, no topic is followed."""
        self._settings = settings
        self._follows = directory is None
        self._directory = directory or Directory(settings.directory.partitions)
        self.tokens = TokenCounts(make_registry(settings.tokenizers, settings.fingerprints, settings.limits.requests_max))
        self._followers: list[TopicFollower] = []
        self._publisher: Publisher | None = None
        self._worth = Worth()
        self.genai = GenAiMetrics() if settings.observe or settings.otlp_endpoint else None
        self._otlp: OtlpExport | None = None
        self._lease_sender: LeaseSender | None = None
        self._server: Any = None
        self._meter: UsageMeter | None = None
        self._stopped = False
        self.port = 0
        self.recovered = 0

    async def start(self) -> None:
        """Serve, recover the journal, read keys and accounts; returns when they are known. Until then calls are told to try
        again, and on a full disk why. Raises TopicUnread if they cannot be read in time, and TokenizerMismatchError where a
        back end has another tokenizer; `stop` it then too."""
        settings = self._settings
        limits = settings.limits
        self._meter = meter = await asyncio.to_thread(UsageMeter, settings.meter)
        self._otlp = self._export()
        on_end = None if self._otlp is None else self._otlp.ended
        parts = MeterParts(
            meter, self.tokens, settings.server_id, settings.region, limits.durable_timeout_s, self.genai, on_end
        )
        self._upstream = Upstream(settings.upstream, settings.upstream_tls, limits)
        self.gateway = Gateway(settings, self._directory, parts, self._upstream)
        if settings.publisher is not None:
            self._publisher = Publisher(meter.journal, settings.publisher, self.gateway.audit.drifts)
            self._publisher.start()
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", limits.message_bytes_max),
                ("grpc.max_send_message_length", limits.message_bytes_max),
                ("grpc.keepalive_time_ms", limits.keepalive_ms),
                ("grpc.keepalive_permit_without_calls", 1),
                # A client may ping as often as its own keepalive wants, down to this.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                *limits.connections.grpc_options(),
            ],
            maximum_concurrent_rpcs=limits.requests_max + _CONTROL_CALLS_MAX,
        )
        for service, handlers in _method_handlers(self.gateway).items():
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        address = authority(settings.host, settings.port)
        if settings.tls is None:
            self.port = self._server.add_insecure_port(address)
        else:
            tls = settings.tls
            credentials = grpc.ssl_server_credentials(
                [(tls.key, tls.certificate)], tls.client_ca, require_client_auth=tls.client_ca is not None
            )
            self.port = self._server.add_secure_port(address, credentials)
        await self._server.start()
        await self._recover(meter)
        if settings.leases is not None:
            self._keep_leases(settings.leases, meter)
        if self._follows:
            self._follow()
        # Topics are read meanwhile.
        await self.gateway.tokenizer_checks.start()
        await self._await_ready()

    def _export(self) -> OtlpExport | None:
        settings = self._settings
        if not settings.otlp_endpoint or self.genai is None:
            return None
        # Of an extra that a gateway without a collector does without.
        from serving.gateway.otlp import OtlpExport

        return OtlpExport(settings.otlp_endpoint, settings.server_id, self.genai)

    def _keep_leases(self, leases: LeaseSettings, meter: UsageMeter) -> None:
        """After the recovery: what an earlier start owed is numbered, and everything from here on is this start's."""
        journal, loop = meter.journal, asyncio.get_running_loop()
        partitions = self._settings.directory.partitions
        commands = CommandSettings(leases.bootstrap, partitions, leases.commands_topic, leases.security)
        self._lease_sender = LeaseSender(commands, leases.key)
        keeper = LeaseKeeper(
            leases, journal.producer_id, journal.starts, partitions, journal.highest_sequence, self._lease_sender.send
        )
        self.gateway.spending = Spending(leases, keeper, self._worth)

        def on_lease(lease: Lease) -> None:
            if lease.holder_id == journal.producer_id:
                loop.call_soon_threadsafe(keeper.on_lease, lease)

        def on_account(account: AccountView) -> None:
            loop.call_soon_threadsafe(keeper.on_account, account.tenant_id, account.free_pico)

        self._directory.on_lease = on_lease
        self._directory.on_changed_account = on_account

    async def _recover(self, meter: UsageMeter) -> None:
        """Bill what an earlier start left open. While the disk has no room for that, every inference is refused."""
        left = len(meter.journal.left_open())
        while True:
            try:
                await asyncio.to_thread(meter.recover)
            except JournalFull as error:
                _LOG.warning("what an earlier start left open is billed once there is room: %s", error)
                self.gateway.journal_full = str(error)
                await asyncio.sleep(_RECOVER_RETRY_S)
            else:
                self.recovered = left
                self.gateway.journal_full = ""
                return

    def _follow(self) -> None:
        directory = self._settings.directory
        follow = partial(TopicFollower, directory.bootstrap, security=directory.security)
        self._followers = [
            follow(directory.keys_topic, self._directory.on_key),
            follow(directory.accounts_topic, self._directory.on_account),
        ]
        if self._settings.leases is not None:
            self._followers.append(follow(self._settings.leases.prices_topic, self._worth.on_book))
        for follower in self._followers:
            follower.start()

    async def _await_ready(self) -> None:
        directory = self._settings.directory
        deadline = time.monotonic() + directory.ready_timeout_s
        for follower in self._followers:
            # In short waits: a thread that waits cannot be cancelled, and a stop must not wait for it.
            while not await asyncio.to_thread(follower.ready.wait, _READY_POLL_S):
                if time.monotonic() > deadline:
                    raise TopicUnread(
                        f"ready_timeout_s: {directory.ready_timeout_s:g}: topic {follower.topic} could not be read from "
                        f"{directory.bootstrap} in time: see that Kafka is there and the topic exists"
                    )
        if self.gateway.spending is not None:
            self.gateway.spending.keeper.start()
        self.gateway.ready = True

    async def _give_leases_back(self) -> None:
        if self.gateway.spending is not None and self._lease_sender is not None:
            await self.gateway.spending.keeper.close()
            await asyncio.to_thread(self._lease_sender.close)

    @property
    def meter(self) -> UsageMeter:
        """The meter of a gateway that was started."""
        assert self._meter is not None, "start opens the journal"
        return self._meter

    @property
    def waiting_for(self) -> str:
        """Why inferences are not accepted now; empty: they are."""
        return self.gateway.journal_full or ("" if self.gateway.ready else "keys, accounts and the recovery of its journal")

    def metrics(self) -> Mapping[str, int]:
        """Counts since the start, and what is known now."""
        spending = self.gateway.spending
        leases = {} if spending is None else spending.keeper.metrics
        publisher = {} if self._publisher is None else self._publisher.metrics()
        return {
            **self.gateway.metrics,
            "tokenizers_unchecked": len(self.gateway.tokenizer_checks.unchecked),
            **self._directory.counts(),
            **self.meter.metrics(),
            **leases,
            **{f"publisher_{name}": value for name, value in publisher.items()},
        }

    async def stop(self) -> None:
        """Stop serving, bill what is cut off, close the journal. Does nothing the second time."""
        if self._stopped:
            return
        self._stopped = True
        limits = self._settings.limits
        if self._server is not None:
            self.gateway.ready = False
            stopping = asyncio.get_running_loop().create_task(self._server.stop(limits.shutdown_grace_s))
            # What the grace does not let finish is cut off by us: the bill says so.
            await asyncio.wait({stopping}, timeout=max(0.0, limits.shutdown_grace_s - 0.2))
            self.gateway.stopping = True
            await stopping
            await self.gateway.drain(limits.durable_timeout_s)
            await self._give_leases_back()
            await self.gateway.tokenizer_checks.close()
            await self._upstream.close()
        for follower in self._followers:
            await asyncio.to_thread(follower.close)
        if self._publisher is not None:
            await asyncio.to_thread(self._publisher.close, limits.durable_timeout_s)
        if self._meter is not None:
            await asyncio.to_thread(self._meter.close, limits.durable_timeout_s)
        if self._otlp is not None:
            await asyncio.to_thread(self._otlp.close, _OTLP_CLOSE_S)
        self.tokens.close()


async def run_gateway(
    settings: GatewaySettings,
    *,
    ready: Callable[[int], None] | None = None,
    stop: asyncio.Event | None = None,
    watch: Callable[[GatewayServer], None] | None = None,
) -> None:
    """Serve until cancelled or until `stop` is set; `ready(port)` is called when inferences are accepted, `watch` before."""
    server = GatewayServer(settings)
    try:
        stopping = asyncio.ensure_future((stop or asyncio.Event()).wait())
        starting = asyncio.ensure_future(server.start())
        try:
            # It may have to wait for room on the disk.
            await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                if watch is not None:
                    watch(server)
                if ready is not None:
                    ready(server.port)
                await stopping
        finally:
            for task in (stopping, starting):
                task.cancel()
            await asyncio.gather(stopping, starting, return_exceptions=True)
    finally:
        await server.stop()
