"""How a model's back end speaks and counts, as data: which tensors carry what, which flags make it report its counts.

A profile never guesses. Whatever a model bills has one of these sources, in this order: counts that its back end reports;
tokens that it takes or gives as numbers; its tokenizer, on the text that it takes or gives; a unit that is not text. A model
that has none of them cannot be metered and is refused at start. Each kind of back end is a function that makes a profile;
`KINDS` has them by the names that the configuration uses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from tritonclient.grpc import service_pb2

from billing.v1.usage_pb2 import (
    OPERATION_CLASSIFICATION,
    OPERATION_EMBEDDINGS,
    OPERATION_GENERATE,
    OPERATION_OCR,
    OPERATION_SPEECH_TO_TEXT,
    OPERATION_TEXT_TO_IMAGE,
)
from serving import kserve
from serving.gateway.layout import Forms
from serving.gateway.output_limits import OutputLimit
from serving.gateway.units import AudioMilliseconds, Characters, ImageSteps, PerRequest, UnitRule
from serving.tokenizers import Framing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from serving.gateway.counting import DataPlan
    from serving.gateway.request_form import RequestForm
    from serving.kserve import ModelInferRequest

__all__ = [
    "KINDS",
    "VLLM_COUNTS",
    "CountFlags",
    "ModelProfile",
    "TokenIds",
    "classification",
    "embeddings",
    "generic",
    "ocr",
    "speech_to_text",
    "tensorrt_llm",
    "tensorrt_llm_ids",
    "text_to_image",
    "token_ids",
    "vllm",
    "vllm_embeddings",
]


@dataclass(frozen=True, slots=True)
class CountFlags:
    """The inputs that ask a back end for its counts, and the outputs that bring them; empty: it has no such flag."""

    input_flag: str = "return_num_input_tokens"
    output_flag: str = "return_num_output_tokens"
    input_count: str = "num_input_tokens"
    output_count: str = "num_output_tokens"
    shape: tuple[int, ...] = (1,)
    """Of the flags; the counts are read in any shape. The input is one number; an answer of several texts has a count each."""
    deltas: bool = True
    """Each response counts its own output tokens: sum them. False: each counts all so far, and the last one holds."""
    prompt_in_output_count: bool = False
    """Where the prompt is put in front of the answer, the output count has its tokens in it: take them out."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Tokens as numbers, in and out: they are counted as they are. Empty: there is no such tensor."""

    input_ids: str = "input_ids"
    input_lengths: str = "input_lengths"
    """How many of the ids of each row are the prompt; the rest is padding, and the model does not see it."""
    output_ids: str = "output_ids"
    output_lengths: str = "sequence_length"
    """The same of the answer, for each of its sequences. Without it negative ids are taken for padding."""
    all_generated: str = "return_all_generated_tokens"
    """A flag of the request: each response repeats all tokens so far."""
    prompt_in_output: bool = True
    """Where the prompt is put in front of the answer, its ids are among those of the output: take them out."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One model, as the gateway must know it."""

    model: str
    text_inputs: tuple[str, ...] = ("text_input",)
    """Texts that the model sees as input tokens; the first must be there where the tokenizer counts."""
    text_output: str | None = "text_output"
    """The text that is output tokens; None: the answer is none."""
    tokenizer: str | None = None
    """By its name in the gateway's settings."""
    framing: Framing = Framing.PROMPT
    """What the model sees around the prompt."""
    chat_input: str | None = "chat_template"
    """A flag of the request by which the model puts the prompt into its chat template."""
    counts: CountFlags | None = None
    ids: TokenIds | None = None
    units: tuple[UnitRule, ...] = ()
    stream_input: str | None = "stream"
    stop_input: str | None = None
    """A flag of a request that is none, but stops the one that has its ID, whose last response then comes as ever. None: the
    end of the call is all that such a back end understands."""
    exclude_input: str | None = "exclude_input_in_output"
    exclude_input_default: bool = False
    """What the model does without streaming where a request does not say: TensorRT-LLM has a parameter for it."""
    prompt_in_output_text: bool = False
    """Without streaming and without `exclude_input`, each text starts with its prompt, which the model did not write."""
    decoupled: bool = True
    """False: one response a request, and a stream answers in the order of its requests."""
    output_limit: OutputLimit = OutputLimit.SAMPLING_PARAMETERS
    """Where a request says how long its answer may be."""
    output_limit_input: str = "max_tokens"
    takes_output_limit: bool = True
    """That tensor is known to be an input of the model, so that a request without it may be given it."""
    output_tokens_default: int = 0
    """What the back end gives where a request does not say; 0: not known."""
    operation: int = OPERATION_GENERATE
    prompt_tokens_max: int = 0
    """For plans that state none; 0: the gateway's."""
    counts_input: bool = field(init=False)
    """Whether input tokens are metered at all."""
    counts_output: bool = field(init=False)
    """Whether output tokens are metered at all."""
    metered_outputs: tuple[str, ...] = field(init=False)
    """The outputs that the gateway must see, beside counts."""
    injected: ModelInferRequest = field(init=False, compare=False, repr=False)
    """The flags that make the back end count, as a part of a request that has its tensors raw."""
    injected_outputs: tuple[str, ...] = field(init=False, compare=False, repr=False)
    """What they bring."""
    request_forms: Forms[RequestForm | None] = field(init=False, compare=False, repr=False, default_factory=Forms)
    """What was learned of the model's requests."""
    answer_forms: tuple[Forms[DataPlan | None], Forms[DataPlan | None]] = field(
        init=False, compare=False, repr=False, default_factory=lambda: (Forms(), Forms())
    )
    """And of its answers, without their prompts in front and with them."""

    def __post_init__(self) -> None:
        counts, ids = self.counts, self.ids
        # Asked for every request, so made once.
        object.__setattr__(self, "counts_input", bool(self.text_inputs or ids or (counts and counts.input_flag)))
        object.__setattr__(self, "counts_output", bool(self.text_output or ids or (counts and counts.output_flag)))
        object.__setattr__(self, "metered_outputs", self._metered_outputs())
        object.__setattr__(self, "injected", service_pb2.ModelInferRequest())
        found = () if counts is None else ((counts.input_flag, counts.input_count), (counts.output_flag, counts.output_count))
        object.__setattr__(self, "injected_outputs", tuple(count for flag, count in found if flag))
        for flag, _ in found:
            if flag and counts is not None:
                kserve.add_bool_input(self.injected, flag, True, shape=counts.shape)
        if not self.model:
            raise ValueError("model: is empty: name the model as its back end does")
        if self.counts is None and self.tokenizer is None and self.ids is None:
            if not self.units:
                raise ValueError(f"model {self.model!r}: has neither counts nor a tokenizer: give it one of them")
            if self.text_inputs or self.text_output:
                raise ValueError(f"model {self.model!r}: nothing counts its text: give it a tokenizer")
        if self.prompt_tokens_max < 0:
            raise ValueError(f"prompt_tokens_max: {self.prompt_tokens_max}: must be at least 0")
        if self.output_tokens_default < 0:
            raise ValueError(f"output_tokens_default: {self.output_tokens_default}: must be at least 0")

    def _metered_outputs(self) -> tuple[str, ...]:
        names = [self.text_output] if self.text_output and self.tokenizer is not None else []
        if self.ids is not None:
            names += [name for name in (self.ids.output_ids, self.ids.output_lengths) if name]
        names += [rule.output for rule in self.units if isinstance(rule, Characters) and rule.output not in names]
        return tuple(names)


