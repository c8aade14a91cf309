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
from typing import Any, Final

from pydantic import BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from taximeter.config_section import nearest_name
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


class _FileSource(PydanticBaseSettingsSource):
    """The TOML file, already read: it was parsed by `load`, which says what is wrong with it."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = dict(values)

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


class Config(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Flags come as init values under one reserved name, so that they and the file stay apart.
        values: dict[str, Any] = getattr(init_settings, "init_kwargs", {})
        file_values = values.pop("_file_values", {})
        return init_settings, env_settings, _FileSource(settings_cls, file_values)


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
    _check_environment()
    try:
        # pydantic-settings keeps names that begin with an underscore to itself, so the file's values ride in a dict.
        arguments: dict[str, Any] = {"_file_values": file_values, **values}
        return Config(**arguments)
    except ValidationError as error:
        raise ConfigError(_explain(error, file_values, values, origin)) from None


def is_anything_set() -> bool:
    """Whether there is a configuration to speak of, beyond the defaults: a file here, or something in the environment."""
    return DEFAULT_FILE.is_file() or any(
        name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in _COMMAND_LINE_VARIABLES for name in os.environ
    )


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


def _check_environment() -> None:
    """pydantic-settings ignores a variable whose section it does not know; we do not."""
    for variable in sorted(os.environ):
        if not variable.upper().startswith(ENVIRONMENT_PREFIX) or variable.upper() in _COMMAND_LINE_VARIABLES:
            continue
        section, separator, _ = variable[len(ENVIRONMENT_PREFIX) :].lower().partition("__")
        if section not in Config.model_fields or not separator:
            nearest = nearest_name(section, list(Config.model_fields))
            mend = f"{ENVIRONMENT_PREFIX}{nearest.upper()}__KEY"
            raise ConfigError(f"environment variable {variable} names no key: write {mend}, or unset it")


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
