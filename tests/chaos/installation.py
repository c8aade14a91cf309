"""Running installations that faults are done to: real processes, started once and kept for many trials.

Promise: `start` returns when everything is ready, founded and priced; each part can be killed, paused and started again alone,
by its name; `close` ends all of it. Nothing outlives this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Final
from unittest.mock import patch

from sinks.engine import Reader
from sinks.engines.server import ServerEngine, ServerSettings
from stream_processors import topics
from taximeter import compose
from taximeter.commanding import Commander
from taximeter.config import Config, load
from taximeter.embedded.process import Child, ChildError
from taximeter.price_files import read_price_book
from tests.chaos.gateway_load import GatewayLoad
from tests.chaos.load import EventLoad
from tests.services.clickhouse import ClickHouseServer
from tests.services.kafka import KafkaCluster, kafka_libs
from tests.services.ports import free_port
from tests.sinks.old_server import create_tables
from tests.taximeter.support import ROOT, environment

__all__ = ["PARTITIONS", "PRICES_PICO", "Installation", "KafkaInstallation", "Part"]

PARTITIONS: Final = 4
# Of prices.toml, for one token.
PRICES_PICO: Final = {
    "uncached_input_tokens": 500_000,
    "output_tokens": 1_750_000,
    "cache_read_tokens": 110_000,
    "reasoning_tokens": 2_300_000,
}
PRICE_BOOK: Final = Path(__file__).with_name("prices.toml")
_READY_TIMEOUT_S: Final = 180.0
_STOP_GRACE_S: Final = 15.0
_START_ATTEMPTS: Final = 4


class Part:
    """One process. `arm` tells it to kill or stop itself at a point of `tests.chaos.part`."""

    def __init__(self, child: Child, *, ready: Callable[[], bool] = lambda: True, folder: Path | None = None) -> None:
        self.child = child
        self._ready = ready
        self._folder = folder

    @property
    def alive(self) -> bool:
        return self.child.alive

    @property
    def stopped_by_itself(self) -> bool:
        """Whether it has sent itself SIGSTOP."""
        if not self.child.alive:
            return False
        status = Path(f"/proc/{self.child.pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] == "T"

    def start(self) -> None:
        """Start it unless it runs, and return when it is ready."""
        if not self.child.alive:
            self.launch()
        self.child.wait_until(self._ready, _READY_TIMEOUT_S)

    def launch(self) -> None:
        if self._folder is not None:
            self._trigger.unlink(missing_ok=True)
            self.ready_file.unlink(missing_ok=True)
        self.child.start()

    def stop(self) -> None:
        """SIGTERM, and wait."""
        self.child.stop(_STOP_GRACE_S)

    def kill9(self) -> None:
        self.child.kill9()

    def pause(self) -> None:
        self.child.pause()

    def resume(self) -> None:
        self.child.resume()

    def arm(self, point: str, *, after: int = 0, action: str = "kill") -> None:
        """From now on, at the passing of `point` that follows `after` others."""
        fresh = self._trigger.with_suffix(".new")
        fresh.write_text(json.dumps({"point": point, "after": after, "action": action}))
        fresh.replace(self._trigger)

    def disarm(self) -> bool:
        """Whether it was in time: where not, the part is about to kill or stop itself."""
        try:
            self._trigger.unlink()
        except FileNotFoundError:
            return False
        return True

    def marks(self) -> list[dict[str, object]]:
        """What it was about to do each time that it killed or stopped itself."""
        assert self._folder is not None
        path = self._folder / "marks.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def ready_file(self) -> Path:
        assert self._folder is not None
        return self._folder / "ready"

    @property
    def _trigger(self) -> Path:
        assert self._folder is not None, "only a part that tests.chaos.part runs can be armed"
        return self._folder / "trigger.json"


class Installation(ABC):
    """What trials need of one. Subclasses say what runs, and where."""

    name: ClassVar[str]
    config: Config

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, Part] = {}
        self.load = EventLoad(folder / "load.sock")
        self.gateway_load: GatewayLoad | None = None

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def reader(self) -> Reader:
        """Answers queries about the database. The caller closes it."""

    services: ClassVar[tuple[str, ...]] = ("kafka", "clickhouse")
    # The log starts anew when the broker is killed, so that it is read from its beginning each time.
    forgets: ClassVar[bool] = False

    def admit(self, tenants: list[str]) -> None:  # noqa: B027  most need nothing
        """Give each tenant what it needs to ask; called once, when everything runs."""

    @property
    def config_path(self) -> Path:
        return self.folder / "taximeter.toml"

    def environment(self, part: str) -> Mapping[str, str]:
        """Of the process called `part`; a place for a subclass to shift its clock, say."""
        return environment()

    def journal_folder(self) -> Path:
        """Where the producer's journal lies."""
        return self.folder / "producer"

    def restart_dead(self) -> list[str]:
        """What a supervisor would do: start again whatever has ended; the names."""
        dead = [name for name, part in self.parts.items() if not part.alive]
        # What others stand on comes first, and must be ready before them.
        others = [name for name in dead if not name.startswith(self.services)]
        for name in dead:
            if name not in others:
                self.parts[name].start()
        for name in others:
            self.parts[name].launch()
        for name in others:
            self._start_patiently(self.parts[name])
        return dead

    def _start_patiently(self, part: Part) -> None:
        """A part may give up while what it needs is coming back: a supervisor starts it again."""
        for attempt in range(_START_ATTEMPTS):
            try:
                part.start()
            except ChildError:
                if attempt + 1 == _START_ATTEMPTS:
                    raise
            else:
                return

    def producer(self) -> Part:
        """The producer's process, not started."""
        folder = self.journal_folder()
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["--config", self.config_path, "--journal", folder / "journal.sqlite", "--socket", self.load.socket_path]
        arguments += self.producer_arguments()
        child = self.child("producer", [sys.executable, "-m", "tests.chaos.producer", *map(str, arguments)])
        return Part(child, ready=lambda: self.load.connected)

    def producer_arguments(self) -> list[str]:
        """More of them: a place for a subclass to set something of the configuration."""
        return []

    def child(self, name: str, argv: list[str]) -> Child:
        return Child(name, argv, log_path=self.folder / "logs" / f"{name}.log", cwd=ROOT, environment=self.environment(name))

    def command(self, name: str, *arguments: str, has_ready_file: bool = False) -> Part:
        """A part of the product, started through `tests.chaos.part`."""
        folder = self.folder / "parts" / name
        folder.mkdir(parents=True, exist_ok=True)
        ready = ["--ready-file", str(folder / "ready")] if has_ready_file else []
        launcher = [sys.executable, "-m", "tests.chaos.part"]
        launcher += ["--trigger", str(folder / "trigger.json"), "--marks", str(folder / "marks.jsonl"), "--"]
        child = self.child(name, [*launcher, *arguments, *ready, "--config", str(self.config_path)])
        return Part(child, ready=(folder / "ready").exists if has_ready_file else lambda: True, folder=folder)


