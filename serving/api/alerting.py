"""Alerts: lists, and a watch that goes on where an earlier one stopped.

Promise of the watch: of the alerts that the caller may see, none is missed and none comes twice to who hands back the position
that came with the last one. A position names, for each partition of the ledger, the last record whose alerts were told whole,
and those told of the record behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from billing.v1.billing_service_pb2 import (
    AlertEntry,
    ListAlertsRequest,
    ListAlertsResponse,
    WatchAlertsRequest,
    WatchAlertsResponse,
)
from serving.api.fields import from_time, page_size, to_time
from sinks import queries

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from serving.api.calls import Call
    from sinks.rows import AlertRow

__all__ = ["list_alerts", "watch_alerts"]

# Of one look; what is left comes with the next.
_LOOK_ALERTS: Final = 500


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
    response = ListAlertsResponse(alerts=map(_entry, rows[:size]))
    if len(rows) > size:
        last = rows[size - 1]
        behind = [str(last.updated_ms), str(last.partition), str(last.version), last.alert_id]
        response.next_page_token = call.tokens.seal(call.principal, request, behind)
    return response


@dataclass(slots=True)
class _Place:
    """Where a watch stands."""

    versions: dict[int, int]
    told: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        return [f"{partition}:{version}" for partition, version in sorted(self.versions.items())] + [
            f"={alert_id}" for alert_id in self.told
        ]

    @classmethod
    def of(cls, texts: list[str]) -> _Place:
        pairs = [text.split(":") for text in texts if not text.startswith("=")]
        return cls(
            {int(partition): int(version) for partition, version in pairs},
            [text.removeprefix("=") for text in texts if text.startswith("=")],
        )


def watch_alerts(call: Call, request: WatchAlertsRequest, place: Any) -> tuple[list[Message], Any]:
    """One look: what has come since the last one, and where this one stopped."""
    tenant_id = call.principal.tenant_or_all(request.tenant_id)
    answers: list[Message] = []
    if place is None:
        texts = call.tokens.open(call.principal, request, "after")
        place = _Place(queries.positions(call.reader)) if texts is None else _Place.of(texts)
        answers.append(WatchAlertsResponse(position=call.tokens.seal(call.principal, request, place.texts())))
    # Those that were told of a record come again until the record is told whole.
    limit = _LOOK_ALERTS + len(place.told)
    rows = queries.alerts(call.reader, tenant_id, 0, place.versions, limit=limit)
    for index, row in enumerate(rows):
        if row.alert_id in place.told:
            continue
        # The rest of a record's alerts may be in the next look.
        whole = index + 1 < len(rows) or len(rows) < limit
        if whole and not any((later.partition, later.version) == (row.partition, row.version) for later in rows[index + 1 :]):
            place.versions[row.partition] = row.version
            place.told = []
        else:
            place.told.append(row.alert_id)
        position = call.tokens.seal(call.principal, request, place.texts())
        answers.append(WatchAlertsResponse(alert=_entry(row), position=position))
    return answers, place


def _entry(row: AlertRow) -> AlertEntry:
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
    )
