"""ModelStreamInfer: many requests on one client stream, each on a back end stream of its own, so a cancel hits exactly one.

Chunks that come while the journal's disk works are committed together and leave together: one slow disk costs latency, not
throughput. A chunk leaves when a progress that counts it is durable, the last one when the bill is.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from tritonclient.grpc import service_pb2

from billing.v1.usage_pb2 import (
    OUTCOME_BACKEND_ERROR,
    OUTCOME_BACKEND_ERROR_PARTIAL,
    OUTCOME_BALANCE_EXHAUSTED,
    OUTCOME_COMPLETED,
    OUTCOME_DEADLINE_EXCEEDED,
    OUTCOME_TRUNCATED,
)
from producers.errors import ProducerError
from serving import kserve
from serving.gateway.chunks import Arrivals, StreamResponse, learn_form, read_response
from serving.gateway.errors import CallError
from serving.gateway.metering import tell_usage
from serving.gateway.open_streams import OpenStreams
from serving.gateway.stopping import await_end, can_stop
from serving.gateway.upstream import ASKED_AGAIN, EOF, RETRY_DELAY_S
from serving.kserve import FINAL_PARAMETER, SERVICE_NAME, TensorError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from serving.gateway.calls import Admitted, Caller
    from serving.gateway.chunks import ChunkForm
    from serving.gateway.counting import Counted
    from serving.gateway.gateway import Gateway
    from serving.gateway.policy import Policy
    from serving.kserve import ModelInferRequest

__all__ = ["METHOD", "make_model_stream_infer"]

METHOD = (SERVICE_NAME, "ModelStreamInfer")

_MONEY_ENDED = "balance: is used up: the answer ends here, and is billed up to here: add credit"
_TOO_LONG = "max_tokens: at most {limit} are allowed: the answer ends here, and is billed up to here: ask for a shorter one"

# Chunks of one answer that are read in full to find what they have in common: some answers have a form of their own for each.
_FORMS_MAX = 16

_Leaving = StreamResponse | bytes


@dataclass(frozen=True, slots=True)
class _End:
    """The back end's stream has ended; `message` is empty where it ended well."""

    status: grpc.StatusCode | None
    message: str
    answer: StreamResponse | None = None
    """What says so in band."""


class _ClientGoneError(Exception):
    """The client's stream has ended under a write: it cancelled, or its connection broke."""


