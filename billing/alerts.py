"""The life of alerts: what rules find becomes one active alert for each rule, tenant and subject, told sparingly.

Rules append what they find to a record; `settle` turns findings into what is told. The first finding raises the alert. While it
is active, a further one moves its figures (at most every few seconds) and is told once a cool-down, or at once where it has
become more severe. It is resolved when its rule has seen nothing for the time that the settings name, or says that it is over.
All in log time. What is told stands in `record.alerts`, what only moved in `record.alert_states`; both are absolute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from billing.accounts import AccountState
from billing.commands import CommandRefused
from billing.limits import (
    ALERT_ID_BYTES_MAX,
    ALERT_NOTE_CHARS_MAX,
    ALERTS_ACTIVE_MAX,
    ALERTS_MAX,
    RESTRICTED_KEY_BYTES_MAX,
    RESTRICTIONS_MAX,
    TIME_MS_MAX,
)
from billing.v1.account_pb2 import LedgerPosition, Restriction, RuleLimits
from billing.v1.alert_pb2 import (
    ALERT_RULE_BUDGET,
    ALERT_RULE_FORGED_RECORD,
    ALERT_RULE_KEY_PLACES,
    ALERT_RULE_MISSING_SEQUENCE,
    ALERT_RULE_SILENT_PRODUCER,
    ALERT_RULE_UNREGISTERED_PRODUCER,
    ALERT_STATE_ACKNOWLEDGED,
    ALERT_STATE_RAISED,
    ALERT_STATE_RESOLVED,
    ALERT_STATE_UPDATED,
    Alert,
    AlertRule,
)
from billing.v1.ledger_pb2 import Founding, LedgerRecord

# Of a ledger that was founded before its settings named it.
RESOLVE_MS = 15 * 60_000
# An active alert whose rule goes on finding is stated no more often than this.
_STATED_EVERY_MS = 5_000
# Active alerts of one rule about one tenant that tell subjects apart; further subjects share one.
_SUBJECTS_MAX = 8
_OTHERS = "(others)"
_NEVER_MS = TIME_MS_MAX + 1
# They say themselves when it is over, and when something is to be told.
_SELF_TOLD = frozenset((ALERT_RULE_MISSING_SEQUENCE, ALERT_RULE_SILENT_PRODUCER))
_PROMPT = _SELF_TOLD | {ALERT_RULE_BUDGET, ALERT_RULE_FORGED_RECORD, ALERT_RULE_UNREGISTERED_PRODUCER}


class Name(NamedTuple):
    """Of what there is one active alert at most."""

    rule: int
    tenant_id: str
    subject: str


def rule_name(rule: int) -> str:
    """As people read it: "token_burst"."""
    return AlertRule.Name(rule).removeprefix("ALERT_RULE_").lower()  # type: ignore[arg-type]  # a plain number names it too


def name_request_ids(request_ids: Iterable[str], count_max: int) -> list[str]:
    """The first few, whose bytes together stay in a bound: an active alert is stated in records of other batches too."""
    named: list[str] = []
    room = ALERT_ID_BYTES_MAX
    for request_id in request_ids:
        room -= len(request_id.encode())
        if room < 0 or len(named) == count_max:
            break
        named.append(request_id)
    return named


class Alerts:
    """The active alerts of a partition, each in its contract form, which is what is stated."""

    def __init__(self) -> None:
        # The log time of the next record that has something to resolve, or earlier.
        self.next_ms = _NEVER_MS
        self._active: dict[Name, Alert] = {}
        self._subjects: Counter[tuple[int, str]] = Counter()

    def wants(self, rule: int, tenant_id: str, subject: str, severity: int, now_ms: int, cooldown_ms: int) -> bool:
        """Whether a finding would change anything; else it need not be written down."""
        active = self._active.get(self._name(rule, tenant_id, subject))
        if active is None:
            return len(self._active) < ALERTS_ACTIVE_MAX
        if severity > active.severity or now_ms >= active.updated_ms + _STATED_EVERY_MS:
            return True
        return _has_cooled(active, now_ms, cooldown_ms)

    def settle(
        self, record: LedgerRecord, settings: Founding, accounts: Mapping[str, AccountState], rules: RuleLimits
    ) -> set[str]:
        """Tell what `record.alerts` holds as findings, and what is over. Returns tenants that a rule's action now restricts."""
        findings = []
        for found in record.alerts:
            finding = Alert()
            finding.CopyFrom(found)
            findings.append(finding)
        del record.alerts[:]
        restricted: set[str] = set()
        for finding in findings:
            told = self._take(finding, record, settings)
            account = accounts.get(finding.tenant_id)
            if told is not None and account is not None:
                own = account.plan.rules if account.plan.HasField("rules") else rules
                if _act(told, account, own, record.log_time_ms):
                    restricted.add(account.tenant_id)
                    self._put(told)
        if self.next_ms <= record.log_time_ms:
            self._resolve_due(record)
        return restricted

    def acknowledge(self, alert_id: str, by: str, note: str, record: LedgerRecord) -> None:
        """Note that somebody has taken it on, and tell it. Raises CommandRefused."""
        if len(note) > ALERT_NOTE_CHARS_MAX:
            raise CommandRefused(f"note: {len(note)} characters; give at most {ALERT_NOTE_CHARS_MAX}")
        alert = next((alert for alert in self._active.values() if alert.alert_id == alert_id), None)
        if alert is None:
            raise CommandRefused(f"alert_id: {alert_id[:80]} is not active here; it is resolved, or of another installation")
        now_ms = record.log_time_ms
        changed = Alert()
        changed.CopyFrom(alert)
        changed.acknowledged_ms, changed.acknowledged_by, changed.note = now_ms, by, note
        changed.updated_ms = now_ms
        # Told by `settle`, behind what this record finds itself.
        changed.state = ALERT_STATE_ACKNOWLEDGED
        record.alerts.append(changed)

    def set(self, stated: Alert) -> None:
        """Take what a record states."""
        if stated.state == ALERT_STATE_RESOLVED:
            self._drop(_name_of(stated))
        else:
            self._put(stated)

    def all(self) -> Iterator[Alert]:
        """Every active alert, in a stated order."""
        for name in sorted(self._active):
            yield self._active[name]

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _name(self, rule: int, tenant_id: str, subject: str) -> Name:
        name = Name(rule, tenant_id, subject)
        if subject and tenant_id and name not in self._active and self._subjects[rule, tenant_id] >= _SUBJECTS_MAX:
            return Name(rule, tenant_id, _OTHERS)
        return name

    def _take(self, finding: Alert, record: LedgerRecord, settings: Founding) -> Alert | None:
        """The alert as `record` tells it; None: it tells nothing of it."""
        name = self._name(finding.rule, finding.tenant_id, finding.subject)
        active = self._active.get(name)
        now_ms = record.log_time_ms
        if finding.state in (ALERT_STATE_ACKNOWLEDGED, ALERT_STATE_RESOLVED):
            # Nobody was told of it: of a ledger that is older than the life of alerts.
            return None if active is None else self._tell(_merged(active, finding), finding.state, record)
        if active is None and len(self._active) >= ALERTS_ACTIVE_MAX:
            return None
        if active is None:
            alert = finding
            alert.subject = name.subject
            alert.raised_ms = now_ms
            alert.alert_id = f"{record.generation.hex()[:12]}-{record.partition}-{record.sequence}-{len(record.alerts)}"
        else:
            alert = _merged(active, finding)
        alert.updated_ms = now_ms
        if not finding.resolves_ms and alert.rule not in _SELF_TOLD:
            alert.resolves_ms = now_ms + (settings.alert_resolve_ms or RESOLVE_MS)
        if active is None:
            return self._tell(alert, ALERT_STATE_RAISED, record)
        cooled = _has_cooled(active, now_ms, settings.alert_cooldown_ms)
        if alert.rule in _PROMPT or alert.severity > active.severity or cooled:
            return self._tell(alert, ALERT_STATE_UPDATED, record)
        record.alert_states.append(alert)
        self._put(alert)
        return None

    def _tell(self, alert: Alert, state: int, record: LedgerRecord) -> Alert:
        alert.state = state  # type: ignore[assignment]  # an AlertState
        alert.revision += 1
        alert.updated_ms = alert.told_ms = record.log_time_ms
        alert.index = len(record.alerts)
        alert.position.CopyFrom(LedgerPosition(generation=record.generation, sequence=record.sequence))
        # A replay sets what is told before what only moved: of an alert that did both, in that order, the latter is over.
        moved = [each for each in record.alert_states if _name_of(each) != _name_of(alert)]
        if len(moved) < len(record.alert_states):
            del record.alert_states[:]
            record.alert_states.extend(moved)
        told = record.alerts.add()
        told.CopyFrom(alert)
        self.set(told)
        return told

    def _resolve_due(self, record: LedgerRecord) -> None:
        """In a stated order, as many as the record has room for beside what it found; more wait for the next."""
        due = sorted(name for name, alert in self._active.items() if 0 < alert.resolves_ms <= record.log_time_ms)
        room = max(0, ALERTS_MAX - len(record.alerts) - len(record.alert_states))
        for name in due[:room]:
            alert = Alert()
            alert.CopyFrom(self._active[name])
            self._tell(alert, ALERT_STATE_RESOLVED, record)
        self.next_ms = min((alert.resolves_ms for alert in self._active.values() if alert.resolves_ms), default=_NEVER_MS)

    def _put(self, stated: Alert) -> None:
        name = _name_of(stated)
        if name not in self._active:
            self._subjects[name[:2]] += 1
        alert = Alert()
        alert.CopyFrom(stated)
        self._active[name] = alert
        if alert.resolves_ms:
            self.next_ms = min(self.next_ms, alert.resolves_ms)

    def _drop(self, name: Name) -> None:
        if self._active.pop(name, None) is not None:
            self._subjects[name[:2]] -= 1
            if not self._subjects[name[:2]]:
                del self._subjects[name[:2]]


