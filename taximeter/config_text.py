"""A configuration as TOML: for `config show`, where secrets are masked, and for the file that `up` hands to its parts.

Promise: `load` reads back what `to_toml` wrote. A secret's value is never written: not to a terminal, and not to a
file, where its `…_file` key stands for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

if TYPE_CHECKING:
    from collections.abc import Mapping

    from taximeter.config import Config

__all__ = ["to_json_values", "to_toml"]


def to_toml(config: Config, *, show_masked: bool) -> str:
    """The whole configuration; `show_masked` says that a secret is set, as a comment, without saying which."""
    lines: list[str] = []
    for section in type(config).model_fields:
        _append_table(section, getattr(config, section).model_dump(), lines, show_masked)
    return "\n".join(lines).strip() + "\n"


def to_json_values(config: Config) -> dict[str, Any]:
    """The configuration for programs, with secrets masked and unset keys as null."""
    values: dict[str, Any] = json.loads(config.model_dump_json())
    return values


def _append_table(name: str, values: Mapping[str, Any], lines: list[str], show_masked: bool) -> None:
    lines += ["", f"[{name}]"]
    for key, value in values.items():
        if isinstance(value, SecretStr):
            if show_masked:
                lines.append(f"# {key} is set")
        elif not isinstance(value, dict) and value is not None:
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in values.items():
        if isinstance(value, dict):
            plain = {inner: item for inner, item in value.items() if not isinstance(item, dict)}
            if plain:
                _append_table(f"{name}.{_key(key)}", plain, lines, show_masked)
            for inner, item in value.items():
                if isinstance(item, dict):
                    _append_table(f"{name}.{_key(key)}.{_key(inner)}", item, lines, show_masked)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _value(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # JSON's escapes are a subset of those of a TOML basic string; what JSON leaves alone, TOML takes as it is.
    text = str(value.as_posix() if isinstance(value, Path) else value)
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