class _RequestFlow:
    """One admitted request: from the back end's stream to the client's."""

    def __init__(
        self,
        gateway: Gateway,
        caller: Caller,
        admitted: Admitted,
        write: Callable[[Sequence[_Leaving]], Awaitable[None]],
    ) -> None:
        self._gateway = gateway
        self._caller = caller
        self._admitted = admitted
        self._meter = admitted.meter
        self._prepared = admitted.prepared
        self._write = write
        self._arrived: Arrivals[bytes | _End] = Arrivals(gateway.settings.limits.request_chunks_max)
        # What the newest chunk that was read in full has in common with those that follow.
        self._form: ChunkForm | None = None
        self._forms_left = _FORMS_MAX
        # The newest chunk while it may be the last that the client sees.
        self._held: _Leaving | None = None
        self._counted = self._meter.counter.counted()
        self._delivered_any = False
        self._call: Any = None
        self._read_any = False
        # The back end's stream is being read: the end of the call ends that too.
        self._in_read = False
        # Nobody takes what still comes.
        self._is_cut = False
        # All that the back end has to say has been counted.
        self._ended = False
        # The client is gone: nothing is asked again.
        self._stopping = False

    async def run(self) -> None:
        """Returns when the last response has left. Raises CallError for what the client must still be told."""
        self._meter.forwarded()
        reading = asyncio.get_running_loop().create_task(self._read())
        try:
            await self._deliver()
        except (asyncio.CancelledError, _ClientGoneError):
            if self._ended or not can_stop(self._gateway, self._admitted):
                self._cut(reading)
            else:
                self._admitted.end = partial(self._end, reading)
            raise
        except BaseException:
            self._cut(reading)
            raise
        self._cut(reading)

    def _cut(self, reading: asyncio.Task[None]) -> None:
        """The back end need not go on."""
        self._is_cut = True
        if self._call is not None:
            self._call.cancel()
        if not self._in_read:
            # Never in the middle of a read: gRPC frees what it has read only for whoever still waits for it (grpc#43360).
            reading.cancel()
        if not self._meter.is_closed:
            # What the back end has sent by now was produced, whether or not it reached the client.
            self._count_arrived()

    async def _end(self, reading: asyncio.Task[None]) -> None:
        """The client is gone: let the back end stop, and count up to its last response."""
        self._stopping = True
        try:
            await await_end(self._gateway, self._admitted, self._count_to_the_end(), stream=True)
        finally:
            self._cut(reading)

    async def _count_to_the_end(self) -> None:
        with suppress(TensorError):
            while True:
                for item in await self._arrived.take():
                    response = None if isinstance(item, _End) else read_response(item)
                    if response is None or response.error_message:
                        return
                    self._meter.counter.take(response.infer_response)
                    if kserve.get_parameter(response.infer_response, FINAL_PARAMETER) is True:
                        return

    async def _read(self) -> None:
        """Fill the queue until the back end's stream ends; one that was not there, or is gone before it said anything, is asked
        again."""
        attempts_left = self._gateway.settings.limits.upstream_attempts
        while True:
            attempts_left -= 1
            end = await self._read_once()
            if (
                not attempts_left
                or self._read_any
                or self._stopping
                or self._is_cut
                or end.status not in ASKED_AGAIN
                or self._caller.is_late()
            ):
                break
            self._gateway.metrics["upstream_retries"] += 1
            await asyncio.sleep(RETRY_DELAY_S)
        if not self._is_cut:
            self._arrived.put(end)

    async def _read_once(self) -> _End:
        """One stream of the back end, to its end; a full queue holds the back end up."""
        timeout_s = self._gateway.upstream_timeout_s(self._caller, self._admitted.profile)
        self._call = call = self._gateway.upstream.stream_infer(
            self._admitted.request, timeout=timeout_s, metadata=self._caller.metadata
        )
        try:
            self._in_read = True
            while (response := await call.read()) is not EOF and not self._is_cut:
                self._read_any = True
                if not self._arrived.put(response):
                    self._in_read = False
                    await self._arrived.room()
                    self._in_read = True
        except grpc.aio.AioRpcError as error:
            return _End(error.code(), error.details() or "the back end gave no reason")
        finally:
            self._in_read = False
        return _End(None, "")

    def _count_arrived(self) -> None:
        with suppress(TensorError):
            for item in self._arrived.take_now():
                response = None if isinstance(item, _End) else read_response(item)
                if response is None or response.error_message:
                    return
                self._meter.counter.take(response.infer_response)

    async def _deliver(self) -> None:
        counter, meter = self._meter.counter, self._meter
        while True:
            # Each with what had come when it had.
            ready: list[tuple[_Leaving, Counted]] = []
            for item in await self._arrived.take():
                if isinstance(item, _End):
                    await self._finish(ready, None, item)
                    return
                before, form = self._counted, self._form
                found = None if form is None else form.read(item)
                if found is not None and form is not None and counter.take_data(form.plan, found[0]):
                    leaving: _Leaving = found[1]
                    final = form.is_final
                else:
                    try:
                        leaving = self._read_in_full(item)
                    except TensorError as error:
                        message = f"the back end's answer cannot be metered: {error}"
                        await self._finish(ready, None, _End(grpc.StatusCode.INTERNAL, message))
                        return
                    if leaving.error_message:
                        # In band it has no status; the request ends with it.
                        await self._finish(ready, None, _End(None, leaving.error_message, leaving))
                        return
                    final = kserve.get_parameter(leaving.infer_response, FINAL_PARAMETER)
                self._counted = counter.counted()
                meter.saw_response()
                if final is True:
                    await self._finish(ready, leaving, _End(None, ""))
                    return
                if self._held is not None:
                    ready.append((self._held, before))
                    self._held = None
                if self._may_be_last(final):
                    self._held = leaving
                else:
                    ready.append((leaving, self._counted))
            if ready:
                if not await meter.progress(ready[-1][1]):
                    await self._end_early(ready)
                self._delivered_any = True
                await self._write([response for response, _ in ready])

    def _read_in_full(self, chunk: bytes) -> StreamResponse:
        """Count a chunk, and what the client gets of it. Those that follow may be like it. Raises TensorError."""
        response = read_response(chunk)
        if response.error_message:
            return response
        infer = response.infer_response
        plan = None
        if self._forms_left:
            self._forms_left -= 1
            plan = self._meter.counter.plan(infer)
        self._meter.counter.take(infer)
        infer.id = self._prepared.client_id
        if plan is not None:
            self._form = learn_form(chunk, response, plan)
        return response

    def _may_be_last(self, final: object) -> bool:
        """Whether the client may get nothing after this chunk: it has not asked for an empty final response, or the back
        end does not say which response is the last."""
        if not self._gateway.settings.hold_back_last_chunk:
            return False
        return not self._prepared.empty_final_asked or final is None

    async def _end_early(self, ready: Sequence[tuple[_Leaving, Counted]]) -> NoReturn:
        """The money is used up, or the answer longer than it may be: deliver what is within both of what is ready, and bill
        that. The rest stays here, and the back end need not go on."""
        self._ended = True
        within, beyond = 0, len(ready)
        while beyond - within > 1:
            middle = (within + beyond) // 2
            if await self._meter.progress(ready[middle - 1][1]):
                within = middle
            else:
                beyond = middle
        outcome, message = OUTCOME_BALANCE_EXHAUSTED, _MONEY_ENDED
        if self._meter.is_too_long:
            outcome, message = OUTCOME_TRUNCATED, _TOO_LONG.format(limit=self._meter.output_tokens_max)
        await self._meter.close_as_delivered(outcome)
        self._gateway.metrics["requests_cut_off"] += 1
        if within:
            await self._write([response for response, _ in ready[:within]])
        raise CallError(grpc.StatusCode.RESOURCE_EXHAUSTED, self._prepared.in_clients_words(message))

    async def _finish(self, ready: list[tuple[_Leaving, Counted]], last: StreamResponse | None, end: _End) -> None:
        """Bill the request, then let go of what is left of the answer, the usage on the last response that is visible."""
        self._ended = True
        if self._held is not None:
            ready.append((self._held, self._counted))
        # An empty last response is for those who asked for it.
        if last is not None and (last.infer_response.outputs or self._prepared.empty_final_asked):
            ready.append((last, self._counted))
        outcome, counted_as = self._outcome(end, delivered=self._delivered_any or bool(ready))
        usage = await self._meter.try_close(outcome)
        if usage is None:
            await self._end_early(ready)
        self._gateway.metrics[counted_as] += 1
        if ready:
            *others, visible = [response for response, _ in ready]
            if isinstance(visible, bytes):
                visible = read_response(visible)
            tell_usage(visible.infer_response, usage)
            await self._write([*others, visible])
        if end.message:
            message = self._prepared.in_clients_words(end.message)
            if end.answer is not None:
                end.answer.error_message = message
                end.answer.infer_response.id = self._prepared.client_id
            raise CallError(end.status or grpc.StatusCode.UNKNOWN, message, end.answer)

    def _outcome(self, end: _End, *, delivered: bool) -> tuple[int, str]:
        """What the bill says of the end, and the metric that counts it."""
        if not end.message:
            return OUTCOME_COMPLETED, "requests_completed"
        if end.status is grpc.StatusCode.DEADLINE_EXCEEDED and self._caller.is_late():
            return OUTCOME_DEADLINE_EXCEEDED, "requests_cut_off"
        partial = delivered and self._gateway.settings.bill_partial_answers
        return OUTCOME_BACKEND_ERROR_PARTIAL if partial else OUTCOME_BACKEND_ERROR, "requests_backend_error"


