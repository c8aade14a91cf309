"""The quick start, command by command: real Apache Kafka 4, a real Triton, and each part alone by compose's own command.

Two things are not as on the page. No Docker runs here: `docker compose exec SERVICE taximeter …` and the like run
`taximeter …` as a process with that service's configuration, which is deploy/taximeter.toml with other addresses. And
ClickHouse is chDB, in the sink's process, since no current server can run here.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from playwright.sync_api import expect

from taximeter.embedded.process import Child
from tests.services import require
from tests.services.browser import chromium
from tests.services.kafka import SharedKafka
from tests.services.ports import free_port
from tests.services.triton import TritonServer, TritonUnavailableError, triton_environment
from tests.taximeter.support import ROOT, environment, until

pytestmark = [pytest.mark.apache_kafka, pytest.mark.timeout(900)]

COMPOSE: Final = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
PAGE: Final = (ROOT / "docs" / "quickstart.md").read_text()
BLOCKS: Final = re.findall(r"```(console|python)\n(.*?)```", PAGE, re.DOTALL)
# What `up` starts here, in the order in which compose would. `topics` runs to its end before them.
PARTS: Final = ("worker", "sink", "gateway", "api")
MODEL: Final = ROOT / "tests" / "serving" / "triton" / "repository" / "smollm2"
# `docker compose -f FILE run|exec [flags] SERVICE [taximeter] ARGUMENTS` with nothing but our parts to run.
DOCKER: Final = """#!/bin/sh
shift 4
while [ "${1#-}" != "$1" ]; do shift; done
service=$1; shift
[ "$1" = taximeter ] && shift
TAXIMETER_CONFIG=$CONFIGURATIONS/$service.toml exec %s -m taximeter "$@"
"""


class Newcomer:
    """A folder with the clone's `deploy/`, a shell in it, and the services that compose would run."""

    def __init__(self, folder: Path, bootstrap: str, triton: TritonServer) -> None:
        self.folder = folder
        self.parts: dict[str, Child] = {}
        self.ports = {name: free_port() for name in ("gateway", "http", "grpc", "loopback")}
        self._health = {name: free_port() for name in PARTS}
        self._environment = environment() | {
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CONFIGURATIONS": str(folder),
            "GATEWAY": f"127.0.0.1:{self.ports['gateway']}",
            "TAXIMETER_LEDGER__CONSUMER_GROUP": secrets.token_hex(4),
            # Kafka is shared with other tests, and chDB takes the place of the server; with it, workers take no snapshots.
            "TAXIMETER_LEDGER__SNAPSHOT_URL": "",
            "TAXIMETER_KAFKA__TOPIC_PREFIX": f"{secrets.token_hex(4)}.",
            "TAXIMETER_CLICKHOUSE__ENGINE": "chdb",
            "TAXIMETER_CLICKHOUSE__CHDB_PATH": str(folder / "chdb"),
            "TAXIMETER_CLICKHOUSE__LOOPBACK_PORT": str(self.ports["loopback"]),
            "TAXIMETER_CLICKHOUSE__LOOPBACK_TOKEN": secrets.token_hex(16),
        }
        shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("secrets", "models"))
        docker = folder / "bin" / "docker"
        docker.parent.mkdir()
        docker.write_text(DOCKER % sys.executable)
        docker.chmod(docker.stat().st_mode | stat.S_IXUSR)
        places = {
            "kafka:9092": bootstrap,
            "triton:8001": triton.address,
            "/run/secrets/": f"{folder}/deploy/secrets/",
            "port = 8001": f"port = {self.ports['gateway']}",
            "http_port = 8003": f"http_port = {self.ports['http']}",
            "grpc_port = 8004": f"grpc_port = {self.ports['grpc']}",
            'host = "0.0.0.0"': 'host = "127.0.0.1"',
        }
        for service in ("topics", *PARTS):
            text = (ROOT / "deploy" / "taximeter.toml").read_text()
            own = {"/var/lib/": f"{folder}/{service}/", "0.0.0.0:9464": f"127.0.0.1:{self._health.get(service, 0)}"}
            for place, here in (places | own).items():
                assert place in text, f"deploy/taximeter.toml has no {place!r} any more"
                text = text.replace(place, here)
            (folder / f"{service}.toml").write_text(text)

    def shell(self, commands: str, **variables: str) -> str:
        """What the commands of a block print; each must end well."""
        commands = re.sub(r"^\$ ", "", commands, flags=re.MULTILINE)
        commands = commands.replace("localhost:8003", f"127.0.0.1:{self.ports['http']}")
        commands = commands.replace("/etc/taximeter/prices.toml", "deploy/prices.toml")
        alias = re.search(r"^\$ (alias .*)$", PAGE, re.MULTILINE)
        assert alias is not None
        script = f"shopt -s expand_aliases\nset -euo pipefail\n{alias[1]}\n{commands}"
        ended = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self._environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, f"{commands}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def fails(self, command: str) -> str:
        """What the command says on standard error; it must find something wrong."""
        argv = [sys.executable, "-m", "taximeter", *command.split()]
        settings = self._environment | {"TAXIMETER_CONFIG": f"{self.folder}/worker.toml"}
        ended = subprocess.run(argv, cwd=self.folder, env=settings, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 1
        return ended.stderr

    def up(self) -> None:
        """What `docker compose up --wait` does with our services: starts them, and asks each until it is well."""
        self.shell("docker compose -f deploy/compose.yaml run topics " + " ".join(COMPOSE["services"]["topics"]["command"]))
        for name in PARTS:
            argv = [sys.executable, "-m", "taximeter", *COMPOSE["services"][name]["command"]]
            settings = self._environment | {"TAXIMETER_CONFIG": f"{self.folder}/{name}.toml"}
            child = Child(name, argv, log_path=self.folder / f"{name}.log", cwd=self.folder, environment=settings)
            child.start()
            self.parts[name] = child
        for name in PARTS:
            self.parts[name].wait_until(lambda name=name: self._is_well(name), 300.0)  # type: ignore[misc]  # a bound default

    def _is_well(self, name: str) -> bool:
        test = COMPOSE["services"][name]["healthcheck"]["test"]
        assert test[:3] == ["CMD", "python", "-c"]
        program = test[3].replace(":9464", f":{self._health[name]}")
        asked = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
        return asked.returncode == 0

    def stop(self) -> None:
        for child in reversed(self.parts.values()):
            child.stop(120.0)


@pytest.fixture
def newcomer(tmp_path: Path, apache_kafka: SharedKafka) -> Iterator[Newcomer]:
    for program in ("bash", "openssl", "curl"):
        require(shutil.which(program), f"there is no {program}")
    try:
        installed = triton_environment()
    except TritonUnavailableError as error:
        require(False, str(error))
        raise
    shutil.copytree(MODEL, tmp_path / "models" / "llama")
    triton = TritonServer(tmp_path / "triton", tmp_path / "models", installed)
    triton.start()
    made = Newcomer(tmp_path / "clone", apache_kafka.bootstrap, triton)
    yield made
    made.stop()
    triton.stop()


def test_the_quick_start_meters_a_request_to_the_token(newcomer: Newcomer) -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds == ["console", "console", "console", "console", "python", "console"]
    secrets_made, started, accounts, client_installed, request, asked = (text for _, text in BLOCKS)
    newcomer.shell(secrets_made)
    assert {path.name for path in (newcomer.folder / "deploy" / "secrets").iterdir()} == set(COMPOSE["secrets"])

    # Nothing founds a ledger by itself, and a dry run changes nothing.
    assert "topics apply" in newcomer.fails("worker")
    planned = newcomer.shell("docker compose -f deploy/compose.yaml run topics topics apply --dry-run --json")
    assert json.loads(planned)["changes"]
    assert "up --build --detach --wait" in started
    newcomer.up()
    again = newcomer.shell("docker compose -f deploy/compose.yaml run topics topics apply --json")
    assert json.loads(again)["changes"] == []

    shown = re.findall(r"tm-[A-Za-z0-9_-]{20,}", newcomer.shell(accounts))
    assert len(shown) == 2, shown
    key, operator = shown

    # The page needs it, and so do we: it is installed.
    assert client_installed.startswith("$ pip install 'tritonclient[grpc]'")
    answered = newcomer.folder / "request.py"
    answered.write_text(request)
    told: list[str] = []

    def answers() -> bool:
        # A key opens the gateway within two seconds of its making.
        told[:] = [newcomer.shell(f"python {answered}", KEY=key)]
        return "taximeter_output_tokens" in told[0]

    until(answers, what="an answer through the gateway")
    counted = {
        name: sum(map(int, re.findall(rf"taximeter_{name}_tokens.*?int64_param: (\d+)", told[0], re.DOTALL)))
        for name in ("input", "output")
    }
    assert counted["input"] > 0
    assert counted["output"] > 0

    def charged() -> bool:
        # What was refused before is there earlier, and is not what is waited for.
        rows = _found(newcomer, asked.splitlines()[1], key)[0]["rows"]
        return any(int(row["requests"]) > int(row["refused_requests"]) for row in rows)

    until(charged, what="the charge")
    balance, usage, listed, audited = _found(newcomer, asked, key)
    (by_model,) = usage["rows"]
    # Asked before its balance had come to the gateway, it was refused, which is told too and costs nothing.
    assert (by_model["model"], int(by_model["requests"]) - int(by_model["refused_requests"])) == ("llama", 1), by_model
    assert by_model["input_tokens_all"] == str(counted["input"])
    assert by_model["output_tokens_all"] == str(counted["output"])
    (row,) = listed
    assert (row["model"], row["output_tokens"]) == ("llama", counted["output"])
    assert audited["findings"] == []
    assert operator != key
    assert balance["balance"]["tenant_id"] == "acme"

    (dashboard,) = re.findall(r"<http://localhost:8003(/dashboard/)>", PAGE)
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"http://127.0.0.1:{newcomer.ports['http']}{dashboard}")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("table", name="Models").get_by_role("row", name="llama")).to_be_visible(timeout=120_000)

    for name, child in newcomer.parts.items():
        child.stop(120.0)
        assert child.exit_code == 0, f"{name}: {child.log_tail()}"


def _found(newcomer: Newcomer, commands: str, key: str) -> list[Any]:
    """What each of the page's questions answers, as JSON."""
    lines = commands.strip().splitlines()
    return [json.loads(newcomer.shell(line if "curl" in line else f"{line} --json", KEY=key)) for line in lines]
