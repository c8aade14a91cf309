"""A client that is gone: its answer is stopped at the back end, and counted up to what the back end says was its end.

KServe v2 knows no other cancel than the end of the call, and gRPC drops what is on its way when a call is cancelled: what the
back end made until it saw the cancel, nobody is told. Where the back end stops a request on request (`stop_input` of its
profile), the call stays, a request that says so goes beside it, and the gateway reads on until the last response: all that was
produced has been counted then, and no more was. A back end that does not end in time is cancelled by gRPC after all.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import grpc
from tritonclient.grpc import service_pb2

from serving import kserve
from serving.gateway.upstream import EOF

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from serving.gateway.calls import Admitted
    from serving.gateway.gateway import Gateway
    from serving.kserve import ModelInferRequest

__all__ = ["await_end", "can_stop"]

# A stop may overtake the request that it means, which then is not known yet: it is said again.
_REPEAT_S: Final = 0.1


def can_stop(gateway: Gateway, admitted: Admitted) -> bool:
    """Whether the back end can be told to end this answer, and there is time to hear of it."""
    return admitted.profile.stop_input is not None and not admitted.prepared.stops and not gateway.stopping


async def await_end(gateway: Gateway, admitted: Admitted, counting: Awaitable[None], *, stream: bool) -> None:
    """Stop the answer; returns when `counting` has seen its end, or when it has taken too long."""
    ended = asyncio.Event()
    gateway.spawn(_stop(gateway, admitted, ended, stream=stream))
    try:
        async with asyncio.timeout(gateway.settings.limits.stop_timeout_s):
            await counting
        gateway.metrics["cancels_confirmed"] += 1
    except TimeoutError:
        gateway.metrics["cancels_unconfirmed"] += 1
    finally:
        ended.set()


async def _stop(gateway: Gateway, admitted: Admitted, ended: asyncio.Event, *, stream: bool) -> None:
    """Say it until someone has seen the end. Its own call is never cancelled: gRPC leaks a little for each that is."""
    request = _stop_request(admitted)
    limit_s = gateway.settings.limits.stop_timeout_s
    while not ended.is_set():
        try:
            if stream:
                call = gateway.upstream.stream_infer(request, timeout=limit_s)
                while await call.read() is not EOF:
                    pass
            else:
                await gateway.upstream.infer(request, timeout=limit_s)
        except grpc.aio.AioRpcError:
            # Whether it was heard shows in the answer alone.
            gateway.metrics["stops_failed"] += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), _REPEAT_S)


def _stop_request(admitted: Admitted) -> ModelInferRequest:
    """The request again, as a back end may want all of its inputs, with the word to stop."""
    name = admitted.profile.stop_input
    assert name is not None, "only what can be stopped is"
    request = service_pb2.ModelInferRequest()
    request.CopyFrom(admitted.request)
    kserve.strip_input(request, name)
    counts = admitted.profile.counts
    kserve.add_bool_input(request, name, True, shape=(1,) if counts is None else counts.shape)
    return request
