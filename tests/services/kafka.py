"""Apache Kafka 4 as a plain process or three, in KRaft combined mode, for anyone with a JDK and Maven.

Promise: `KafkaCluster(folder, libs)` starts real brokers on loopback from Kafka's Maven artifacts, which `kafka_libs`
fetches once into the user's cache. Each node can be killed, paused and started again on the same ports with the same
log. With three nodes, topics have three replicas and need two in sync. Nothing outlives the process that started it.

`python -m tests.services.kafka` fetches them, and lets a broker write down the classes that it loaded
(`archive_classes`): with that file a node takes half of the processor's time to start.

Settings that matter to tests: groups form at once, unknown topics are not created, and a dead node is noticed after 3
s. What a topic may hold is left at Kafka's defaults, so that a topic that was not set up as the design asks is found
out.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata

from taximeter.embedded.process import Child, accepts_connections
from tests.services.ports import free_port

__all__ = ["QUIET", "KafkaCluster", "KafkaNode", "KafkaUnavailableError", "SharedKafka", "archive_classes", "kafka_libs"]

_HOST = "127.0.0.1"
_POM = Path(__file__).with_name("kafka-pom.xml")
_FETCH_TIMEOUT_S = 600.0
_FORMAT_TIMEOUT_S = 180.0
_START_TIMEOUT_S = 180.0
_METADATA_TIMEOUT_S = 2.0
_ARCHIVE_TIMEOUT_S = 180.0
_CHECKPOINT = "bootstrap.checkpoint"

# Of a node that nobody kills: it runs for a whole run of the tests and seldom has something to do.
QUIET: Final = {
    "broker.session.timeout.ms": "60000",
    "broker.heartbeat.interval.ms": "2000",
    "metadata.max.idle.interval.ms": "0",
}

# A JVM that starts quickly and stays small; tests run for seconds and never need the second compiler.
_JVM_OPTIONS = (
    "-Xms128m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
)


class KafkaUnavailableError(RuntimeError):
    """This machine cannot run Apache Kafka; the text says what to install."""


def kafka_libs() -> Path:
    """The folder of Kafka's jars, fetched by Maven on the first call; or the one that `TAXIMETER_KAFKA_LIBS` names."""
    given = os.environ.get("TAXIMETER_KAFKA_LIBS")
    if given:
        if not any(Path(given).glob("kafka_2.13-*.jar")):
            raise KafkaUnavailableError(
                f"TAXIMETER_KAFKA_LIBS is {given!r}, where there is no kafka_2.13-*.jar; unset it or mend it"
            )
        return Path(given)
    if shutil.which("java") is None:
        raise KafkaUnavailableError("there is no java on this machine; on Debian: apt-get install default-jdk-headless maven")
    libs = _cache() / f"kafka-{_kafka_version()}"
    if not libs.is_dir():
        _fetch(libs)
    return libs


def archive_classes(libs: Path) -> Path:
    """Run a broker once for Java's archive of its classes; nothing where it is there. Java itself finds out whether it fits."""
    archive = _class_archive(libs)
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        made = Path(temporary) / archive.name
        cluster = KafkaCluster(Path(temporary), libs, java_options=(f"-XX:ArchiveClassesAtExit={made}",))
        cluster.start()
        for node in cluster.nodes:
            # It is written when the broker ends well.
            node.process.stop(_ARCHIVE_TIMEOUT_S)
        if not made.exists():
            raise KafkaUnavailableError(f"Java wrote no archive of Kafka's classes:\n{cluster.log_tail()}")
        made.replace(archive)
    return archive


def _with_archive(libs: Path) -> tuple[str, ...]:
    archive = _class_archive(libs)
    return (f"-XX:SharedArchiveFile={archive}",) if archive.exists() else ()


def _class_archive(libs: Path) -> Path:
    return _cache() / f"{libs.name}.jsa"


def _checkpoint(libs: Path) -> Path | None:
    """Where what Kafka's tool wrote is kept; nowhere for jars that may be another version tomorrow."""
    return _cache() / f"{libs.name}.checkpoint" if libs.parent == _cache() else None


