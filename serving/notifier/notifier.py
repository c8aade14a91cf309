"""The notifier as a part: it follows the alert topic, writes each alert down for every endpoint that wants it, and delivers.

Promise: an alert that was told after the journal was made reaches every endpoint whose filters let it through, at least once
and under one webhook ID, or is a dead letter that says why; no kill loses one. Endpoints are independent of each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import stamina.instrumentation

from producers.alerts import AlertFollower
from serving.notifier.deliveries import GONE, EndpointQueue
from serving.notifier.errors import NotifierError
from serving.notifier.journal import Journal, NewDelivery
from serving.notifier.payloads import body_of, webhook_id_of

if TYPE_CHECKING:
    from billing.v1.alert_pb2 import Alert
    from serving.notifier.errors import Outcome
    from serving.notifier.settings import NotifierSettings

__all__ = ["EndpointStatus", "Notifier", "run_notifier"]

_LOG = logging.getLogger(__name__)
_LOOK_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """How it stands with one endpoint, for metrics."""

    name: str
    gone: bool
    waiting: int
    # Of those, after an attempt that was not taken.
    retrying: int
    dead: int
    oldest_s: float
    # Attempts of this process by what became of them; and deliveries that it gave up.
    outcomes: Counter[Outcome]
    given_up: int


class Notifier:
    """One process has one. `run` it on an event loop."""

    def __init__(self, settings: NotifierSettings) -> None:
        self._settings = settings
        self._journal = Journal(settings.journal_path, dead_max=settings.limits.dead_max).hold()
        self._begun_ms = self._journal.begun_ms
        self._queues: dict[str, EndpointQueue] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        # Taken by the follower's thread and not yet seen by a queue.
        self._handed: Counter[str] = Counter()
        self.taken = 0
        self._follower = AlertFollower(
            settings.bootstrap, self._take, topic=settings.topic, after=self._journal.cursor, security=settings.security
        )

    @property
    def waiting_for(self) -> str:
        """What it waits for before it is ready; empty: it is."""
        return "" if self._follower.ready.is_set() else f"topic {self._settings.topic}, which has not been read to its end"

    @property
    def dropped(self) -> int:
        """Dead letters that had to go because there were too many."""
        return self._journal.dropped

    def behind_s(self) -> float:
        """For how long alerts may be in the topic that are not written down; 0: none is."""
        return self._follower.behind_s()

    def status(self) -> list[EndpointStatus]:
        """Of each endpoint. May be asked from any thread."""
        dead, retrying, oldest = self._journal.dead_counts(), self._journal.retrying_counts(), self._journal.oldest_ms()
        now_ms = time.time() * 1_000
        return [
            EndpointStatus(
                name=name,
                gone=queue.gone,
                waiting=queue.waiting,
                retrying=retrying.get(name, 0),
                dead=dead.get(name, 0),
                oldest_s=max(0.0, now_ms - oldest[name]) / 1_000 if name in oldest else 0.0,
                outcomes=queue.outcomes.copy(),
                given_up=queue.given_up,
            )
            for name, queue in list(self._queues.items())
        ]

    async def run(self, ready: Callable[[], None] | None = None) -> None:
        """Deliver until cancelled. Raises NotifierError when it cannot go on."""
        self._loop = asyncio.get_running_loop()
        gone = self._journal.gone()
        for endpoint in self._settings.endpoints:
            is_gone = gone.get(endpoint.name) == endpoint.url
            self._queues[endpoint.name] = EndpointQueue(endpoint, self._journal, self._settings.limits, gone=is_gone)
            if is_gone:
                _LOG.warning("endpoint %s: %s", endpoint.name, GONE)
        try:
            self._add_waiting()
            self._follower.start()
            while True:
                await asyncio.sleep(_LOOK_S)
                self._check()
                if ready is not None and not self.waiting_for:
                    ready()
                    ready = None
        finally:
            await asyncio.to_thread(self._follower.close)
            await asyncio.gather(*(queue.close() for queue in self._queues.values()))
            self._journal.close()

    def _check(self) -> None:
        failure = next((queue.failure for queue in self._queues.values() if queue.failure is not None), None)
        if failure is not None:
            raise NotifierError(f"the journal cannot be written ({failure}): see that {self._settings.journal_path} has room")
        if self._follower.failed.is_set():
            raise NotifierError(f"an alert could not be written down: see that {self._settings.journal_path} has room")
        if self._journal.was_changed():
            gone = self._journal.gone()
            for name, queue in self._queues.items():
                queue.gone = queue.gone and gone.get(name) == queue.endpoint.url
            self._add_waiting()

    def _add_waiting(self) -> None:
        """Everything that the journal says waits; what is of no endpoint any more is a dead letter."""
        for number, name, alert_id in self._journal.waiting():
            if name in self._queues:
                self._queues[name].add(number, alert_id)
            else:
                self._journal.bury(number, "the configuration has no such endpoint any more")

    def _take(self, alert: Alert, cursor: str) -> None:
        """On the follower's thread: write it down, then hand it over."""
        assert self._loop is not None, "the follower starts when the loop runs"
        if alert.told_ms < self._begun_ms:
            return
        new = [
            NewDelivery(
                name, webhook_id_of(alert), alert.alert_id, body_of(alert, queue.endpoint.format), self._refusal(name, queue)
            )
            for name, queue in self._queues.items()
            if queue.endpoint.wants(alert)
        ]
        numbers = self._journal.take(cursor, new)
        self.taken += 1
        for each in new:
            if each.dead:
                _LOG.error("endpoint %s: %s is a dead letter: %s", each.endpoint, each.webhook_id, each.dead)
        handed = [(number, each) for number, each in zip(numbers, new, strict=True) if number]
        for _, each in handed:
            self._handed[each.endpoint] += 1
        self._loop.call_soon_threadsafe(self._hand_over, handed)

    def _refusal(self, name: str, queue: EndpointQueue) -> str:
        """Why the endpoint gets a dead letter at once; empty: it does not."""
        if queue.gone:
            return GONE
        most = self._settings.limits.queue_max
        return "" if queue.waiting + self._handed[name] < most else f"{most} deliveries waited for the endpoint already"

    def _hand_over(self, handed: Sequence[tuple[int, NewDelivery]]) -> None:
        for number, each in handed:
            self._queues[each.endpoint].add(number, each.alert_id)
            self._handed[each.endpoint] -= 1


async def run_notifier(
    settings: NotifierSettings, *, ready: Callable[[], None] | None = None, watch: Callable[[Notifier], None] | None = None
) -> None:
    """Deliver until cancelled; `ready` is called when the topic has been read, `watch` with the notifier before."""
    # The queues log each attempt, by the endpoint's name: an address may carry a secret.
    stamina.instrumentation.set_on_retry_hooks([])
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    notifier = Notifier(settings)
    if watch is not None:
        watch(notifier)
    await notifier.run(ready)
