"""A model server's place: a process that meters what it is told over a socket, and may be killed. Its journal survives it.

`python -m tests.chaos.producer --config FILE --journal FILE --socket FILE`. Each line in is a request: {"id", "tenant",
"tokens", "at_ms"}; each line out says what became of it, once its receipt is durable or failed: {"id", "outcome", "reason"}.
A line {"marks": n} is answered, after everything before it, with the highest number that the journal gave in each partition.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import socket
import threading
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


def serve(meter: UsageMeter, connection: socket.socket) -> None:
    """Until the driver hangs up."""
    waiting: queue.SimpleQueue[tuple[dict[str, Any], Receipt | ProducerError | None]] = queue.SimpleQueue()
    answering = threading.Thread(target=_answer, args=(meter, connection, waiting), daemon=True)
    answering.start()
    with connection.makefile("r") as lines:
        for line in lines:
            asked = json.loads(line)
            if "marks" in asked:
                waiting.put((asked, None))
                continue
            try:
                waiting.put((asked, meter.record(event_of(asked))))
            except ProducerError as error:
                waiting.put((asked, error))


def _answer(meter: UsageMeter, connection: socket.socket, waiting: queue.SimpleQueue[Any]) -> None:
    while True:
        asked, result = waiting.get()
        if result is None:
            highest = [meter.journal.highest_sequence(partition) for partition in range(meter.settings.partitions)]
            answer = {**asked, "producer_id": meter.journal.producer_id, "highest": highest}
        else:
            answer = {"id": asked["id"], "outcome": "ok", "reason": ""}
            try:
                if isinstance(result, ProducerError):
                    raise result
                result.durable()
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
