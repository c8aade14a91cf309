"""From usage durable to a budget's warning on the alert topic, and to the refusal in a gateway's directory, at 2,000 events/s.

The embedded set-up (broker, worker, publisher, sink), loaded by a meter that has begun. Every 50 ms one event uses up the
budget of a user of its own. Its delay is the time from the durability of its group in the journal to the alert at a consumer of
the alert topic, and to the moment when a gateway's directory, which follows the accounts, refuses that user.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.freshness import await_up, quantile, usage_event
from benchmarks.measure import Measurement
from billing.amounts import to_amount
from billing.v1.account_pb2 import AccountUpdate
from billing.v1.alert_pb2 import ALERT_RULE_BUDGET, Alert
from billing.v1.command_pb2 import BudgetUpsert
from producers.follower import TopicFollower
from producers.meter import UsageMeter
from producers.publisher import Publisher
from serving.gateway.directory import Directory, KeyView
from taximeter.commanding import Commander, PlanTerms
from taximeter.compose import kafka_security, meter_settings, open_reader, publisher_settings, topic_names
from taximeter.config import Config, load
from taximeter.embedded.state import DataDir

EVENTS_PER_S = 2_000
GROUP = 50
SECONDS = 20
WARM_UP_S = 4
PROBE_EVERY = 2
PROBES = EVENTS_PER_S * SECONDS // GROUP // PROBE_EVERY
TENANT = "tenant-0"
DRAIN_TIMEOUT_S = 30


def run() -> list[Measurement]:
    """Start the embedded set-up, load it, measure, stop it."""
    with tempfile.TemporaryDirectory(prefix="taximeter-bench-") as folder:
        data_dir = DataDir(Path(folder))
        command = [sys.executable, "-m", "taximeter", "up", "--quiet", "--data-dir", folder]
        command += ["--set", "embedded.model_server=false", "--set", "embedded.gateway=false"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            config = load(await_up(data_dir, process))
            _set_budgets(config)
            warned_s, refused_s = _measure(config, Path(folder) / "bench")
        finally:
            process.terminate()
            process.wait(60)
    name = f"budget at {EVENTS_PER_S:,} events/s: usage durable to"
    return [
        Measurement(f"{name} {what}, {label}", quantile(delays_s, share) * 1_000, "ms", target=target)
        for what, delays_s in (("warning on the alert topic", warned_s), ("refusal in a gateway", refused_s))
        for label, share, target in (("p50", 0.50, ""), ("p99", 0.99, "< 1000"))
    ]


def _user(number: int) -> str:
    return f"user-{number}"


def _set_budgets(config: Config) -> None:
    commander = Commander(config, "benchmark")
    with open_reader(config) as reader:
        commander.give([commander.tenant(TENANT, "", "USD", PlanTerms(prepaid=False))], reader)
        said = [
            commander.budget(
                BudgetUpsert(
                    tenant_id=TENANT,
                    user_id=_user(number),
                    amount=to_amount(1),
                    threshold_millionths=[1_000_000],
                    hard_stop=True,
                )
            )
            for number in range(PROBES)
        ]
        commander.give(said, reader, timeout_s=120)


class _Seen:
    """When each user's budget was told of, and when its user was refused."""

    def __init__(self, config: Config) -> None:
        self.warned: dict[str, float] = {}
        self.refused: dict[str, float] = {}
        self._directory = Directory(config.ledger.partitions)
        topics, security = topic_names(config), kafka_security(config.kafka)
        self._followers = [
            TopicFollower(config.kafka.bootstrap, topics.alerts, self._on_alert, security=security),
            TopicFollower(config.kafka.bootstrap, topics.accounts, self._on_account, security=security),
        ]
        for follower in self._followers:
            follower.start()
        for follower in self._followers:
            if not follower.ready.wait(30):
                raise RuntimeError(f"topic {follower.topic} could not be read")

    def _on_alert(self, key: bytes, value: bytes, partition: int) -> None:
        alert = Alert.FromString(value)
        if alert.rule == ALERT_RULE_BUDGET:
            self.warned.setdefault(alert.labels["user_id"], time.monotonic())

    def _on_account(self, key: bytes, value: bytes, partition: int) -> None:
        self._directory.on_account(key, value, partition)
        if not key.startswith(b"budget/"):
            return
        user_id = AccountUpdate.FromString(value).budget.user_id
        caller = KeyView("key", TENANT, "default", user_id, frozenset(), 0, revoked=False)
        if self._directory.find_stop(caller, time.time_ns() // 1_000_000) is not None:
            self.refused.setdefault(user_id, time.monotonic())

    def close(self) -> None:
        for follower in self._followers:
            follower.close()


def _measure(config: Config, folder: Path) -> tuple[list[float], list[float]]:
    """The delays of the probes after the warm-up, sorted."""
    seen = _Seen(config)
    meter = UsageMeter(meter_settings(config, folder / "journal.sqlite"))
    publisher = Publisher(meter.journal, publisher_settings(config))
    publisher.start()
    try:
        _await_covered(meter, publisher)
        durable = _record(meter)
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while min(len(seen.warned), len(seen.refused)) < PROBES and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        publisher.close(10)
        meter.close(10)
        seen.close()
    if min(len(seen.warned), len(seen.refused)) < PROBES:
        raise RuntimeError(
            f"{len(seen.warned)} warnings and {len(seen.refused)} refusals of {PROBES} after {DRAIN_TIMEOUT_S} s"
        )
    first = min(durable.values()) + WARM_UP_S
    counted = {user_id: at for user_id, at in durable.items() if at >= first}
    return (
        sorted(max(0.0, seen.warned[user_id] - at) for user_id, at in counted.items()),
        sorted(max(0.0, seen.refused[user_id] - at) for user_id, at in counted.items()),
    )


def _await_covered(meter: UsageMeter, publisher: Publisher) -> None:
    """Usage to every partition, and back: how long a metering point takes to begin is not what is measured."""
    for number in range(GROUP):
        meter.record(usage_event(number)).durable(10)
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while publisher.metrics()["uncovered"]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the first events are not in the ledger after {DRAIN_TIMEOUT_S} s")
        time.sleep(0.05)


def _record(meter: UsageMeter) -> dict[str, float]:
    """When the group with each user's one event was durable."""
    durable: dict[str, float] = {}
    began = time.monotonic()
    for group in range(EVENTS_PER_S * SECONDS // GROUP):
        pause_s = began + group * GROUP / EVENTS_PER_S - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        user_id = _user(group // PROBE_EVERY) if group % PROBE_EVERY == 0 else ""
        receipt = None
        for number in range(GROUP):
            event = usage_event(group * GROUP + number)
            if user_id and number == 0:
                event.tenant_id, event.user_id = TENANT, user_id
            receipt = meter.record(event)
        assert receipt is not None
        receipt.durable(10)
        if user_id:
            durable[user_id] = time.monotonic()
    return durable