def _has_cooled(active: Alert, now_ms: int, cooldown_ms: int) -> bool:
    """Whether it may be told again."""
    return now_ms >= active.told_ms + cooldown_ms and not active.acknowledged_ms


def _name_of(alert: Alert) -> Name:
    return Name(alert.rule, alert.tenant_id, alert.subject)


def _merged(active: Alert, finding: Alert) -> Alert:
    """The alert with the finding's evidence; who it is, since when and what was done stay."""
    alert = Alert()
    alert.CopyFrom(finding)
    alert.alert_id, alert.subject, alert.raised_ms = active.alert_id, active.subject, active.raised_ms
    alert.state, alert.revision, alert.told_ms = active.state, active.revision, active.told_ms
    alert.index, alert.action = active.index, active.action
    alert.position.CopyFrom(active.position)
    alert.severity = max(active.severity, finding.severity)
    if finding.state != ALERT_STATE_ACKNOWLEDGED:
        alert.acknowledged_ms, alert.acknowledged_by, alert.note = active.acknowledged_ms, active.acknowledged_by, active.note
    return alert


def _act(told: Alert, account: AccountState, rules: RuleLimits, now_ms: int) -> bool:
    """Restrict the tenant, or its key, where its plan says that this rule acts. `told` then says so."""
    action = next((action for action in rules.actions if action.rule == told.rule), None)
    if action is None or told.state not in (ALERT_STATE_RAISED, ALERT_STATE_UPDATED):
        return False
    key_id = told.subject if told.rule == ALERT_RULE_KEY_PLACES else ""
    until_ms = min(now_ms + action.duration_ms, TIME_MS_MAX)
    kept = [held for held in account.restrictions if (held.rule, held.key_id) != (told.rule, key_id) and held.until_ms > now_ms]
    if len(kept) >= RESTRICTIONS_MAX or len(key_id.encode()) > RESTRICTED_KEY_BYTES_MAX:
        return False
    restriction = Restriction(
        rule=told.rule,
        alert_id=told.alert_id,
        key_id=key_id,
        requests_per_minute=action.requests_per_minute,
        until_ms=until_ms,
    )
    account.restrictions = [*kept, restriction]
    whose = f"key {key_id}" if key_id else f"tenant {told.tenant_id}"
    what = f"{action.requests_per_minute} requests per minute" if action.requests_per_minute else "nothing"
    until = datetime.fromtimestamp(until_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    told.action = f"gateways let {what} of {whose} through until {until}"
    return True
