"""`config show`: what is set, wherever it came from, with secrets masked."""

from taximeter.commands.common import Context, JsonOption, command
from taximeter.config_text import to_json_values, to_toml

__all__ = ["show"]


@command
def show(context: Context, json: JsonOption = False) -> None:
    """Show the whole configuration, secrets masked."""
    config = context.own_config() if context.running is None else context.config()
    if json:
        context.output.json(to_json_values(config))
    else:
        context.output.console.print(to_toml(config, show_masked=True), markup=False, soft_wrap=True)
