"""Whether a request may go on, decided from what is in memory: pure functions, no clock, no I/O.

Each rule says what a client is told (a gRPC status and a sentence) and whether the refusal is put on record: a refusal that
has no tenant (a key that nobody knows) or that is our own fault (stale state) is counted in metrics only.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc

from billing.amounts import format_pico
from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    ACCOUNT_STATUS_CLOSED,
    BILLING_MODE_POSTPAID,
    KeyScope,
)
from billing.v1.usage_pb2 import (
    REFUSAL_REASON_BALANCE,
    REFUSAL_REASON_BUDGET,
    REFUSAL_REASON_KEY,
    REFUSAL_REASON_MODEL,
    REFUSAL_REASON_OUTPUT_TOO_LARGE,
    REFUSAL_REASON_PROMPT_TOO_LARGE,
    REFUSAL_REASON_RATE,
    REFUSAL_REASON_SUSPENDED,
    REFUSAL_REASON_UNSPECIFIED,
    RefusalReason,
)

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from serving.gateway.directory import AccountView, BudgetView, KeyView
    from serving.gateway.limits import Breach
    from serving.gateway.settings import AdmissionSettings

__all__ = [
    "Refusal",
    "account_refusal",
    "budget_refusal",
    "concurrency_refusal",
    "is_shadowed",
    "is_stale",
    "key_refusal",
    "model_refusal",
    "money_refusal",
    "output_refusal",
    "project_refusal",
    "prompt_limit",
    "prompt_refusal",
    "rate_refusal",
    "reason_name",
    "restriction_refusal",
    "tokenizer_refusal",
]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request does not go on."""

    status: grpc.StatusCode
    reason: int
    """A RefusalReason."""
    message: str
    recorded: bool
    """Whether it becomes a usage event at price 0."""
    retry_after_s: int = 0
    """When the same request may be let through; 0: time alone changes nothing."""


def _scope_name(scope: int) -> str:
    return KeyScope.Name(scope).removeprefix("KEY_SCOPE_").lower()  # type: ignore[arg-type]  # the stubs want an enum


def key_refusal(key: KeyView | None, scopes: AbstractSet[int], now_ms: int) -> Refusal | None:
    """Whether the key may be used at all, for an RPC that needs one of `scopes`."""
    # One sentence for every key that does not open: whoever guesses learns nothing from the difference.
    if key is None or key.revoked or 0 < key.expires_ms <= now_ms:
        return Refusal(
            grpc.StatusCode.UNAUTHENTICATED,
            REFUSAL_REASON_KEY,
            "API key: unknown, revoked or expired: send a valid one in the metadata, as 'authorization: Bearer <key>' or "
            "'x-api-key: <key>'",
            key is not None,
        )
    if not key.scopes & scopes:
        wanted = " or ".join(sorted(_scope_name(scope) for scope in scopes))
        return Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            REFUSAL_REASON_KEY,
            f"API key {key.key_id}: lacks the scope {wanted}: use a key that has it",
            True,
        )
    return None


def is_stale(log_time_ms: int, now_ms: int, settings: AdmissionSettings) -> bool:
    """Whether the ledger partition has been silent for so long that what is known of its accounts says nothing."""
    return now_ms - log_time_ms > settings.state_age_max_ms


def account_refusal(
    account: AccountView | None, log_time_ms: int, now_ms: int, settings: AdmissionSettings, *, free: bool = False
) -> Refusal | None:
    """Whether the tenant may start an inference; `log_time_ms` is the last sign of life of its ledger partition. What is `free`
    needs no balance."""
    if is_stale(log_time_ms, now_ms, settings) and not settings.fail_open:
        return Refusal(
            grpc.StatusCode.UNAVAILABLE,
            REFUSAL_REASON_UNSPECIFIED,
            f"account state is older than {settings.state_age_max_ms} ms: the balance is not known: try again later",
            False,
        )
    if account is None:
        return Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            REFUSAL_REASON_SUSPENDED,
            "account: does not exist: ask the operator to create the tenant",
            True,
        )
    if account.status != ACCOUNT_STATUS_ACTIVE:
        state = "closed" if account.status == ACCOUNT_STATUS_CLOSED else "not active"
        return Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            REFUSAL_REASON_SUSPENDED,
            f"account: is {state}: ask the operator to activate it",
            True,
        )
    if free:
        return None
    if account.billing_mode == BILLING_MODE_POSTPAID:
        limit_pico = account.credit_limit_pico
        if 0 < limit_pico <= -account.balance_pico:
            limit = format_pico(limit_pico, account.currency)
            return Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                REFUSAL_REASON_BALANCE,
                f"credit limit: {limit} is used up: ask the operator to raise it",
                True,
            )
    elif account.balance_pico <= 0:
        balance = format_pico(account.balance_pico, account.currency)
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            REFUSAL_REASON_BALANCE,
            f"balance: {balance}: must be more than 0: add credit",
            True,
        )
    return None


