"""What a request asks, and what its responses say was used: pure, one object a request.

`prepare` rewrites a request for the back end (its own id, the flags that make the back end count, the last response even if
it is empty) and remembers what the client did not ask for. `AnswerCounter` reads counts from responses, normalises the known
traps, and takes out again what was injected, so that a client sees what it would have seen without the gateway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from billing.limits import QUANTITY_MAX
from serving import kserve
from serving.kserve import EMPTY_FINAL_PARAMETER, TensorError
from serving.tokenizers import Framing

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from serving.gateway.profiles import ModelProfile
    from serving.kserve import ModelInferRequest, ModelInferResponse

__all__ = ["AnswerCounter", "Counted", "PreparedRequest", "prepare"]

_FOUR_BYTES = frozenset({"INT32", "UINT32"})


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """What the gateway must remember of a request while the back end works on it."""

    client_id: str
    prompt: str
    framing: Framing
    hidden_outputs: tuple[str, ...]
    """Injected: the client did not ask for them and does not see them."""
    empty_final_asked: bool
    prompt_echoed: bool
    """The back end puts the prompt in front of its answer."""


def _refuse_shared_memory(request: ModelInferRequest) -> None:
    for tensor in (*request.inputs, *request.outputs):
        if kserve.has_shared_memory(tensor):
            raise TensorError(tensor.name, "in shared memory", "send tensors in the request: the gateway must meter them")


def _flag(request: ModelInferRequest, names: AbstractSet[str], name: str | None) -> bool:
    """Whether the client set the flag. The set of names spares a walk over all inputs for each that is not there."""
    return name is not None and name in names and bool(kserve.read_bool_input(request, name))


def _inject_flag(request: ModelInferRequest, names: AbstractSet[str], flag: str, count: str, shape: tuple[int, ...]) -> bool:
    """Make the back end report a count; True if the client did not ask for it."""
    asked = _flag(request, names, flag)
    if not asked:
        if flag in names:
            kserve.strip_input(request, flag)
        kserve.add_bool_input(request, flag, True, shape=shape)
    # A client that lists the outputs that it wants gets those alone.
    return kserve.request_output(request, count) or not asked


def prepare(request: ModelInferRequest, profile: ModelProfile, upstream_id: str, *, stream: bool) -> PreparedRequest:
    """Rewrite `request` in place for the back end. Raises TensorError for what cannot be metered."""
    _refuse_shared_memory(request)
    prompt = kserve.read_text_input(request, profile.text_input)
    if prompt is None:
        if profile.tokenizer is not None:
            raise TensorError(profile.text_input, "missing", "send the prompt as a BYTES tensor of one element")
        prompt = ""
    names = {tensor.name for tensor in request.inputs}
    framing = Framing.CHAT if _flag(request, names, profile.chat_input) else profile.framing
    streaming = _flag(request, names, profile.stream_input)
    excluded = _flag(request, names, profile.exclude_input)
    hidden: list[str] = []
    counts = profile.counts
    if counts is None:
        if kserve.request_output(request, profile.text_output):
            hidden.append(profile.text_output)
    else:
        if _inject_flag(request, names, counts.input_flag, counts.input_count, counts.shape):
            hidden.append(counts.input_count)
        if _inject_flag(request, names, counts.output_flag, counts.output_count, counts.shape):
            hidden.append(counts.output_count)
    empty_final_asked = kserve.get_parameter(request, EMPTY_FINAL_PARAMETER)
    if empty_final_asked is not None and not isinstance(empty_final_asked, bool):
        # The back end would refuse it, and it will not see it.
        raise TensorError(EMPTY_FINAL_PARAMETER, repr(empty_final_asked), "a parameter that must be a bool_param")
    if stream:
        kserve.set_parameter(request, EMPTY_FINAL_PARAMETER, True)
    client_id = request.id
    request.id = upstream_id
    return PreparedRequest(
        client_id=client_id,
        prompt=prompt,
        framing=framing,
        hidden_outputs=tuple(hidden),
        empty_final_asked=bool(empty_final_asked),
        prompt_echoed=not streaming and not excluded,
    )


@dataclass(frozen=True, slots=True)
class Counted:
    """What the responses so far say: counts where the back end gave them, and how much text there was."""

    input_tokens: int | None
    output_tokens: int | None
    text_parts: int


class AnswerCounter:
    """Adds up a request's responses."""

    __slots__ = ("_counts", "_hidden", "_input", "_output", "_parts", "_prepared", "_profile", "responses")

    def __init__(self, profile: ModelProfile, prepared: PreparedRequest) -> None:
        self._profile = profile
        self._prepared = prepared
        self._counts = profile.counts
        self._hidden = prepared.hidden_outputs
        self._input: int | None = None
        self._output: int | None = None
        self._parts: list[bytes] = []
        self.responses = 0

    def take(self, response: ModelInferResponse) -> None:
        """Count a response and take out what was injected. Raises TensorError if it cannot be read."""
        self.responses += 1
        names = [tensor.name for tensor in response.outputs]
        counts = self._counts
        if counts is not None:
            tokens = _read_count(response, names, counts.input_count)
            if tokens is not None and (self._input is None or tokens > self._input):
                self._input = tokens
            tokens = _read_count(response, names, counts.output_count)
            if tokens is not None:
                self._output = tokens + (self._output or 0) if counts.deltas else tokens
        if self._profile.tokenizer is not None:
            text = kserve.read_bytes_output(response, self._profile.text_output)
            if text:
                self._parts.extend(text)
        for name in self._hidden:
            if name in names:
                _strip(response, names, name)

    def counted(self) -> Counted:
        """All so far."""
        output = self._output
        if (
            output is not None
            and self._input is not None
            and self._counts is not None
            and self._counts.prompt_in_output_count
            and self._prepared.prompt_echoed
        ):
            output = max(0, output - self._input)
        return Counted(self._input, output, len(self._parts))

    def text(self, first_part: int = 0, end_part: int | None = None) -> str:
        """What the model wrote. A character may be split over two responses, so bytes are joined before they are read."""
        text = b"".join(self._parts[first_part:end_part]).decode(errors="replace")
        if first_part == 0 and self._profile.prompt_in_output_text and self._prepared.prompt_echoed:
            text = text.removeprefix(self._prepared.prompt)
        return text


def _strip(response: ModelInferResponse, names: list[str], name: str) -> None:
    """Take an output out of the response and its name out of `names`, which are the response's outputs in order."""
    index = names.index(name)
    if len(response.raw_output_contents) == len(names):
        del response.raw_output_contents[index]
        del response.outputs[index]
    else:
        kserve.strip_output(response, name)
    del names[index]


def _read_count(response: ModelInferResponse, names: list[str], name: str) -> int | None:
    """A count; None where there is none, or one that cannot be one: then the tokenizer takes its place."""
    if name not in names:
        return None
    raws = response.raw_output_contents
    index = names.index(name)
    # What back ends send: four raw bytes. Everything else takes the way that checks everything.
    if len(raws) == len(names) and len(raw := raws[index]) == 4 and response.outputs[index].datatype in _FOUR_BYTES:
        tokens: int | None = int.from_bytes(raw, "little", signed=response.outputs[index].datatype == "INT32")
    else:
        tokens = kserve.read_integer_output(response, name)
    return tokens if tokens is not None and 0 <= tokens <= QUANTITY_MAX else None
