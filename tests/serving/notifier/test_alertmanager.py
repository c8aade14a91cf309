"""A real Alertmanager takes what the notifier sends, and knows when an alert is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from billing.v1.alert_pb2 import ALERT_STATE_RESOLVED, ALERT_STATE_UPDATED, SEVERITY_CRITICAL, Alert
from serving.notifier.payloads import body_of, webhook_id_of
from serving.notifier.sending import Sender
from tests.producers.support import wait_until
from tests.services import require
from tests.services.alertmanager import MISSING_MESSAGE, Alertmanager, alertmanager_command
from tests.serving.notifier.support import QUICK, alert, endpoint


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Alertmanager]:
    require(alertmanager_command(), MISSING_MESSAGE)
    made = Alertmanager(tmp_path)
    made.start()
    yield made
    made.stop()


def active(manager: Alertmanager) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(manager.url, params={"active": "true"}, timeout=60, trust_env=False).json()
    return found


async def test_it_fires_becomes_severe_and_ends(manager: Alertmanager) -> None:
    sender = Sender(endpoint(manager.url, format="alertmanager", secrets=()), QUICK)

    async def tell(told: Alert) -> None:
        await sender.send(webhook_id_of(told), body_of(told, "alertmanager"))

    def severities() -> list[str]:
        return [each["labels"]["severity"] for each in active(manager)]

    await tell(alert(1, name="x"))
    wait_until(lambda: severities() == ["warning"], "the alert")
    [fires] = active(manager)
    assert fires["annotations"]["summary"] == "many tokens — in a minute"
    assert fires["status"]["state"] in ("active", "unprocessed")
    await tell(alert(2, name="x", state=ALERT_STATE_UPDATED, severity=SEVERITY_CRITICAL, revision=2))
    wait_until(lambda: severities() == ["critical"], "the severe one alone")
    await tell(alert(3, name="x", state=ALERT_STATE_RESOLVED, severity=SEVERITY_CRITICAL, revision=3))
    wait_until(lambda: severities() == [], "the end")
    await sender.close()
