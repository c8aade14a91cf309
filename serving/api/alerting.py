"""Alerts: lists from the database, and a watch of their topic that goes on where an earlier one stopped.

Promise of the watch: of the alerts that the caller may see, none is missed and none comes twice to who hands back the position
that came with the last one. A position that is too old for that is refused, with what to do.

A position names, for each partition that the caller may see something of, the last alert that was told there, and when it was
given. A tenant's has the same length whatever others are told, and comes as often.
"""

from __future__ import annotations

import base64
import time
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from billing.alerts import rule_name
from billing.identity import partition_of
from billing.v1.alert_pb2 import ALERT_STATE_RESOLVED, AlertState, Severity
from billing.v1.billing_service_pb2 import (
    AlertEntry,
    ListAlertsRequest,
    ListAlertsResponse,
    WatchAlertsRequest,
    WatchAlertsResponse,
)
from producers.alerts import AlertCursor
from serving.api.errors import ApiError
from serving.api.fields import from_time, page_size, to_time
from sinks import queries

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message

    from billing.v1.alert_pb2 import Alert
    from serving.api.calls import Call
    from sinks.rows import AlertRow

__all__ = ["alert_entry", "list_alerts", "watch_alerts"]

# Of one look; what is left comes with the next.
_LOOK_ALERTS: Final = 500
# Who is told nothing for so long is given a new position, so that what it holds does not become too old.
_POSITION_S: Final = 60.0
_PADDED_CHARS: Final = 128


def list_alerts(call: Call, request: ListAlertsRequest) -> ListAlertsResponse:
    """Alerts, oldest first."""
    since_ms = from_time(request, "since", 0)
    place = call.tokens.open(call.principal, request, "page_token", 4)
    size = page_size(request.page_size)
    rows = queries.alerts(
        call.reader,
        call.principal.tenant_or_all(request.tenant_id),
        since_ms,
        behind=None if place is None else (int(place[0]), int(place[1]), int(place[2]), place[3]),
        limit=size + 1,
    )
    response = ListAlertsResponse(alerts=map(alert_entry, rows[:size]))
    if len(rows) > size:
        last = rows[size - 1]
        behind = [str(last.updated_ms), str(last.partition), str(last.version), last.alert_id]
        response.next_page_token = call.tokens.seal(call.principal, request, behind)
    return response


@dataclass(slots=True)
class _Place:
    """Where a watch stands."""

    cursor: AlertCursor
    # Of the next in the feed.
    number: int
    # On the monotonic clock: when it last gave a position.
    given_s: float


def watch_alerts(call: Call, request: WatchAlertsRequest, place: Any) -> tuple[Sequence[Message], Any]:
    """One look: what has come since the last one, and where this one stopped."""
    tenant_id = call.principal.tenant_or_all(request.tenant_id)
    partitions = None if tenant_id is None else (partition_of(tenant_id, call.partitions),)
    if not call.alerts.ready:
        raise ApiError(grpc.StatusCode.UNAVAILABLE, "alerts are still being read: try again in a moment")
    answers: list[WatchAlertsResponse] = []
    if place is None:
        place = _begin(call, request, partitions)
        answers.append(WatchAlertsResponse(position=_position(call, request, place)))
    is_more = True
    while is_more and not (answers and answers[-1].HasField("alert")):
        told, place.number = call.alerts.since(place.number, _LOOK_ALERTS)
        if call.alerts.has_lost(place.cursor, partitions):
            raise _too_old("more was told than is kept")
        is_more = len(told) == _LOOK_ALERTS
        for partition, alert in told:
            if (partitions is not None and partition not in partitions) or not place.cursor.is_new(alert, partition):
                continue
            place.cursor.move(alert, partition)
            if tenant_id is None or alert.tenant_id == tenant_id:
                answers.append(WatchAlertsResponse(alert=_told_entry(alert), position=_position(call, request, place)))
    if not answers and time.monotonic() - place.given_s >= _POSITION_S:
        answers.append(WatchAlertsResponse(position=_position(call, request, place)))
    return answers, place


def _begin(call: Call, request: WatchAlertsRequest, partitions: Iterable[int] | None) -> _Place:
    texts = call.tokens.open(call.principal, request, "after")
    if texts is None:
        cursor, number = call.alerts.end()
        return _Place(cursor if partitions is None else cursor.of(partitions), number, 0.0)
    if len(texts) != 2 or not texts[1].isdigit():
        # Of a version that kept other positions.
        raise _too_old("it is of an earlier version")
    age_ms = call.now_ms - int(texts[1])
    if age_ms > call.alerts.retention_ms:
        days, kept_days = age_ms // 86_400_000, call.alerts.retention_ms // 86_400_000
        raise _too_old(f"it was given {days} days ago, and alerts are kept for {kept_days}")
    text = zlib.decompress(base64.b85decode(texts[0].rstrip())).decode()
    return _Place(AlertCursor(text), 0, 0.0)


def _position(call: Call, request: WatchAlertsRequest, place: _Place) -> str:
    place.given_s = time.monotonic()
    text = base64.b85encode(zlib.compress(str(place.cursor).encode(), 9)).decode()
    padded = text.ljust(-(-len(text) // _PADDED_CHARS) * _PADDED_CHARS)
    return call.tokens.seal(call.principal, request, [padded, str(call.now_ms)])


def _too_old(why: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.OUT_OF_RANGE,
        f"after: alerts may be missing behind this position ({why}): list them with ListAlerts, and watch without `after`",
    )


def alert_entry(row: AlertRow) -> AlertEntry:
    """An alert as the database has it: as it was told last."""
    return AlertEntry(
        alert_id=row.alert_id,
        tenant_id=row.tenant_id,
        rule=row.rule,
        severity=row.severity,
        raised=to_time(row.raised_ms),
        summary=row.summary,
        request_ids=row.request_ids,
        figures=row.figures,
        labels=row.labels,
        state=row.state,
        updated=to_time(row.updated_ms),
        resolved=to_time(row.updated_ms if row.state == "resolved" else 0),
        acknowledged_by=row.acknowledged_by,
        note=row.note,
        subject=row.subject,
        action=row.action,
    )


def _told_entry(alert: Alert) -> AlertEntry:
    return AlertEntry(
        alert_id=alert.alert_id,
        tenant_id=alert.tenant_id,
        rule=rule_name(alert.rule),
        severity=Severity.Name(alert.severity).removeprefix("SEVERITY_").lower(),
        raised=to_time(alert.raised_ms),
        summary=alert.summary,
        request_ids=alert.request_ids,
        figures=alert.figures,
        labels=alert.labels,
        state=AlertState.Name(alert.state).removeprefix("ALERT_STATE_").lower(),
        updated=to_time(alert.updated_ms),
        resolved=to_time(alert.updated_ms if alert.state == ALERT_STATE_RESOLVED else 0),
        acknowledged_by=alert.acknowledged_by,
        note=alert.note,
        subject=alert.subject,
        action=alert.action,
    )
