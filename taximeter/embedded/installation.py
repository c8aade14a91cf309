"""An embedded installation: the configuration that its parts run with, and the processes that they are.

Promise: whatever the file, the environment and the flags say stands, except for what must be this machine's:
addresses, folders in the data directory, and secrets, which are made there. Ports are kept over a restart while they
are free. The parts read the very configuration that was written to `run/taximeter.toml`, and nothing of it comes from
their environment.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from taximeter.config import ENVIRONMENT_PREFIX, Config, load
from taximeter.config_text import to_toml
from taximeter.embedded.broker import TansuBroker, TansuSettings
from taximeter.embedded.process import Child, accepts_connections, free_port
from taximeter.embedded.state import DataDir, RunState
from taximeter.embedded.supervisor import Launchable, Part, Supervisor
from taximeter.secret_files import ensure_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["Installation", "install"]

_PORTS: Final = ("broker_port", "gateway_port", "model_server_port", "loopback_port", "api_http_port", "api_grpc_port")
_PROBE_TIMEOUT_S: Final = 1.0
# An empty request and an answer of one field (`ready` = 1: true), as bytes: the client's library is not loaded for them.
_SERVER_READY: Final = "/inference.GRPCInferenceService/ServerReady"
_READY: Final = b"\x08\x01"
_PREPARE_TIMEOUT_S: Final = 120.0
_SESSION_TIMEOUT_S: Final = 6.0
# The gateway first, so that nobody is admitted whose usage would wait; what feeds the ledger before what reads it.
_STOP_ORDER: Final = ("api", "gateway", "model-server", "worker", "notifier", "sink")


@dataclass(frozen=True, slots=True)
class Installation:
    """What `up` runs."""

    data_dir: DataDir
    config: Config

    @property
    def ports(self) -> dict[str, int]:
        embedded = self.config.embedded
        return {name.removesuffix("_port"): getattr(embedded, name) for name in _PORTS}

    def supervisor(self, *, tell: Callable[[str], None], on_change: Callable[[], None]) -> Supervisor:
        """All parts of it, none of them started."""
        embedded = self.config.embedded
        broker = TansuBroker(
            TansuSettings(
                log_path=self.data_dir.logs / "broker.log",
                port=embedded.broker_port,
                host=embedded.host,
                start_timeout_s=embedded.ready_timeout_s,
            )
        )
        parts: dict[str, Launchable] = {}
        for number in range(1, embedded.workers + 1):
            name = "worker" if embedded.workers == 1 else f"worker-{number}"
            ready_path = self.data_dir.path / "run" / f"{name}.ready"
            parts[name] = self._part(name, ["worker", "--ready-file", str(ready_path)], ready_path.exists, ready_path)
        parts["sink"] = self._part("sink", ["sink"], self._sink_answers)
        if embedded.model_server:
            parts["model-server"] = self._part(
                "model-server", ["model-server"], lambda: _grpc_ready(embedded.model_server_port)
            )
        if embedded.gateway:
            parts["gateway"] = self._part("gateway", ["gateway"], lambda: _grpc_ready(embedded.gateway_port))
        if embedded.api:
            ready_path = self.data_dir.path / "run" / "api.ready"
            parts["api"] = self._part("api", ["api", "--ready-file", str(ready_path)], ready_path.exists, ready_path)
        if self.config.notifier.endpoints:
            ready_path = self.data_dir.path / "run" / "notifier.ready"
            parts["notifier"] = self._part(
                "notifier", ["notifier", "--ready-file", str(ready_path)], ready_path.exists, ready_path
            )
        stop_order = [name for stem in _STOP_ORDER for name in parts if name == stem or name.startswith(f"{stem}-")]
        return Supervisor(
            foundation=broker,
            prepare=self.prepare,
            parts=parts,
            stop_order=stop_order,
            standing_on_foundation=frozenset(
                name for name in parts if name not in ("api", "gateway", "model-server", "notifier")
            ),
            on_change=on_change,
            tell=tell,
        )

    def prepare(self) -> None:
        """Schema, topics and ledger, in a process of its own: chDB and RocksDB belong to one process at a time."""
        child = self._child("prepare", ["prepare"])
        child.start()
        child.wait_until(lambda: child.exit_code == 0, _PREPARE_TIMEOUT_S)

    def run_state(self, pids: Mapping[str, int]) -> RunState:
        return RunState(os.getpid(), self.data_dir.config_path, self.ports, dict(pids))

    def _part(self, name: str, arguments: list[str], ready: Callable[[], bool], ready_file: Path | None = None) -> Part:
        embedded = self.config.embedded
        child = self._child(name, arguments)
        return Part(child, ready, embedded.ready_timeout_s, embedded.stop_timeout_s, ready_file)

    def _child(self, name: str, arguments: list[str]) -> Child:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        command = [sys.executable, "-m", "taximeter", *arguments, "--config", str(self.data_dir.config_path)]
        return Child(name, command, log_path=self.data_dir.logs / f"{name}.log", environment=environment)

    def _sink_answers(self) -> bool:
        return accepts_connections(self.config.embedded.host, self.config.embedded.loopback_port)


def install(data_dir: DataDir, base: Config) -> Installation:
    """Make the data directory's folders, secrets and configuration, or take what is there."""
    data_dir.path.mkdir(parents=True, exist_ok=True)
    data_dir.logs.mkdir(exist_ok=True)
    data_dir.config_path.parent.mkdir(exist_ok=True)
    secret_files = ensure_secrets(data_dir.secrets)
    ports = _choose_ports(data_dir, base)
    text = to_toml(base, show_masked=False)
    fresh = data_dir.config_path.with_suffix(".new")
    fresh.write_text(text)
    config = load(fresh, (), _overrides(data_dir, base, ports, secret_files))
    fresh.write_text(to_toml(config, show_masked=False))
    fresh.replace(data_dir.config_path)
    return Installation(data_dir, config)


