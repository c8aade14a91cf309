"""The deliveries of one endpoint: which are under way, in which order, and when they are tried again.

Promise: states of one alert arrive in order, the next one only after the one before was taken or given up; alerts wait for each
other only where too many are under way. Attempts come after exponential pauses with jitter until the horizon; then it is a dead
letter. One endpoint knows nothing of the others. When it stops, attempts under way end and are noted, within the time that an
attempt has; nothing new is begun.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar, TypeVarTuple, Unpack

import stamina

from serving.notifier.errors import DeliveryFailed, EndpointGone
from serving.notifier.sending import Sender

if TYPE_CHECKING:
    from collections.abc import Callable

    from serving.notifier.errors import Outcome
    from serving.notifier.journal import Delivery, Journal
    from serving.notifier.settings import Endpoint, NotifierLimits

__all__ = ["GONE", "EndpointQueue"]

_LOG = logging.getLogger(__name__)

GONE: Final = "the endpoint answered 410 Gone and is not asked any more: correct its url, or `taximeter webhooks dead retry`"
# An attempt is due at once, but never without limit: the horizon may be over after a long stop.
_LEAST_S: Final = 0.001
_Result = TypeVar("_Result")
_Arguments = TypeVarTuple("_Arguments")


class EndpointQueue:
    """Everything on the event loop that it was made on. `add` what waits; `close` it."""

    def __init__(self, endpoint: Endpoint, journal: Journal, limits: NotifierLimits, *, gone: bool) -> None:
        self.endpoint = endpoint
        self.gone = gone
        # Attempts by what became of them; and deliveries that became dead letters.
        self.outcomes: Counter[Outcome] = Counter()
        self.given_up = 0
        self._journal, self._limits = journal, limits
        self._sender = Sender(endpoint, limits)
        self._known: set[int] = set()
        self._of_alert: dict[str, deque[int]] = {}
        self._ready: deque[str] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        # Those that are within an attempt, up to the note of what became of it.
        self._trying: set[asyncio.Task[None]] = set()
        self._closing = False
        # Of its own: what holds threads of others holds up nothing here.
        self._writer = ThreadPoolExecutor(1, f"journal-{endpoint.name}")
        self._attempts = asyncio.Semaphore(limits.attempts_at_once)
        self.failure: BaseException | None = None

    @property
    def waiting(self) -> int:
        """How many wait or are under way. May be asked from any thread."""
        return len(self._known)

    def add(self, number: int, alert_id: str) -> None:
        """Deliver it, after those of its alert that are here already."""
        if number in self._known:
            return
        self._known.add(number)
        if alert_id in self._of_alert:
            self._of_alert[alert_id].append(number)
            return
        self._of_alert[alert_id] = deque([number])
        self._ready.append(alert_id)
        self._begin()

    async def close(self) -> None:
        """Stop; what was not taken stays in the journal. What is under way may end: it would come to its receiver again."""
        self._closing = True
        for task in self._tasks - self._trying:
            task.cancel()
        tasks = list(self._tasks)
        if tasks:
            await asyncio.wait(tasks, timeout=self._limits.attempt_timeout_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._writer.shutdown()
        await self._sender.close()

    async def _journaled(self, work: Callable[[Unpack[_Arguments]], _Result], *arguments: *_Arguments) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *arguments)

    def _begin(self) -> None:
        while self._ready and len(self._tasks) < self._limits.alerts_at_once and not self._closing:
            task = asyncio.ensure_future(self._deliver_all(self._ready.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            # The journal's: nothing more can be said to be delivered.
            self.failure = self.failure or error
        else:
            self._begin()

    async def _deliver_all(self, alert_id: str) -> None:
        numbers = self._of_alert[alert_id]
        while numbers:
            delivery = await self._journaled(self._journal.read, numbers[0])
            if delivery is not None:
                await self._deliver(delivery)
            self._known.discard(numbers.popleft())
        del self._of_alert[alert_id]

    async def _deliver(self, delivery: Delivery) -> None:
        limits = self._limits
        spent_s = time.time() - delivery.tried_ms / 1_000 if delivery.tried_ms else 0.0
        retrying = stamina.retry_context(
            on=_pause,
            attempts=None,
            timeout=max(_LEAST_S, limits.horizon_s - spent_s),
            wait_initial=limits.wait_initial_s,
            wait_max=limits.wait_max_s,
            wait_jitter=limits.wait_jitter_s,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    await self._try(delivery)
        except EndpointGone as error:
            await self._bury(delivery, str(error))
        except DeliveryFailed as error:
            await self._bury(delivery, f"not taken within {limits.horizon_s:g} s; at last: {error}")

    async def _try(self, delivery: Delivery) -> None:
        if self.gone:
            raise EndpointGone(GONE)
        async with self._attempts:
            task = asyncio.current_task()
            assert task is not None, "it is called from one"
            self._trying.add(task)
            try:
                await self._attempt(delivery)
            finally:
                self._trying.discard(task)
                if self._closing:
                    # What follows it is not begun.
                    task.cancel()

    async def _attempt(self, delivery: Delivery) -> None:
        try:
            await self._sender.send(delivery.webhook_id, delivery.body)
            self.outcomes["taken"] += 1
            await self._journaled(self._journal.delivered, delivery.number)
        except DeliveryFailed as error:
            self.outcomes[error.outcome] += 1
            _LOG.warning("endpoint %s: %s was not taken: %s", self.endpoint.name, delivery.webhook_id, error)
            await self._journaled(self._journal.failed, delivery.number, str(error))
            if isinstance(error, EndpointGone):
                # Written down first: who has seen it here finds it there, also after a kill.
                await self._journaled(self._journal.mark_gone, self.endpoint.name, self.endpoint.url)
                self.gone = True
                _LOG.warning("endpoint %s: %s", self.endpoint.name, GONE)
            raise

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        self.given_up += 1
        _LOG.error("endpoint %s: %s is a dead letter: %s", self.endpoint.name, delivery.webhook_id, reason)
        await self._journaled(self._journal.bury, delivery.number, reason)


def _pause(error: Exception) -> bool | float:
    """Whether another attempt makes sense, or after how long."""
    if not isinstance(error, DeliveryFailed) or isinstance(error, EndpointGone):
        return False
    return True if error.retry_after_s is None else error.retry_after_s
