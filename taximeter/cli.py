"""The command line. Exit codes: 0 well, 1 something was found wrong, 2 misused.

A command loads the module that it stands in and no other: each part of an installation is such a process too.
"""

from __future__ import annotations

import functools
import gc
import importlib
import sys
from typing import Final

import typer

__all__ = ["application", "main"]

_GROUPS: Final = {
    "tenant": "Tenants.",
    "key": "API keys.",
    "credit": "Credit.",
    "account": "What a balance consists of.",
    "project": "Projects of tenants.",
    "budget": "How much may be spent in a month.",
    "report": "For bookkeepers.",
    "alert": "Alerts, one at a time.",
    "lease": "What gateways hold of balances.",
    "producer": "Who may report usage.",
    "rules": "When abuse rules speak.",
    "prices": "The price book.",
    "invoice": "Invoices.",
    "export": "Cost and usage for other tools.",
    "user": "A tenant's users.",
    "events": "Corrections of single events.",
    "topics": "Kafka's topics.",
    "ledger": "The ledger's log.",
    "backup": "Copies of the ledger.",
    "models": "Models behind the gateway.",
    "webhooks": "Alerts to endpoints.",
    "webhooks dead": "Alerts that an endpoint did not take.",
    "config": "The configuration.",
}
# What a user types: the module of `taximeter.commands` and its function.
_COMMANDS: Final = {
    "demo": "demo.demo",
    "up": "running.up",
    "worker": "parts.worker",
    "sink": "parts.sink",
    "gateway": "parts.gateway",
    "api": "parts.api",
    "notifier": "parts.notifier",
    "prepare": "operations.prepare",
    "model-server": "parts.model_server",
    "migrate": "operations.migrate",
    "audit": "checking.audit",
    "anchor": "checking.anchor",
    "doctor": "checking.doctor",
    "replay": "feeding.replay",
    "import": "feeding.import_",
    "sync": "feeding.sync",
    "balance": "reading.balance",
    "usage": "reading.usage",
    "statement": "reading.statement",
    "alerts": "alerting.alerts",
    "credit-note": "corrections.credit_note",
    "rerate": "corrections.rerate",
    "tenant create": "accounts.create_tenant",
    "tenant suspend": "tenants.suspend_tenant",
    "tenant activate": "tenants.activate_tenant",
    "tenant close": "tenants.close_tenant",
    "tenant show": "tenants.show_tenant",
    "key create": "keys.create",
    "key list": "keys.list_",
    "key revoke": "keys.revoke",
    "key rotate": "keys.rotate",
    "credit grant": "accounts.grant_credit",
    "credit topup": "credit.topup_credit",
    "account show": "credit.show_account",
    "project create": "tenants.create_project",
    "project close": "tenants.close_project",
    "user erase": "users.erase_user",
    "budget set": "tenants.set_budget",
    "budget list": "tenants.list_budgets",
    "report credit": "credit.report_credit",
    "producer register": "producers.register",
    "producer revoke": "producers.revoke",
    "producer list": "producers.list_",
    "producer key": "producers.key",
    "rules show": "rules.show",
    "rules set": "rules.set_",
    "alert acknowledge": "alerting.acknowledge",
    "lease key": "leases.key",
    "lease retire": "leases.retire",
    "prices check": "prices.check",
    "prices show": "prices.show",
    "prices diff": "prices.diff",
    "prices apply": "prices.apply",
    "prices simulate": "prices.simulate",
    "invoice draft": "invoicing.draft_invoice",
    "invoice finalize": "invoicing.finalize_invoices",
    "invoice list": "invoicing.list_invoices",
    "invoice show": "invoicing.show_invoice",
    "invoice export": "invoices.export_invoice",
    "invoice explain": "invoices.explain_invoice",
    "export focus": "exporting.export_focus",
    "events void": "corrections.void",
    "events amend": "corrections.amend",
    "topics apply": "operations.apply_topics",
    "ledger diff": "operations.diff_ledger",
    "backup take": "backups.take",
    "backup verify": "backups.verify",
    "backup restore": "backups.restore",
    "models check": "models.check",
    "webhooks dead list": "webhooks.list_",
    "webhooks dead retry": "webhooks.retry",
    "webhooks dead drop": "webhooks.drop",
    "config show": "configuration.show",
}
_HIDDEN: Final = frozenset({"prepare", "model-server"})


@functools.cache
def application(word: str = "") -> typer.Typer:
    """All commands, or those alone whose first word this is; all, where there is none such."""
    app = typer.Typer(
        name="taximeter",
        help="The meter for AI inference: every token of every request becomes a balance within seconds, charged once.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    # A command that is the only one stays a command, with its name before it.
    app.callback()(lambda: None)
    groups: dict[str, typer.Typer] = {"": app}
    chosen = {name: place for name, place in _COMMANDS.items() if name.partition(" ")[0] == word}
    for name, place in (chosen or _COMMANDS).items():
        module, _, function = place.partition(".")
        called = getattr(importlib.import_module(f"taximeter.commands.{module}"), function)
        path, _, last = name.rpartition(" ")
        _group(groups, path).command(last, hidden=name in _HIDDEN)(called)
    return app


def _group(groups: dict[str, typer.Typer], path: str) -> typer.Typer:
    """The group of that path, made with those above it."""
    if path not in groups:
        above, _, word = path.rpartition(" ")
        groups[path] = typer.Typer(no_args_is_help=True, help=_GROUPS[path])
        _group(groups, above).add_typer(groups[path], name=word)
    return groups[path]


def main() -> None:
    """The entry point of the script `taximeter`."""
    # Imports make next to no garbage, and to look for it takes a sixth of a start. A command begins to collect when it has
    # imported what it needs.
    gc.disable()
    application(sys.argv[1] if len(sys.argv) > 1 else "")()
