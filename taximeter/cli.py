"""The command line. Exit codes: 0 well, 1 something was found wrong, 2 misused."""

import typer

from taximeter.commands import (
    accounts,
    checking,
    configuration,
    corrections,
    credit,
    demo,
    exporting,
    feeding,
    invoices,
    invoicing,
    keys,
    leases,
    models,
    operations,
    parts,
    prices,
    reading,
    running,
    tenants,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="taximeter",
    help="The meter for AI inference: every token of every request becomes a balance within seconds, charged once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
models_app = typer.Typer(no_args_is_help=True, help="Models behind the gateway.")
config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
tenant_app = typer.Typer(no_args_is_help=True, help="Tenants.")
key_app = typer.Typer(no_args_is_help=True, help="API keys.")
credit_app = typer.Typer(no_args_is_help=True, help="Credit.")
account_app = typer.Typer(no_args_is_help=True, help="What a balance consists of.")
project_app = typer.Typer(no_args_is_help=True, help="Projects of tenants.")
budget_app = typer.Typer(no_args_is_help=True, help="How much may be spent in a month.")
report_app = typer.Typer(no_args_is_help=True, help="For bookkeepers.")
lease_app = typer.Typer(no_args_is_help=True, help="What gateways hold of balances.")
topics_app = typer.Typer(no_args_is_help=True, help="Kafka's topics.")
prices_app = typer.Typer(no_args_is_help=True, help="The price book.")
invoice_app = typer.Typer(no_args_is_help=True, help="Invoices.")
events_app = typer.Typer(no_args_is_help=True, help="Corrections of single events.")
export_app = typer.Typer(no_args_is_help=True, help="Cost and usage for other tools.")

app.command("demo")(demo.demo)
app.command("up")(running.up)
app.command("worker")(parts.worker)
app.command("sink")(parts.sink)
app.command("gateway")(parts.gateway)
app.command("prepare", hidden=True)(operations.prepare)
app.command("model-server", hidden=True)(parts.model_server)
app.command("migrate")(operations.migrate)
app.command("audit")(checking.audit)
app.command("doctor")(checking.doctor)
app.command("replay")(feeding.replay)
app.command("import")(feeding.import_)
app.command("sync")(feeding.sync)
app.command("balance")(reading.balance)
app.command("usage")(reading.usage)
app.command("statement")(reading.statement)
app.command("alerts")(reading.alerts)
app.command("credit-note")(corrections.credit_note)
app.command("rerate")(corrections.rerate)
for group, name in (
    (tenant_app, "tenant"),
    (key_app, "key"),
    (credit_app, "credit"),
    (account_app, "account"),
    (project_app, "project"),
    (budget_app, "budget"),
    (report_app, "report"),
    (lease_app, "lease"),
    (prices_app, "prices"),
    (invoice_app, "invoice"),
    (export_app, "export"),
    (events_app, "events"),
    (topics_app, "topics"),
    (models_app, "models"),
    (config_app, "config"),
):
    app.add_typer(group, name=name)
tenant_app.command("create")(accounts.create_tenant)
key_app.command("create")(keys.create)
key_app.command("list")(keys.list_)
key_app.command("revoke")(keys.revoke)
key_app.command("rotate")(keys.rotate)
tenant_app.command("suspend")(tenants.suspend_tenant)
tenant_app.command("activate")(tenants.activate_tenant)
tenant_app.command("close")(tenants.close_tenant)
tenant_app.command("show")(tenants.show_tenant)
project_app.command("create")(tenants.create_project)
project_app.command("close")(tenants.close_project)
budget_app.command("set")(tenants.set_budget)
budget_app.command("list")(tenants.list_budgets)
account_app.command("show")(credit.show_account)
report_app.command("credit")(credit.report_credit)
lease_app.command("key")(leases.key)
lease_app.command("retire")(leases.retire)
credit_app.command("grant")(accounts.grant_credit)
credit_app.command("topup")(credit.topup_credit)
invoice_app.command("draft")(invoicing.draft_invoice)
invoice_app.command("finalize")(invoicing.finalize_invoices)
invoice_app.command("list")(invoicing.list_invoices)
invoice_app.command("show")(invoicing.show_invoice)
invoice_app.command("export")(invoices.export_invoice)
invoice_app.command("explain")(invoices.explain_invoice)
events_app.command("void")(corrections.void)
events_app.command("amend")(corrections.amend)
export_app.command("focus")(exporting.export_focus)
prices_app.command("check")(prices.check)
prices_app.command("show")(prices.show)
prices_app.command("diff")(prices.diff)
prices_app.command("apply")(prices.apply)
prices_app.command("simulate")(prices.simulate)
topics_app.command("apply")(operations.apply_topics)
models_app.command("check")(models.check)
config_app.command("show")(configuration.show)


def main() -> None:
    """The entry point of the script `taximeter`."""
    app()
