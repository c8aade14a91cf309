"""The first record of a ledger partition: everything that changes what a step gives stands in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from billing.alerts import RESOLVE_MS
from billing.chain import seal
from billing.completeness import MISSING_GRACE_MS, SILENCE_MS
from billing.drift import DRIFT_MILLIONTHS
from billing.key_ring import Keys
from billing.limits import SCHEMA_VERSION
from billing.registrations import EVERYONE
from billing.release import folded
from billing.rule_limits import DEFAULT_RULES, PLAN_RULE_DEFAULTS
from billing.state import DAY_MS, LedgerState
from billing.v1.account_pb2 import BILLING_MODE_PREPAID, LedgerPosition, Plan, ProducerRegistration, RuleLimits
from billing.v1.ledger_pb2 import CorrectedEvent, Founding, InputPosition, InvoiceSeries, LedgerRecord

GENERATION_BYTES = 16
DEDUPE_KEY_BYTES = 32
HORIZON_DAYS = 35


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """What a ledger is founded with; the same for all of its partitions, never changed after."""

    partitions: int
    dedupe_key: bytes
    dedupe_horizon_ms: int = HORIZON_DAYS * DAY_MS
    window_lateness_ms: int = 10 * 60_000
    future_alert_ms: int = 5 * 60_000
    future_reject_ms: int = DAY_MS
    alert_cooldown_ms: int = 10 * 60_000
    missing_grace_ms: int = MISSING_GRACE_MS
    silence_ms: int = SILENCE_MS
    alert_resolve_ms: int = RESOLVE_MS
    drift_millionths: int = DRIFT_MILLIONTHS
    default_currency: str = "USD"
    default_prompt_tokens_max: int = 0
    default_burst_tokens_floor: int = PLAN_RULE_DEFAULTS["burst_tokens_floor"]
    default_burst_factor: int = PLAN_RULE_DEFAULTS["burst_factor"]
    default_duplicate_flood_events: int = PLAN_RULE_DEFAULTS["duplicate_flood_events"]
    # Usage is taken of registered producers alone, from the first event on; else until a command says so.
    registered_producers_only: bool = False
    default_rules: RuleLimits = field(default_factory=lambda: DEFAULT_RULES)

    def __post_init__(self) -> None:
        if not 1 <= self.partitions <= 10_000:
            raise ValueError(f"partitions: {self.partitions}; a ledger has 1 to 10,000")
        if len(self.dedupe_key) != DEDUPE_KEY_BYTES:
            raise ValueError(f"dedupe_key: {len(self.dedupe_key)} bytes; give {DEDUPE_KEY_BYTES} random ones")
        if self.dedupe_horizon_ms < DAY_MS:
            raise ValueError(f"dedupe_horizon_ms: {self.dedupe_horizon_ms} is under a day; retries come later than that")

    def to_founding(self, founded_ms: int) -> Founding:
        """The contract form."""
        return Founding(
            partitions=self.partitions,
            dedupe_key=self.dedupe_key,
            dedupe_horizon_ms=self.dedupe_horizon_ms,
            window_lateness_ms=self.window_lateness_ms,
            future_alert_ms=self.future_alert_ms,
            future_reject_ms=self.future_reject_ms,
            alert_cooldown_ms=self.alert_cooldown_ms,
            missing_grace_ms=self.missing_grace_ms,
            silence_ms=self.silence_ms,
            alert_resolve_ms=self.alert_resolve_ms,
            drift_millionths=self.drift_millionths,
            founded_ms=founded_ms,
            default_currency=self.default_currency,
            default_plan=Plan(
                plan_id="default",
                billing_mode=BILLING_MODE_PREPAID,
                prompt_tokens_max=self.default_prompt_tokens_max,
                burst_tokens_floor=self.default_burst_tokens_floor,
                burst_factor=self.default_burst_factor,
                duplicate_flood_events=self.default_duplicate_flood_events,
                rules=self.default_rules,
            ),
        )


def found(
    settings: LedgerSettings, partition: int, generation: bytes, founded_ms: int, seal_key: Keys, writer: str
) -> tuple[LedgerRecord, bytes]:
    """The founding record of `partition` and its stored bytes. `generation` is 16 random bytes, one for all partitions."""
    return _founding_record(
        settings.to_founding(founded_ms),
        partition,
        generation,
        founded_ms,
        seal_key,
        writer,
        registrations=[ProducerRegistration(producer_id=EVERYONE, revoked=True)] if settings.registered_producers_only else (),
    )


def found_again(
    state: LedgerState, generation: bytes, founded_ms: int, seal_key: Keys, writer: str, *, inputs_kept: bool = False
) -> tuple[LedgerRecord, bytes]:
    """A founding record that carries on `state`, whose log is gone: the same settings, and the state stated in full.

    `inputs_kept`: the input logs are those that the state has read, and are read on from there; else from their beginnings.

    The accounts, keys, producer marks and price books of the state stand in the record, so that a reader that knows only the
    new log has them; windows are let go into their periods' lines, dedupe keys stay in the local store that carries on.
    """
    founding = Founding()
    founding.CopyFrom(state.settings)
    # Of a state that was itself carried on, the settings hold the books that it began with; all of them are stated below.
    founding.ClearField("price_books")
    founding.founded_ms = founded_ms
    founding.predecessor.CopyFrom(LedgerPosition(generation=state.generation, sequence=state.sequence))
    founding.predecessor_hash = state.record_hash
    return _founding_record(
        founding,
        state.partition,
        generation,
        max(founded_ms, state.log_time_ms),
        seal_key,
        writer,
        carried=state,
        registrations=state.registrations.all(),
        inputs=state.inputs if inputs_kept else {},
    )


def _founding_record(
    founding: Founding,
    partition: int,
    generation: bytes,
    log_time_ms: int,
    seal_key: Keys,
    writer: str,
    *,
    carried: LedgerState | None = None,
    registrations: Iterable[ProducerRegistration] = (),
    inputs: Mapping[str, int] | None = None,
) -> tuple[LedgerRecord, bytes]:
    if len(generation) != GENERATION_BYTES:
        raise ValueError(f"generation: {len(generation)} bytes; give {GENERATION_BYTES} random ones")
    record = LedgerRecord(
        schema_version=SCHEMA_VERSION,
        generation=generation,
        sequence=0,
        log_time_ms=log_time_ms,
        resumed_ms=log_time_ms,
        partition=partition,
        writer=writer,
        founding=founding,
        registrations=registrations,
        inputs=[InputPosition(topic=topic, offset=offset) for topic, offset in sorted((inputs or {}).items())],
    )
    if carried is not None:
        record.accounts.extend(
            carried.accounts[tenant_id].to_account(generation, 0, log_time_ms) for tenant_id in sorted(carried.accounts)
        )
        record.keys.extend(carried.keys[key_id] for key_id in sorted(carried.keys))
        record.producers.extend(carried.producers[p].to_mark() for p in sorted(carried.producers))
        record.leases.extend(lease.to_lease(generation, 0) for lease in carried.leases)
        record.quantities.extend(carried.quantities.all())
        record.credits.extend(carried.credits.all(log_time_ms))
        record.lines.extend(line.to_line() for line in folded(carried, generation, carried.windows))
        record.invoice_series.extend(
            InvoiceSeries(series=name, number=head.number, head_hash=head.hash) for name, head in sorted(carried.series.items())
        )
        record.budgets.extend(carried.budgets.all(generation))
        record.projects.extend(carried.all_projects())
        record.alert_states.extend(carried.alerts.all())
        record.key_places.extend(carried.places.all())
        record.corrected.extend(
            CorrectedEvent(key=key, adjustment_id=by.adjustment_id, corrected_ms=by.corrected_ms)
            for key, by in sorted(carried.corrected.items())
        )
        record.founding.price_books.extend(carried.books.all())
    return record, seal(record, seal_key)
