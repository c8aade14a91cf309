"""A model server's place: a process that meters what it is told over a socket, and may be killed. Its journal survives it.

`python -m tests.chaos.producer --config FILE --journal FILE --socket FILE`. Each line in is a request: {"id", "tenant",
"tokens", "at_ms"}; each line out says what became of it, once its receipt is durable or failed: {"id", "outcome", "reason"}.
A line {"marks": n} is answered, after everything before it, with the highest number that the journal gave in each partition,
and with the longest that a call of `record`, and a wait from there until the event was durable, took since the marks before.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    OPERATION_GENERATE,
    OUTCOME_COMPLETED,
    SERVICE_CLASS_STANDARD,
    UsageEvent,
)
from producers.errors import ProducerError
from producers.meter import UsageMeter
from producers.publisher import Publisher
from producers.receipt import Receipt
from taximeter import compose
from taximeter.config import load

MODEL = "chaos-model"


def event_of(asked: dict[str, Any]) -> UsageEvent:
    """The event of a request: the same request gives the same bytes."""
    return UsageEvent(
        request_id=asked["id"],
        tenant_id=asked["tenant"],
        project_id="chaos",
        model=MODEL,
        operation=OPERATION_GENERATE,
        service_class=SERVICE_CLASS_STANDARD,
        outcome=OUTCOME_COMPLETED,
        count_source=COUNT_SOURCE_BACKEND,
        started_ms=asked["at_ms"] - 200,
        ended_ms=asked["at_ms"],
        **asked["tokens"],
    )


class Slowest:
    """The longest of what was measured since it was last asked."""

    def __init__(self) -> None:
        self._ms: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, name: str, began_s: float) -> None:
        took_ms = (time.perf_counter() - began_s) * 1_000
        with self._lock:
            self._ms[name] = max(self._ms.get(name, 0.0), took_ms)

    def take(self) -> dict[str, float]:
        with self._lock:
            taken, self._ms = self._ms, {}
        return taken


def serve(meter: UsageMeter, connection: socket.socket) -> None:
    """Until the driver hangs up."""
    waiting: queue.SimpleQueue[tuple[dict[str, Any], float, Receipt | ProducerError | None]] = queue.SimpleQueue()
    slowest = Slowest()
    answering = threading.Thread(target=_answer, args=(meter, connection, waiting, slowest), daemon=True)
    answering.start()
    with connection.makefile("r") as lines:
        for line in lines:
            asked = json.loads(line)
            if "marks" in asked:
                waiting.put((asked, 0.0, None))
                continue
            event = event_of(asked)
            began_s = time.perf_counter()
            result: Receipt | ProducerError
            try:
                result = meter.record(event)
            except ProducerError as error:
                result = error
            slowest.note("record_ms", began_s)
            waiting.put((asked, began_s, result))


def _answer(meter: UsageMeter, connection: socket.socket, waiting: queue.SimpleQueue[Any], slowest: Slowest) -> None:
    while True:
        asked, began_s, result = waiting.get()
        if result is None:
            highest = [meter.journal.highest_sequence(partition) for partition in range(meter.settings.partitions)]
            answer = {**asked, "producer_id": meter.journal.producer_id, "highest": highest, "slowest": slowest.take()}
        else:
            answer = {"id": asked["id"], "outcome": "ok", "reason": ""}
            try:
                if isinstance(result, ProducerError):
                    raise result
                result.durable()
                slowest.note("durable_ms", began_s)
            except TimeoutError as error:
                answer |= {"outcome": "unknown", "reason": str(error)}
            except ProducerError as error:
                # A group that the disk refused may stand in the journal after a crash: only a refusal is a failure.
                is_refusal = isinstance(result, ProducerError)
                answer |= {"outcome": "failed" if is_refusal else "unknown", "reason": f"{type(error).__name__}: {error}"}
        connection.sendall((json.dumps(answer) + "\n").encode())


def run(config_path: Path, journal_path: Path, socket_path: Path, flags: Sequence[str] = ()) -> None:
    """Meter, publish, and answer the driver."""
    config = load(config_path, flags=flags)
    meter = UsageMeter(compose.meter_settings(config, journal_path))
    publisher = Publisher(meter.journal, compose.publisher_settings(config))
    publisher.start()
    meter.recover()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path))
        serve(meter, connection)
    publisher.close(5.0)
    meter.close()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("config", "journal", "socket"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    run(given.config, given.journal, given.socket, given.set)
