"""What a batch of usage does to the state: the hot loop of Taximeter.

Per event: validate, deduplicate, rate, sum. Everything that can be done once a batch, a tenant or a window is done there. An
event whose bytes are few and hold no rare field takes the short path, which reads only the fields that it can have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from billing.abuse import Evidence, Rules
from billing.accounts import AccountState
from billing.amounts import to_amount
from billing.identity import DEDUPE_KEY_BYTES, FINGERPRINT_BYTES, partition_of, tenant_prefix
from billing.limits import PLAIN_EVENT_BYTES_MAX, QUANTITY_MAX, SCHEMA_VERSION, TIME_MS_MAX
from billing.prices import Rate
from billing.rating import FREE_OUTCOMES, cost_pico, event_cost_pico, token_quantities, unit_quantities
from billing.sequences import ProducerSequences
from billing.state import DAY_MS, LedgerState
from billing.v1.ledger_pb2 import (
    DROP_REASON_CONFLICT,
    DROP_REASON_DUPLICATE,
    DROP_REASON_FORWARDED,
    DROP_REASON_INVALID,
    DROP_REASON_TOO_FAR_IN_FUTURE,
    DROP_REASON_TOO_OLD,
    Dropped,
    DropReason,
    LedgerRecord,
    RememberedKeys,
    UsageApplied,
)
from billing.v1.usage_pb2 import (
    OUTCOME_REJECTED,
    REFUSAL_REASON_PROMPT_TOO_LARGE,
    RawUsageBatch,
    UsageBatch,
    UsageEvent,
)
from billing.validation import event_problem
from billing.windows import MINUTE_MS, Key, Window

# The wire tags of cache_write_tokens … units, backfill and attributes, and refusal_reason. Where none of these byte pairs
# stands in an event, each of those fields is empty; where one does, it may be (a pair can stand inside a text).
_RARE = re.compile(rb"[\x80\x88\x90\x98\xa0\xaa\xe8\xf0\xfa]\x01")
_LOW = (1 << 64) - 1
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Forward:
    """Events that were sent to the wrong partition: `value` is a UsageBatch for `partition`."""

    partition: int
    value: bytes


class _Sum:
    """What this batch adds to one window."""

    __slots__ = (
        "always_rate",
        "cost",
        "events",
        "input",
        "limit",
        "other",
        "output",
        "price_cached",
        "price_input",
        "price_output",
        "rate",
        "read",
        "refused",
        "units",
        "unrated",
    )

    def __init__(self, limit: int) -> None:
        self.events = 0
        self.refused = 0
        self.unrated = 0
        self.cost = 0
        self.input = 0
        self.output = 0
        self.read = 0
        # Classes 3 … 7, where any came.
        self.other: list[int] | None = None
        self.units: dict[str, int] | None = None
        self.limit = limit
        # The rate of everything in this window, where the book cannot change within it.
        self.rate: Rate | None = None
        self.always_rate = False
        self.price_input = 0
        self.price_output = 0
        self.price_cached = 0

    def fix_rate(self, rate: Rate) -> None:
        self.rate = rate
        self.always_rate = True
        self.price_input, self.price_output, self.price_cached = rate.token_pico[:3]


class _Batch:
    """One batch on its way into the state."""

    def __init__(self, state: LedgerState, batch: UsageBatch, raws: list[bytes], log_time_ms: int) -> None:
        self.state = state
        self.batch = batch
        self.raws = raws
        self.log_time_ms = log_time_ms
        self.sums: dict[tuple[str, str, str, int, int, int], _Sum] = {}
        self.evidence: dict[str, Evidence] = {}
        self.limits: dict[str, int] = {}
        self.dropped: list[Dropped] = []
        self.forwards: dict[int, list[bytes]] = {}
        self.costs: list[int] = []
        self.versions: list[int] = []
        self.remembered: dict[int, tuple[list[bytes], list[bytes]]] = {}
        self.duplicates = 0
        self.conflicts = 0

    def tenant_evidence(self, tenant_id: str) -> Evidence:
        found = self.evidence.get(tenant_id)
        if found is None:
            found = self.evidence[tenant_id] = Evidence()
        return found

    def account(self, tenant_id: str) -> AccountState:
        account = self.state.accounts.get(tenant_id)
        if account is None:
            settings = self.state.settings
            account = AccountState(tenant_id, settings.default_currency, plan=settings.default_plan)
            self.state.accounts[tenant_id] = account
        return account

    def drop(self, index: int, reason: DropReason.ValueType, detail: str = "") -> Dropped:
        dropped = Dropped(index=index, reason=reason, detail=detail)
        self.dropped.append(dropped)
        return dropped

    def run(self) -> None:
        state = self.state
        events = self.batch.events
        raws = self.raws
        log_time_ms = self.log_time_ms
        settings = state.settings
        oldest_ms = log_time_ms - settings.dedupe_horizon_ms
        alert_after_ms = log_time_ms + settings.future_alert_ms
        horizon_ms = settings.dedupe_horizon_ms
        seen_day = (log_time_ms + horizon_ms) // DAY_MS

        tenant_ids = [event.tenant_id for event in events]
        request_ids = [event.request_id for event in events]
        here = self._tenants_here(set(tenant_ids))
        key = settings.dedupe_key
        prefixes = {tenant_id: tenant_prefix(tenant_id) for tenant_id in set(tenant_ids)}
        digests = [
            blake2b(prefixes[tenant_id] + request_id.encode(), digest_size=DEDUPE_KEY_BYTES, key=key).digest()
            for tenant_id, request_id in zip(tenant_ids, request_ids, strict=True)
        ]
        fingerprints = [blake2b(raw, digest_size=FINGERPRINT_BYTES).digest() for raw in raws]
        known = state.seen.find(digests)
        fresh: dict[bytes, bytes] = {}

        sums = self.sums
        costs = self.costs
        versions = self.versions
        rare = _RARE.search
        day_digests: list[bytes] = []
        day_fingerprints: list[bytes] = []
        self.remembered[seen_day] = (day_digests, day_fingerprints)
        for index, event in enumerate(events):
            tenant_id = tenant_ids[index]
            raw = raws[index]
            ended_ms = event.ended_ms
            input_tokens = event.uncached_input_tokens
            output_tokens = event.output_tokens
            read_tokens = event.cache_read_tokens
            model = event.model
            plain = len(raw) <= PLAIN_EVENT_BYTES_MAX and rare(raw) is None
            if (
                not plain
                or (input_tokens | output_tokens | read_tokens) >= QUANTITY_MAX
                or not (0 < event.started_ms <= ended_ms <= TIME_MS_MAX)
                or not (tenant_id and model and request_ids[index])
            ):
                problem = event_problem(event)
                if problem is not None:
                    self.drop(index, DROP_REASON_INVALID, problem)
                    continue
            if not here[tenant_id]:
                self._send_on(index, tenant_id, raw)
                continue
            digest = digests[index]
            before = known[index] or fresh.get(digest)
            if before is not None:
                self._again(index, event, request_ids[index], before == fingerprints[index])
                continue
            if ended_ms > alert_after_ms or ended_ms < oldest_ms:
                if not self._time_allowed(index, event):
                    continue
            window_key = (
                tenant_id,
                event.project_id,
                model,
                event.operation,
                event.service_class,
                ended_ms // MINUTE_MS,
            )
            total = sums.get(window_key)
            if total is None:
                total = sums[window_key] = self._open_sum(window_key)
            total.events += 1
            if plain and total.always_rate and event.outcome not in FREE_OUTCOMES:
                cost = (
                    input_tokens * total.price_input
                    + output_tokens * total.price_output
                    + read_tokens * total.price_cached
                )
                total.input += input_tokens
                total.output += output_tokens
                total.read += read_tokens
                total.cost += cost
                costs.append(cost)
                versions.append(total.rate.version)  # type: ignore[union-attr]
            else:
                self._add_any(event, total, window_key)
            if input_tokens + read_tokens > total.limit:
                self.tenant_evidence(tenant_id).oversized.append((request_ids[index], input_tokens + read_tokens))
            fresh[digest] = fingerprints[index]
            if ended_ms > log_time_ms and (ended_ms + horizon_ms) // DAY_MS != seen_day:
                later = self.remembered.setdefault((ended_ms + horizon_ms) // DAY_MS, ([], []))
                later[0].append(digest)
                later[1].append(fingerprints[index])
            else:
                day_digests.append(digest)
                day_fingerprints.append(fingerprints[index])

    def _tenants_here(self, tenant_ids: set[str]) -> dict[str, bool]:
        state = self.state
        partitions = state.settings.partitions
        return {tenant_id: partition_of(tenant_id, partitions) == state.partition for tenant_id in tenant_ids}

    def _send_on(self, index: int, tenant_id: str, raw: bytes) -> None:
        partition = partition_of(tenant_id, self.state.settings.partitions)
        if self.batch.forwarded:
            self.drop(
                index,
                DROP_REASON_INVALID,
                f"tenant_id: {tenant_id} lives in partition {partition} and was sent on once already; partition by murmur2",
            )
            return
        self.forwards.setdefault(partition, []).append(raw)
        self.drop(index, DROP_REASON_FORWARDED, f"partition {partition}")

    def _again(self, index: int, event: UsageEvent, request_id: str, same: bool) -> None:
        account = self.account(event.tenant_id)
        evidence = self.tenant_evidence(event.tenant_id)
        if same:
            self.duplicates += 1
            account.duplicates += 1
            evidence.duplicates.append(request_id)
            self.drop(index, DROP_REASON_DUPLICATE)
            return
        self.conflicts += 1
        account.conflicts += 1
        evidence.conflicts.append(request_id)
        rate = self.state.books.rate(
            account.currency, event.ended_ms, event.model, event.operation, event.service_class
        )
        dropped = self.drop(
            index,
            DROP_REASON_CONFLICT,
            f"request_id: {request_id} came before with another payload; the first stays charged",
        )
        dropped.would_have_cost.CopyFrom(to_amount(event_cost_pico(event, rate)))

    def _time_allowed(self, index: int, event: UsageEvent) -> bool:
        settings = self.state.settings
        ahead_ms = event.ended_ms - self.log_time_ms
        if ahead_ms > settings.future_reject_ms:
            self.drop(
                index,
                DROP_REASON_TOO_FAR_IN_FUTURE,
                f"ended_ms: {event.ended_ms} is {ahead_ms} ms ahead of the ledger, over {settings.future_reject_ms}; "
                "set the server's clock and send it again",
            )
            return False
        if ahead_ms > 0:
            self.tenant_evidence(event.tenant_id).future.append((event.request_id, ahead_ms))
            return True
        if event.backfill:
            return True
        self.drop(
            index,
            DROP_REASON_TOO_OLD,
            f"ended_ms: {event.ended_ms} is older than the dedupe horizon of {settings.dedupe_horizon_ms} ms; import it as a "
            "backfill, which looks for earlier charges first",
        )
        return False

    def _open_sum(self, key: tuple[str, str, str, int, int, int]) -> _Sum:
        tenant_id, _, model, operation, service_class, minute = key
        account = self.account(tenant_id)
        limit = self.limits.get(tenant_id)
        if limit is None:
            limit = self.limits[tenant_id] = account.plan.prompt_tokens_max or _UNLIMITED
        total = _Sum(limit)
        books = self.state.books
        if books.constant_within(account.currency, minute * MINUTE_MS, (minute + 1) * MINUTE_MS):
            rate = books.rate(account.currency, minute * MINUTE_MS, model, operation, service_class)
            if rate is not None:
                total.fix_rate(rate)
        return total

    def _add_any(self, event: UsageEvent, total: _Sum, key: tuple[str, str, str, int, int, int]) -> None:
        """Any event at all: other classes, units, free outcomes, no rate, a book that changes within the minute."""
        outcome = event.outcome
        if outcome in FREE_OUTCOMES:
            total.refused += 1
            self.costs.append(0)
            self.versions.append(0)
            if outcome == OUTCOME_REJECTED and event.refusal_reason == REFUSAL_REASON_PROMPT_TOO_LARGE:
                prompt_tokens = event.uncached_input_tokens + event.cache_read_tokens
                if prompt_tokens <= total.limit:
                    self.tenant_evidence(key[0]).oversized.append((event.request_id, prompt_tokens))
            return
        tokens = token_quantities(event)
        units = unit_quantities(event)
        total.input += tokens[0]
        total.output += tokens[1]
        total.read += tokens[2]
        if any(tokens[3:]):
            other = total.other = total.other or [0] * 5
            for position, quantity in enumerate(tokens[3:]):
                other[position] += quantity
        if units:
            held = total.units = total.units or {}
            for unit, quantity in units.items():
                held[unit] = held.get(unit, 0) + quantity
        rate = total.rate
        if not total.always_rate:
            currency = self.account(key[0]).currency
            rate = self.state.books.rate(currency, event.ended_ms, key[2], key[3], key[4])
        if rate is None:
            total.unrated += 1
            self.costs.append(0)
            self.versions.append(0)
            self.tenant_evidence(key[0]).unrated.setdefault(key[2], []).append(event.request_id)
            return
        cost = cost_pico(tokens, units, rate)
        total.cost += cost
        self.costs.append(cost)
        self.versions.append(rate.version)


def apply_usage(
    state: LedgerState, value: bytes, batch: UsageBatch, raw: RawUsageBatch, record: LedgerRecord
) -> list[Forward]:
    """Apply a decoded batch (its bytes: `value`) to `state`, state its effect in `record`, return what must be sent on."""
    work = _Batch(state, batch, list(raw.events), record.log_time_ms)
    work.run()
    applied = UsageApplied(batch=value, dropped=work.dropped, duplicates=work.duplicates, conflicts=work.conflicts)
    _state_costs(work, applied)
    for day in sorted(work.remembered):
        digests, fingerprints = work.remembered[day]
        if digests:
            state.seen.remember(day, digests, fingerprints)
            entries = b"".join([part for pair in zip(digests, fingerprints, strict=True) for part in pair])
            applied.remembered.append(RememberedKeys(expires_day=day, entries=entries))
    record.usage.CopyFrom(applied)
    _add_sums(work, record)
    _judge(work, record)
    if batch.producer_id:
        _mark(state, batch, record)
    return [_forward(partition, raws) for partition, raws in sorted(work.forwards.items())]


def _state_costs(work: _Batch, applied: UsageApplied) -> None:
    costs = work.costs
    if max(costs, default=0) > _LOW:
        applied.cost_pico_low.extend([cost & _LOW for cost in costs])
        applied.cost_pico_high.extend([cost >> 64 for cost in costs])
    else:
        applied.cost_pico_low.extend(costs)
    versions = work.versions
    applied.price_versions.extend(versions[:1] if len(set(versions)) == 1 else versions)


def _add_sums(work: _Batch, record: LedgerRecord) -> None:
    state = work.state
    log_time_ms = record.log_time_ms
    for raw_key, total in work.sums.items():
        key = Key(*raw_key)
        account = state.accounts[key.tenant_id]
        window = state.windows.get(key)
        if window is None:
            window = state.windows[key] = Window(record.sequence, account.currency)
        tokens = window.tokens
        tokens[0] += total.input
        tokens[1] += total.output
        tokens[2] += total.read
        batch_tokens = total.input + total.output + total.read
        if total.other:
            for position, quantity in enumerate(total.other, start=3):
                tokens[position] += quantity
            batch_tokens += sum(total.other)
        for unit, quantity in (total.units or {}).items():
            window.units[unit] = window.units.get(unit, 0) + quantity
        window.events += total.events
        window.refused_events += total.refused
        window.unrated_events += total.unrated
        window.cost_pico += total.cost
        state.touch_window(key, window, log_time_ms)
        record.totals.append(window.to_total(key))
        account.events += total.events
        account.unrated_events += total.unrated
        account.spend_pico += total.cost
        minute_tokens = work.tenant_evidence(key.tenant_id).minute_tokens
        minute_tokens[key.minute] = minute_tokens.get(key.minute, 0) + batch_tokens


def _judge(work: _Batch, record: LedgerRecord) -> None:
    state = work.state
    rules = Rules(record.log_time_ms, state.settings.alert_cooldown_ms)
    if work.sums:
        _name_requests(work)
    for tenant_id in sorted(work.evidence):
        account = state.accounts[tenant_id]
        rules.look(account, work.evidence[tenant_id], account.plan.prompt_tokens_max)
        record.accounts.append(account.to_account(state.generation, record.sequence, record.log_time_ms))
    record.alerts.extend(rules.alerts)


def _name_requests(work: _Batch) -> None:
    """Give each tenant's evidence its last few requests of this batch, for rules that speak of all of them."""
    wanted = dict.fromkeys(work.evidence, 3)
    dropped = {entry.index for entry in work.dropped}
    for index in range(len(work.raws) - 1, -1, -1):
        if not wanted:
            return
        event = work.batch.events[index]
        left = wanted.get(event.tenant_id)
        if left and index not in dropped:
            work.evidence[event.tenant_id].request_ids.append(event.request_id)
            if left == 1:
                del wanted[event.tenant_id]
            else:
                wanted[event.tenant_id] = left - 1


def _mark(state: LedgerState, batch: UsageBatch, record: LedgerRecord) -> None:
    producer = state.producers.get(batch.producer_id)
    if producer is None:
        producer = state.producers[batch.producer_id] = ProducerSequences(batch.producer_id)
    producer.take(batch.first_sequence, len(batch.events), batch.highest_sequence, record.log_time_ms)
    record.producers.append(producer.to_mark())


def _forward(partition: int, raws: list[bytes]) -> Forward:
    """The same event bytes in a batch of nobody's numbering: the fingerprints stay, the sender's sequence is not touched."""
    head = UsageBatch(schema_version=SCHEMA_VERSION, forwarded=True).SerializeToString()
    return Forward(partition, head + RawUsageBatch(events=raws).SerializeToString())