def money_refusal(account: AccountView) -> Refusal:
    """For a request whose worst case is more than the tenant has free."""
    balance = format_pico(account.balance_pico, account.currency)
    leased = format_pico(account.leased_pico, account.currency)
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        REFUSAL_REASON_BALANCE,
        f"balance: {balance}, of which {leased} is set aside for requests that run: not enough for this request's longest "
        "answer: allow fewer output tokens, wait, or add credit",
        True,
        # Those that run give back what they did not need.
        1 if account.leased_pico > 0 else 0,
    )


def budget_refusal(stop: BudgetView, currency: str, now_ms: int) -> Refusal:
    """For a request of someone whose budget is used up."""
    whose = f"project {stop.project_id}" if stop.project_id else f"user {stop.user_id}" if stop.user_id else "the account"
    until = datetime.fromtimestamp(stop.period_end_ms / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        REFUSAL_REASON_BUDGET,
        f"budget of {whose}: {format_pico(stop.amount_pico, currency)} is used up until {until}: wait for the next period, or "
        "ask whoever set it to raise it",
        True,
        _until_s(stop.period_end_ms, now_ms),
    )


def _until_s(end_ms: int, now_ms: int) -> int:
    return max(1, -(-(end_ms - now_ms) // 1_000))


def restriction_refusal(key: KeyView, account: AccountView, now_ms: int) -> Refusal | None:
    """For a tenant, or a key, that an abuse rule has stopped: which rule, which alert, and until when."""
    held = next((held for held in account.restrictions if not held.requests_per_minute and held.holds(key, now_ms)), None)
    if held is None:
        return None
    return Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        REFUSAL_REASON_SUSPENDED,
        f"{f'API key {held.key_id}' if held.key_id else 'account'}: stopped by the rule {held}: wait, or ask the operator",
        True,
        _until_s(held.until_ms, now_ms),
    )


def project_refusal(project_id: str) -> Refusal:
    """For a key of a project that is closed."""
    return Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        REFUSAL_REASON_SUSPENDED,
        f"project {project_id}: is closed: use a key of another project",
        True,
    )


def model_refusal(model: str) -> Refusal:
    """For a model that has no profile."""
    return Refusal(
        grpc.StatusCode.NOT_FOUND,
        REFUSAL_REASON_MODEL,
        f"model_name: {model[:128]!r}: is not served here: use one that the server's repository index lists",
        True,
    )


def tokenizer_refusal(model: str, retry_after_s: int, *, differs: bool) -> Refusal:
    """For a model whose tokenizer is another than its back end's, or of which the back end has not said yet."""
    what = "differs from the back end's" if differs else "could not be compared with the back end's, which does not answer"
    return Refusal(
        grpc.StatusCode.UNAVAILABLE,
        REFUSAL_REASON_UNSPECIFIED,
        f"model {model}: its tokenizer here {what}, so what it used would not be known: try again in {retry_after_s} s",
        False,
        retry_after_s,
    )


def prompt_limit(plan_max: int, profile_max: int, gateway_max: int, *tighter: int) -> int:
    """The limit that holds: the plan's, else the model's, else the gateway's, never over a `tighter` one; 0 is none."""
    limit = plan_max or profile_max or gateway_max
    return min([each for each in (limit, *tighter) if each], default=0) if tighter else limit


def prompt_refusal(tokens: int, limit: int, *, exact: bool) -> Refusal:
    """For a prompt that is over the limit."""
    counted = f"{tokens} tokens" if exact else f"up to {tokens} tokens by its bytes"
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        REFUSAL_REASON_PROMPT_TOO_LARGE,
        f"prompt: {counted}: at most {limit} are allowed: send a shorter one",
        True,
    )


def output_refusal(tokens: int, limit: int) -> Refusal:
    """For a request whose answer may be longer than allowed."""
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        REFUSAL_REASON_OUTPUT_TOO_LARGE,
        f"max_tokens: {tokens}: at most {limit} are allowed: ask for a shorter answer",
        True,
    )


def rate_refusal(breach: Breach) -> Refusal:
    """For one request, or its tokens, too many in this minute or at the same time."""
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        REFUSAL_REASON_RATE,
        f"{breach.what}: {breach.limit} of {breach.whose} are used: try again in {breach.retry_after_s} s",
        True,
        breach.retry_after_s,
    )


def reason_name(refusal: Refusal) -> str:
    """As metrics call it."""
    return RefusalReason.Name(refusal.reason).removeprefix("REFUSAL_REASON_").lower()  # type: ignore[arg-type]


def is_shadowed(refusal: Refusal) -> bool:
    """Whether it is one that a tenant in shadow mode is spared."""
    return refusal.reason in _SHADOWED


_SHADOWED = frozenset(
    {
        # State too old to know the balance by.
        REFUSAL_REASON_UNSPECIFIED,
        REFUSAL_REASON_PROMPT_TOO_LARGE,
        REFUSAL_REASON_OUTPUT_TOO_LARGE,
        REFUSAL_REASON_RATE,
        REFUSAL_REASON_BALANCE,
        REFUSAL_REASON_BUDGET,
    }
)


def concurrency_refusal(whose: str, limit: int, what: str = "concurrent requests") -> Refusal:
    """For one inference, or one stream, too many at the same time."""
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        REFUSAL_REASON_RATE,
        f"{what}: {limit} of {whose} are running: wait until one has ended",
        True,
        1,
    )
