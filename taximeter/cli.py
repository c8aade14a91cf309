"""The command line. Exit codes: 0 well, 1 something was found wrong, 2 misused."""

import typer

from taximeter.commands import configuration

__all__ = ["app", "main"]

app = typer.Typer(
    name="taximeter",
    help="The meter for AI inference: every token of every request becomes a balance within a second, charged once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
app.add_typer(config_app, name="config")
config_app.command("show")(configuration.show)


def main() -> None:
    """The entry point of the script `taximeter`."""
    app()
