"""What a batch of usage does to the state: the hot path of Taximeter.

It works in columns (`usage_columns`): what is charged is found by looks over whole columns (`usage_admission`), and takes one
pass per window. What the abuse rules see of a batch is summed there too, by tenant and minute: they ask nothing of an event of
which nothing is unusual.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from billing.abuse import SUSPENSION_GRACE_MS, Evidence, MinuteUse, Rules, outlier_tokens
from billing.accounts import AccountState
from billing.budget_step import charge_budgets
from billing.drift import find_drifts
from billing.key_places import place_of
from billing.leases import Leases
from billing.limits import (
    PLACE_SAMPLES,
    SETTLED_LEASES_MAX,
    WINDOW_PARTS_HARD_MAX,
)
from billing.line_parts import add_rated
from billing.prices import Rate
from billing.rating import FREE_OUTCOMES, unit_quantities
from billing.registrations import Permission, alert_refused
from billing.release import release
from billing.schedules import Part
from billing.sequences import ProducerSequences, is_numbered
from billing.state import DAY_MS, LedgerState
from billing.terms_step import rate_by_terms
from billing.usage_admission import Admission, Forward
from billing.usage_columns import PROMPT_PLACES, UsageColumns
from billing.v1.account_pb2 import ACCOUNT_STATUS_CLOSED, ACCOUNT_STATUS_SUSPENDED
from billing.v1.ledger_pb2 import (
    LedgerRecord,
)
from billing.v1.usage_pb2 import (
    OUTCOME_CANCELLED,
    OUTCOME_REJECTED,
    REFUSAL_REASON_PROMPT_TOO_LARGE,
    UsageBatch,
)
from billing.validation import TOKEN_FIELDS
from billing.windows import MINUTE_MS, Key, Window

_LOW = (1 << 64) - 1
_REQUEST_IDS_NAMED = 3
_NO_PRICES = (0,) * len(TOKEN_FIELDS)


class _Batch:
    """One batch on its way into the state: its columns, and what came of it."""

    def __init__(self, state: LedgerState, value: bytes, batch: UsageBatch, log_time_ms: int, permitted: Permission) -> None:
        columns = UsageColumns(value, batch)
        self.state = state
        self.log_time_ms = log_time_ms
        self.columns = columns
        self.events = columns.events
        self.tenant_ids = columns.tenant_ids
        self.request_ids = columns.request_ids
        self.ended_ms = columns.ended_ms
        self.with_units = columns.with_units
        # Tenants that the producer may not bill.
        self.foreign = permitted.foreign(columns.tenants)
        self.admission = Admission(state, columns, log_time_ms, self.foreign, forwarded=batch.forwarded)
        self.evidence = self.admission.evidence
        self.costs = [0] * len(columns)
        # Price book versions and the events that each rated.
        self.rated: list[tuple[int, Sequence[int]]] = []
        # Of events whose price has terms: what each is made of.
        self.parts: dict[int, list[Part]] = {}

    # -- rating and sums: one pass per window ---------------------------------------------------------------------------

    def charge(self, admitted: Sequence[int], record: LedgerRecord) -> None:
        """Rate the admitted events and add them to their windows and accounts."""
        state, columns = self.state, self.columns
        if state.books.any_terms:
            self.parts = rate_by_terms(state, self.events, admitted, self.costs, record)
        # What most batches have none of is looked for once.
        outcomes = set(columns.outcomes)
        free, cancelled = not FREE_OUTCOMES.isdisjoint(outcomes), OUTCOME_CANCELLED in outcomes
        largest_prompt = columns.largest_prompt_tokens()
        first_minute, last_minute = columns.first_ended_ms // MINUTE_MS, columns.last_ended_ms // MINUTE_MS
        book_changes = state.books.change_within(first_minute * MINUTE_MS, (last_minute + 1) * MINUTE_MS)
        add_total = record.totals.add
        for key, indexes in columns.windows_of(admitted).items():
            account = state.account_of(key[0])
            evidence = self.evidence[key[0]]
            use = evidence.minutes.get(key[5])
            if use is None:
                use = evidence.minutes[key[5]] = MinuteUse()
                evidence.prompt_limit = account.plan.prompt_tokens_max
                evidence.outlier_tokens = outlier_tokens(account, state.rule_limits(account))
            limit = evidence.prompt_limit
            for rate, rated in self._rates(key, account.currency, indexes, book_changes):
                window = self._window((*key, rate.version if rate else 0), account.currency, record)
                evidence.last_indexes = rated
                count = len(rated)
                window.events += count
                account.events += count
                use.requests += count
                if limit and largest_prompt > limit:
                    evidence.oversized += self._prompts_over(rated, limit)
                if 0 < evidence.outlier_tokens < largest_prompt:
                    evidence.outliers += self._prompts_over(rated, evidence.outlier_tokens)
                charged = self._set_free_aside(rated, window, limit, evidence, use) if free else rated
                if cancelled:
                    self._find_cancelled(charged, evidence, use)
                if self.with_units:
                    self._add_units(charged, window)
                cost = self._rate(rate, window, account, evidence, use, charged)
                use.cost_pico += cost
                window.cost_pico += cost
                account.spend_pico += cost
                evidence.cost_pico += cost
                state.touch_window(window, self.log_time_ms)
                add_total().CopyFrom(window.to_total())

    def _window(self, key: tuple[str, str, str, int, int, int, int], currency: str, record: LedgerRecord) -> Window:
        """The open window of `key` that takes usage in `currency`: where there is none, this record opens it."""
        windows = self.state.windows
        window = windows.get(key)  # type: ignore[call-overload]  # a plain tuple finds its Key
        if window is None or not window.takes(currency):
            if window is not None:
                release(self.state, window, record)
            window = Window(Key(*key), record.sequence, currency)
            windows[window.key] = window
        return window  # type: ignore[no-any-return]

    def _set_free_aside(self, indexes: list[int], window: Window, limit: int, evidence: Evidence, use: MinuteUse) -> list[int]:
        outcomes = self.columns.outcomes
        refused = [index for index in indexes if outcomes[index] in FREE_OUTCOMES]
        window.refused_events += len(refused)
        by_gateway = [self.request_ids[index] for index in refused if outcomes[index] == OUTCOME_REJECTED]
        evidence.refused += by_gateway
        use.refused += len(by_gateway)
        self._find_refused_prompts(refused, limit, evidence)
        return [index for index in indexes if outcomes[index] not in FREE_OUTCOMES]

    def _add_units(self, indexes: Sequence[int], window: Window) -> None:
        for index in self.with_units.intersection(indexes):
            for unit, quantity in unit_quantities(self.events[index]).items():
                window.units[unit] = window.units.get(unit, 0) + quantity

    def _rates(
        self, key: tuple[str, str, str, int, int, int], currency: str, indexes: list[int], book_changes: bool
    ) -> Iterable[tuple[Rate | None, list[int]]]:
        """What rates `indexes`: one version of the book, but for a minute in which another one takes effect."""
        tenant_id, _, model, operation, service_class, minute = key
        books = self.state.books
        start_ms = minute * MINUTE_MS
        if not book_changes or not books.change_within(start_ms, start_ms + MINUTE_MS, currency):
            return ((books.rate(currency, start_ms, model, operation, service_class, tenant_id), indexes),)
        by_version: dict[int, tuple[Rate | None, list[int]]] = {}
        for index in indexes:
            rate = books.rate(currency, self.ended_ms[index], model, operation, service_class, tenant_id)
            by_version.setdefault(rate.version if rate else 0, (rate, []))[1].append(index)
        return by_version.values()

    def _rate(
        self,
        rate: Rate | None,
        window: Window,
        account: AccountState,
        evidence: Evidence,
        use: MinuteUse,
        indexes: Sequence[int],
    ) -> int:
        """Add what `indexes` used to the window and the minute. Returns what they cost, which is also noted for each."""
        flat = rate.token_pico if rate is not None and rate.terms is None else _NO_PRICES
        noted = self.costs
        cost = 0
        for place, column in self.columns.tokens.items():
            pico = flat[place]
            added = 0
            for index in indexes:
                quantity = column[index]
                added += quantity
                noted[index] += quantity * pico
            window.tokens[place] += added
            use.tokens += added
            if place in PROMPT_PLACES:
                use.prompt_tokens += added
            cost += added * pico
        if rate is None:
            window.unrated_events += len(indexes)
            account.unrated_events += len(indexes)
            if indexes:
                unrated = evidence.unrated.setdefault(window.key.model, [])
                unrated.extend([self.request_ids[index] for index in indexes])
            return 0
        self.rated.append((rate.version, indexes))
        if rate.terms is not None:
            # `rate_by_terms` has noted them.
            for index in indexes:
                add_rated(window.parts, self.parts[index], WINDOW_PARTS_HARD_MAX)
            return sum([noted[index] for index in indexes])
        if self.with_units:
            for index in self.with_units.intersection(indexes):
                units = unit_quantities(self.events[index]).items()
                of_units = sum(quantity * rate.unit_pico.get(unit, 0) for unit, quantity in units)
                noted[index] += of_units
                cost += of_units
        return cost

    def _prompts_over(self, indexes: Iterable[int], limit: int) -> list[tuple[str, int]]:
        prompts = [(self.request_ids[index], self.columns.prompt_tokens(index)) for index in indexes]
        return [(request_id, tokens) for request_id, tokens in prompts if tokens > limit]

    def _find_cancelled(self, indexes: Iterable[int], evidence: Evidence, use: MinuteUse) -> None:
        outcomes = self.columns.outcomes
        cancelled = [self.request_ids[index] for index in indexes if outcomes[index] == OUTCOME_CANCELLED]
        evidence.cancelled += cancelled
        use.cancelled += len(cancelled)

    def _find_refused_prompts(self, refused: Iterable[int], limit: int, evidence: Evidence) -> None:
        """Prompts that a gateway refused by a limit of its own, which the plan does not state."""
        for index in refused:
            if self.columns.outcomes[index] != OUTCOME_REJECTED:
                continue
            prompt_tokens = self.columns.prompt_tokens(index)
            too_large = self.events[index].refusal_reason == REFUSAL_REASON_PROMPT_TOO_LARGE
            if too_large and not (limit and prompt_tokens > limit):
                evidence.oversized.append((self.request_ids[index], prompt_tokens))

    # -- what the record states -----------------------------------------------------------------------------------------

    def remember(self, admitted: Sequence[int], record: LedgerRecord) -> None:
        """Keep the keys of the admitted events until max(seen, ended) + horizon is over, in days."""
        known, horizon_ms = self.admission, self.state.settings.dedupe_horizon_ms
        first_day = (self.log_time_ms + horizon_ms) // DAY_MS
        if len(admitted) == len(self.columns) and (self.columns.last_ended_ms + horizon_ms) // DAY_MS <= first_day:
            self._remember_day(first_day, known.digests, known.fingerprints, record)
            return
        days: defaultdict[int, list[int]] = defaultdict(list)
        for index in admitted:
            days[max(first_day, (self.ended_ms[index] + horizon_ms) // DAY_MS)].append(index)
        for day in sorted(days):
            digests = [known.digests[index] for index in days[day]]
            self._remember_day(day, digests, [known.fingerprints[index] for index in days[day]], record)

    def _remember_day(self, day: int, digests: list[bytes], fingerprints: list[bytes], record: LedgerRecord) -> None:
        self.state.seen.remember(day, digests, fingerprints)
        in_turn = [b""] * (2 * len(digests))
        in_turn[::2], in_turn[1::2] = digests, fingerprints
        record.usage.remembered.add(expires_day=day, entries=b"".join(in_turn))

    def state_costs(self, admitted: Sequence[int], record: LedgerRecord) -> None:
        """Cost and price version beside each admitted event, in their order."""
        costs = self.costs if len(admitted) == len(self.columns) else [self.costs[index] for index in admitted]
        if max(costs) > _LOW:
            record.usage.cost_pico_low.extend([cost & _LOW for cost in costs])
            record.usage.cost_pico_high.extend([cost >> 64 for cost in costs])
        else:
            record.usage.cost_pico_low.extend(costs)
        versions = {version for version, _ in self.rated}
        if len(versions) == 1 and sum([len(indexes) for _, indexes in self.rated]) == len(admitted):
            record.usage.price_versions.extend(versions)
            return
        # Several versions, or some events that nothing rated: one entry each, 0 for unrated.
        of_index = dict.fromkeys(admitted, 0)
        for version, indexes in self.rated:
            of_index.update(dict.fromkeys(indexes, version))
        record.usage.price_versions.extend(of_index.values() if any(of_index.values()) else [0])

    def charge_leases(self, batch: UsageBatch, admitted: Sequence[int], record: LedgerRecord) -> None:
        """What the batch's producer held of the tenants' balances for these events is spend now."""
        held = self.state.leases.held_by(batch.producer_id)
        if not held:
            return
        for tenant_id in sorted(self.evidence.keys() & held.keys()):
            epochs, account = held[tenant_id], self.state.accounts[tenant_id]
            if batch.first_sequence > max(lease.last_sequence for lease in epochs):
                costs = [(batch.first_sequence, self.evidence[tenant_id].cost_pico)]
            else:
                costs = [(batch.first_sequence + i, self.costs[i]) for i in admitted if self.tenant_ids[i] == tenant_id]
            changed = Leases.charge(epochs, account, costs)
            record.leases.extend(lease.to_lease(self.state.generation, record.sequence) for lease in changed)

    def _find_places(self, admitted: Sequence[int], record: LedgerRecord) -> None:
        """Where keys were used from: asked of some events of a large batch, other ones in each record."""
        if not self.columns.any_keys:
            return
        with_attributes = self.columns.any_attributes
        stride = -(-len(admitted) // PLACE_SAMPLES)
        for index in admitted[record.sequence % stride :: stride]:
            event = self.events[index]
            key_id, place = event.api_key_id, place_of(event, with_attributes=with_attributes)
            if key_id and place:
                tenant_id = self.tenant_ids[index]
                places = self.state.places.note(tenant_id, key_id, place, record)
                if len(places) > 1:
                    evidence = self.evidence[tenant_id]
                    _, request_ids = evidence.places.get(key_id, ((), []))
                    evidence.places[key_id] = places, [*request_ids, self.request_ids[index]]

    def _find_suspended(self, admitted: Sequence[int], tenant_id: str, since_ms: int) -> list[str]:
        """Charged requests of the tenant that began after it was suspended or closed, and gateways had time to hear of it."""
        after_ms = since_ms + SUSPENSION_GRACE_MS
        columns = self.columns
        return [
            self.request_ids[index]
            for index in admitted
            if self.tenant_ids[index] == tenant_id
            and columns.started_ms[index] > after_ms
            and columns.outcomes[index] not in FREE_OUTCOMES
        ]

    def judge(self, admitted: Sequence[int], record: LedgerRecord) -> None:
        """Let the abuse rules look at every tenant that the batch touched, then state its account."""
        state = self.state
        rules = Rules(self.log_time_ms, state.settings.alert_cooldown_ms, state.alerts)
        if admitted:
            self._find_places(admitted, record)
        for tenant_id in sorted(self.evidence):
            account = state.accounts[tenant_id]
            evidence = self.evidence[tenant_id]
            evidence.request_ids = [self.request_ids[index] for index in evidence.last_indexes[-_REQUEST_IDS_NAMED:]]
            if account.status in (ACCOUNT_STATUS_SUSPENDED, ACCOUNT_STATUS_CLOSED):
                evidence.suspended = self._find_suspended(admitted, tenant_id, account.status_ms)
            rules.look(account, evidence, state.rule_limits(account))
            record.accounts.add().CopyFrom(account.to_account(state.generation, record.sequence, self.log_time_ms))
        record.alerts.extend(rules.found)


def apply_usage(
    state: LedgerState, value: bytes, batch: UsageBatch, record: LedgerRecord, permitted: Permission
) -> list[Forward]:
    """Apply a decoded batch (its bytes: `value`) to `state`, state its effect in `record`, return what must be sent on."""
    record.usage.batch = value
    work = _Batch(state, value, batch, record.log_time_ms, permitted)
    admission = work.admission
    admitted = admission.admit()
    if admitted:
        work.charge(admitted, record)
        work.remember(admitted, record)
        work.state_costs(admitted, record)
        work.charge_leases(batch, admitted, record)
        charge_budgets(state, work.columns, admitted, work.costs, record)
    record.usage.dropped.extend(admission.dropped)
    record.usage.duplicates = admission.duplicates
    record.usage.conflicts = admission.conflicts
    released = _mark(state, batch, record) if is_numbered(batch) else set()
    work.judge(admitted, record)
    if work.foreign:
        foreign = [index for index, tenant_id in enumerate(work.tenant_ids) if tenant_id in work.foreign]
        alert_refused(
            record,
            state.registrations,
            permitted,
            batch.producer_id,
            state.settings.alert_cooldown_ms,
            tenant_ids=sorted(work.foreign),
            request_ids=[work.request_ids[index] for index in foreign],
            events=len(foreign),
        )
    if batch.count_drifts:
        find_drifts(state, batch, record)
    for tenant_id in sorted(released - work.evidence.keys()):
        account = state.accounts[tenant_id]
        record.accounts.append(account.to_account(state.generation, record.sequence, record.log_time_ms))
    return admission.sent_on()


def _mark(state: LedgerState, batch: UsageBatch, record: LedgerRecord) -> set[str]:
    """Note the producer's numbering. Returns tenants of which an earlier start of the producer holds nothing any more."""
    producer = state.producers.get(batch.producer_id)
    if producer is None:
        producer = state.producers[batch.producer_id] = ProducerSequences(batch.producer_id)
    producer.take(batch.first_sequence, len(batch.events), batch.highest_sequence, record.log_time_ms, closed=batch.closed)
    record.producers.append(producer.to_mark())
    gone = state.leases.settle(batch.producer_id, producer.covered, state.accounts, SETTLED_LEASES_MAX)
    record.leases.extend(lease.to_lease(state.generation, record.sequence) for lease in gone)
    return {lease.tenant_id for lease in gone}
