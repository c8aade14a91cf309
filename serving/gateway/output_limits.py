"""How long a request allows its answer to be: read it, make it shorter, and say it where the request does not.

Two ways that back ends have: `max_tokens` in the JSON of `sampling_parameters` (vLLM; also as a parameter of the request), and
a tensor, `max_tokens` or `request_output_len` (TensorRT-LLM). A request that states none has the back end's own default: it is
given a limit only where that default is not known to be shorter, so that no answer becomes longer by it. A request may ask for
several texts, each of that length.
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Final, NamedTuple

from billing.limits import QUANTITY_MAX
from serving import kserve

if TYPE_CHECKING:
    from serving.gateway.profiles import ModelProfile
    from serving.kserve import ModelInferRequest

__all__ = ["OutputAsked", "OutputLimit", "limit_output", "read_output_asked", "set_output_limit"]

_JSON_INPUT = "sampling_parameters"
_NAME = "max_tokens"
# Texts that one prompt may ask for: in the JSON, and as tensors. What is more than any back end gives is refused there.
_JSON_TEXTS = ("n", "best_of")
_TENSOR_TEXTS = ("beam_width", "num_return_sequences")
_TEXTS_MAX = 1_024
# In place of sampling parameters: it says nothing of the answer.
_UNREADABLE: Final[dict[str, object]] = {}


class OutputLimit(enum.Enum):
    """Where a model's requests say it."""

    SAMPLING_PARAMETERS = "sampling_parameters"
    TENSOR = "tensor"
    NOWHERE = "nowhere"


class OutputAsked(NamedTuple):
    """What a request says of its answer."""

    # That it may have at most; None where the request does not say, or says what the back end will refuse.
    tokens: int | None
    # How many, each as long as that.
    texts: int
    # It says something of it, if only that there is to be no limit: null, or a number below zero.
    is_said: bool = False


def read_output_asked(request: ModelInferRequest, where: OutputLimit, name: str = _NAME) -> OutputAsked:
    """How long the answer may be, and how many texts it has. Raises TensorError for a tensor that cannot be read."""
    value: object = None
    texts, is_said = 1, False
    if where is OutputLimit.TENSOR:
        value = kserve.read_integer_input(request, name)
        for texts_name in _TENSOR_TEXTS:
            texts *= kserve.read_integer_input(request, texts_name) or 1
    elif where is OutputLimit.SAMPLING_PARAMETERS:
        parameters = _sampling_parameters(request)
        if parameters is None:
            # A parameter of no type is none.
            parameters = {
                key: found for key in (_NAME, *_JSON_TEXTS) if (found := kserve.get_parameter(request, key)) is not None
            }
        # Null is said too.
        value, is_said = parameters.get(_NAME), _NAME in parameters
        for key in _JSON_TEXTS:
            texts = max(texts, _whole(parameters.get(key)) or 1)
    return OutputAsked(_whole(value), min(max(texts, 1), _TEXTS_MAX), is_said or value is not None)


def _whole(value: object) -> int | None:
    """What a back end makes of a number in JSON, which may be a text there or have a fraction; None: it refuses that, or it is
    no limit."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    # No answer is longer than what can be billed, and no price of it then longer than an amount.
    return min(number, QUANTITY_MAX) if number >= 0 else None


def set_output_limit(request: ModelInferRequest, where: OutputLimit, tokens: int, name: str = _NAME) -> None:
    """Let the answer of a request that states a limit have at most `tokens`."""
    if where is OutputLimit.TENSOR:
        tensor = kserve.find_input(request, name)
        assert tensor is not None, "its limit was read"
        dtype, shape = tensor.datatype, tuple(tensor.shape)
        kserve.strip_input(request, name)
        kserve.add_integer_input(request, name, tokens, dtype=dtype, shape=shape)
    elif where is OutputLimit.SAMPLING_PARAMETERS:
        parameters = _sampling_parameters(request)
        if parameters is None:
            kserve.set_parameter(request, _NAME, tokens)
            return
        kserve.strip_input(request, _JSON_INPUT)
        kserve.add_bytes_input(request, _JSON_INPUT, [json.dumps({**parameters, _NAME: tokens}).encode()])


def limit_output(request: ModelInferRequest, profile: ModelProfile, asked: OutputAsked, tokens: int) -> OutputAsked:
    """Let a request that states no limit have an answer of `tokens` at most; what it asks for then.

    It is as it was where the back end's default is shorter, where nothing is known by which the back end would be told, and
    where the back end will refuse what it cannot read: an answer to that is not what was asked for.
    """
    where, default = profile.output_limit, profile.output_tokens_default
    if where is OutputLimit.NOWHERE or (default and default <= tokens and not asked.is_said):
        return asked
    if where is OutputLimit.SAMPLING_PARAMETERS and _sampling_parameters(request) is _UNREADABLE:
        return asked
    if where is OutputLimit.TENSOR:
        if asked.is_said:
            set_output_limit(request, where, tokens, profile.output_limit_input)
        elif profile.takes_output_limit:
            shape = (1,) if profile.counts is None else profile.counts.shape
            kserve.add_integer_input(request, profile.output_limit_input, tokens, dtype="INT32", shape=shape)
        else:
            return asked
    else:
        set_output_limit(request, where, tokens)
    return asked._replace(tokens=tokens, is_said=True)


def _sampling_parameters(request: ModelInferRequest) -> dict[str, object] | None:
    """None where the tensor is not there; `_UNREADABLE` where it is not what a back end takes, which will say so."""
    text = kserve.read_text_input(request, _JSON_INPUT)
    if text is None:
        return None
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError):
        return _UNREADABLE
    return parameters if isinstance(parameters, dict) else _UNREADABLE
