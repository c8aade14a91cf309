"""Who may call what, in one table: an RPC that is not in it does not exist, and the server does not start while one is missing.

The tenant comes from the key alone. A tenant's key sees that tenant and nothing else; a key without a tenant is an operator's.
What a key may not see is answered as what does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import grpc

from billing.v1 import billing_service_pb2
from billing.v1.account_pb2 import KEY_SCOPE_ADMIN, KEY_SCOPE_PRICES, KEY_SCOPE_READ
from serving.api.errors import ApiError
from serving.gateway.admission import key_refusal
from serving.gateway.directory import Directory, KeyView

__all__ = ["POLICIES", "SERVICE", "Policy", "Principal", "authenticate", "check_complete"]

SERVICE: Final = billing_service_pb2.DESCRIPTOR.services_by_name["BillingService"]


@dataclass(frozen=True, slots=True)
class Policy:
    """One RPC's rule, and its route over HTTP."""

    verb: Literal["GET", "POST"]
    path: str
    # One of these is enough.
    scopes: frozenset[int]
    # Needs a key that is no tenant's.
    operators_only: bool = False

    @property
    def writes(self) -> bool:
        return self.verb == "POST"


_READERS: Final = frozenset({KEY_SCOPE_READ, KEY_SCOPE_ADMIN})
_ADMINS: Final = frozenset({KEY_SCOPE_ADMIN})
_PRICES: Final = frozenset({KEY_SCOPE_READ, KEY_SCOPE_ADMIN, KEY_SCOPE_PRICES})

POLICIES: Final[dict[str, Policy]] = {
    "GetBalance": Policy("GET", "/v1/balance", _READERS),
    "ListUsage": Policy("GET", "/v1/usage", _READERS),
    "GetStatement": Policy("GET", "/v1/statement", _READERS),
    "ListInvoices": Policy("GET", "/v1/invoices", _READERS),
    "GetInvoice": Policy("GET", "/v1/invoices/{number}", _READERS),
    "GetInvoiceDocument": Policy("GET", "/v1/invoices/{number}/document", _READERS),
    "ExplainInvoiceLine": Policy("GET", "/v1/invoices/{number}/lines/{line}", _READERS),
    "ListCreditGrants": Policy("GET", "/v1/credit/grants", _READERS),
    "GrantCredit": Policy("POST", "/v1/credit/grants", _ADMINS, operators_only=True),
    "GetPriceBook": Policy("GET", "/v1/prices", _PRICES),
    "ListAlerts": Policy("GET", "/v1/alerts", _READERS),
    "WatchAlerts": Policy("GET", "/v1/alerts/watch", _READERS),
    "AcknowledgeAlert": Policy("POST", "/v1/alerts/acknowledge", _ADMINS),
    "ListKeys": Policy("GET", "/v1/keys", _ADMINS),
    "CreateKey": Policy("POST", "/v1/keys", _ADMINS),
    "RevokeKey": Policy("POST", "/v1/keys/revoke", _ADMINS),
    "ListTenants": Policy("GET", "/v1/tenants", _READERS),
    "GetTenant": Policy("GET", "/v1/tenant", _READERS),
    "CreateTenant": Policy("POST", "/v1/tenants", _ADMINS, operators_only=True),
    "SetTenantStatus": Policy("POST", "/v1/tenant/status", _ADMINS, operators_only=True),
    "GetPipeline": Policy("GET", "/v1/pipeline", _READERS, operators_only=True),
    "GetOverview": Policy("GET", "/v1/overview", _READERS),
    "WatchOverview": Policy("GET", "/v1/overview/watch", _READERS),
}


class Principal(NamedTuple):
    """Who calls."""

    key_id: str
    # Empty: an operator.
    tenant_id: str

    @property
    def is_operator(self) -> bool:
        return not self.tenant_id

    def tenant(self, named: str) -> str:
        """The one tenant that a call is about. Raises ApiError; for a tenant that is not the caller's, as for none that is."""
        if self.tenant_id:
            if named not in ("", self.tenant_id):
                raise ApiError.unknown("tenant", named)
            return self.tenant_id
        if not named:
            raise ApiError.unacceptable("tenant_id: is empty; this key is no tenant's, so name the tenant")
        return named

    def tenant_or_all(self, named: str) -> str | None:
        """The tenant that a call is about; None: all of them, which an operator may ask."""
        return None if self.is_operator and not named else self.tenant(named)


def authenticate(directory: Directory, secret_hash: bytes | None, policy: Policy, now_ms: int) -> Principal:
    """Who has this key, if it opens what `policy` guards. Raises ApiError."""
    key: KeyView | None = None if secret_hash is None else directory.find_key(secret_hash)
    refusal = key_refusal(key, policy.scopes, now_ms)
    if refusal is not None:
        raise ApiError(refusal.status, refusal.message)
    assert key is not None, "no refusal, so there is a key"
    if policy.operators_only and key.tenant_id:
        raise ApiError(grpc.StatusCode.PERMISSION_DENIED, f"API key {key.key_id}: is a tenant's: use an operator's key")
    return Principal(key.key_id, key.tenant_id)


def check_complete(handlers: set[str]) -> None:
    """Raises RuntimeError unless every RPC of the contract has a policy and a handler, and nothing else has."""
    for what, names in (("policy", set(POLICIES)), ("handler", handlers)):
        if odd := sorted(names ^ {method.name for method in SERVICE.methods}):
            raise RuntimeError(f"{', '.join(odd)}: RPC without a {what}, or a {what} without an RPC; see serving/api/access.py")
