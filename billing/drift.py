"""Counting drift: a back end whose counts are off those of the model's own tokenizer, as a producer's sampled recount says.

The figures come with the producer's batches and heartbeats, so the alert has no tenant: it is about a model at a producer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from billing.limits import ALERTS_MAX, COUNT_DRIFTS_MAX, ID_CHARS_MAX, QUANTITY_MAX
from billing.v1.alert_pb2 import ALERT_RULE_COUNTING_DRIFT, SEVERITY_WARNING, Alert
from billing.v1.ledger_pb2 import LedgerRecord
from billing.v1.usage_pb2 import UsageBatch

if TYPE_CHECKING:
    from billing.state import LedgerState

# Of a ledger that was founded before its settings named it: 2 %, as gateways have it by default.
DRIFT_MILLIONTHS = 20_000
# Fewer samples say nothing of a model.
SAMPLES_MIN = 20
_WHOLE = 1_000_000


def find_drifts(state: LedgerState, batch: UsageBatch, record: LedgerRecord) -> None:
    """Find the models that a batch speaks of whose counts differ by more than the settings allow."""
    bound = state.settings.drift_millionths or DRIFT_MILLIONTHS
    for drift in batch.count_drifts[:COUNT_DRIFTS_MAX]:
        told, counted = min(drift.backend_tokens, QUANTITY_MAX), min(drift.tokenizer_tokens, QUANTITY_MAX)
        off = abs(told - counted) * _WHOLE
        if drift.samples < SAMPLES_MIN or off <= bound * counted or len(drift.model) > ID_CHARS_MAX:
            continue
        subject = f"{drift.model} at {batch.producer_id}"[: 2 * ID_CHARS_MAX]
        cooldown_ms, now_ms = state.settings.alert_cooldown_ms, record.log_time_ms
        if len(record.alerts) >= ALERTS_MAX or not state.alerts.wants(
            ALERT_RULE_COUNTING_DRIFT, "", subject, SEVERITY_WARNING, now_ms, cooldown_ms
        ):
            continue
        record.alerts.append(
            Alert(
                rule=ALERT_RULE_COUNTING_DRIFT,
                severity=SEVERITY_WARNING,
                subject=subject,
                summary=f"model {drift.model}: over its last {drift.samples} sampled answers at {batch.producer_id} the back "
                f"end counted {told} tokens and the model's tokenizer {counted}; the bill follows the back end: see that the "
                "tokenizer is the model's, and the back end's counts what its profile says",
                figures={
                    "backend_tokens": told,
                    "tokenizer_tokens": counted,
                    "samples": min(drift.samples, QUANTITY_MAX),
                    "off_millionths": off // max(counted, 1),
                    "limit_millionths": bound,
                },
                labels={"model": drift.model, "producer_id": batch.producer_id[:ID_CHARS_MAX]},
            )
        )