def _uuid() -> str:
    """As Kafka writes them."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taximeter"


def _kafka_version() -> str:
    match = re.search(r"<artifactId>kafka_2\.13</artifactId>\s*<version>([^<]+)</version>", _POM.read_text())
    assert match is not None, f"{_POM} names no version of kafka_2.13"
    return match[1]


def _fetch(libs: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaUnavailableError("there is no mvn on this machine to fetch Kafka's jars; on Debian: apt-get install maven")
    libs.parent.mkdir(parents=True, exist_ok=True)
    # Fetched beside and renamed, so that a folder under the final name is whole, whoever else fetches.
    with tempfile.TemporaryDirectory(dir=libs.parent) as temporary:
        folder = Path(temporary) / "libs"
        arguments = [maven, "-B", "-q", "-f", str(_POM), "dependency:copy-dependencies", f"-DoutputDirectory={folder}"]
        try:
            done = subprocess.run(
                arguments, cwd=temporary, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise KafkaUnavailableError(f"Maven did not fetch Kafka's jars in {_FETCH_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            raise KafkaUnavailableError(f"Maven could not fetch Kafka's jars:\n{(done.stdout + done.stderr)[-2000:]}")
        try:
            folder.rename(libs)
        except OSError:
            if not libs.is_dir():
                raise


@dataclass(frozen=True)
class KafkaNode:
    """One broker that is a controller too."""

    node_id: int
    port: int
    controller_port: int
    process: Child

    @property
    def address(self) -> str:
        return f"{_HOST}:{self.port}"

    def start(self) -> None:
        """Start it, and return when it listens; the cluster may still be electing."""
        self.process.start()
        self.process.wait_until(lambda: accepts_connections(_HOST, self.port), _START_TIMEOUT_S)


@dataclass(frozen=True)
class SharedKafka:
    """A node that the tests of other processes use too: all that a test has of it is its address."""

    bootstrap: str


class KafkaCluster:
    """One node, or several that replicate. Use `start`, then `bootstrap`; `nodes` for faults; `close` at the end."""

    def __init__(
        self,
        folder: Path,
        libs: Path,
        *,
        nodes: int = 1,
        settings: dict[str, str] | None = None,
        listeners: dict[str, tuple[int, int]] | None = None,
        users: dict[str, str] | None = None,
        heap_mb: int = 512,
        java_options: tuple[str, ...] | None = None,
    ) -> None:
        """`listeners`, of a single node, beside its own: name -> the port it listens on, the port it advertises. `users`:
        name -> password, by SCRAM-SHA-512. `java_options` beside the usual ones: the archive of classes where there is one, if
        nothing is said.
        """
        assert not listeners or nodes == 1, "listeners: all nodes would take the same ports"
        self._listeners = listeners or {}
        self.folder = folder
        self._libs = libs
        self._settings = settings or {}
        self._users = users or {}
        self._heap_mb = heap_mb
        self._java_options = _with_archive(libs) if java_options is None else java_options
        ports = [(free_port(), free_port()) for _ in range(nodes)]
        self._voters = ",".join(f"{i}@{_HOST}:{controller}" for i, (_, controller) in enumerate(ports, start=1))
        self._cluster_id = _uuid()
        self.nodes = [self._node(i, *pair, nodes) for i, pair in enumerate(ports, start=1)]

    @property
    def bootstrap(self) -> str:
        return ",".join(node.address for node in self.nodes)

    def start(self) -> None:
        """Start every node at once, and return when all of them are in the cluster's metadata."""
        for node in self.nodes:
            if not node.process.alive:
                node.process.start()
        for node in self.nodes:
            node.process.wait_until(self._complete, _START_TIMEOUT_S)

    def close(self) -> None:
        """End it without ceremony: the folder is the test's, and nobody reads it again."""
        for node in self.nodes:
            node.process.kill9()

    def log_tail(self) -> str:
        return "\n".join(f"node {node.node_id}:\n{node.process.log_tail()}" for node in self.nodes)

    def in_sync(self) -> bool:
        """Whether every node is there and every replica has everything: one more may be lost without stopping anyone."""
        return not self.out_of_sync()

    def out_of_sync(self) -> list[str]:
        """What `in_sync` waits for."""
        metadata = self._metadata()
        if metadata is None:
            return ["no node knows of all the others"]
        return [
            f"{topic.topic}/{partition.id}: led by {partition.leader}, {partition.isrs} of {partition.replicas} in sync"
            for topic in metadata.topics.values()
            for partition in topic.partitions.values()
            if partition.leader < 0 or len(partition.isrs) < len(partition.replicas)
        ]

    def _complete(self) -> bool:
        return self._metadata() is not None

    def _metadata(self) -> ClusterMetadata | None:
        """Of all nodes; None while one is missing."""
        if not all(accepts_connections(_HOST, node.port) for node in self.nodes):
            return None
        # Held until the answer is there.
        admin = AdminClient({"bootstrap.servers": self.bootstrap})
        try:
            metadata = admin.list_topics(timeout=_METADATA_TIMEOUT_S)
        except KafkaException:
            return None
        return metadata if len(metadata.brokers) == len(self.nodes) else None

    def _node(self, node_id: int, port: int, controller_port: int, nodes: int) -> KafkaNode:
        folder = self.folder / f"node-{node_id}"
        folder.mkdir(parents=True)
        own = {name: listens for name, (listens, _) in self._listeners.items()}
        listening = {"PLAINTEXT": port, **own, "CONTROLLER": controller_port}
        advertised = {"PLAINTEXT": port, **{name: advertises for name, (_, advertises) in self._listeners.items()}}
        properties = {
            "process.roles": "broker,controller",
            "node.id": str(node_id),
            "controller.quorum.voters": self._voters,
            "controller.listener.names": "CONTROLLER",
            "listeners": ",".join(f"{name}://{_HOST}:{at}" for name, at in listening.items()),
            "advertised.listeners": ",".join(f"{name}://{_HOST}:{at}" for name, at in advertised.items()),
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in listening),
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(folder / "logs"),
            "auto.create.topics.enable": "false",
            "default.replication.factor": str(min(nodes, 3)),
            "min.insync.replicas": str(min(nodes, 2)),
            "offsets.topic.num.partitions": "4",
            "offsets.topic.replication.factor": str(min(nodes, 3)),
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": str(min(nodes, 3)),
            "transaction.state.log.min.isr": str(min(nodes, 2)),
            "share.coordinator.state.topic.num.partitions": "1",
            "share.coordinator.state.topic.replication.factor": str(min(nodes, 3)),
            "share.coordinator.state.topic.min.isr": str(min(nodes, 2)),
            "group.initial.rebalance.delay.ms": "0",
            "broker.session.timeout.ms": "3000",
            "broker.heartbeat.interval.ms": "500",
            "log.cleaner.dedupe.buffer.size": str(16 << 20),
            "num.network.threads": "2",
            "num.io.threads": "2",
            **self._settings,
        }
        config = folder / "server.properties"
        config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        java = ["java", f"-Xmx{self._heap_mb}m", *_JVM_OPTIONS, *self._java_options, "-cp", f"{self._libs}/*"]
        self._format(java, config, node_id)
        process = Child(
            f"Kafka node {node_id}", [*java, "kafka.Kafka", str(config)], log_path=folder / "server.log", cwd=folder
        )
        return KafkaNode(node_id, port, controller_port, process)

    def _format(self, java: list[str], config: Path, node_id: int) -> None:
        """By Kafka's tool the first time on this machine and where there are users: it takes half as long as the start."""
        logs, kept = config.parent / "logs", _checkpoint(self._libs)
        if kept is not None and kept.exists() and not self._users:
            # Who this is, and the first records of every cluster of this version.
            logs.mkdir()
            named = {"version": 1, "cluster.id": self._cluster_id, "node.id": node_id, "directory.id": _uuid()}
            (logs / "meta.properties").write_text("".join(f"{key}={value}\n" for key, value in named.items()))
            shutil.copy(kept, logs / _CHECKPOINT)
            return
        self._run_format(java, config)
        if kept is not None and not self._users:
            with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
                Path(shutil.copy(logs / _CHECKPOINT, temporary)).replace(kept)

    def _run_format(self, java: list[str], config: Path) -> None:
        arguments = [
            *java,
            "kafka.tools.StorageTool",
            "format",
            "--cluster-id",
            self._cluster_id,
            "--config",
            str(config),
        ]
        for name, password in self._users.items():
            arguments += ["--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_FORMAT_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise KafkaUnavailableError(f"Kafka's storage could not be formatted:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    try:
        found = kafka_libs()
        sys.stdout.write(f"Apache Kafka's jars are in {found}, and the archive of its classes is {archive_classes(found)}\n")
    except KafkaUnavailableError as unavailable:
        sys.exit(str(unavailable))
