"""What every command shares: the options that say which installation is meant, and how a failure is told.

Promise: a command is a function of a `Context` and its own arguments. An expected failure, ours or a part's, becomes
one line on standard error and the exit code that belongs to it; with `--json`, the line is a JSON document. A bug
keeps its traceback.
"""

import functools
import gc
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from taximeter.config import Config, is_anything_set, load
from taximeter.embedded.state import DataDir, RunState
from taximeter.errors import NotReadyError, TaximeterError
from taximeter.failures import explain
from taximeter.output import Output

__all__ = ["Context", "JsonOption", "all_is_imported", "command"]

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document for programs instead of a table.")]
_ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="TAXIMETER_CONFIG", help="The configuration file (default: taximeter.toml)."),
]
_DataDirOption = Annotated[
    Path,
    typer.Option("--data-dir", envvar="TAXIMETER_DATA_DIR", help="Where `taximeter up` keeps everything."),
]
_SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one key; may be repeated.")
]
DEFAULT_DATA_DIR = Path(".taximeter")


@dataclass(slots=True)
class Context:
    """Which installation a command is about, and where its words go."""

    config_path: Path | None
    flags: tuple[str, ...]
    data_dir: DataDir
    output: Output = field(default_factory=Output)

    @property
    def running(self) -> RunState | None:
        """The `up` that runs in the data directory."""
        return self.data_dir.running()

    def config(self) -> Config:
        """The file that was named; else that of the `up` that runs; else `taximeter.toml` or the defaults."""
        if self.config_path is None and (state := self.running) is not None:
            return load(state.config_path, self.flags)
        if self.config_path is None and not self.flags and not is_anything_set():
            raise NotReadyError(
                f"nothing runs in data directory {self.data_dir.path}, and there is no taximeter.toml: start `taximeter up` "
                "there, name that directory with --data-dir, or name a configuration with --config"
            )
        return load(self.config_path, self.flags)

    def own_config(self) -> Config:
        """The configuration without a look at what runs: for what starts it."""
        return load(self.config_path, self.flags)


def all_is_imported() -> None:
    """Begin to collect garbage, of what comes from now on: see `taximeter.cli.main`. Nothing where it is collected already."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def command(function: Callable[..., None], *, imports_more: bool = False) -> Callable[..., None]:
    """A typer command from a function whose first argument is a Context; one that `imports_more` says when all is there."""
    own = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = [parameter.replace(annotation=hints[name]) for name, parameter in own.parameters.items()][1:]
    shared = [
        _shared("config", _ConfigOption, None),
        _shared("data_dir", _DataDirOption, DEFAULT_DATA_DIR),
        _shared("set_", _SetOption, None),
    ]

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> None:
        context = Context(
            arguments.pop("config"), tuple(arguments.pop("set_") or ()), DataDir(arguments.pop("data_dir").absolute())
        )
        if not imports_more:
            all_is_imported()
        try:
            function(context, **arguments)
        except TaximeterError as error:
            fail(context.output, str(error), error.exit_code, as_json=arguments.get("json", False) is True)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            known = explain(error, context.config)
            if known is None:
                raise
            fail(context.output, known, TaximeterError.exit_code, as_json=arguments.get("json", False) is True)

    signature = inspect.Signature([*parameters, *shared])
    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
    return wrapper


def fail(output: Output, message: str, exit_code: int, *, as_json: bool) -> None:
    """Say what is wrong and end the command."""
    if as_json:
        output.json({"error": message})
    output.notes.print(f"[bold red]error[/]: {_escape(message)}", soft_wrap=True)
    raise typer.Exit(exit_code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _shared(name: str, annotation: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
