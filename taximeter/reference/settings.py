"""The page of settings, from the models of its sections; what a key means is the comment above it."""

from __future__ import annotations

import ast
import inspect
import json
import types
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from taximeter import platform_config, rules_config, serving_config
from taximeter.config import ENVIRONMENT_PREFIX, Config
from taximeter.reference.markdown import cell, code, table

__all__ = ["settings_page"]

_PLAIN = {int: "whole number", float: "number", bool: "true or false", str: "text", SecretStr: "secret"}

_INTRODUCTION = """\
One configuration: a TOML file (`taximeter.toml`, or what `--config` names), then the environment, then `--set
section.key=value`, each over the one before. A key that nobody knows is an error. A secret stands in a file that its
`…_file` names, or in the environment."""


def settings_page() -> str:
    """Each key with its type, default, variable and meaning."""
    meanings: dict[tuple[str, str], str] = {}
    for module in (platform_config, rules_config, serving_config):
        meanings |= _comments(inspect.getsource(module))
    sections = ["# Settings", _INTRODUCTION]
    for name, info in Config.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        sections += _section(name, model, meanings)
    return "\n\n".join(sections)


def _section(name: str, model: type[BaseModel], meanings: dict[tuple[str, str], str]) -> list[str]:
    rows, nested = [], []
    for key, info in model.model_fields.items():
        inner, is_named = _model_of(info.annotation)
        if inner is not None:
            nested.append((f"{name}.{key}.NAME" if is_named else f"{name}.{key}", inner))
        path = f"{name}.{key}".replace(".", "__")
        variable = "" if "NAME" in name or inner is not None else f"{ENVIRONMENT_PREFIX}{path}".upper()
        kind = _type(info) if inner is None else "a section for each" if is_named else "a section"
        rows.append((code(key), kind, code(_default(info)), code(variable), cell(meanings.get((model.__name__, key), ""))))
    head = ("key", "type", "default", "variable", "meaning")
    sections = [f"## [{name}]", cell(inspect.getdoc(model) or ""), table(head, rows)]
    for inner_name, inner in nested:
        sections += _section(inner_name, inner, meanings)
    return sections


def _model_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Of a section within a section; and whether it is one of several that have names."""
    is_named = get_origin(annotation) is dict
    found = get_args(annotation)[-1] if is_named else annotation
    return (found if isinstance(found, type) and issubclass(found, BaseModel) else None), is_named


def _type(info: FieldInfo) -> str:
    bounds = []
    for bound in info.metadata:
        for name, words in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(bound, name, None) is not None:
                bounds.append(f"{words} {getattr(bound, name):,}")
    kind = _kind(info.annotation)
    return cell(f"{kind}, {', '.join(bounds)}" if bounds else kind)


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(json.dumps(each) for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(each) for each in arguments if each is not type(None))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"{_kind(arguments[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, PurePath):
        return "path"
    return _PLAIN[annotation]


def _default(info: FieldInfo) -> str:
    default = info.default
    if info.default_factory is not None or default is None:
        return ""
    return json.dumps(default if isinstance(default, bool | int | float | str) else str(default), ensure_ascii=False)


def _comments(source: str) -> dict[tuple[str, str], str]:
    """By class and key, the comment that stands right above the key."""
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                above = field.lineno - 2
                said: list[str] = []
                while lines[above].strip().startswith("#"):
                    said.insert(0, lines[above].strip().removeprefix("#").strip())
                    above -= 1
                found[node.name, field.target.id] = " ".join(said)
    return found
