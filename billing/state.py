"""What one ledger partition knows. `step` moves it by one input, `replay.apply` by one record; both lead to the same digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from billing import credit
from billing.accounts import AccountState
from billing.alerts import Alerts
from billing.budgets import Budgets
from billing.key_places import HOUR_MS, Places
from billing.leases import Leases
from billing.limits import RELEASED_BYTES_MAX, RELEASED_WINDOWS_MAX
from billing.period_lines import KEPT_MS as LINES_KEPT_MS
from billing.period_lines import PeriodLines
from billing.prices import PriceBooks
from billing.quantities import KEPT_MS, Quantities
from billing.registrations import Registrations
from billing.sequences import ProducerSequences
from billing.v1.account_pb2 import ApiKey, Project, RuleLimits
from billing.v1.ledger_pb2 import Founding
from billing.windows import MINUTE_MS, Key, Window

DAY_MS = 86_400_000
# How long it is known that an event was voided or amended: as long as the lines of its period.
CORRECTED_KEPT_MS = LINES_KEPT_MS


class SeenKeys(Protocol):
    """The memory of what was charged: 16-byte dedupe keys and the 8-byte fingerprint of what was said under each."""

    def find(self, digests: Sequence[bytes]) -> list[bytes | None]:
        """For each digest the fingerprint that it was remembered with, or None: exact, no false answers either way."""
        ...

    def remember(self, expires_day: int, digests: Sequence[bytes], fingerprints: Sequence[bytes]) -> None:
        """Remember these until `expires_day` (days since 1970) is over."""
        ...

    def expire(self, through_day: int) -> None:
        """Let go of what expires on `through_day` or before."""
        ...

    def digest(self) -> bytes:
        """SHA-256 over what is remembered, whatever it is kept in: each key once with its fingerprint and its day (two
        bytes), big-endian, sorted."""
        ...


class MemorySeenKeys:
    """SeenKeys in plain dictionaries: for tests, audits and simulations."""

    def __init__(self) -> None:
        self.days: dict[int, dict[bytes, bytes]] = {}

    def find(self, digests: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(digests)
        for day in self.days.values():
            for index, digest in enumerate(digests):
                known = day.get(digest)
                if known is not None:
                    found[index] = known
        return found

    def remember(self, expires_day: int, digests: Sequence[bytes], fingerprints: Sequence[bytes]) -> None:
        self.days.setdefault(expires_day, {}).update(zip(digests, fingerprints, strict=True))

    def expire(self, through_day: int) -> None:
        for day in [day for day in self.days if day <= through_day]:
            del self.days[day]

    def digest(self) -> bytes:
        rows = [key + said + day.to_bytes(2, "big") for day, keys in self.days.items() for key, said in keys.items()]
        return hashlib.sha256(b"".join(sorted(rows))).digest()


class SeriesHead(NamedTuple):
    """The last invoice of a series: its number, and the SHA-256 of its stored bytes."""

    number: int
    hash: bytes


class Corrected(NamedTuple):
    """How an event was corrected."""

    adjustment_id: str
    corrected_ms: int


class LedgerState:
    """The state of one partition after a record. Made by `replay.apply` of a founding record, or loaded from a local store."""

    def __init__(self, seen: SeenKeys) -> None:
        self.seen = seen
        self.partition = 0
        self.generation = b""
        self.sequence = -1
        self.record_hash = b""
        self.log_time_ms = 0
        # When the ledger went on after it had stood still: see `completeness`.
        self.resumed_ms = 0
        self.settings = Founding()
        self.inputs: dict[str, int] = {}
        self.books = PriceBooks()
        self.accounts: dict[str, AccountState] = {}
        self.keys: dict[str, ApiKey] = {}
        self.windows: dict[Key, Window] = {}
        self.registrations = Registrations()
        self.producers: dict[str, ProducerSequences] = {}
        self.leases = Leases()
        self.quantities = Quantities()
        self.credits = credit.Credits()
        self.lines = PeriodLines()
        # Of invoices, by its name.
        self.series: dict[str, SeriesHead] = {}
        self.budgets = Budgets()
        self.alerts = Alerts()
        # Where keys are used from.
        self.places = Places()
        # By tenant and project.
        self.projects: dict[str, dict[str, Project]] = {}
        # Dedupe key of an event that was voided or amended: by which command, and when.
        self.corrected: dict[bytes, Corrected] = {}
        # Command ID to when it was issued: it is known for as long as a repeat would not be refused for its age.
        self.commands: dict[str, int] = {}
        self.expired_through_day = 0
        self._release: dict[int, set[Key]] = {}

    @property
    def founded(self) -> bool:
        """Whether a founding record has been applied."""
        return self.sequence >= 0

    def all_projects(self) -> Iterator[Project]:
        """Every project, in a stated order."""
        for tenant_id in sorted(self.projects):
            projects = self.projects[tenant_id]
            yield from (projects[project_id] for project_id in sorted(projects))

    def account_of(self, tenant_id: str) -> AccountState:
        """The tenant's account; where nobody has created it, a new one of the default plan."""
        account = self.accounts.get(tenant_id)
        if account is None:
            settings = self.settings
            account = AccountState(tenant_id, settings.default_currency, plan=settings.default_plan)
            self.accounts[tenant_id] = account
        return account

    def rule_limits(self, account: AccountState) -> RuleLimits:
        """When the rules speak of a tenant: its plan says so, else the ledger's founding."""
        plan = account.plan
        return plan.rules if plan.HasField("rules") else self.settings.default_plan.rules

    def touch_window(self, window: Window, log_time_ms: int) -> None:
        """Note that `window` changed at `log_time_ms`: it stays open until both its end and this are past the lateness."""
        end_ms = (window.key[5] + 1) * MINUTE_MS
        last_ms = (end_ms if end_ms > log_time_ms else log_time_ms) + self.settings.window_lateness_ms
        due = last_ms // MINUTE_MS + 1
        if window.release_minute != due:
            self._leave_minute(window)
            window.release_minute = due
            self._release.setdefault(due, set()).add(window.key)

    def _leave_minute(self, window: Window) -> None:
        """A replay never asks what is due: what stayed under an earlier minute would be as much as the log has windows."""
        keys = self._release.get(window.release_minute)
        if keys is not None:
            keys.discard(window.key)
            if not keys:
                del self._release[window.release_minute]

    def due_windows(self, log_time_ms: int) -> list[Key]:
        """Windows to let go now, at most RELEASED_WINDOWS_MAX, in a stated order. The caller removes them."""
        now = log_time_ms // MINUTE_MS
        due: list[Key] = []
        room = RELEASED_BYTES_MAX
        for minute in sorted(self._release):
            if minute > now or len(due) >= RELEASED_WINDOWS_MAX or room <= 0:
                break
            keys = self._release[minute]
            stale = {key for key in keys if (w := self.windows.get(key)) is None or w.release_minute != minute}
            keys -= stale
            for key in sorted(keys)[: RELEASED_WINDOWS_MAX - len(due)]:
                room -= len(key.tenant_id.encode()) + len(key.project_id.encode()) + len(key.model.encode())
                if room < 0:
                    break
                due.append(key)
            if not keys:
                del self._release[minute]
        return due

    def remove_windows(self, keys: Iterable[Key]) -> None:
        """Let go of `keys`."""
        for key in keys:
            self._leave_minute(self.windows.pop(key))

    def forget(self, log_time_ms: int) -> None:
        """Let go of command IDs, periods' counters and lines, and ended grants that are too old: once a day, by a tick."""
        before_ms = log_time_ms - self.settings.dedupe_horizon_ms
        for command_id in [c for c, issued_ms in self.commands.items() if issued_ms < before_ms]:
            del self.commands[command_id]
        # It may have been issued so far ahead.
        self.leases.forget(before_ms - self.settings.future_reject_ms)
        self.quantities.forget(log_time_ms - KEPT_MS)
        self.credits.forget(log_time_ms - credit.KEPT_MS)
        self.lines.forget(log_time_ms - LINES_KEPT_MS, lambda tenant_id: self.accounts[tenant_id].invoiced_through_ms)
        self.places.forget(log_time_ms // HOUR_MS - 1)
        for key in [key for key, by in self.corrected.items() if by.corrected_ms < log_time_ms - CORRECTED_KEPT_MS]:
            del self.corrected[key]

    def digest(self, *, with_memory: bool = True) -> str:
        """SHA-256 over everything here in a canonical order: equal states have equal digests.

        Without the dedupe memory it is quick, which tests need that ask after every record.
        """
        h = hashlib.sha256()

        def add(*parts: object) -> None:
            h.update(repr(parts).encode())

        add(
            self.partition,
            self.generation,
            self.sequence,
            self.record_hash,
            self.log_time_ms,
            self.resumed_ms,
            sorted(self.inputs.items()),
        )
        add(self.settings.SerializeToString(deterministic=True), self.expired_through_day)
        for book in self.books.all():
            add(book.SerializeToString(deterministic=True))
        for tenant_id in sorted(self.accounts):
            account = self.accounts[tenant_id].to_account(b"", 0, 0)
            add(account.SerializeToString(deterministic=True))
        for key_id in sorted(self.keys):
            add(self.keys[key_id].SerializeToString(deterministic=True))
        for key in sorted(self.windows):
            window = self.windows[key]
            add(window.to_total().SerializeToString(deterministic=True), window.release_minute)
        for producer_id in sorted(self.producers):
            add(self.producers[producer_id].to_mark().SerializeToString(deterministic=True))
        for registration in self.registrations.all():
            add(registration.SerializeToString(deterministic=True))
        for lease in self.leases:
            add(lease.to_lease(b"", 0).SerializeToString(deterministic=True))
        for quantities in self.quantities.all():
            add(quantities.SerializeToString(deterministic=True))
        for held in self.credits.all():
            add(held.SerializeToString(deterministic=True))
        for line in self.lines:
            add(line.to_line().SerializeToString(deterministic=True))
        add(sorted(self.series.items()))
        for budget in self.budgets.all():
            add(budget.SerializeToString(deterministic=True))
        for alert in self.alerts.all():
            add(alert.SerializeToString(deterministic=True))
        for places in self.places.all():
            add(places.SerializeToString(deterministic=True))
        for project in self.all_projects():
            add(project.SerializeToString(deterministic=True))
        add(sorted(self.corrected.items()))
        add(sorted(self.commands.items()), sorted(self.leases.asked.items()))
        if with_memory:
            h.update(self.seen.digest())
        return h.hexdigest()
