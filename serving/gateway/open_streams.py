"""How many streams clients have open, in all and by tenant.

One on which nothing is asked costs next to nothing, but it is one of the calls that gRPC takes in a process, and probes and
others' requests need theirs. Promise: no more are open than requests may run, of one tenant and in all.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from serving.gateway import admission
from serving.gateway.errors import CallError

if TYPE_CHECKING:
    from serving.gateway.settings import LimitSettings

__all__ = ["OpenStreams"]


class OpenStreams:
    """Those of one gateway, counted in its metrics where one is refused. Belongs to one event loop."""

    def __init__(self, limits: LimitSettings, metrics: Counter[str]) -> None:
        self._limits = limits
        self._metrics = metrics
        self._of_tenant: Counter[str] = Counter()

    def begin(self, tenant_id: str) -> None:
        """One more is open; `end` it. Raises CallError."""
        for whose, count, limit in (
            ("this tenant", self._of_tenant[tenant_id], self._limits.tenant_requests_max),
            ("the gateway", self._of_tenant.total(), self._limits.requests_max),
        ):
            if count >= limit:
                # Nothing was asked, so there is nothing to put on record.
                refusal = admission.concurrency_refusal(whose, limit, what="open streams")
                self._metrics[f"refused_{admission.reason_name(refusal)}"] += 1
                raise CallError.refused(refusal)
        self._of_tenant[tenant_id] += 1

    def end(self, tenant_id: str) -> None:
        self._of_tenant[tenant_id] -= 1
        if not self._of_tenant[tenant_id]:
            del self._of_tenant[tenant_id]
