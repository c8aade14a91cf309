"""From a usage event durable at the metering point to its alert at a webhook and in `WatchAlerts`, at 5,000 events/s through
the embedded set-up.

A meter records 50 events every 10 ms. One of every tenth group is of a tenant that nobody has created, each time another one,
which the rule `unknown_tenant` tells. A local HTTP server takes the webhooks and a gRPC client watches; each notes when a
tenant's alert is there. None may be missing, and none may come twice to the watch.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc

from benchmarks.freshness import EVENTS_PER_S, GROUP, await_up, quantile, usage_event
from benchmarks.measure import Measurement
from billing.v1.billing_service_pb2 import WatchAlertsRequest
from billing.v1.billing_service_pb2_grpc import BillingServiceStub
from producers.meter import UsageMeter
from producers.publisher import Publisher
from taximeter.compose import meter_settings, publisher_settings
from taximeter.config import Config, load
from taximeter.embedded.state import DataDir

SECONDS = 24
WARM_UP_S = 4
ALERT_GROUPS = 10
STRANGER = "stranger-"
DRAIN_TIMEOUT_S = 60


class Arrivals:
    """When the alert of each stranger was there first, and how often it came."""

    def __init__(self) -> None:
        self.first_s: dict[str, float] = {}
        self.count: Counter[str] = Counter()

    def note(self, tenant_id: str, rule: str, state: str) -> None:
        now_s = time.monotonic()
        if tenant_id.startswith(STRANGER) and (rule, state) == ("unknown_tenant", "raised"):
            self.first_s.setdefault(tenant_id, now_s)
            self.count[tenant_id] += 1


def run() -> list[Measurement]:
    """Start the embedded set-up with an endpoint, load it, measure, stop it."""
    hooked, watched = Arrivals(), Arrivals()
    server = _receiver(hooked)
    with tempfile.TemporaryDirectory(prefix="taximeter-bench-") as folder:
        data_dir = DataDir(Path(folder))
        secret = Path(folder) / "secret"
        secret.write_text(base64.b64encode(secrets.token_bytes(32)).decode())
        endpoint = {
            "url": f"http://127.0.0.1:{server.server_address[1]}/",
            "secret_file": secret,
            "allow_plaintext": "true",
            "allow_private": "true",
        }
        command = [sys.executable, "-m", "taximeter", "up", "--quiet", "--data-dir", folder]
        command += ["--set", "embedded.model_server=false", "--set", "embedded.gateway=false"]
        command += [part for key, value in endpoint.items() for part in ("--set", f"notifier.endpoints.bench.{key}={value}")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            config = load(await_up(data_dir, process))
            durable_s = _measure(config, Path(folder), hooked, watched)
        finally:
            process.terminate()
            process.wait(60)
            server.shutdown()
            server.server_close()
    repeated = sum(count - 1 for count in watched.count.values())
    if repeated:
        raise RuntimeError(f"{repeated} alerts came twice to the watch")
    return [
        measurement
        for name, arrivals in (("at a webhook", hooked), ("in WatchAlerts", watched))
        for measurement in _told(f"alert {name} at {EVENTS_PER_S:,} events/s", durable_s, arrivals)
    ]


def _told(name: str, durable_s: dict[str, float], arrivals: Arrivals) -> list[Measurement]:
    delays_s = sorted(arrivals.first_s[tenant_id] - at_s for tenant_id, at_s in durable_s.items())
    return [
        Measurement(f"{name}, p50 of {len(delays_s)}", quantile(delays_s, 0.50) * 1_000, "ms"),
        Measurement(f"{name}, p99", quantile(delays_s, 0.99) * 1_000, "ms", target="< 1000"),
    ]


def _measure(config: Config, folder: Path, hooked: Arrivals, watched: Arrivals) -> dict[str, float]:
    """When each stranger's event was durable, after the warm-up; returns when all of them arrived everywhere."""
    meter = UsageMeter(meter_settings(config, folder / "bench" / "journal.sqlite"))
    publisher = Publisher(meter.journal, publisher_settings(config))
    channel = grpc.insecure_channel(f"127.0.0.1:{config.api.grpc_port}")
    metadata = (("authorization", f"Bearer {_operator_key(folder)}"),)
    stub: Any = BillingServiceStub(channel)  # type: ignore[no-untyped-call]
    answers = stub.WatchAlerts(WatchAlertsRequest(), metadata=metadata)
    # The first answer is the position: from now on nothing is missed.
    next(answers)
    watcher = threading.Thread(target=_watch, args=(answers, watched), daemon=True)
    watcher.start()
    publisher.start()
    try:
        durable_s = _record(meter)
        deadline_s = time.monotonic() + DRAIN_TIMEOUT_S
        while missing := [name for arrivals in (hooked, watched) for name in durable_s if name not in arrivals.first_s]:
            if time.monotonic() >= deadline_s:
                raise RuntimeError(f"{len(missing)} alerts are not there after {DRAIN_TIMEOUT_S} s, the first of {missing[0]}")
            time.sleep(0.1)
        return durable_s
    finally:
        answers.cancel()
        watcher.join(10)
        channel.close()
        publisher.close(10)
        meter.close(10)


def _record(meter: UsageMeter) -> dict[str, float]:
    durable_s: dict[str, float] = {}
    began_s = time.monotonic()
    for group in range(EVENTS_PER_S * SECONDS // GROUP):
        pause_s = began_s + group * GROUP / EVENTS_PER_S - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        receipt = None
        for number in range(group * GROUP, (group + 1) * GROUP):
            event = usage_event(number)
            if number == group * GROUP and group % ALERT_GROUPS == 0:
                event.tenant_id = f"{STRANGER}{group}"
            receipt = meter.record(event)
        assert receipt is not None
        receipt.durable(10)
        if group % ALERT_GROUPS == 0 and time.monotonic() >= began_s + WARM_UP_S:
            durable_s[f"{STRANGER}{group}"] = time.monotonic()
    return durable_s


def _watch(answers: Any, watched: Arrivals) -> None:
    try:
        for answer in answers:
            if answer.HasField("alert"):
                watched.note(answer.alert.tenant_id, answer.alert.rule, answer.alert.state)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.CANCELLED:
            raise


def _operator_key(folder: Path) -> str:
    command = [sys.executable, "-m", "taximeter", "key", "create", "--operator", "--scope", "read", "--json"]
    made = subprocess.run([*command, "--data-dir", str(folder)], check=True, capture_output=True, text=True, timeout=120)
    return str(json.loads(made.stdout)["secret"])


def _receiver(hooked: Arrivals) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            data = json.loads(self.rfile.read(int(self.headers["content-length"])))["data"]
            hooked.note(data["tenant_id"], data["rule"], data["state"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  its name is the library's
            """Nothing to say."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
