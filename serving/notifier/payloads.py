"""What is sent of an alert: the same bytes at every attempt, made when the alert is taken.

Promise: a webhook's ID names one alert and one of its revisions, whatever is killed and read again between. In Alertmanager's
format an alert's labels stay the same over its life but for its severity, by which Alertmanagers route: when that has risen,
the lower ones are told to be over in the same message.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from billing.alerts import rule_name
from billing.v1.alert_pb2 import ALERT_STATE_RESOLVED, SEVERITY_INFO, AlertState
from serving.notifier.settings import Format, severity_name

if TYPE_CHECKING:
    from billing.v1.alert_pb2 import Alert

__all__ = ["alert_values", "body_of", "state_name", "webhook_id_of"]

# Alertmanager lets an alert go five minutes after it was last sent. Ours say themselves when they are over; should that not
# arrive, this is when they end.
_ACTIVE_MS_MAX: Final = 7 * 86_400_000


def webhook_id_of(alert: Alert) -> str:
    """The same for every repeat of it. No dots: it is signed with dots around it."""
    return f"{alert.alert_id}-r{alert.revision}"


def state_name(state: int) -> str:
    """As people read it: "raised"."""
    return AlertState.Name(state).removeprefix("ALERT_STATE_").lower()  # type: ignore[arg-type]  # a plain number names it too


def body_of(alert: Alert, form: Format) -> bytes:
    """The request's body."""
    values: Any = _standard(alert) if form == "standard" else _alertmanager(alert)
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def alert_values(alert: Alert) -> dict[str, Any]:
    """Everything that is told of it; what does not apply is absent."""
    values: dict[str, Any] = {
        "alert_id": alert.alert_id,
        "revision": alert.revision,
        "state": state_name(alert.state),
        "rule": rule_name(alert.rule),
        "severity": severity_name(alert.severity),
        "tenant_id": alert.tenant_id,
        "subject": alert.subject,
        "summary": alert.summary,
        "request_ids": list(alert.request_ids),
        "figures": dict(alert.figures),
        "labels": dict(alert.labels),
        "raised": _time(alert.raised_ms),
        "updated": _time(alert.updated_ms),
    }
    if alert.acknowledged_ms:
        values |= {
            "acknowledged": _time(alert.acknowledged_ms),
            "acknowledged_by": alert.acknowledged_by,
            "note": alert.note,
        }
    if alert.action:
        values["action"] = alert.action
    return values


def _standard(alert: Alert) -> dict[str, Any]:
    kind = f"alert.{state_name(alert.state)}"
    return {"type": kind, "timestamp": _time(alert.told_ms), "data": alert_values(alert)}


def _alertmanager(alert: Alert) -> list[dict[str, Any]]:
    """A `postableAlerts` of Alertmanager's API v2."""
    is_over = alert.state == ALERT_STATE_RESOLVED
    told = [_postable(alert, alert.severity, alert.told_ms if is_over else alert.told_ms + _ACTIVE_MS_MAX)]
    if alert.revision > 1:
        told += [_postable(alert, lower, alert.told_ms) for lower in range(SEVERITY_INFO, alert.severity)]
    return told


def _postable(alert: Alert, severity: int, ends_ms: int) -> dict[str, Any]:
    named = {
        "alertname": f"taximeter_{rule_name(alert.rule)}",
        "alert_id": alert.alert_id,
        "severity": severity_name(severity),
        "tenant_id": alert.tenant_id,
        "subject": alert.subject,
    }
    said = {
        "summary": alert.summary,
        "state": state_name(alert.state),
        "figures": ", ".join(f"{name}={value}" for name, value in sorted(alert.figures.items())),
        "requests": ", ".join(alert.request_ids),
        "action": alert.action,
        "acknowledged_by": alert.acknowledged_by,
        "note": alert.note,
    }
    return {
        # An empty label is none to Alertmanager, and an empty annotation says nothing.
        "labels": {name: value for name, value in named.items() if value},
        "annotations": {name: value for name, value in said.items() if value},
        "startsAt": _time(alert.raised_ms),
        "endsAt": _time(ends_ms),
    }


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
