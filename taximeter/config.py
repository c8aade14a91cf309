"""The one configuration: a TOML file, the environment and flags, in that order of growing weight.

Promise: `load` returns a frozen, complete `Config`, or raises `ConfigError` that names every wrong key, its value
(never a secret's) and the mend. A key that nobody knows is an error that names the nearest known one, wherever it
came from.

The file is `taximeter.toml`, or what `--config` or `TAXIMETER_CONFIG` names. The environment is
`TAXIMETER_SECTION__KEY`, such as `TAXIMETER_KAFKA__BOOTSTRAP`. A flag is `--set kafka.bootstrap=…`. A secret stands in
a file named by `…_file`, or in the environment; it is masked in every repr, error and dump.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from pydantic import BaseModel, Field, SecretStr, ValidationError

from taximeter.config_section import Section, nearest_name
from taximeter.errors import ConfigError
from taximeter.logs import keep_out
from taximeter.platform_config import (
    ClickHouseConfig,
    EmbeddedConfig,
    KafkaConfig,
    LedgerConfig,
    PricesConfig,
    ProducerConfig,
)
from taximeter.serving_config import ApiConfig, GatewayConfig, ModelsConfig, NotifierConfig

__all__ = ["ENVIRONMENT_PREFIX", "Config", "is_anything_set", "load", "read_secret"]

ENVIRONMENT_PREFIX: Final = "TAXIMETER_"
# Variables of the command line itself, which are no keys of the configuration.
_COMMAND_LINE_VARIABLES: Final = frozenset(
    {"TAXIMETER_CONFIG", "TAXIMETER_DATA_DIR", "TAXIMETER_LOG_FORMAT", "TAXIMETER_LOG_LEVEL"}
)
DEFAULT_FILE: Final = Path("taximeter.toml")
_FILE_BYTES_MAX: Final = 1_000_000


class Config(Section):
    """Everything that can be set."""

    kafka: KafkaConfig = Field(default_factory=KafkaConfig)
    ledger: LedgerConfig = Field(default_factory=LedgerConfig)
    clickhouse: ClickHouseConfig = Field(default_factory=ClickHouseConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    api: ApiConfig = Field(default_factory=ApiConfig)
    producer: ProducerConfig = Field(default_factory=ProducerConfig)
    models: ModelsConfig = Field(default_factory=ModelsConfig)
    notifier: NotifierConfig = Field(default_factory=NotifierConfig)
    prices: PricesConfig = Field(default_factory=PricesConfig)
    embedded: EmbeddedConfig = Field(default_factory=EmbeddedConfig)


def load(
    path: Path | None = None,
    flags: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, object]] | None = None,
) -> Config:
    """The configuration.

    `path` None: `taximeter.toml` if it is there. `flags` are "section.key=value". `overrides` win over everything.
    """
    file_values = {} if path is None and not DEFAULT_FILE.is_file() else _read_toml(path or DEFAULT_FILE)
    origin = str(path or DEFAULT_FILE)
    values = _parse_flags(flags)
    for section, keys in (overrides or {}).items():
        values.setdefault(section, {}).update(keys)
    try:
        return Config.model_validate(_merged(_merged(file_values, _environment()), values))
    except ValidationError as error:
        raise ConfigError(_explain(error, file_values, values, origin)) from None


def is_anything_set() -> bool:
    """Whether there is a configuration to speak of, beyond the defaults: a file here, or something in the environment."""
    return DEFAULT_FILE.is_file() or any(map(_is_setting, os.environ))


def read_secret(section: BaseModel, field: str, *, needed_for: str) -> bytes:
    """The secret `field` of a section: from `<field>_file` or the value itself; no log shows it from now on. ConfigError when
    neither is there.
    """
    section_name = _section_name(section)
    value: SecretStr | None = getattr(section, field)
    if value is not None:
        secret = value.get_secret_value().encode()
        keep_out(secret)
        return secret
    path: Path | None = getattr(section, f"{field}_file")
    variable = f"{ENVIRONMENT_PREFIX}{section_name.upper()}__{field.upper()}"
    if path is None:
        raise ConfigError(
            f"{section_name}.{field} is not set and {needed_for} needs it: set {section_name}.{field}_file, or {variable}"
        )
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{section_name}.{field}_file {path} cannot be read ({error.strerror}): correct the path") from None
    if not secret:
        raise ConfigError(f"{section_name}.{field}_file {path} is empty: put the secret in it")
    keep_out(secret)
    return secret


def _section_name(section: BaseModel) -> str:
    return next(name for name, info in Config.model_fields.items() if info.annotation is type(section))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise ConfigError(f"configuration file {path} has over {_FILE_BYTES_MAX} bytes: is it the right file?")
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read ({error.strerror}): correct --config") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"configuration file {path} is not TOML ({error}): correct that line") from None


def _parse_flags(flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    for flag in flags:
        name, equals, text = flag.partition("=")
        parts = name.strip().split(".")
        if not equals or len(parts) < 2 or not all(parts):
            raise ConfigError(f"--set {flag!r} is not section.key=value: write e.g. --set kafka.bootstrap=127.0.0.1:9092")
        target: dict[str, Any] = values.setdefault(parts[0], {})
        for part in parts[1:-1]:
            target = target.setdefault(part, {})
        target[parts[-1]] = text
    return values


def _merged(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key; of anything else, the stronger one's."""
    merged = dict(weaker)
    for key, value in stronger.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _environment() -> dict[str, Any]:
    """What the environment sets, by section."""
    variables = [name for name in sorted(os.environ) if _is_setting(name)]
    for variable in variables:
        section, separator, _ = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        # The library passes over a variable whose section it does not know.
        if section not in Config.model_fields or not separator:
            nearest = nearest_name(section, list(Config.model_fields))
            mend = f"{ENVIRONMENT_PREFIX}{nearest.upper()}__KEY"
            raise ConfigError(f"environment variable {variable} names no key: write {mend}, or unset it")
    if not variables:
        return {}
    # Where nothing is set, as in the parts of `up`, it would be a fifth of what a command takes to start.
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsError

    # It asks a class for its fields alone.
    fields = cast("type[BaseSettings]", Config)
    try:
        return EnvSettingsSource(fields, env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__")()
    except SettingsError as error:
        raise ConfigError(f"environment: {error}: a table or a list is written as JSON") from None


def _is_setting(variable: str) -> bool:
    return variable.upper().startswith(ENVIRONMENT_PREFIX) and variable.upper() not in _COMMAND_LINE_VARIABLES


def _model_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    """The section's class that a path of keys leads to."""
    current: Any = Config
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = None if field is None else field.annotation
        elif getattr(current, "__origin__", None) is dict:
            current = current.__args__[1]
        else:
            return None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _explain(error: ValidationError, file_values: Mapping[str, Any], flags: Mapping[str, Any], origin: str) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        location = problem["loc"]
        key = ".".join(str(part) for part in location) or "configuration"
        source = _source_of(location, file_values, flags, origin)
        if problem["type"] == "extra_forbidden":
            model = _model_at(location[:-1])
            known = [] if model is None else list(model.model_fields)
            prefix = ".".join(str(part) for part in location[:-1])
            nearest = ".".join(part for part in (prefix, nearest_name(str(location[-1]), known)) if part)
            lines.append(f"{key} ({source}) is no key: the nearest is {nearest}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key} ({source}){_shown(location, file_values, flags)}: {message}")
    return "; ".join(lines)


def _look_up(location: Sequence[str | int], values: Mapping[str, Any]) -> Any:
    current: Any = values
    for part in location:
        if not isinstance(current, Mapping) or part not in current:
            return None
        current = current[part]
    return current


def _source_of(location: Sequence[str | int], file_values: Mapping[str, Any], flags: Mapping[str, Any], origin: str) -> str:
    if _look_up(location, flags) is not None:
        return "a flag"
    variable = ENVIRONMENT_PREFIX + "__".join(str(part).upper() for part in location)
    if any(name.upper() == variable for name in os.environ):
        return f"environment {variable}"
    return origin


def _shown(location: Sequence[str | int], file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> str:
    """The wrong value, unless its key may hold a secret."""
    model = _model_at(location[:-1])
    field = None if model is None else model.model_fields.get(str(location[-1]))
    if field is None or "SecretStr" in str(field.annotation):
        return ""
    value = _look_up(location, flags)
    if value is None:
        variable = ENVIRONMENT_PREFIX + "__".join(str(part).upper() for part in location)
        value = next((text for name, text in os.environ.items() if name.upper() == variable), None)
    if value is None:
        value = _look_up(location, file_values)
    return "" if value is None or isinstance(value, Mapping) else f" is {value!r}"
