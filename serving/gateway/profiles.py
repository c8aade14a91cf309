"""How a model's back end speaks and counts, as data: which tensors carry text, which flags make it report its counts.

A profile never guesses: a model has either flags by which its back end reports counts, or a tokenizer, or both (then the
tokenizer stands in where no count came, as after a cancel). A model with neither cannot be metered and is refused at start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from billing.v1.usage_pb2 import OPERATION_GENERATE
from serving.gateway.output_limits import OutputLimit
from serving.tokenizers import Framing

__all__ = ["VLLM_COUNTS", "CountFlags", "ModelProfile", "generic", "tensorrt_llm", "vllm"]


@dataclass(frozen=True, slots=True)
class CountFlags:
    """The inputs that ask a back end for its counts, and the outputs that bring them."""

    input_flag: str = "return_num_input_tokens"
    output_flag: str = "return_num_output_tokens"
    input_count: str = "num_input_tokens"
    output_count: str = "num_output_tokens"
    shape: tuple[int, ...] = (1,)
    """Of the flags; the counts are read in any shape of one element."""
    deltas: bool = True
    """Each response counts its own output tokens: sum them. False: each counts all so far, and the last one holds."""
    prompt_in_output_count: bool = False
    """Without streaming and without `exclude_input`, the output count has the prompt's tokens in it: take them out."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One model, as the gateway must know it."""

    model: str
    text_input: str = "text_input"
    text_output: str = "text_output"
    tokenizer: str | None = None
    """By its name in the gateway's settings."""
    framing: Framing = Framing.PROMPT
    """What the model sees around the prompt."""
    chat_input: str | None = "chat_template"
    """A flag of the request by which the model puts the prompt into its chat template."""
    counts: CountFlags | None = None
    stream_input: str | None = "stream"
    exclude_input: str | None = "exclude_input_in_output"
    prompt_in_output_text: bool = False
    """Without streaming and without `exclude_input`, the text starts with the prompt, which the model did not write."""
    decoupled: bool = True
    """False: one response a request, and a stream answers in the order of its requests."""
    output_limit: OutputLimit = OutputLimit.SAMPLING_PARAMETERS
    """Where a request says how long its answer may be."""
    operation: int = OPERATION_GENERATE
    prompt_tokens_max: int = 0
    """For plans that state none; 0: the gateway's."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: is empty: name the model as its back end does")
        if self.counts is None and self.tokenizer is None:
            raise ValueError(f"model {self.model!r}: has neither counts nor a tokenizer: give it one of them")
        if self.prompt_tokens_max < 0:
            raise ValueError(f"prompt_tokens_max: {self.prompt_tokens_max}: must be at least 0")


VLLM_COUNTS = CountFlags()
_TENSORRT_LLM_COUNTS = replace(VLLM_COUNTS, shape=(1, 1), prompt_in_output_count=True)


def vllm(model: str, *, tokenizer: str | None = None, decoupled: bool = True, prompt_tokens_max: int = 0) -> ModelProfile:
    """Triton's vLLM back end, and servers that took over its tensors."""
    return ModelProfile(
        model,
        tokenizer=tokenizer,
        counts=VLLM_COUNTS,
        prompt_in_output_text=True,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
    )


def tensorrt_llm(
    model: str, *, tokenizer: str | None = None, decoupled: bool = True, prompt_tokens_max: int = 0
) -> ModelProfile:
    """TensorRT-LLM's ensemble: the same flags in two dimensions, and the prompt inside the output count."""
    return ModelProfile(
        model,
        tokenizer=tokenizer,
        counts=_TENSORRT_LLM_COUNTS,
        output_limit=OutputLimit.TENSOR,
        prompt_in_output_text=True,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
    )


def generic(model: str, *, tokenizer: str, decoupled: bool = True, prompt_tokens_max: int = 0) -> ModelProfile:
    """Text in, text out, and no counts: the tokenizer does it all."""
    return ModelProfile(
        model,
        tokenizer=tokenizer,
        stream_input=None,
        exclude_input=None,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
    )
