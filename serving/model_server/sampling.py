"""vLLM's sampling parameters in llama.cpp's words.

Values may be JSON strings, as Triton's vLLM back end takes them. An unknown name is an error, as there: a limit with a
typing error in its name must not become no limit.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from serving import kserve
from serving.model_server.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from serving.kserve import ModelInferRequest

__all__ = ["read_sampling_parameters", "to_integer", "to_llama_options"]

_FIELD: Final = "sampling_parameters"
# KServe's and Triton's own request parameters, which are not the model's.
_RESERVED: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
_DEFAULT_MAX_TOKENS: Final = 16  # vLLM's
_MAX_STOPS: Final = 16


def read_sampling_parameters(request: ModelInferRequest) -> dict[str, Any]:
    """The JSON object of the tensor `sampling_parameters`, or else the request's own parameters."""
    text = kserve.read_text_input(request, _FIELD)
    if text is None:
        return {
            name: kserve.get_parameter(request, name)
            for name in request.parameters
            if name not in _RESERVED and not name.startswith("triton_")
        }
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError.invalid(f"{_FIELD}: not JSON: {error}: send a JSON object") from error
    if not isinstance(parameters, dict):
        raise RequestError.invalid(f"{_FIELD}: {type(parameters).__name__}: send a JSON object")
    return parameters


def _fail(name: str, value: object, mend: str) -> RequestError:
    return RequestError.invalid(f"{_FIELD}.{name}: {value!r}: {mend}")


def to_integer(name: str, value: object, least: int, most: int) -> int:
    """The value as a whole number within its bounds."""
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = int(value)  # type: ignore[call-overload]  # what int() refuses is refused below
    except (ValueError, TypeError, OverflowError) as error:
        raise _fail(name, value, "must be a whole number") from error
    if not least <= number <= most:
        raise _fail(name, value, f"must be between {least} and {most}")
    return int(number)


def _to_float(name: str, value: object, least: float, most: float) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)  # type: ignore[arg-type]  # what float() refuses is refused below
    except (ValueError, TypeError, OverflowError) as error:
        raise _fail(name, value, "must be a number") from error
    if not least <= number <= most:
        raise _fail(name, value, f"must be between {least:g} and {most:g}")
    return number


def _to_bool(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise _fail(name, value, "must be true or false")


def _to_stops(name: str, value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _fail(name, value, f"must be a text or a list of at most {_MAX_STOPS} texts, none of them empty")
    return stops


_OPTIONS: Final[Mapping[str, tuple[str, Callable[[str, object], Any]]]] = {
    "temperature": ("temperature", lambda name, value: _to_float(name, value, 0, 100)),
    "top_p": ("top_p", lambda name, value: _to_float(name, value, 0, 1)),
    # vLLM's -1 and llama.cpp's 0 both mean all of the vocabulary.
    "top_k": ("top_k", lambda name, value: max(0, to_integer(name, value, -1, 1 << 20))),
    "min_p": ("min_p", lambda name, value: _to_float(name, value, 0, 1)),
    "seed": ("seed", lambda name, value: to_integer(name, value, 0, 2**32 - 2)),
    "stop": ("stop", _to_stops),
    "ignore_eos": ("ignore_eos", _to_bool),
    "presence_penalty": ("presence_penalty", lambda name, value: _to_float(name, value, -2, 2)),
    "frequency_penalty": ("frequency_penalty", lambda name, value: _to_float(name, value, -2, 2)),
    "repetition_penalty": ("repeat_penalty", lambda name, value: _to_float(name, value, 0.01, 100)),
}


def to_llama_options(parameters: dict[str, Any], max_output_tokens: int) -> dict[str, Any]:
    """The request body for llama.cpp, every value checked."""
    max_tokens = to_integer("max_tokens", parameters.get("max_tokens", _DEFAULT_MAX_TOKENS), 1, max_output_tokens)
    # vLLM's defaults, where llama.cpp has others of its own.
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    for name, value in parameters.items():
        if name == "max_tokens" or value is None:
            continue
        if name == "n":
            to_integer(name, value, 1, 1)
            continue
        known = _OPTIONS.get(name)
        if known is None:
            raise _fail(name, value, f"unknown: known are max_tokens, n, {', '.join(sorted(_OPTIONS))}")
        option, convert = known
        options[option] = convert(name, value)
    return options