def _overrides(
    data_dir: DataDir, base: Config, ports: Mapping[str, int], secret_files: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    host = base.embedded.host
    overrides: dict[str, dict[str, Any]] = {
        "kafka": {
            "bootstrap": f"{host}:{ports['broker_port']}",
            "security_protocol": "PLAINTEXT",
            "replication_factor": 1,
        },
        "ledger": {
            "state_dir": data_dir.path / "ledger",
            # The embedded broker answers a group's first join after half of it.
            "session_timeout_s": min(base.ledger.session_timeout_s, _SESSION_TIMEOUT_S),
            "seal_key": None,
            "seal_key_file": secret_files["seal_key"],
            "command_key": None,
            "command_key_file": secret_files["command_key"],
        },
        "clickhouse": {
            "engine": "chdb",
            "chdb_path": data_dir.path / "chdb",
            "loopback_port": ports["loopback_port"],
            "loopback_token": None,
            "loopback_token_file": secret_files["loopback_token"],
        },
        "gateway": {
            "host": host,
            "port": ports["gateway_port"],
            "journal_path": data_dir.path / "gateway" / "journal.sqlite",
            "key_pepper": None,
            "key_pepper_file": secret_files["key_pepper"],
        },
        "api": {"host": host, "http_port": ports["api_http_port"], "grpc_port": ports["api_grpc_port"]},
        "notifier": {"journal_path": data_dir.path / "notifier" / "journal.sqlite"},
        "embedded": dict(ports),
    }
    if base.embedded.model_server:
        overrides["gateway"]["upstream"] = f"{host}:{ports['model_server_port']}"
        overrides["models"] = _models(base)
    return overrides


def _models(base: Config) -> dict[str, Any]:
    """The profiles of the small model server's models, beside what the configuration names."""
    own: dict[str, dict[str, object]] = {}
    tokenizers: dict[str, Path] = {}
    if "trace" in base.embedded.models:
        own |= {"trace": {"backend": "vllm"}, "trace-unary": {"backend": "vllm", "decoupled": False}}
    if "smollm2" in base.embedded.models:
        from serving.model_server import find_smollm2_weights

        tokenizers["smollm2"] = find_smollm2_weights()
        smollm2: dict[str, object] = {"backend": "vllm", "tokenizer": "smollm2"}
        own |= {"smollm2": smollm2, "smollm2-unary": {**smollm2, "decoupled": False}}
    profiles = {name: profile.model_dump(exclude_none=True) for name, profile in base.models.profiles.items()}
    return {"profiles": {**own, **profiles}, "tokenizers": {**tokenizers, **base.models.tokenizers}}


def _choose_ports(data_dir: DataDir, base: Config) -> dict[str, int]:
    """What is set; else what was used the last time, if it is free; else a free one."""
    path = data_dir.path / "run" / "ports.json"
    try:
        remembered = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        remembered = {}
    ports: dict[str, int] = {}
    for name in _PORTS:
        port = getattr(base.embedded, name) or remembered.get(name, 0)
        if port and not getattr(base.embedded, name) and accepts_connections(base.embedded.host, port):
            port = 0
        while not port or port in ports.values():
            port = free_port(base.embedded.host)
        ports[name] = port
    path.write_text(json.dumps(ports))
    return ports


def _grpc_ready(port: int) -> bool:
    """Whether a KServe v2 server there says that it is ready."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            return bool(channel.unary_unary(_SERVER_READY, bytes, bytes)(b"", timeout=_PROBE_TIMEOUT_S) == _READY)
        except grpc.RpcError:
            return False