class _ClientStream:
    """One client's stream and the requests that run on it."""

    def __init__(self, gateway: Gateway, caller: Caller, policy: Policy, context: Any) -> None:
        self._gateway = gateway
        self._caller = caller
        self._policy = policy
        self._context = context
        self._writing = asyncio.Lock()
        self._slots = asyncio.Semaphore(gateway.settings.limits.stream_requests_max)
        self._tasks: set[asyncio.Task[None]] = set()
        self._main = asyncio.current_task()
        self._failure: CallError | None = None
        # When the request before it has been answered: models that are not decoupled answer in order.
        self._tail: asyncio.Future[None] | None = None

    async def run(self) -> None:
        try:
            while True:
                await self._slots.acquire()
                request = await self._context.read()
                if request is EOF:
                    break
                self._start(request)
            while self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            for task in self._tasks:
                task.cancel()
            if self._failure is None or self._main is None:
                raise
            self._main.uncancel()
        if self._failure is not None:
            await self._failure.abort(self._context)

    def _start(self, request: ModelInferRequest) -> None:
        profile = self._gateway.settings.models.get(request.model_name)
        before = done = None
        if profile is not None and not profile.decoupled:
            before, done = self._tail, asyncio.get_running_loop().create_future()
            self._tail = done
        task = self._gateway.spawn(self._serve(request, before, done))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()

    async def _serve(
        self, request: ModelInferRequest, before: asyncio.Future[None] | None, done: asyncio.Future[None] | None
    ) -> None:
        client_id = request.id

        async def write(responses: Sequence[_Leaving]) -> None:
            if before is not None:
                await asyncio.shield(before)
            # One message at a time may be on its way in a gRPC stream.
            async with self._writing:
                for response in responses:
                    try:
                        await self._context.write(response)
                    except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
                        raise _ClientGoneError from error

        try:
            try:
                await self._answer(request, write)
            except CallError as error:
                await self._tell(error, client_id, write)
        except _ClientGoneError:
            # gRPC is about to cancel the whole call; the bill is in the gateway's hands.
            self._gateway.metrics["clients_gone"] += 1
        finally:
            if done is not None and not done.done():
                done.set_result(None)

    async def _answer(self, request: ModelInferRequest, write: Callable[[Sequence[_Leaving]], Awaitable[None]]) -> None:
        gateway, caller = self._gateway, self._caller.for_one_request()
        admitted = await gateway.begin(request, caller, self._policy, stream=True)
        try:
            await _RequestFlow(gateway, caller, admitted, write).run()
        except ProducerError as error:
            raise gateway.unrecorded(error) from error
        finally:
            gateway.end(admitted, caller)

    async def _tell(self, error: CallError, client_id: str, write: Callable[[Sequence[_Leaving]], Awaitable[None]]) -> None:
        """In band, with the client's ID, where other requests share the stream or the error is this request's own; else, and
        where the client asked for it, the stream ends with the status."""
        alone = len(self._tasks) == 1 and error.status in _ENDS_STREAM
        if self._caller.wants_status or alone:
            if self._failure is None and self._main is not None:
                self._failure = error
                self._main.cancel()
            return
        response = error.answer
        if response is None:
            response = service_pb2.ModelStreamInferResponse(error_message=error.message)
            response.infer_response.id = client_id
        kserve.set_parameter(response.infer_response, "taximeter_status", error.status.name)
        if error.retry_after_s:
            kserve.set_parameter(response.infer_response, "taximeter_retry_after_s", error.retry_after_s)
        await write([response])


# What a client that talks to the back end directly would see end its stream.
_ENDS_STREAM = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)


def make_model_stream_infer(gateway: Gateway, policy: Policy) -> Callable[[Any, Any], Awaitable[None]]:
    """The RPC's handler."""

    open_streams = OpenStreams(gateway.settings.limits, gateway.metrics)

    async def model_stream_infer(_: Any, context: Any) -> None:
        caller = gateway.caller(context)
        try:
            # Also before each request: a key may be revoked while the stream is open.
            key = gateway.authenticate(caller, policy)
            open_streams.begin(key.tenant_id)
        except CallError as error:
            await error.abort(context)
        try:
            await _ClientStream(gateway, caller, policy, context).run()
        finally:
            open_streams.end(key.tenant_id)

    return model_stream_infer