VLLM_COUNTS: Final = CountFlags()
# As its SamplingParams have it.
_VLLM_OUTPUT_TOKENS: Final = 16
_TENSORRT_LLM_COUNTS: Final = replace(VLLM_COUNTS, shape=(1, 1), prompt_in_output_count=True)


def vllm(
    model: str,
    *,
    tokenizer: str | None = None,
    decoupled: bool = True,
    prompt_tokens_max: int = 0,
    output_tokens_default: int = _VLLM_OUTPUT_TOKENS,
    stop_input: str | None = None,
) -> ModelProfile:
    """Triton's vLLM back end, and servers that took over its tensors; the former has no `stop_input`."""
    return ModelProfile(
        model,
        tokenizer=tokenizer,
        counts=VLLM_COUNTS,
        stop_input=stop_input,
        prompt_in_output_text=True,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
        output_tokens_default=output_tokens_default,
    )


def vllm_embeddings(model: str, *, decoupled: bool = True) -> ModelProfile:
    """The vLLM back end's embeddings: a JSON request, of which the back end alone knows what its model sees."""
    return ModelProfile(
        model,
        text_inputs=(),
        text_output=None,
        counts=replace(VLLM_COUNTS, output_flag=""),
        units=(PerRequest(),),
        decoupled=decoupled,
        output_limit=OutputLimit.NOWHERE,
        operation=OPERATION_EMBEDDINGS,
    )


