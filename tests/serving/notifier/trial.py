"""Alerts come without a pause while notifier and billing API are killed, again and again, at any moment: none is lost, none
comes twice to who looks at webhook IDs or watches from a position, and each alert's states come in order.

    python -m tests.serving.notifier.trial --kills 50

The receiver is a real HTTP server that fails some requests; what is sent again after it said yes (a kill came before that was
noted) is counted and told. The publisher writes some alerts twice, as one that was killed does.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import Producer
from confluent_kafka.admin import NewTopic
from standardwebhooks import Webhook, WebhookVerificationError

from billing.v1.alert_pb2 import ALERT_STATE_RAISED, ALERT_STATE_UPDATED, Alert
from serving.notifier.journal import Journal
from serving.notifier.payloads import webhook_id_of
from taximeter.embedded.broker import TansuBroker, TansuSettings
from tests.producers.support import create_topics
from tests.serving.notifier.notifier_process import configure, notifier_process
from tests.serving.notifier.support import SECRET, Answer, Receiver, Request, alert, receiving
from tests.serving.notifier.watcher import ApiUnderTrial, Watcher
from tests.taximeter.support import until

__all__ = ["Outcome", "Teller", "run_trial"]

_PARTITIONS = 4
_FAILED_ONE_IN = 10
_REVISIONS = 3
_AHEAD_MAX = 200


@dataclass(slots=True)
class Outcome:
    """What became of a trial."""

    kills: int = 0
    told: list[str] = field(default_factory=list)
    # IDs in the order in which the receiver said yes, with those that it said yes to again.
    taken: list[str] = field(default_factory=list)
    # What a client of WatchAlerts was told, in order, and how often it had to connect again.
    watched: list[str] = field(default_factory=list)
    connections_lost: int = 0
    unverified: int = 0
    failed: int = 0
    dead: int = 0

    @property
    def lost(self) -> list[str]:
        return sorted(set(self.told) - set(self.taken))

    @property
    def watched_wrongly(self) -> list[str]:
        """What the watch was not told once."""
        told, watched = Counter(self.told), Counter(self.watched)
        return sorted(name for name in told.keys() | watched.keys() if (told[name], watched[name]) != (1, 1))

    @property
    def unasked(self) -> list[str]:
        return sorted(set(self.taken) - set(self.told))

    @property
    def again(self) -> int:
        """Webhook IDs that came more than once after the receiver had said yes: it drops them by their IDs."""
        return sum(count - 1 for count in Counter(self.taken).values())

    @property
    def out_of_order(self) -> list[str]:
        """Of who drops repeats: states that came after a later one of the same alert."""
        found = []
        for order in (self.taken, self.watched):
            last: dict[str, int] = {}
            for webhook_id in dict.fromkeys(order):
                name, _, revision = webhook_id.rpartition("-r")
                if int(revision) < last.get(name, 0):
                    found.append(webhook_id)
                last[name] = int(revision)
        return found

    @property
    def is_well(self) -> bool:
        return not (self.lost or self.unasked or self.watched_wrongly or self.out_of_order or self.unverified or self.dead)


class Teller(threading.Thread):
    """Publishes alerts, each with a few revisions, until it is stopped; some messages are written twice."""

    def __init__(self, bootstrap: str, topic: str, rate_per_s: float, rng: random.Random, taken: Callable[[], int]) -> None:
        """`taken` says how many arrived: it waits while too many are under way, however slow the machine is."""
        super().__init__(daemon=True)
        self.told: list[str] = []
        self._taken = taken
        self._topic, self._pause_s, self._rng = topic, 1 / rate_per_s, rng
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 1})
        self._stopping = threading.Event()
        self._sequences = [0] * _PARTITIONS

    def run(self) -> None:
        number = 0
        while not self._stopping.wait(self._pause_s):
            if len(self.told) > self._taken() + _AHEAD_MAX:
                continue
            partition = self._rng.randrange(_PARTITIONS)
            for revision in range(1, self._rng.randint(1, _REVISIONS) + 1):
                self._tell(partition, f"a{number}-{partition}", revision)
            number += 1

    def stop(self) -> list[str]:
        """The IDs of everything that was told."""
        self._stopping.set()
        self.join(60)
        assert self._producer.flush(60) == 0
        return self.told

    def _tell(self, partition: int, name: str, revision: int) -> None:
        self._sequences[partition] += 1
        state = ALERT_STATE_RAISED if revision == 1 else ALERT_STATE_UPDATED
        told: Alert = alert(self._sequences[partition], name=name, revision=revision, state=state)
        told.labels["revision"] = str(revision)
        for _ in range(2 if self._rng.random() < 0.1 else 1):
            self._producer.produce(self._topic, key=b"t", value=told.SerializeToString(), partition=partition)
        self._producer.poll(0)
        self.told.append(webhook_id_of(told))


def run_trial(bootstrap: str, folder: Path, *, kills: int, seed: int, rate_per_s: float = 20.0) -> Outcome:
    """Kill the notifier `kills` times, and the API every third time, then let them finish."""
    rng, outcome = random.Random(seed), Outcome()
    prefix = f"trial-{seed}-{time.time_ns()}."
    create_topics(bootstrap, NewTopic(f"{prefix}billing.alerts", _PARTITIONS, 1))
    # When it is made decides which alerts are old: before any is told.
    Journal(folder / "notifier.sqlite", dead_max=10_000).close()
    with receiving() as receiver:
        _answer(receiver, outcome, random.Random(seed + 1))
        config = configure(folder, bootstrap, prefix, receiver.url)
        api = ApiUnderTrial(folder, config, bootstrap, prefix, _PARTITIONS)
        watcher, serving = Watcher(api.port), api.process()
        serving.start()
        watcher.start()
        until(lambda: watcher.position or watcher.failure, what="the watch's first position")
        teller = Teller(bootstrap, f"{prefix}billing.alerts", rate_per_s, rng, lambda: len(outcome.taken))
        teller.start()
        for number in range(kills):
            process = notifier_process(config)
            process.start()
            # At any moment of what it does: mostly while it delivers, sometimes while it starts.
            if rng.random() < 0.9:
                until(receiver.has(len(receiver.requests) + rng.randint(1, 30)), what="deliveries")
            process.kill9()
            outcome.kills += 1
            if number % 3 == 1:
                serving.kill9()
                serving = api.process()
                serving.start()
        outcome.told = teller.stop()
        process = notifier_process(config)
        process.start()
        until(lambda: set(outcome.told) <= set(outcome.taken), timeout_s=600, what="the rest")
        # The receiver knows before the notifier does.
        until(lambda: not _waiting(folder), timeout_s=600, what="the notifier's own notes of it")
        until(lambda: watcher.failure or set(outcome.told) <= set(watcher.told), timeout_s=600, what="the rest of the watch")
        watcher.stop()
        outcome.watched, outcome.connections_lost = watcher.told, watcher.lost
        for each in (process, serving):
            each.stop(60)
            assert each.exit_code == 0, each.log_tail()
    assert watcher.failure is None, watcher.failure
    journal = Journal(folder / "notifier.sqlite", dead_max=10_000)
    outcome.dead = len(journal.dead())
    journal.close()
    return outcome


def _waiting(folder: Path) -> int:
    """How many deliveries the notifier has not noted as taken."""
    with contextlib.closing(sqlite3.connect(folder / "notifier.sqlite", timeout=60)) as file:
        return int(file.execute("SELECT count(*) FROM deliveries WHERE dead_ms = 0").fetchone()[0])


def _answer(receiver: Receiver, outcome: Outcome, rng: random.Random) -> None:
    signer, lock = Webhook(SECRET), threading.Lock()

    def answer(request: Request) -> Answer:
        with lock:
            if rng.randrange(_FAILED_ONE_IN) == 0:
                outcome.failed += 1
                return Answer(503)
            try:
                signer.verify(request.body, request.headers, json_parse=False)
            except WebhookVerificationError:
                outcome.unverified += 1
                return Answer(401)
            outcome.taken.append(request.webhook_id)
            return Answer(204)

    receiver.answer = answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        broker = TansuBroker(TansuSettings(log_path=Path(folder) / "broker.log"))
        broker.start()
        try:
            outcome = run_trial(broker.bootstrap, Path(folder), kills=arguments.kills, seed=arguments.seed)
        finally:
            broker.stop()
    print(f"{outcome.kills} kills, {len(outcome.told)} webhooks told, {outcome.failed} attempts failed by the receiver")
    print(f"lost {len(outcome.lost)}, not told {len(outcome.unasked)}, out of order {len(outcome.out_of_order)}")
    print(f"unverified {outcome.unverified}, dead letters {outcome.dead}")
    print(f"watched {len(outcome.watched)}, of them missing or repeated {len(outcome.watched_wrongly)}")
    print(f"came again under their ID after the receiver had said yes: {outcome.again}")
    return 0 if outcome.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
