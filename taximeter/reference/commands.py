"""The page of commands, from the command line itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer.main

from taximeter.cli import application
from taximeter.reference.markdown import cell, code, table

__all__ = ["commands_page"]

# Every command takes them: which installation it is about.
_SHARED = frozenset({"config", "data_dir", "set_"})
_INTRODUCTION = "Exit codes: 0 well, 1 something was found wrong, 2 misused. Every command takes these:"
# typer carries a click of its own, whose classes have no public name.
_Command = Any
_Parameter = Any


def commands_page() -> str:
    """Each command with its arguments and options."""
    commands = list(_commands(typer.main.get_command(application()), "taximeter"))
    shared = {parameter.name: parameter for _, command in commands for parameter in command.params if parameter.name in _SHARED}
    sections = ["# Commands", _INTRODUCTION, _parameters(list(shared.values()))]
    for name, command in commands:
        own = [parameter for parameter in command.params if parameter.name not in _SHARED]
        words = [name, *(_usage(parameter) for parameter in own if not parameter.opts[0].startswith("-")), "[OPTIONS]"]
        sections += [f"## {name}", cell(inspect.cleandoc(command.help or "")), f"```\n{' '.join(words)}\n```"]
        if own:
            sections.append(_parameters(own))
    return "\n\n".join(sections)


def _commands(command: _Command, name: str) -> Iterator[tuple[str, _Command]]:
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
        return
    for word in sorted(below):
        if not below[word].hidden:
            yield from _commands(below[word], f"{name} {word}")


def _usage(parameter: _Parameter) -> str:
    word = (parameter.metavar or parameter.name).upper() + ("..." if parameter.nargs != 1 else "")
    return word if parameter.required else f"[{word}]"


def _parameters(parameters: list[_Parameter]) -> str:
    return table(("", "default", "variable", "says"), [_row(parameter) for parameter in parameters])


def _row(parameter: _Parameter) -> tuple[str, str, str, str]:
    is_option = parameter.opts[0].startswith("-")
    names = " / ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else _usage(parameter)
    is_told = not (parameter.required or getattr(parameter, "is_flag", False) or callable(parameter.default))
    default = str(parameter.default) if is_told and parameter.default is not None else ""
    choices = _choices(parameter.type_descriptor.annotation)
    told = f"{parameter.help or ''} One of {', '.join(choices)}." if choices else parameter.help or ""
    return code(names), code(default), code(parameter.envvar or ""), cell(told)


def _choices(annotation: Any) -> list[str]:
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []
