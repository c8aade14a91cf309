"""A request for a model that is known by its profile and by what its server says of it: what `taximeter models check`
sends, and a gateway that starts.

Tensors that the profile knows get a small value of their own; others get what is given for them, or are left out where the
model does not need them. What cannot be filled in is an error that names the tensor.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from serving import kserve
from serving.gateway.output_limits import OutputLimit
from serving.gateway.units import AudioMilliseconds, ImageSteps
from serving.kserve import TensorError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.gateway.profiles import ModelProfile

__all__ = ["SAMPLE_PROMPT", "make_request", "problems_of"]

# Of plain English most vocabularies make the same number of tokens: of this no two do.
SAMPLE_PROMPT: Final = "The quick brown fox jumps over 12,345 lazy dogs; naïve Füchse, 敏捷的棕色狐狸 👍🏽"

_TOKEN_IDS: Final = (1, 2, 3, 4, 5, 6, 7, 8)
_STEPS: Final = 2


def _known_values(profile: ModelProfile, prompt: str, output_tokens: int) -> dict[str, list[Any]]:
    """By tensor: what the profile says it is for."""
    values: dict[str, list[Any]] = {}
    if profile.text_inputs:
        values[profile.text_inputs[0]] = [prompt]
    if profile.stream_input is not None:
        values[profile.stream_input] = [profile.decoupled]
    if profile.output_limit is OutputLimit.SAMPLING_PARAMETERS:
        values["sampling_parameters"] = [json.dumps({"max_tokens": output_tokens})]
    elif profile.output_limit is OutputLimit.TENSOR:
        values[profile.output_limit_input] = [output_tokens]
    if profile.ids is not None:
        values[profile.ids.input_ids] = list(_TOKEN_IDS)
        values[profile.ids.input_lengths] = [len(_TOKEN_IDS)]
    for rule in profile.units:
        if isinstance(rule, AudioMilliseconds):
            values[rule.input] = [0] * rule.sample_rate_hz
            values[rule.lengths_input] = [rule.sample_rate_hz]
        elif isinstance(rule, ImageSteps):
            values[rule.steps_input] = [_STEPS]
            values[rule.images_input] = [1]
    return values


def _shape(declared: list[int], count: int) -> list[int]:
    """What is open in a declared shape is one, and the last such dimension takes what there is."""
    shape = [1 if size < 0 else size for size in declared]
    if declared and declared[-1] < 0:
        shape[-1] = count // max(1, math.prod(shape[:-1]))
    return shape


def _pack(name: str, datatype: str, values: list[Any]) -> tuple[bytes, int]:
    """Raw data, and how many elements it has; bytes that are given for numbers are such data already."""
    if datatype == "BYTES":
        elements = [value if isinstance(value, bytes) else str(value).encode() for value in values]
        return kserve.pack_bytes(elements), len(elements)
    kind = triton_to_np_dtype(datatype)
    if kind is None:
        raise TensorError(name, f"datatype {datatype!r}", "is not one that a value can be made for")
    try:
        array = (
            np.frombuffer(values[0], dtype=kind)
            if len(values) == 1 and isinstance(values[0], bytes)
            else np.array(values, dtype=kind)
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise TensorError(name, str(values)[:64], f"give numbers that fit {datatype}") from error
    return array.tobytes(), array.size


def _add(request: Any, name: str, datatype: str, declared: list[int], values: list[Any]) -> None:
    raw, count = _pack(name, datatype, values)
    shape = _shape(declared, count)
    if math.prod(shape) != count:
        raise TensorError(name, f"{count} elements for shape {declared}", f"give {math.prod(shape)}")
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(raw)


def make_request(
    profile: ModelProfile, metadata: Any, config: Any | None, given: Mapping[str, list[Any]], prompt: str, output_tokens: int
) -> Any:
    """An inference request of the model that `metadata` (and `config`, from servers that have it) describe. Raises
    TensorError."""
    unknown = set(given) - {tensor.name for tensor in metadata.inputs}
    for name in sorted(unknown):
        raise TensorError(name, "not an input", f"the model has {', '.join(tensor.name for tensor in metadata.inputs)}")
    optional = {tensor.name for tensor in config.input if tensor.optional} if config is not None else set()
    values = {**_known_values(profile, prompt, output_tokens), **given}
    request = service_pb2.ModelInferRequest(model_name=profile.model, id="taximeter-models-check")
    for tensor in metadata.inputs:
        if tensor.name in values:
            _add(request, tensor.name, tensor.datatype, list(tensor.shape), values[tensor.name])
        elif tensor.name not in optional:
            raise TensorError(tensor.name, f"{tensor.datatype} {list(tensor.shape)}", "the model needs it: give it a value")
    return request


def problems_of(profile: ModelProfile, metadata: Any, config: Any | None) -> list[str]:
    """What the profile says and the server does not."""
    inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (metadata.inputs, metadata.outputs))
    counts, ids = profile.counts, profile.ids
    wanted = [profile.text_inputs[:1], (ids.input_ids, ids.input_lengths) if ids else ()]
    wanted += [(rule.input, rule.lengths_input) for rule in profile.units if isinstance(rule, AudioMilliseconds)]
    wanted += [(counts.input_flag, counts.output_flag) if counts else ()]
    found = [
        f"input {name}: the model has none of that name, but {', '.join(sorted(inputs))}"
        for names in wanted
        for name in names
        if name and name not in inputs
    ]
    reported = ((counts.input_flag, counts.input_count), (counts.output_flag, counts.output_count)) if counts else ()
    found += [
        f"output {name}: the model has none of that name, but {', '.join(sorted(outputs))}"
        for name in (*profile.metered_outputs, *(count for flag, count in reported if flag))
        if name not in outputs
    ]
    if config is None:
        return found
    if config.model_transaction_policy.decoupled != profile.decoupled:
        found.append(f"decoupled = {str(profile.decoupled).lower()}: the model's configuration says the opposite")
    stated = config.parameters["exclude_input_in_output"].string_value if "exclude_input_in_output" in config.parameters else ""
    if counts is not None and counts.prompt_in_output_count and stated not in ("", str(profile.exclude_input_default).lower()):
        found.append(f"exclude_input_default: the model's parameter exclude_input_in_output is {stated}: set it to that")
    return found
