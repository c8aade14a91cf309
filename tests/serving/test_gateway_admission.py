"""Who gets through: the policy table against the descriptors, credentials, and each rule of admission."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2

from billing.v1.account_pb2 import (
    ACCOUNT_STATUS_ACTIVE,
    ACCOUNT_STATUS_CLOSED,
    ACCOUNT_STATUS_SUSPENDED,
    BILLING_MODE_POSTPAID,
    BILLING_MODE_PREPAID,
    KEY_SCOPE_METER,
    KEY_SCOPE_OPERATE,
    KEY_SCOPE_READ,
    Account,
    AccountUpdate,
)
from billing.v1.alert_pb2 import ALERT_RULE_TOKEN_BURST
from billing.v1.usage_pb2 import REFUSAL_REASON_BALANCE, REFUSAL_REASON_PROMPT_TOO_LARGE, REFUSAL_REASON_SUSPENDED
from serving.gateway import admission
from serving.gateway.credentials import find_secret, hash_secret
from serving.gateway.directory import AccountView, Directory, KeyView, RestrictionView, scopes_of
from serving.gateway.limits import Breach, RateLimits
from serving.gateway.policy import POLICIES, Access
from serving.gateway.settings import AdmissionSettings
from serving.kserve import SERVICE_NAME

KEY = KeyView("key-a", "tenant-a", "", "", frozenset({KEY_SCOPE_METER}), 0, False)
ACCOUNT = AccountView("tenant-a", ACCOUNT_STATUS_ACTIVE, BILLING_MODE_PREPAID, "USD", 1, 0, 0)
NOW_MS = 1_000_000
SETTINGS = AdmissionSettings(state_age_max_ms=1_000)


def test_every_rpc_has_a_policy_and_no_other() -> None:
    described = {
        (service.full_name, method.name)
        for file in (service_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    # The wheel describes reflection's older name alone.
    described |= {(service.replace(".v1alpha.", ".v1."), method) for service, method in described if "reflection" in service}
    assert set(POLICIES) == described
    assert sum(service == SERVICE_NAME for service, _ in described) == 20


def test_what_concerns_all_tenants_needs_a_scope_that_says_so() -> None:
    shared = {method for (_, method), policy in POLICIES.items() if policy.scopes == {KEY_SCOPE_OPERATE}}
    changing = ("Load", "Unload", "Register", "Unregister", "Setting", "Settings")
    assert shared >= {method for _, method in POLICIES if method.endswith(changing)}
    assert all(POLICIES[SERVICE_NAME, method].message for method in shared)


def test_everything_but_liveness_needs_a_scope() -> None:
    for (_, method), policy in POLICIES.items():
        if policy.access is Access.ABSENT:
            assert method == "Watch"
        elif policy.access is Access.OPEN:
            assert method in {"ServerLive", "ServerReady", "Check"}
        else:
            assert policy.scopes, method


@pytest.mark.parametrize(
    ("metadata", "secret"),
    [
        ([("authorization", "Bearer abc")], "abc"),
        ([("authorization", "bearer  abc ")], "abc"),
        ([("x-api-key", "abc")], "abc"),
        ([("authorization", "Basic abc"), ("x-api-key", "def")], "def"),
        ([("authorization", "Bearer ")], None),
        ([("x-api-key", "a" * 513)], None),
        ([("authorization", b"Bearer abc")], None),
        ([], None),
    ],
)
def test_secrets_in_metadata(metadata: list[tuple[str, str | bytes]], secret: str | None) -> None:
    assert find_secret(metadata) == secret


def test_the_hash_of_a_secret_depends_on_the_pepper() -> None:
    assert hash_secret(b"p" * 16, "abc") == hash_secret(b"p" * 16, "abc")
    assert hash_secret(b"p" * 16, "abc") != hash_secret(b"q" * 16, "abc")


@pytest.mark.parametrize(
    ("key", "status"),
    [
        (None, grpc.StatusCode.UNAUTHENTICATED),
        (replace(KEY, revoked=True), grpc.StatusCode.UNAUTHENTICATED),
        (replace(KEY, expires_ms=NOW_MS), grpc.StatusCode.UNAUTHENTICATED),
        (replace(KEY, scopes=frozenset({KEY_SCOPE_READ})), grpc.StatusCode.PERMISSION_DENIED),
    ],
)
def test_keys_that_do_not_open(key: KeyView | None, status: grpc.StatusCode) -> None:
    refusal = admission.key_refusal(key, {KEY_SCOPE_METER}, NOW_MS)
    assert refusal is not None
    assert refusal.status is status
    assert refusal.recorded is (key is not None), "what has a tenant is put on record"


def test_keys_that_open() -> None:
    assert admission.key_refusal(KEY, {KEY_SCOPE_METER}, NOW_MS) is None
    assert admission.key_refusal(replace(KEY, expires_ms=NOW_MS + 1), {KEY_SCOPE_METER}, NOW_MS) is None


@pytest.mark.parametrize(
    ("account", "status", "reason"),
    [
        (None, grpc.StatusCode.PERMISSION_DENIED, REFUSAL_REASON_SUSPENDED),
        (
            replace(ACCOUNT, status=ACCOUNT_STATUS_SUSPENDED),
            grpc.StatusCode.PERMISSION_DENIED,
            REFUSAL_REASON_SUSPENDED,
        ),
        (replace(ACCOUNT, status=ACCOUNT_STATUS_CLOSED), grpc.StatusCode.PERMISSION_DENIED, REFUSAL_REASON_SUSPENDED),
        (replace(ACCOUNT, balance_pico=0), grpc.StatusCode.RESOURCE_EXHAUSTED, REFUSAL_REASON_BALANCE),
        (replace(ACCOUNT, balance_pico=-5), grpc.StatusCode.RESOURCE_EXHAUSTED, REFUSAL_REASON_BALANCE),
        (
            replace(ACCOUNT, billing_mode=BILLING_MODE_POSTPAID, balance_pico=-10, credit_limit_pico=10),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            REFUSAL_REASON_BALANCE,
        ),
    ],
)
def test_accounts_that_may_not_start(account: AccountView | None, status: grpc.StatusCode, reason: int) -> None:
    refusal = admission.account_refusal(account, NOW_MS, NOW_MS, SETTINGS)
    assert refusal is not None
    assert (refusal.status, refusal.reason, refusal.recorded) == (status, reason, True)
    assert ": " in refusal.message


@pytest.mark.parametrize(
    "account",
    [
        ACCOUNT,
        replace(ACCOUNT, billing_mode=BILLING_MODE_POSTPAID, balance_pico=-(10**30)),
        replace(ACCOUNT, billing_mode=BILLING_MODE_POSTPAID, balance_pico=-9, credit_limit_pico=10),
    ],
)
def test_accounts_that_may_start(account: AccountView) -> None:
    assert admission.account_refusal(account, NOW_MS, NOW_MS, SETTINGS) is None


def test_stale_state_fails_closed_unless_told_otherwise() -> None:
    assert admission.account_refusal(ACCOUNT, NOW_MS - 1_000, NOW_MS, SETTINGS) is None
    refusal = admission.account_refusal(ACCOUNT, NOW_MS - 1_001, NOW_MS, SETTINGS)
    assert refusal is not None
    assert refusal.status is grpc.StatusCode.UNAVAILABLE
    assert not refusal.recorded
    assert admission.account_refusal(ACCOUNT, 0, NOW_MS, replace(SETTINGS, fail_open=True)) is None
    spent = replace(ACCOUNT, balance_pico=0)
    assert admission.account_refusal(spent, 0, NOW_MS, replace(SETTINGS, fail_open=True)) is not None


@pytest.mark.parametrize(("plan", "profile", "gateway", "limit"), [(1, 2, 3, 1), (0, 2, 3, 2), (0, 0, 3, 3), (0, 0, 0, 0)])
def test_the_nearest_prompt_limit_holds(plan: int, profile: int, gateway: int, limit: int) -> None:
    assert admission.prompt_limit(plan, profile, gateway) == limit


def test_a_prompt_refusal_says_how_it_was_counted() -> None:
    exact = admission.prompt_refusal(11, 10, exact=True)
    assert exact.reason == REFUSAL_REASON_PROMPT_TOO_LARGE
    assert "11 tokens: at most 10" in exact.message
    assert "up to 11 tokens by its bytes" in admission.prompt_refusal(11, 10, exact=False).message


@pytest.mark.parametrize(("key_id", "stopped"), [("", True), ("key-a", True), ("key-b", False)])
def test_whom_a_rule_has_stopped_is_told_the_rule_the_alert_and_until_when(key_id: str, stopped: bool) -> None:
    held = RestrictionView("key_places", "alert-1", key_id, 0, NOW_MS + 60_000)
    refusal = admission.restriction_refusal(KEY, replace(ACCOUNT, restrictions=(held,)), NOW_MS)
    assert (refusal is not None) is stopped
    if refusal is not None:
        whose = f"API key {key_id}" if key_id else "account"
        assert refusal.message.startswith(f"{whose}: stopped by the rule key_places until 1970-01-01T00:17:40Z (alert alert-1)")
        assert (refusal.reason, refusal.recorded, refusal.retry_after_s) == (REFUSAL_REASON_SUSPENDED, True, 60)
    assert admission.restriction_refusal(KEY, replace(ACCOUNT, restrictions=(held,)), NOW_MS + 60_000) is None


def test_a_rule_that_slows_down_is_one_more_limit_until_it_expires() -> None:
    directory = Directory(1)
    account = Account(tenant_id="tenant-a", status=ACCOUNT_STATUS_ACTIVE)
    account.restrictions.add(rule=ALERT_RULE_TOKEN_BURST, alert_id="alert-1", requests_per_minute=6, until_ms=NOW_MS + 60_000)
    directory.on_account(b"tenant-a", AccountUpdate(account=account).SerializeToString(), 0)
    view = directory.find_account("tenant-a")
    assert view is not None
    assert admission.restriction_refusal(KEY, view, NOW_MS) is None
    [scope] = scopes_of(KEY, view, "m", NOW_MS)
    assert (scope.kind, scope.limits.requests_per_minute) == ("rule", 6)
    rates = RateLimits()
    assert not any(isinstance(rates.admit([scope], 0.0), Breach) for _ in range(6))
    breach = rates.admit([scope], 0.0)
    assert isinstance(breach, Breach)
    assert "of rule token_burst until 1970-01-01T00:17:40Z (alert alert-1) are used" in admission.rate_refusal(breach).message
    assert scopes_of(KEY, view, "m", NOW_MS + 60_000) == []
