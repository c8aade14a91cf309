"""A decorator that meters work which is no request: a document that is read, a training run, a nightly batch.

    @metered_job(calls, Identity("acme"), model="reader", operation=OPERATION_OCR, count=lambda pages: Used(units=…))
    def read_document(path): ...

Promise: the job begins when it is open in the journal, and is refused with `JournalFull` otherwise. A function is one bill, by
its result. A generator (a training run that yields its steps) adds up what each item used, each durable before the next begins:
a process that dies in between leaves the bill of the steps that were done. A job that raises before it has used anything costs
nothing; the exception goes on. Coroutines and async generators likewise.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from billing.v1.usage_pb2 import OPERATION_BATCH_JOB, OUTCOME_CANCELLED, OUTCOME_COMPLETED
from producers.calls import CallMeter, Identity, MeteredCall, Used

if TYPE_CHECKING:
    from producers.receipt import Receipt

__all__ = ["metered_job"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Job:
    """One run."""

    def __init__(self, call: MeteredCall, count: Callable[[Any], Used]) -> None:
        self._call = call
        self._count = count
        self._used = Used()

    def step(self, item: Any) -> Receipt:
        """A generator has made an item."""
        self._used += self._count(item)
        return self._call.progress(self._used)

    def finish(self, result: Any = None, *, counted: bool = False) -> Receipt:
        """It has ended well; `counted`: its items were."""
        return self._call.close(OUTCOME_COMPLETED, self._used if counted else self._count(result))

    def end(self, error: BaseException) -> Receipt:
        """It did not come to its end."""
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            return self._call.close(OUTCOME_CANCELLED, self._used)
        return self._call.fail(self._used, delivered=self._used != Used())


def metered_job(
    calls: CallMeter,
    identity: Identity | Callable[..., Identity],
    *,
    model: str,
    count: Callable[[Any], Used],
    operation: int = OPERATION_BATCH_JOB,
) -> Callable[[_Function], _Function]:
    """Meter a function. `identity` says who pays, or is asked with the function's arguments; `count` looks at its result, or at
    each item that it yields."""

    def begin(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[_Job, Receipt]:
        who = identity(*arguments, **named) if callable(identity) else identity
        call = calls.begin(who, model, operation)
        return _Job(call, count), call.receipt

    timeout_s = calls.durable_timeout_s

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def async_items(*arguments: Any, **named: Any) -> Any:
                job, receipt = begin(arguments, named)
                await receipt.wait(timeout_s)
                try:
                    async for item in function(*arguments, **named):
                        await job.step(item).wait(timeout_s)
                        yield item
                except BaseException as error:
                    job.end(error)
                    raise
                await job.finish(counted=True).wait(timeout_s)

            return async_items
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def async_whole(*arguments: Any, **named: Any) -> Any:
                job, receipt = begin(arguments, named)
                await receipt.wait(timeout_s)
                try:
                    result = await function(*arguments, **named)
                    closing = job.finish(result)
                except BaseException as error:
                    job.end(error)
                    raise
                await closing.wait(timeout_s)
                return result

            return async_whole
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def items(*arguments: Any, **named: Any) -> Any:
                job, receipt = begin(arguments, named)
                receipt.durable(timeout_s)
                try:
                    for item in function(*arguments, **named):
                        job.step(item).durable(timeout_s)
                        yield item
                except BaseException as error:
                    job.end(error).durable(timeout_s)
                    raise
                job.finish(counted=True).durable(timeout_s)

            return items

        @functools.wraps(function)
        def whole(*arguments: Any, **named: Any) -> Any:
            job, receipt = begin(arguments, named)
            receipt.durable(timeout_s)
            try:
                result = function(*arguments, **named)
                closing = job.finish(result)
            except BaseException as error:
                job.end(error).durable(timeout_s)
                raise
            closing.durable(timeout_s)
            return result

        return whole

    return cast("Callable[[_Function], _Function]", decorate)
