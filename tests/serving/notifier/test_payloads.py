"""Bodies: the same for the same alert and revision, in Standard Webhooks' form and in Alertmanager's."""

from __future__ import annotations

import json
from typing import Any, Final

import jsonschema

from billing.v1.alert_pb2 import (
    ALERT_STATE_ACKNOWLEDGED,
    ALERT_STATE_RESOLVED,
    ALERT_STATE_UPDATED,
    SEVERITY_CRITICAL,
)
from serving.notifier.payloads import body_of, webhook_id_of
from tests.serving.notifier.support import alert

TOLD_MS = 1_700_000_000_123
# `postableAlerts` of Alertmanager's API v2, from api/v2/openapi.yaml of prometheus/alertmanager 0.25 as JSON schema: what is
# in `allOf` there is merged, and nothing else is let through.
_LABELS: Final = {"type": "object", "additionalProperties": {"type": "string"}}
POSTABLE_ALERTS: Final = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["labels"],
        "additionalProperties": False,
        "properties": {
            "labels": _LABELS,
            "annotations": _LABELS,
            "startsAt": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"},
            "endsAt": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$"},
            "generatorURL": {"type": "string", "format": "uri"},
        },
    },
}


def manager(told: Any) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = json.loads(body_of(told, "alertmanager"))
    jsonschema.validate(values, POSTABLE_ALERTS)
    return values


def test_a_webhook_says_everything_and_its_id_names_the_revision() -> None:
    told = alert(5, told_ms=TOLD_MS, state=ALERT_STATE_ACKNOWLEDGED, revision=3)
    told.acknowledged_ms, told.acknowledged_by, told.note, told.action = TOLD_MS, "ann", "on it", "throttled"
    assert webhook_id_of(told) == "abc-0-5-0-r3"
    assert json.loads(body_of(told, "standard")) == {
        "type": "alert.acknowledged",
        "timestamp": "2023-11-14T22:13:20.123Z",
        "data": {
            "alert_id": "abc-0-5-0",
            "revision": 3,
            "state": "acknowledged",
            "rule": "token_burst",
            "severity": "warning",
            "tenant_id": "acme",
            "subject": "llama",
            "summary": "many tokens — in a minute",
            "request_ids": ["r1", "r2"],
            "figures": {"tokens": 5},
            "labels": {"model": "llama"},
            "raised": "2023-11-14T22:13:19.123Z",
            "updated": "2023-11-14T22:13:20.123Z",
            "acknowledged": "2023-11-14T22:13:20.123Z",
            "acknowledged_by": "ann",
            "note": "on it",
            "action": "throttled",
        },
    }


def test_bodies_are_the_same_bytes_each_time() -> None:
    first, again = alert(5, told_ms=TOLD_MS), alert(5, told_ms=TOLD_MS)
    for told in (first, again):
        told.figures.clear()
    for name in ("b", "a"):
        first.figures[name] = 1
    for name in ("a", "b"):
        again.figures[name] = 1
    for form in ("standard", "alertmanager"):
        assert body_of(first, form) == body_of(again, form)


def test_alertmanager_s_labels_stay_and_what_is_resolved_ends() -> None:
    raised = alert(1, name="x", told_ms=TOLD_MS)
    resolved = alert(9, name="x", told_ms=TOLD_MS + 60_000, state=ALERT_STATE_RESOLVED, revision=2)
    resolved.summary, resolved.figures["tokens"] = "it is over", 0
    resolved.labels["model"] = "other"
    resolved.raised_ms = raised.raised_ms
    [before], [after, *_] = manager(raised), manager(resolved)
    assert before["labels"] == after["labels"]
    assert before["labels"]["alertname"] == "taximeter_token_burst"
    assert before["startsAt"] == after["startsAt"] == "2023-11-14T22:13:19.123Z"
    assert after["endsAt"] == "2023-11-14T22:14:20.123Z"
    # Or it would be let go five minutes later, though it goes on.
    assert before["endsAt"] == "2023-11-21T22:13:20.123Z"
    assert "action" not in before["annotations"]


def test_what_has_become_more_severe_ends_what_it_was() -> None:
    [warning] = manager(alert(1, name="x", told_ms=TOLD_MS))
    critical, *lower = manager(
        alert(2, name="x", told_ms=TOLD_MS + 1_000, state=ALERT_STATE_UPDATED, severity=SEVERITY_CRITICAL, revision=2)
    )
    assert critical["labels"] == {**warning["labels"], "severity": "critical"}
    assert warning["labels"] in [each["labels"] for each in lower]
    assert all(each["endsAt"] == "2023-11-14T22:13:21.123Z" for each in lower)
    assert critical["endsAt"] > lower[0]["endsAt"]
