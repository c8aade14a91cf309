"""How long a request allows its answer to be: read it, and make it shorter.

Two ways that back ends have: `max_tokens` in the JSON of `sampling_parameters` (vLLM; also as a parameter of the request), and
a tensor, `max_tokens` or `request_output_len` (TensorRT-LLM). A request that states none has the back end's own default, which
a gateway does not know. A request may ask for several texts, each of that length.
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, NamedTuple

from serving import kserve

if TYPE_CHECKING:
    from serving.kserve import ModelInferRequest

__all__ = ["OutputAsked", "OutputLimit", "read_output_asked", "set_output_limit"]

_JSON_INPUT = "sampling_parameters"
_NAME = "max_tokens"
# Texts that one prompt may ask for: in the JSON, and as tensors. What is more than any back end gives is refused there.
_JSON_TEXTS = ("n", "best_of")
_TENSOR_TEXTS = ("beam_width", "num_return_sequences")
_TEXTS_MAX = 1_024


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


def read_output_asked(request: ModelInferRequest, where: OutputLimit, name: str = _NAME) -> OutputAsked:
    """How long the answer may be, and how many texts it has. Raises TensorError for a tensor that cannot be read."""
    value: object = None
    texts = 1
    if where is OutputLimit.TENSOR:
        value = kserve.read_integer_input(request, name)
        for texts_name in _TENSOR_TEXTS:
            texts *= kserve.read_integer_input(request, texts_name) or 1
    elif where is OutputLimit.SAMPLING_PARAMETERS:
        parameters = _sampling_parameters(request)
        if parameters is None:
            value = kserve.get_parameter(request, _NAME)
        else:
            value = parameters.get(_NAME)
            for key in _JSON_TEXTS:
                stated = parameters.get(key)
                if isinstance(stated, int):
                    texts = max(texts, stated)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    tokens = value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
    return OutputAsked(tokens, min(max(texts, 1), _TEXTS_MAX))


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


def _sampling_parameters(request: ModelInferRequest) -> dict[str, object] | None:
    """None where the tensor is not there; empty where it is not what a back end takes, which will say so."""
    text = kserve.read_text_input(request, _JSON_INPUT)
    if text is None:
        return None
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parameters if isinstance(parameters, dict) else {}