def tensorrt_llm(
    model: str,
    *,
    tokenizer: str | None = None,
    decoupled: bool = True,
    prompt_tokens_max: int = 0,
    output_tokens_default: int = 0,
    exclude_input_default: bool = False,
) -> ModelProfile:
    """TensorRT-LLM's ensemble: vLLM's flags in two dimensions, and the prompt inside the output count."""
    return ModelProfile(
        model,
        tokenizer=tokenizer,
        counts=_TENSORRT_LLM_COUNTS,
        stop_input="stop",
        output_limit=OutputLimit.TENSOR,
        prompt_in_output_text=True,
        exclude_input_default=exclude_input_default,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
        output_tokens_default=output_tokens_default,
    )


def tensorrt_llm_ids(
    model: str,
    *,
    decoupled: bool = True,
    prompt_tokens_max: int = 0,
    output_tokens_default: int = 0,
    exclude_input_default: bool = False,
) -> ModelProfile:
    """TensorRT-LLM's inner model: tokens as numbers, and the same flags; where they bring nothing the ids are counted."""
    return ModelProfile(
        model,
        text_inputs=(),
        text_output=None,
        counts=_TENSORRT_LLM_COUNTS,
        ids=TokenIds(),
        stream_input="streaming",
        stop_input="stop",
        output_limit=OutputLimit.TENSOR,
        output_limit_input="request_output_len",
        exclude_input_default=exclude_input_default,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
        output_tokens_default=output_tokens_default,
    )


def token_ids(
    model: str,
    *,
    decoupled: bool = True,
    prompt_tokens_max: int = 0,
    ids_input: str = "input_ids",
    lengths_input: str = "",
    ids_output: str = "output_ids",
    lengths_output: str = "",
) -> ModelProfile:
    """Token ids in, token ids out, and no counts."""
    return ModelProfile(
        model,
        text_inputs=(),
        text_output=None,
        ids=TokenIds(ids_input, lengths_input, ids_output, lengths_output, all_generated="", prompt_in_output=False),
        stream_input=None,
        exclude_input=None,
        decoupled=decoupled,
        output_limit=OutputLimit.TENSOR,
        takes_output_limit=False,
        prompt_tokens_max=prompt_tokens_max,
    )


def generic(
    model: str,
    *,
    tokenizer: str,
    decoupled: bool = True,
    prompt_tokens_max: int = 0,
    text_inputs: tuple[str, ...] = ("text_input",),
    text_output: str = "text_output",
    output_tokens_default: int = 0,
    stop_input: str | None = None,
) -> ModelProfile:
    """Texts in, texts out, and no counts (TensorRT-LLM's llmapi model too): the tokenizer does it all."""
    return ModelProfile(
        model,
        text_inputs=text_inputs,
        text_output=text_output,
        tokenizer=tokenizer,
        stream_input=None,
        stop_input=stop_input,
        exclude_input=None,
        decoupled=decoupled,
        prompt_tokens_max=prompt_tokens_max,
        output_tokens_default=output_tokens_default,
    )