class KafkaInstallation(Installation):
    """Apache Kafka, one node; Debian's ClickHouse server; two workers, a sink, a producer. In production's shape."""

    name = "kafka"
    nodes: ClassVar[int] = 1
    heap_mb: ClassVar[int] = 512
    workers: ClassVar[int] = 2
    session_timeout_s: ClassVar[float] = 4.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Kafka takes no session under six seconds unless told; a trial would wait for it each time.
        settings = {"group.min.session.timeout.ms": "1000"}
        self.kafka = KafkaCluster(
            folder / "kafka",
            kafka_libs(),
            nodes=self.nodes,
            settings=settings,
            listeners=self.listeners(),
            heap_mb=self.heap_mb,
        )
        self.clickhouse = ClickHouseServer(self.clickhouse_folder())
        self.gateway_port, self.upstream_port = free_port(), free_port()

    def listeners(self) -> dict[str, tuple[int, int]]:
        """More of the broker's listeners: a place for a subclass to put a proxy before them."""
        return {}

    def clickhouse_folder(self) -> Path:
        return self.folder / "clickhouse"

    def bootstrap(self) -> str:
        """Where clients are told that Kafka is: a place for a subclass to put a proxy."""
        return self.kafka.bootstrap

    def start(self) -> None:
        self.kafka.start()
        self.clickhouse.start()
        self._write_config()
        with patch.dict(os.environ, environment(), clear=True):
            self.config = load(self.config_path)
        asyncio.run(topics.apply(compose.apply_settings(self.config, embedded=False)))
        engine = ServerEngine(self._server_settings())
        engine.create_database()
        create_tables(engine)
        engine.close()
        for node in self.kafka.nodes:
            name = "kafka" if self.nodes == 1 else f"kafka-{node.node_id}"
            self.parts[name] = Part(node.process, ready=self.kafka._complete if self.nodes == 1 else lambda: True)
        self.parts["clickhouse"] = Part(self.clickhouse.process, ready=self.clickhouse._answers)
        for number in range(1, self.workers + 1):
            self.parts[f"worker-{number}"] = self.worker(f"worker-{number}")
        self.parts["sink"] = self.sink()
        self.parts["producer"] = self.producer()
        self.restart_dead()
        commander = Commander(self.config, "chaos")
        commander.send([commander.prices(read_price_book(PRICE_BOOK), command_id="prices-1")])

    def sink(self) -> Part:
        return self.command("sink", "sink", "--no-migrate")

    def worker(self, name: str) -> Part:
        """Another worker process, with a disk of its own."""
        state = f"ledger.state_dir={self.folder / 'state' / name}"
        return self.command(name, "worker", "--set", state, has_ready_file=True)

    def close(self) -> None:
        for part in self.parts.values():
            part.kill9()
        self.load.close()
        self.kafka.close()
        self.clickhouse.kill9()

    def reader(self) -> Reader:
        return ServerEngine(self._server_settings())

    def _server_settings(self) -> ServerSettings:
        server = self.clickhouse
        return ServerSettings(
            host=server.host, port=server.port, database="taximeter", user=server.user, password=server.password
        )

    def _write_config(self) -> None:
        for name in ("seal_key", "command_key", "key_pepper"):
            (self.folder / name).write_text(secrets.token_hex(32))
        (self.folder / "clickhouse_password").write_text(self.clickhouse.password)
        self.config_path.write_text(
            f"""
            [kafka]
            bootstrap = "{self.bootstrap()}"
            [ledger]
            partitions = {PARTITIONS}
            session_timeout_s = {self.session_timeout_s}
            seal_key_file = "{self.folder}/seal_key"
            command_key_file = "{self.folder}/command_key"
            [clickhouse]
            engine = "server"
            host = "{self.clickhouse.host}"
            port = {self.clickhouse.port}
            user = "{self.clickhouse.user}"
            password_file = "{self.folder}/clickhouse_password"
            [gateway]
            port = {self.gateway_port}
            upstream = "127.0.0.1:{self.upstream_port}"
            journal_path = "{self.folder}/gateway/journal.sqlite"
            key_pepper_file = "{self.folder}/key_pepper"
            [models.profiles.trace]
            backend = "vllm"
            """
        )
