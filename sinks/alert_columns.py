"""Rows of the alerts that records tell of: one for each alert, as it was told last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from billing.v1.alert_pb2 import AlertRule, AlertState, Severity
from sinks.event_columns import EnumNames

if TYPE_CHECKING:
    from billing.v1.alert_pb2 import Alert
    from sinks.columns import Accepted

__all__ = ["alert_rows"]

_RULES = EnumNames(AlertRule.items(), "ALERT_RULE_")
_SEVERITIES = EnumNames(Severity.items(), "SEVERITY_")
_STATES = EnumNames(AlertState.items(), "ALERT_STATE_")


def alert_rows(batch: Sequence[Accepted]) -> Iterable[tuple[object, ...]]:
    """Of the table alerts."""
    # One record may tell twice of one alert; rows of it would have the same version.
    last: dict[str, tuple[Accepted, Alert]] = {}
    for accepted in batch:
        for alert in accepted.record.alerts:
            last[alert.alert_id] = accepted, alert
    for accepted, alert in last.values():
        figures, labels = sorted(alert.figures.items()), sorted(alert.labels.items())
        yield (
            alert.tenant_id,
            alert.alert_id,
            _RULES[alert.rule],
            _SEVERITIES[alert.severity],
            alert.raised_ms,
            alert.summary,
            list(alert.request_ids),
            [name for name, _ in figures],
            [value for _, value in figures],
            [name for name, _ in labels],
            [value for _, value in labels],
            accepted.record.partition,
            accepted.record.generation.hex(),
            accepted.record.sequence,
            accepted.version,
            alert.subject,
            # Of records that are older than the life of alerts.
            _STATES[alert.state] if alert.state else "raised",
            max(alert.revision, 1),
            alert.updated_ms or alert.raised_ms,
            alert.acknowledged_by,
            alert.note,
            alert.action,
        )
