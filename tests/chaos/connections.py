"""Connections that break: between each client and Kafka, and between the sink and ClickHouse.

Every kind of client has a listener of the broker of its own, which advertises the port of a proxy of its own; so the producer,
the workers and the sink can be cut off one by one or together, and nobody goes round the proxy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.chaos.faults import Fault
from tests.chaos.installation import KafkaInstallation, Part
from tests.chaos.proxy import Proxy
from tests.services.ports import free_port

__all__ = ["ProxiedInstallation"]

_CLIENTS: Final = ("producer", "worker", "sink")
_DATABASE: Final = "clickhouse"
_MET_TIMEOUT_S: Final = 120.0
# Counts of a proxy that say that its fault met something.
_MARKS: Final = ("broken", "pieces_held", "pieces_slowed")


class ProxiedInstallation(KafkaInstallation):
    """Between Kafka and each kind of client a proxy, and one between the sink and ClickHouse."""

    name = "proxied"

    def __init__(self, folder: Path) -> None:
        self._ports = {client: free_port() for client in _CLIENTS}
        self.proxies = {client: Proxy(folder / "logs", port, name=f"proxy-{client}") for client, port in self._ports.items()}
        super().__init__(folder)
        self.proxies[_DATABASE] = Proxy(folder / "logs", self.clickhouse.port, name=f"proxy-{_DATABASE}")

    def listeners(self) -> dict[str, tuple[int, int]]:
        return {client.upper(): (port, self.proxies[client].port) for client, port in self._ports.items()}

    def start(self) -> None:
        for proxy in self.proxies.values():
            proxy.start()
        super().start()

    def close(self) -> None:
        super().close()
        for proxy in self.proxies.values():
            proxy.stop()

    def worker(self, name: str) -> Part:
        state = f"ledger.state_dir={self.folder / 'state' / name}"
        return self.command(name, "worker", "--set", state, *self._behind("worker"), has_ready_file=True)

    def sink(self) -> Part:
        database = f"clickhouse.port={self.proxies[_DATABASE].port}"
        return self.command("sink", "sink", "--no-migrate", "--set", database, *self._behind("sink"))

    def producer_arguments(self) -> list[str]:
        return self._behind("producer")

    def _behind(self, client: str) -> list[str]:
        return ["--set", f"kafka.bootstrap={self.proxies[client].address}"]


class BrokenConnections(Fault):
    """One kind of client, or several, lose their way to Kafka or to ClickHouse, in one way of seven."""

    name = "connections"
    checks = "I2, I3, I9, I10"
    nightly = 50
    setup = ProxiedInstallation
    # Beyond the workers' session, now and then.
    hold_s = (0.3, 6.0)

    def inject(self) -> None:
        installation = self.world.installation
        assert isinstance(installation, ProxiedInstallation)
        names = [*_CLIENTS, _DATABASE]
        chosen = self.draw.sample(names, self.draw.choice([1, 1, 1, 2, len(names)]))
        self._proxies = {name: installation.proxies[name] for name in sorted(chosen)}
        self._what, do = self.draw.choice(self._ways())
        self._before = {name: proxy.counts() for name, proxy in self._proxies.items()}
        time.sleep(self.draw.uniform(0.0, 0.5))
        for proxy in self._proxies.values():
            do(proxy)
        self.world.wait(self._met, _MET_TIMEOUT_S, f"traffic that met {self._what} at {', '.join(self._proxies)}")

    def _ways(self) -> list[tuple[str, Callable[[Proxy], None]]]:
        delay_ms, bytes_per_s = self.draw.choice([50, 200, 800]), self.draw.choice([2_000, 20_000, 100_000])
        return [
            ("cut", Proxy.cut),
            ("reset", Proxy.reset),
            ("half-open", Proxy.half_open),
            (f"{bytes_per_s} bytes/s", lambda proxy: proxy.slow(bytes_per_s)),
            (f"a delay of {delay_ms} ms", lambda proxy: proxy.delay(delay_ms)),
            ("nothing to the server", lambda proxy: proxy.hold("to_server")),
            ("nothing to the client", lambda proxy: proxy.hold("to_client")),
        ]

    def _met(self) -> bool:
        """Whether each fault has broken, held or slowed something by now."""
        self._counted = {
            name: {each: count - self._before[name][each] for each, count in proxy.counts().items()}
            for name, proxy in self._proxies.items()
        }
        return all(
            sum(counts[each] for each in ("broken", "pieces_held", "pieces_slowed")) for counts in self._counted.values()
        )

    def heal(self) -> None:
        for proxy in self._proxies.values():
            proxy.heal()
        self.world.installation.restart_dead()

    def evidence(self) -> str:
        met = {
            name: " ".join(f"{counts[each]} {each}" for each in _MARKS if counts[each])
            for name, counts in self._counted.items()
        }
        return f"{self._what}: {met}" if all(met.values()) else ""