def embeddings(
    model: str,
    *,
    tokenizer: str,
    decoupled: bool = False,
    prompt_tokens_max: int = 0,
    text_inputs: tuple[str, ...] = ("text_input",),
) -> ModelProfile:
    """Texts in, numbers out: the request, and the tokens of all its texts."""
    return ModelProfile(
        model,
        text_inputs=text_inputs,
        text_output=None,
        tokenizer=tokenizer,
        units=(PerRequest(),),
        stream_input=None,
        exclude_input=None,
        decoupled=decoupled,
        output_limit=OutputLimit.NOWHERE,
        operation=OPERATION_EMBEDDINGS,
        prompt_tokens_max=prompt_tokens_max,
    )


def classification(
    model: str,
    *,
    tokenizer: str,
    decoupled: bool = False,
    prompt_tokens_max: int = 0,
    text_inputs: tuple[str, ...] = ("text_input",),
) -> ModelProfile:
    """Texts in, labels out: billed as embeddings are."""
    made = embeddings(
        model, tokenizer=tokenizer, decoupled=decoupled, prompt_tokens_max=prompt_tokens_max, text_inputs=text_inputs
    )
    return replace(made, operation=OPERATION_CLASSIFICATION)


def ocr(
    model: str, *, decoupled: bool = False, text_output: str = "text_output", characters_reserved: int = 20_000
) -> ModelProfile:
    """An image in, its text out: the characters that were read."""
    return ModelProfile(
        model,
        text_inputs=(),
        text_output=None,
        units=(Characters(text_output, reserved=characters_reserved), PerRequest()),
        stream_input=None,
        exclude_input=None,
        decoupled=decoupled,
        output_limit=OutputLimit.NOWHERE,
        operation=OPERATION_OCR,
    )


def speech_to_text(
    model: str,
    *,
    tokenizer: str,
    decoupled: bool = False,
    audio_input: str = "audio",
    audio_lengths_input: str = "",
    sample_rate_hz: int = 16_000,
    text_output: str = "text_output",
) -> ModelProfile:
    """Samples of audio in, their transcript out: milliseconds, and the transcript's tokens."""
    return ModelProfile(
        model,
        text_inputs=(),
        text_output=text_output,
        tokenizer=tokenizer,
        units=(AudioMilliseconds(audio_input, audio_lengths_input, sample_rate_hz),),
        stream_input=None,
        exclude_input=None,
        decoupled=decoupled,
        output_limit=OutputLimit.NOWHERE,
        operation=OPERATION_SPEECH_TO_TEXT,
    )


def text_to_image(
    model: str,
    *,
    tokenizer: str,
    decoupled: bool = False,
    prompt_tokens_max: int = 0,
    text_inputs: tuple[str, ...] = ("prompt", "negative_prompt"),
    steps_input: str = "steps",
    steps_default: int = 50,
    images_input: str = "samples",
    images_default: int = 1,
) -> ModelProfile:
    """A prompt in, pictures out: the prompt's tokens, and steps times pictures."""
    return ModelProfile(
        model,
        text_inputs=text_inputs,
        text_output=None,
        tokenizer=tokenizer,
        units=(ImageSteps(steps_input, steps_default, images_input, images_default),),
        stream_input=None,
        exclude_input=None,
        decoupled=decoupled,
        output_limit=OutputLimit.NOWHERE,
        operation=OPERATION_TEXT_TO_IMAGE,
        prompt_tokens_max=prompt_tokens_max,
    )


KINDS: Final[Mapping[str, Callable[..., ModelProfile]]] = {
    kind.__name__: kind
    for kind in (
        vllm,
        vllm_embeddings,
        tensorrt_llm,
        tensorrt_llm_ids,
        token_ids,
        generic,
        embeddings,
        classification,
        ocr,
        speech_to_text,
        text_to_image,
    )
}
