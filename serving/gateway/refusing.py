"""How a request is refused: on record first, where it has a tenant, then told; of a tenant that is only watched, only noted."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NoReturn

from billing.v1.usage_pb2 import OUTCOME_REJECTED
from producers.errors import ProducerError
from serving.gateway import admission
from serving.gateway.errors import CallError
from serving.gateway.metering import now_ms, tell_end

if TYPE_CHECKING:
    from collections import Counter

    from billing.v1.usage_pb2 import UsageEvent
    from producers.meter import Receipt
    from serving.gateway.admission import Refusal
    from serving.gateway.directory import AccountView
    from serving.gateway.metering import MeterParts

__all__ = ["Refusals"]

_LOG = logging.getLogger(__name__)


class Refusals:
    """Those of one gateway, counted in its metrics."""

    def __init__(self, parts: MeterParts, metrics: Counter[str]) -> None:
        self._parts = parts
        self._metrics = metrics

    async def enforce(self, refusal: Refusal, event: UsageEvent, account: AccountView | None) -> None:
        """Refuse, unless the tenant is only watched."""
        if account is None or not account.shadow or not admission.is_shadowed(refusal):
            await self.refuse(refusal, event)
        self._metrics[f"shadow_{admission.reason_name(refusal)}"] += 1
        names = {"tenant_id": event.tenant_id, "request_id": event.request_id}
        _LOG.info(
            "tenant %s is in shadow mode; a request would have been refused: %s", event.tenant_id, refusal.message, extra=names
        )

    async def refuse(self, refusal: Refusal, event: UsageEvent) -> NoReturn:
        """Put the refusal on record where it has to be, then raise it."""
        receipt = self.record(refusal, event)
        if receipt is not None:
            try:
                await receipt.wait(self._parts.durable_timeout_s)
            except ProducerError:
                self._lost(event)
        raise CallError.refused(refusal)

    def record(self, refusal: Refusal, event: UsageEvent) -> Receipt | None:
        """Count it, and put it on record where it has to be: what says when it is there."""
        self.count(refusal)
        if not refusal.recorded:
            return None
        event.outcome = OUTCOME_REJECTED
        event.refusal_reason = refusal.reason  # type: ignore[assignment]
        event.ended_ms = max(now_ms(), event.started_ms)
        tell_end(self._parts, event)
        try:
            return self._parts.meter.record(event)
        except ProducerError:
            self._lost(event)
            return None

    def count(self, refusal: Refusal) -> None:
        """One more of its kind."""
        self._metrics[f"refused_{admission.reason_name(refusal)}"] += 1

    def _lost(self, event: UsageEvent) -> None:
        # It costs nothing and is refused all the same; the metric says that the record lacks it.
        self._metrics["refusals_unrecorded"] += 1
        names = {"tenant_id": event.tenant_id, "request_id": event.request_id}
        _LOG.warning("a refusal of tenant %s could not be recorded", event.tenant_id, exc_info=True, extra=names)
