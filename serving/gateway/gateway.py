"""The gateway's middle: who calls, whether the call may go on, and the request that is open in the journal when it does.

`begin` does everything between a client's request and the back end: key, account, model, prompt size, concurrency, journal.
It raises `CallError` with what the client is told. A refusal that has a tenant is durable in the journal before it is told.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc

from billing.amounts import format_pico
from billing.v1.usage_pb2 import (
    COUNT_SOURCE_BACKEND,
    COUNT_SOURCE_ESTIMATE,
    COUNT_SOURCE_TOKENIZER,
    OUTCOME_CANCELLED,
    OUTCOME_DEADLINE_EXCEEDED,
    OUTCOME_INTERRUPTED,
)
from producers.errors import JournalFull, NotDurableInTime, ProducerError
from serving.gateway import admission
from serving.gateway.calls import Admitted, Caller, Metadata
from serving.gateway.count_audit import CountAudit
from serving.gateway.counting import AnswerCounter, PreparedRequest, prepare, reserved_units
from serving.gateway.credentials import CREDENTIAL_METADATA, SecretHasher, find_secret
from serving.gateway.directory import scopes_of
from serving.gateway.errors import CallError
from serving.gateway.limits import UNLIMITED, Breach, RateLimits, Scope
from serving.gateway.metering import MeterParts, Price, RequestMeter, new_event, now_ms
from serving.gateway.output_limits import limit_output, read_output_asked
from serving.gateway.policy import Access
from serving.gateway.refusing import Refusals
from serving.gateway.scoping import RunningRequests, SequenceScope
from serving.gateway.tokenizer_checks import TokenizerChecks
from serving.gateway.tokens import TextCount
from serving.gateway.tracing import TRACEPARENT, own_span, with_span
from serving.kserve import TensorError
from serving.tokenizers import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence

    from billing.v1.usage_pb2 import UsageEvent
    from serving.gateway.admission import Refusal
    from serving.gateway.directory import AccountView, Directory, KeyView
    from serving.gateway.limits import RequestSlot
    from serving.gateway.output_limits import OutputAsked
    from serving.gateway.policy import Policy
    from serving.gateway.profiles import ModelProfile
    from serving.gateway.settings import GatewaySettings
    from serving.gateway.spending import RequestMoney, Spending
    from serving.gateway.upstream import Upstream
    from serving.kserve import ModelInferRequest

__all__ = ["Gateway"]

_LOG = logging.getLogger(__name__)
# No vocabulary has longer tokens, so a text of more bytes than this a token is over the limit without counting: what one
# prompt can make the tokenizer work is bounded.
_TOKEN_BYTES_MAX = 512
# gRPC's own, the client's credentials, what describes the one connection, and its span: none of it is the back end's.
_NOT_FORWARDED = CREDENTIAL_METADATA | {"user-agent", "te", "content-type", "host", "connection", TRACEPARENT}
_GRPCS_OWN = ("grpc-", ":")
_WANTS_STATUS = ("triton_grpc_error", "true")

# Between two attempts to write a bill on a full disk.
_FULL_RETRY_S = 1.0


def _size_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


class Gateway:
    """What all calls of one gateway share. Belongs to one event loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        directory: Directory,
        parts: MeterParts,
        upstream: Upstream,
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.metrics: Counter[str] = Counter()
        self.ready = False
        # Why nothing can be opened yet, while the journal waits for room to recover.
        self.journal_full = ""
        self.stopping = False
        # Set where leases are kept: what a tenant's requests are paid from.
        self.spending: Spending | None = None
        self._directory = directory
        self._hash_secret = SecretHasher(settings.directory.pepper)
        self._sequences = SequenceScope(settings.directory.pepper)
        self._named = RunningRequests()
        self._parts = parts
        self._refusals = Refusals(parts, self.metrics)
        self._running = 0
        self._tenant_running: dict[str, int] = {}
        self._rates = RateLimits(settings.limits.replicas)
        self.audit = CountAudit(settings.audit)
        self.tokenizer_checks = TokenizerChecks(
            settings.models, parts.tokens, upstream, settings.check_tokenizers, settings.limits.control_timeout_s
        )
        self._tasks: set[asyncio.Task[None]] = set()

    # -- who calls -----------------------------------------------------------------------------------------------------

    def caller(self, context: Any) -> Caller:
        """Read a call's metadata and deadline once."""
        metadata: Metadata = context.invocation_metadata() or ()
        secret, is_traced = None, self.settings.trace
        kept: list[tuple[str, str | bytes]] = []
        for pair in metadata:
            name = pair[0]
            if name not in _NOT_FORWARDED:
                if not name.startswith(_GRPCS_OWN):
                    kept.append(pair)
            elif name in CREDENTIAL_METADATA:
                if secret is None:
                    secret = find_secret((pair,))
            elif name == TRACEPARENT:
                is_traced = True
        left_s = context.time_remaining()
        span = own_span(metadata, begin=self.settings.trace) if is_traced else ""
        return Caller(
            None if secret is None else self._hash_secret(secret),
            with_span(tuple(kept), span),
            None if left_s is None else time.monotonic() + left_s,
            _WANTS_STATUS in kept,
            span,
        )

    def authenticate(self, caller: Caller, policy: Policy, request: ModelInferRequest | None = None) -> KeyView:
        """The caller's key. Raises CallError; of an inference, a key that has a tenant but may not be used leaves a record."""
        if self.journal_full:
            self.metrics["journal_full"] += 1
            raise self._full(self.journal_full)
        if not self.ready:
            raise CallError(grpc.StatusCode.UNAVAILABLE, "keys are still being read: try again in a moment", retry_after_s=1)
        key = None if caller.secret_hash is None else self._directory.find_key(caller.secret_hash)
        refusal = admission.key_refusal(key, policy.scopes, now_ms())
        if refusal is not None:
            if key is None or policy.access is not Access.METERED:
                self._refusals.count(refusal)
            else:
                model, client_id = ("-", "") if request is None else (request.model_name or "-", request.id)
                # Not waited for: whoever guesses shall not queue for the disk.
                self._refusals.record(
                    refusal, new_event(self._parts, key, secrets.token_hex(16), model, 0, client_id, caller.span)
                )
            if policy.message and refusal.status is grpc.StatusCode.PERMISSION_DENIED:
                raise CallError(refusal.status, f"denied by policy {policy.name}: {policy.message} ({refusal.message})")
            raise CallError.refused(refusal)
        assert key is not None, "no refusal, so there is a key"
        return key

    # -- whether it goes on --------------------------------------------------------------------------------------------

    async def begin(self, request: ModelInferRequest, caller: Caller, policy: Policy, *, stream: bool) -> Admitted:
        """Admit an inference and open it in the journal; `end` must be called when it is over. Raises CallError."""
        key = self.authenticate(caller, policy, request)
        tenant_id = key.tenant_id
        limits, running = self.settings.limits, self._tenant_running.get(tenant_id, 0)
        if running >= limits.tenant_requests_max or self._running >= limits.requests_max:
            refusal = self._slot_refusal(tenant_id)
            # Not waited for: whoever is refused for sending too much shall not queue for the disk as well.
            model = request.model_name or "-"
            event = new_event(self._parts, key, secrets.token_hex(16), model, 0, request.id, caller.span)
            self._refusals.record(refusal, event)
            raise CallError.refused(refusal)
        self._running += 1
        self._tenant_running[tenant_id] = running + 1
        try:
            return await self._begin(request, key, caller, stream=stream)
        except BaseException:
            self._free_slot(tenant_id)
            raise

    def end(self, admitted: Admitted, caller: Caller) -> None:
        """The request is over, however it ended: it makes room for another, and a bill that nobody has written by now, because
        the client is gone or the journal failed, is written apart from the call."""
        self._free_slot(admitted.tenant_id)
        if admitted.profile.stop_input is not None:
            self._named.remove(admitted.tenant_id, admitted.prepared.client_id, admitted.prepared.upstream_id)
        if admitted.slot is not UNLIMITED:
            admitted.slot.end(admitted.meter.tokens, time.monotonic())
        if not admitted.meter.is_closed:
            # It holds the request as the request holds it: let go, or only the collector of cycles frees them.
            end, admitted.end = admitted.end, None
            self._settle(admitted.meter, self._cut_off_outcome(caller), end)
        elif admitted.profile.tokenizer is not None and self.audit.takes(admitted.request.id):
            self.spawn(self._count_again(admitted))

    async def _count_again(self, admitted: Admitted) -> None:
        """One in n answers, beside what the back end said of it."""
        self.audit.begin()
        try:
            counts = await admitted.meter.recount()
            if counts is not None:
                self.audit.take(admitted.profile.model, *counts)
        except (TokenizerError, RuntimeError):
            # It was billed by the back end's count; what cannot be counted again says nothing.
            self.metrics["audits_failed"] += 1
        finally:
            self.audit.end()

    def _free_slot(self, tenant_id: str) -> None:
        self._running -= 1
        left = self._tenant_running[tenant_id] - 1
        if left:
            self._tenant_running[tenant_id] = left
        else:
            del self._tenant_running[tenant_id]

    def _slot_refusal(self, tenant_id: str) -> Refusal:
        limits = self.settings.limits
        if self._tenant_running.get(tenant_id, 0) >= limits.tenant_requests_max:
            return admission.concurrency_refusal("this tenant", limits.tenant_requests_max)
        return admission.concurrency_refusal("the gateway", limits.requests_max)

    async def _begin(self, request: ModelInferRequest, key: KeyView, caller: Caller, *, stream: bool) -> Admitted:
        request_id = secrets.token_hex(16)
        client_id = request.id
        model = request.model_name
        profile = self.settings.models.get(model)
        operation = 0 if profile is None else profile.operation
        event = new_event(self._parts, key, request_id, model or "-", operation, client_id, caller.span)
        now = event.started_ms
        account = self._directory.find_account(key.tenant_id)
        refusal = admission.account_refusal(
            account, self._directory.log_time_ms(key.tenant_id), now, self.settings.admission, free=key.test
        )
        if refusal is None:
            refusal = self._stopped(key, account, now)
        if refusal is not None:
            await self._refusals.enforce(refusal, event, account)
        if profile is None:
            await self._refusals.refuse(admission.model_refusal(model), event)
        if model in self.tokenizer_checks.unchecked:
            refusal = await self.tokenizer_checks.refusal(model)
            if refusal is not None:
                await self._refusals.refuse(refusal, event)
        scopes = scopes_of(key, account, model, now)
        slot = self._rates.admit(scopes, time.monotonic()) if scopes else UNLIMITED
        if isinstance(slot, Breach):
            await self._refusals.enforce(admission.rate_refusal(slot), event, account)
            slot = UNLIMITED
        try:
            return await self._open(request, key, account, event, profile, scopes, slot, stream=stream)
        except BaseException:
            slot.end(0, time.monotonic())
            raise

    async def _open(
        self,
        request: ModelInferRequest,
        key: KeyView,
        account: AccountView | None,
        event: UsageEvent,
        profile: ModelProfile,
        scopes: Sequence[Scope],
        slot: RequestSlot,
        *,
        stream: bool,
    ) -> Admitted:
        """The part of it that looks into the request."""
        request_id = event.request_id
        try:
            prepared = prepare(request, profile, request_id, stream=stream)
            self._sequences.apply(request, key.tenant_id)
            if prepared.stops:
                request.id = self._named.newest(key.tenant_id, prepared.client_id) or request_id
        except TensorError as error:
            self.metrics["requests_invalid"] += 1
            raise CallError.invalid(error) from error
        plan_max = 0 if account is None else account.prompt_tokens_max
        limit = admission.prompt_limit(
            plan_max,
            profile.prompt_tokens_max,
            self.settings.limits.prompt_tokens_max,
            *([scope.limits.prompt_tokens_max for scope in scopes] if scopes else ()),
        )
        prompt_count = await self._check_prompt(prepared, profile, limit, event, account)
        asked, output_max = None, 0
        if scopes:
            asked, output_max = await self._check_scopes(request, event, account, profile, prepared, prompt_count, scopes, slot)
        money = None
        # What is free needs no money, and who is only watched need not have it.
        is_paid = account is not None and account.free_pico is not None and not (key.test or account.shadow or prepared.stops)
        if self.spending is not None and account is not None and is_paid:
            money = await self._set_aside(self.spending, request, event, account, profile, prepared, prompt_count, asked)
        meter = RequestMeter(
            self._parts,
            event,
            profile,
            prepared,
            AnswerCounter(profile, prepared),
            prompt_count,
            money,
            self._pricer(account),
            output_max,
        )
        try:
            await meter.open()
        except ProducerError as error:
            if money is not None:
                money.release()
            raise self._not_opened(error) from error
        except asyncio.CancelledError:
            self._settle(meter, OUTCOME_CANCELLED)
            raise
        self.metrics["requests_admitted"] += 1
        if profile.stop_input is not None and not prepared.stops:
            # Of another model nobody can stop a request by its ID.
            self._named.add(key.tenant_id, prepared.client_id, request_id)
        return Admitted(request, profile, prepared, meter, key.tenant_id, slot)

    def _pricer(self, account: AccountView | None) -> Callable[[UsageEvent], Price] | None:
        """What tells a client the price, where its plan says so and prices are known."""
        if account is None or not account.tell_price or self.spending is None:
            return None
        worth, currency = self.spending.worth, account.currency

        def price(event: UsageEvent) -> Price:
            cost_pico = worth.cost_pico(event, currency)
            latest = self._directory.find_account(event.tenant_id) or account
            return Price(format_pico(cost_pico, currency), format_pico(latest.balance_pico - cost_pico, currency))

        return price

    async def _check_scopes(
        self,
        request: ModelInferRequest,
        event: UsageEvent,
        account: AccountView | None,
        profile: ModelProfile,
        prepared: PreparedRequest,
        prompt_count: TextCount | None,
        scopes: Sequence[Scope],
        slot: RequestSlot,
    ) -> tuple[OutputAsked, int]:
        """Refuse an answer longer than key, tenant or model may have, and tokens beyond this minute's; what was asked, and how
        long the answer may be whatever was asked (0: no limit, or one that is only watched)."""
        try:
            asked = read_output_asked(request, profile.output_limit, profile.output_limit_input)
        except TensorError as error:
            self.metrics["requests_invalid"] += 1
            raise CallError.invalid(error) from error
        stated, texts = asked.tokens, asked.texts
        limit = admission.prompt_limit(0, 0, 0, *(scope.limits.output_tokens_max for scope in scopes))
        if stated is not None and 0 < limit < stated:
            await self._refusals.enforce(admission.output_refusal(stated, limit), event, account)
        longest = stated or (0 if account is None else account.output_tokens_default)
        if 0 < limit < longest:
            longest = limit
        tokens = self._prompt_tokens(profile, prepared, prompt_count) + longest * texts
        breach = slot.reserve(tokens, time.monotonic())
        if breach is not None:
            await self._refusals.enforce(admission.rate_refusal(breach), event, account)
        if account is not None and account.shadow:
            return asked, 0
        if stated is None and limit:
            # The back end need not write what may not be delivered.
            asked = limit_output(request, profile, asked, limit)
        return asked, limit * texts

    def _prompt_tokens(self, profile: ModelProfile, prepared: PreparedRequest, prompt_count: TextCount | None) -> int:
        """The prompt's tokens, or a bound of them."""
        if prompt_count is not None:
            return prompt_count.tokens
        bound = self._parts.tokens.bound_all(profile.tokenizer, prepared.prompts, prepared.framing)
        return _size_bytes(prepared.prompts) if bound is None else bound

    def _stopped(self, key: KeyView, account: AccountView | None, now: int) -> Refusal | None:
        if self._directory.is_closed(key.tenant_id, key.project_id):
            return admission.project_refusal(key.project_id)
        if account is not None and account.restrictions:
            refusal = admission.restriction_refusal(key, account, now)
            if refusal is not None:
                return refusal
        # A test key's usage costs nothing.
        stop = None if key.test else self._directory.find_stop(key, now)
        return None if stop is None else admission.budget_refusal(stop, "" if account is None else account.currency, now)

    def _not_opened(self, error: ProducerError) -> CallError:
        if isinstance(error, JournalFull):
            self.metrics["journal_full"] += 1
            return self._full(str(error))
        return self.unrecorded(error)

    @staticmethod
    def _full(why: str) -> CallError:
        # It frees itself as the ledger takes events, and asks its disk as often.
        status = grpc.StatusCode.RESOURCE_EXHAUSTED
        return CallError(status, f"usage cannot be recorded: {why}", retry_after_s=math.ceil(_FULL_RETRY_S))

    async def _set_aside(
        self,
        spending: Spending,
        request: ModelInferRequest,
        event: UsageEvent,
        account: AccountView,
        profile: ModelProfile,
        prepared: PreparedRequest,
        prompt_count: TextCount | None,
        asked: OutputAsked | None,
    ) -> RequestMoney | None:
        """The money for the request's worst case. Refuses where there is not enough; None where that may not be known and the
        gateway fails open."""
        prompt_tokens = self._prompt_tokens(profile, prepared, prompt_count)
        until_ms = event.started_ms + int(self.settings.limits.upstream_timeout_s * 1_000)
        units = reserved_units(profile, prepared)
        try:
            money = await spending.set_aside(request, event, account, profile, prompt_tokens, until_ms, units, asked)
        except TensorError as error:
            self.metrics["requests_invalid"] += 1
            raise CallError.invalid(error) from error
        if money is None:
            rules = self.settings.admission
            if rules.fail_open and admission.is_stale(self._directory.log_time_ms(account.tenant_id), now_ms(), rules):
                self.metrics["admitted_without_money"] += 1
                return None
            await self._refusals.refuse(admission.money_refusal(account), event)
        if money.clamped_tokens:
            self.metrics["answers_clamped"] += 1
        return money

    async def _check_prompt(
        self, prepared: PreparedRequest, profile: ModelProfile, limit: int, event: UsageEvent, account: AccountView | None
    ) -> TextCount | None:
        """Refuse a prompt over the limit, by its bytes where they settle it, else by its tokens."""
        count = None if prepared.input_tokens is None else TextCount(prepared.input_tokens, exact=True)
        if not limit:
            return count
        tokens = self._parts.tokens
        bound = tokens.bound_all(profile.tokenizer, prepared.prompts, prepared.framing) if count is None else count.tokens
        if bound is not None and bound <= limit:
            return count
        if count is None and profile.tokenizer is not None and _size_bytes(prepared.prompts) <= limit * _TOKEN_BYTES_MAX:
            count = await tokens.count_all(profile.tokenizer, prepared.prompts, prepared.framing, event.tenant_id)
            bound = count.tokens
        if bound is None:
            bound = _size_bytes(prepared.prompts)
        elif count is not None and bound <= limit:
            return count
        exact = count is not None and count.exact
        event.uncached_input_tokens = event.context_tokens = bound
        event.count_source = COUNT_SOURCE_TOKENIZER if exact else COUNT_SOURCE_ESTIMATE
        if exact and prepared.input_tokens is not None:
            event.count_source = COUNT_SOURCE_BACKEND
        elif exact and profile.tokenizer is not None:
            event.tokenizer = tokens.fingerprint(profile.tokenizer)
        await self._refusals.enforce(admission.prompt_refusal(bound, limit, exact=exact), event, account)
        return count

    # -- how it ends ---------------------------------------------------------------------------------------------------

    def upstream_timeout_s(self, caller: Caller, profile: ModelProfile) -> float:
        """How long the back end has: the client's deadline, else the setting. One that can be stopped is, at the deadline, and
        has time to say what it has done by then."""
        left_s = caller.time_left_s()
        if left_s is None:
            return self.settings.limits.upstream_timeout_s
        return left_s if profile.stop_input is None else left_s + self.settings.limits.stop_timeout_s

    def unrecorded(self, error: ProducerError) -> CallError:
        """What a client is told when the journal does not take what its answer costs: the answer does not leave."""
        self.metrics["journal_errors"] += 1
        return CallError(grpc.StatusCode.UNAVAILABLE, f"usage cannot be recorded: {error}")

    def _cut_off_outcome(self, caller: Caller) -> int:
        if self.stopping:
            return OUTCOME_INTERRUPTED
        return OUTCOME_DEADLINE_EXCEEDED if caller.is_late() else OUTCOME_CANCELLED

    def _settle(self, meter: RequestMeter, outcome: int, end: Callable[[], Awaitable[None]] | None = None) -> None:
        self.metrics["requests_cut_off"] += 1
        self.spawn(self._close(meter, outcome, end))

    async def _close(self, meter: RequestMeter, outcome: int, end: Callable[[], Awaitable[None]] | None) -> None:
        """Write a bill that nobody waits for; one that fails keeps the last progress, a full or slow journal is asked again."""
        if end is not None:
            await end()
        while True:
            try:
                await meter.close(outcome)
            except ProducerError as error:
                self.metrics["journal_errors"] += 1
                if isinstance(error, JournalFull | NotDurableInTime) and not self.stopping:
                    await asyncio.sleep(_FULL_RETRY_S)
                    continue
                _LOG.exception("a bill could not be written; the journal's recovery bills what was delivered")
            return

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something that a stop waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, timeout_s: float) -> None:
        """Wait until all bills are written, also those that begin meanwhile."""
        deadline = time.monotonic() + timeout_s
        while self._tasks and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait(self._tasks, timeout=left_s)
