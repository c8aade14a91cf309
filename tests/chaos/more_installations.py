"""The gateway in front of a model server, on Apache Kafka; and everything embedded, under its own supervisor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Final
from unittest.mock import patch

import tritonclient.grpc as triton

from sinks.engine import Reader
from sinks.engines.loopback import LoopbackEngine
from taximeter.commanding import Commander, PlanTerms
from taximeter.config import load, read_secret
from tests.chaos.gateway_load import GatewayLoad
from tests.chaos.installation import PARTITIONS, PRICE_BOOK, Installation, KafkaInstallation, Part
from tests.taximeter.support import Up, environment, until

__all__ = ["EmbeddedInstallation", "GatewayInstallation"]

_PROBE_TIMEOUT_S: Final = 2
_BROKER: Final = "broker"


class GatewayInstallation(KafkaInstallation):
    """One worker, and a gateway that has the trace model behind it; each tenant has a key."""

    name = "gateway"
    workers = 1

    def start(self) -> None:
        super().start()
        model_server = [sys.executable, "-m", "serving.model_server", "--models", "trace", "--port", str(self.upstream_port)]
        self.parts["model-server"] = Part(self.child("model-server", model_server), ready=lambda: _serves(self.upstream_port))
        self.parts["gateway"] = Part(self.command("gateway", "gateway").child, ready=lambda: _serves(self.gateway_port))
        self.restart_dead()
        self.gateway_load = GatewayLoad(f"127.0.0.1:{self.gateway_port}", PARTITIONS)

    def admit(self, tenants: list[str]) -> None:
        commander = Commander(self.config, "chaos")
        terms = PlanTerms(prepaid=False, burst_tokens_floor=0, burst_factor=0)
        commander.send([commander.tenant(tenant_id, "", "USD", terms) for tenant_id in tenants])
        keys = {tenant_id: commander.key(tenant_id) for tenant_id in tenants}
        commander.send([key.command for key in keys.values()])
        assert self.gateway_load is not None
        self.gateway_load.keys = {tenant_id: key.secret for tenant_id, key in keys.items()}

    def close(self) -> None:
        if self.gateway_load is not None:
            self.gateway_load.close()
        super().close()


class EmbeddedInstallation(Installation):
    """`taximeter up`: its broker forgets, its supervisor mends. Beside it a producer with a journal."""

    name = "embedded"
    forgets = True
    services = ("up",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.up = Up(folder / "data", f"prices.initial_book={PRICE_BOOK}", f"ledger.partitions={PARTITIONS}")

    @property
    def config_path(self) -> Path:
        return self.up.data_dir.config_path

    def start(self) -> None:
        self.parts["up"] = Part(self.up.child, ready=lambda: self.up.data_dir.running() is not None)
        self.parts["up"].start()
        with patch.dict(os.environ, environment(), clear=True):
            self.config = load(self.config_path)
        self.parts["producer"] = self.producer()
        self.parts["producer"].start()

    def kill_broker(self) -> None:
        """SIGKILL; the supervisor makes another, which knows nothing."""
        os.kill(self.up.pids()[_BROKER], signal.SIGKILL)

    def kill_all(self) -> None:
        """The supervisor, and with it everything that it started."""
        pids = list(self.up.pids().values())
        self.parts["up"].kill9()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), what="the end of all parts")

    def close(self) -> None:
        self.load.close()
        for part in self.parts.values():
            part.kill9()

    def reader(self) -> Reader:
        token = read_secret(self.config.clickhouse, "loopback_token", needed_for="asking").decode()
        return LoopbackEngine(f"http://127.0.0.1:{self.config.clickhouse.loopback_port}", token)


def _serves(port: int) -> bool:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        try:
            return bool(client.is_server_ready(client_timeout=_PROBE_TIMEOUT_S))
        except triton.InferenceServerException:
            return False
