"""What answers each RPC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from serving.api import alerting, invoicing, overview, reading, writing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.api.calls import Handler, Watcher

__all__ = ["HANDLERS", "WATCHERS"]

HANDLERS: Final[Mapping[str, Handler]] = {
    "GetBalance": reading.get_balance,
    "ListUsage": reading.list_usage,
    "GetStatement": reading.get_statement,
    "ListInvoices": invoicing.list_invoices,
    "GetInvoice": invoicing.get_invoice,
    "GetInvoiceDocument": invoicing.get_invoice_document,
    "ExplainInvoiceLine": invoicing.explain_invoice_line,
    "ListCreditGrants": writing.list_credit_grants,
    "GrantCredit": writing.grant_credit,
    "GetPriceBook": reading.get_price_book,
    "ListAlerts": alerting.list_alerts,
    "AcknowledgeAlert": writing.acknowledge_alert,
    "ListKeys": writing.list_keys,
    "CreateKey": writing.create_key,
    "RevokeKey": writing.revoke_key,
    "ListTenants": reading.list_tenants,
    "GetTenant": reading.get_tenant,
    "CreateTenant": writing.create_tenant,
    "SetTenantStatus": writing.set_tenant_status,
    "GetPipeline": reading.get_pipeline,
    "GetOverview": overview.get_overview,
}
WATCHERS: Final[Mapping[str, Watcher]] = {
    "WatchAlerts": alerting.watch_alerts,
    "WatchOverview": overview.watch_overview,
}
