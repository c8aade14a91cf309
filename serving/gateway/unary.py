"""ModelInfer: one request, one response, one bill that is durable before the response leaves."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from billing.v1.usage_pb2 import OUTCOME_BACKEND_ERROR, OUTCOME_COMPLETED, OUTCOME_DEADLINE_EXCEEDED
from producers.errors import ProducerError
from serving import kserve
from serving.gateway.errors import CallError
from serving.gateway.metering import OUTPUT_TOKENS_MAX, tell_usage
from serving.gateway.stopping import await_end, can_stop
from serving.gateway.upstream import ASKED_AGAIN, RETRY_DELAY_S
from serving.kserve import SERVICE_NAME, TensorError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from serving.gateway.calls import Admitted, Caller
    from serving.gateway.gateway import Gateway
    from serving.gateway.policy import Policy
    from serving.kserve import ModelInferRequest, ModelInferResponse

__all__ = ["METHOD", "make_model_infer"]

METHOD = (SERVICE_NAME, "ModelInfer")


async def _ask(gateway: Gateway, admitted: Admitted, caller: Caller) -> ModelInferResponse:
    """The back end's response, asked again where it was not there. Counts it."""
    attempts_left = gateway.settings.limits.upstream_attempts
    while True:
        attempts_left -= 1
        try:
            response = await gateway.upstream.infer(
                admitted.request, timeout=gateway.upstream_timeout_s(caller, admitted.profile), metadata=caller.metadata
            )
            admitted.meter.saw_response()
            admitted.meter.counter.take(response)
            return response
        except grpc.aio.AioRpcError as error:
            if not attempts_left or error.code() not in ASKED_AGAIN or caller.is_late():
                raise
        gateway.metrics["upstream_retries"] += 1
        await asyncio.sleep(RETRY_DELAY_S)


async def _ask_to_the_end(gateway: Gateway, admitted: Admitted, caller: Caller) -> ModelInferResponse:
    """The same of a back end that can be stopped: when the client is gone, what it has produced is still counted."""
    asking = asyncio.get_running_loop().create_task(_ask(gateway, admitted, caller))
    try:
        return await asyncio.shield(asking)
    except asyncio.CancelledError:
        if can_stop(gateway, admitted):
            admitted.end = partial(await_end, gateway, admitted, _counted(asking), stream=False)
        else:
            asking.cancel()
        raise


async def _counted(asking: asyncio.Task[ModelInferResponse]) -> None:
    with suppress(grpc.aio.AioRpcError, TensorError):
        await asking


async def _answer(gateway: Gateway, admitted: Admitted, caller: Caller, context: Any) -> ModelInferResponse:
    """Forward the request, bill it, and return what the client gets. Raises CallError."""
    meter = admitted.meter
    meter.forwarded()
    try:
        ask = _ask if admitted.profile.stop_input is None else _ask_to_the_end
        response = await ask(gateway, admitted, caller)
    except grpc.aio.AioRpcError as error:
        late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and caller.is_late()
        await meter.close(OUTCOME_DEADLINE_EXCEEDED if late else OUTCOME_BACKEND_ERROR)
        gateway.metrics["requests_backend_error"] += not late
        details = error.details() or "the back end gave no reason"
        raise CallError(error.code(), admitted.prepared.in_clients_words(details)) from error
    except TensorError as error:
        await meter.close(OUTCOME_BACKEND_ERROR)
        gateway.metrics["requests_backend_error"] += 1
        raise CallError(grpc.StatusCode.INTERNAL, f"the back end's answer cannot be metered: {error}") from error
    usage = await meter.close(OUTCOME_COMPLETED)
    gateway.metrics["requests_completed"] += 1
    if usage.trailers:
        context.set_trailing_metadata(usage.trailers)
    response.id = admitted.prepared.client_id
    tell_usage(response, usage)
    if meter.is_too_long:
        # It was told where it can be, and answered in one piece, which cannot be cut.
        gateway.metrics["answers_over_limit"] += 1
        kserve.set_parameter(response, f"taximeter_{OUTPUT_TOKENS_MAX}", meter.output_tokens_max)
    return response


def make_model_infer(gateway: Gateway, policy: Policy) -> Callable[[ModelInferRequest, Any], Awaitable[Any]]:
    """The RPC's handler."""

    async def model_infer(request: ModelInferRequest, context: Any) -> ModelInferResponse:
        caller = gateway.caller(context)
        try:
            admitted = await gateway.begin(request, caller, policy, stream=False)
            try:
                return await _answer(gateway, admitted, caller, context)
            except ProducerError as error:
                raise gateway.unrecorded(error) from error
            finally:
                gateway.end(admitted, caller)
        except CallError as error:
            await error.abort(context)

    return model_infer
