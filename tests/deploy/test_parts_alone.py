"""Production's shape on one machine: real Apache Kafka 4, and each part alone, started by the command that compose gives it.

ClickHouse is chDB, in the sink's process, since no current server can run here; the model server is the small one.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml

from taximeter.embedded.process import Child, free_port
from tests.services.kafka import KafkaCluster
from tests.taximeter.support import ROOT, environment, said, until

pytestmark = [pytest.mark.apache_kafka, pytest.mark.timeout(900)]

COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


class Installation:
    """A configuration file like deploy/taximeter.toml, and the parts that run with it."""

    def __init__(self, folder: Path, bootstrap: str) -> None:
        self.folder = folder
        self.gateway = f"127.0.0.1:{free_port()}"
        self.upstream = f"127.0.0.1:{free_port()}"
        self._parts: list[Child] = []
        for name in ("seal_key", "command_key", "key_pepper", "loopback_token"):
            (folder / name).write_text(secrets.token_hex(32))
        (folder / "taximeter.toml").write_text(
            f"""
            [kafka]
            bootstrap = "{bootstrap}"
            topic_prefix = "{secrets.token_hex(4)}."
            [ledger]
            partitions = 4
            consumer_group = "{secrets.token_hex(4)}"
            state_dir = "{folder}/ledger"
            seal_key_file = "{folder}/seal_key"
            command_key_file = "{folder}/command_key"
            [clickhouse]
            engine = "chdb"
            chdb_path = "{folder}/chdb"
            loopback_port = {free_port()}
            loopback_token_file = "{folder}/loopback_token"
            [gateway]
            port = {self.gateway.split(":")[1]}
            upstream = "{self.upstream}"
            journal_path = "{folder}/journal.sqlite"
            key_pepper_file = "{folder}/key_pepper"
            [models.profiles.trace-unary]
            backend = "vllm"
            decoupled = false
            """
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "taximeter", *arguments, "--config", str(self.folder / "taximeter.toml")]

    def run(self, *arguments: str) -> str:
        return said(*arguments, "--config", self.folder / "taximeter.toml")

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def start(self, name: str, argv: list[str]) -> Child:
        child = Child(name, argv, log_path=self.folder / f"{name}.log", cwd=ROOT, environment=environment())
        child.start()
        self._parts.append(child)
        return child

    def stop(self) -> None:
        for child in reversed(self._parts):
            child.stop(20.0)


@pytest.fixture
def installation(tmp_path: Path, apache_kafka: KafkaCluster) -> Iterator[Installation]:
    made = Installation(tmp_path, apache_kafka.bootstrap)
    yield made
    made.stop()


def test_each_part_alone_meters_a_request_to_the_token(installation: Installation) -> None:
    # Nothing founds a ledger by itself, and a dry run changes nothing.
    assert "topics apply" in _failure(installation, "worker")
    planned = installation.json("topics", "apply", "--dry-run")["changes"]
    assert installation.json(*COMPOSE["services"]["topics"]["command"])["changes"]
    assert planned
    assert installation.json("topics", "apply")["changes"] == []

    model_server = [sys.executable, "-m", "serving.model_server", "--models", "trace"]
    installation.start("model-server", [*model_server, "--port", installation.upstream.split(":")[1]])
    parts = {
        name: installation.start(name, installation.command(*COMPOSE["services"][name]["command"]))
        for name in ("worker", "sink", "gateway")
    }
    installation.run("tenant", "create", "acme")
    installation.run("credit", "grant", "acme", "5")
    installation.run("prices", "apply", str(ROOT / "taximeter" / "data" / "prices.toml"))
    key = installation.json("key", "create", "acme")["secret"]
    with triton.InferenceServerClient(installation.gateway) as client:
        until(lambda: _ready(client), what="the gateway")
        # Keys and accounts reach a gateway within seconds of the ledger.
        until(lambda: _ask(client, key), what="an answer")

    def charged() -> bool:
        (balance,) = [row for row in installation.json("balance") if row["tenant_id"] == "acme"]
        return bool(balance["requests"] == 1)

    until(charged, what="the charge")
    (usage,) = installation.json("usage", "acme", "--by", "model")
    assert (usage["requests"], usage["uncached_input_tokens"], usage["output_tokens"]) == (1, 123, 45)
    assert installation.json("audit")["findings"] == []
    for name, child in parts.items():
        child.stop(20.0)
        assert child.exit_code == 0, f"{name}: {child.log_tail()}"


def _failure(installation: Installation, *arguments: str) -> str:
    ended = subprocess.run(
        installation.command(*arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    return ended.stderr


def _ready(client: Any) -> bool:
    try:
        return bool(client.is_server_ready(client_timeout=2))
    except triton.InferenceServerException:
        return False


def _ask(client: Any, key: str) -> bool:
    sampling = triton.InferInput("sampling_parameters", [1], "BYTES")
    counts = json.dumps({"context_tokens": 123, "output_tokens": 45}).encode()
    sampling.set_data_from_numpy(np.array([counts], dtype=object))
    try:
        answer = client.infer("trace-unary", [sampling], headers={"authorization": f"Bearer {key}"}, client_timeout=10)
    except triton.InferenceServerException as error:
        # Not known yet, or not ready yet; anything else is no reason to ask again.
        if not {"UNAUTHENTICATED", "UNAVAILABLE"} & set(str(error.status()).split(".")):
            raise
        return False
    told = answer.get_response().parameters
    assert (told["taximeter_input_tokens"].int64_param, told["taximeter_output_tokens"].int64_param) == (123, 45)
    return True
