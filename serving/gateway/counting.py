"""What a request asks, and what its responses say was used: pure, one object a request.

`prepare` rewrites a request for the back end (its own id, the flags that make the back end count, the last response even if
it is empty) and remembers what the client did not ask for. `AnswerCounter` reads counts from responses, normalises the known
traps, and takes out again what was injected, so that a client sees what it would have seen without the gateway.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from billing.limits import QUANTITY_MAX
from serving import kserve
from serving.gateway.layout import form_key, layout_of
from serving.gateway.request_form import form_of
from serving.gateway.units import Characters, count_characters
from serving.kserve import EMPTY_FINAL_PARAMETER, TensorError
from serving.tokenizers import Framing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serving.gateway.layout import Layout, Place
    from serving.gateway.profiles import CountFlags, ModelProfile, TokenIds
    from serving.kserve import ModelInferRequest, ModelInferResponse

    _Places = Mapping[str, Place]

__all__ = ["AnswerCounter", "Counted", "DataPlan", "PreparedRequest", "prepare", "reserved_units"]

# What back ends send counts as, and the most that each can say.
_FOUR_BYTES = {"INT32": 2**31 - 1, "UINT32": 2**32 - 1}


class PreparedRequest(NamedTuple):
    """What the gateway must remember of a request while the back end works on it."""

    client_id: str
    upstream_id: str
    prompts: tuple[str, ...]
    """What the tokenizer counts where the back end does not."""
    framing: Framing
    input_tokens: int | None
    """Where they are known without anybody who counts: they came as numbers, or the model has none."""
    rows: int
    """Of token ids: prompts in one request."""
    units: tuple[int, ...]
    """Of the profile's units, what the request itself says."""
    hidden_outputs: tuple[str, ...]
    """Injected: the client did not ask for them and does not see them."""
    empty_final_asked: bool
    prompt_echoed: bool
    """The back end puts the prompt in front of its answer."""
    repeats_all: bool
    """Each response has all token ids so far, not only new ones."""
    stops: bool
    """It is no inference: it stops the one that has its ID."""

    def in_clients_words(self, message: str) -> str:
        """A back end's message, where it names the request by the ID that it knows."""
        return message.replace(self.upstream_id, self.client_id or "<id_unknown>")


def _refuse_shared_memory(request: ModelInferRequest, layout: Layout) -> None:
    name = layout.shared
    if name is None and request.outputs:
        name = next((tensor.name for tensor in request.outputs if kserve.has_shared_memory(tensor)), None)
    if name is not None:
        raise TensorError(name, "in shared memory", "send tensors in the request: the gateway must meter them")


def _raw_single(request: ModelInferRequest, place: Place, datatype: str) -> bytes | None:
    """The data of a raw input of one element of that type; None: it is not plainly that, and must be read with all checks."""
    position = place.position
    if position is None or not place.is_single or place.datatype != datatype:
        return None
    raws = request.raw_input_contents
    return raws[position] if position < len(raws) else None


def _flag(request: ModelInferRequest, places: _Places, name: str | None) -> bool | None:
    """What the client set the flag to; None: it did not."""
    place = places.get(name) if name else None
    if place is None or name is None:
        return None
    data = _raw_single(request, place, "BOOL")
    return kserve.read_bool_input(request, name) if data is None or len(data) != 1 else data != b"\0"


def _text(request: ModelInferRequest, places: _Places, name: str) -> str:
    """The one text of an input that is there."""
    data = _raw_single(request, places[name], "BYTES")
    if data is not None and len(data) >= 4 and int.from_bytes(data[:4], "little") == len(data) - 4:
        with contextlib.suppress(UnicodeDecodeError):
            return data[4:].decode()
    return kserve.read_text_input(request, name) or ""


def _inject_flag(request: ModelInferRequest, places: _Places, flag: str, count: str, shape: tuple[int, ...]) -> bool:
    """Make the back end report a count; True if the client did not ask for it."""
    asked = bool(_flag(request, places, flag))
    if not asked:
        if flag in places:
            kserve.strip_input(request, flag)
        kserve.add_bool_input(request, flag, True, shape=shape)
    # A client that lists the outputs that it wants gets those alone.
    return kserve.request_output(request, count) or not asked


def _inject(request: ModelInferRequest, places: _Places, profile: ModelProfile) -> tuple[str, ...]:
    """Ask for every output that is metered; those that the client did not ask for."""
    counts = profile.counts
    flags = () if counts is None else (counts.input_flag, counts.output_flag)
    if request.raw_input_contents and not request.outputs and not any(flag in places for flag in flags):
        # The client says nothing of counts or outputs: all that is asked for goes in at once.
        request.MergeFrom(profile.injected)
        return profile.injected_outputs
    hidden: list[str] = []
    if counts is not None:
        for flag, count in ((counts.input_flag, counts.input_count), (counts.output_flag, counts.output_count)):
            if flag and _inject_flag(request, places, flag, count, counts.shape):
                hidden.append(count)
    if request.outputs:
        hidden += [name for name in profile.metered_outputs if kserve.request_output(request, name)]
    return tuple(hidden)


def _read_prompts(request: ModelInferRequest, places: _Places, profile: ModelProfile) -> tuple[str, ...]:
    found: list[str] = []
    for place, name in enumerate(profile.text_inputs):
        if name in places:
            if profile.counts is None:
                found += kserve.read_texts_input(request, name) or ()
            else:
                # A back end that counts takes one prompt a request; its counts could not be told apart.
                found.append(_text(request, places, name))
        elif place == 0 and profile.tokenizer is not None:
            raise TensorError(name, "missing", "send the prompt as a BYTES tensor of one element")
    return tuple(found)


def _read_ids(request: ModelInferRequest, ids: TokenIds) -> tuple[int, int]:
    """How many tokens the prompts of a request have that come as numbers, and how many prompts those are."""
    given = kserve.count_elements(request, ids.input_ids)
    if given is None:
        raise TensorError(ids.input_ids, "missing", "send the prompt's token ids")
    tensor = kserve.find_input(request, ids.input_ids)
    rows = max(1, tensor.shape[0]) if tensor is not None and len(tensor.shape) > 1 else 1
    lengths = kserve.read_integers_input(request, ids.input_lengths) if ids.input_lengths else None
    if lengths is None:
        return given, rows
    if min(lengths, default=0) < 0 or sum(lengths) > given:
        raise TensorError(ids.input_lengths, f"{sum(lengths)} tokens in all", f"{ids.input_ids} has {given}")
    return sum(lengths), rows


def prepare(request: ModelInferRequest, profile: ModelProfile, upstream_id: str, *, stream: bool) -> PreparedRequest:
    """Rewrite `request` in place for the back end. Raises TensorError for what cannot be metered."""
    prompts: tuple[str, ...] = ()
    input_tokens, rows, units = None if profile.counts_input else 0, 1, (0,) * len(profile.units)
    stops = repeats_all = False
    form = form_of(request, profile)
    plain = None if form is None else form.read(request.raw_input_contents)
    if plain is not None:
        prompts, (streaming, excluded, chat) = plain
        # The client says nothing of counts or outputs: all that is asked for goes in at once.
        request.MergeFrom(profile.injected)
        hidden = profile.injected_outputs
    else:
        layout = layout_of(request)
        places = layout.places
        _refuse_shared_memory(request, layout)
        ids = profile.ids
        stops = bool(_flag(request, places, profile.stop_input))
        if stops:
            # What it says beside is what the back end wants in every request.
            input_tokens = 0
        else:
            prompts = _read_prompts(request, places, profile) if profile.text_inputs else ()
            if ids is not None:
                input_tokens, rows = _read_ids(request, ids)
            if profile.units:
                units = tuple([rule.of_request(request) for rule in profile.units])
        streaming = _flag(request, places, profile.stream_input)
        excluded = _flag(request, places, profile.exclude_input)
        chat = _flag(request, places, profile.chat_input)
        repeats_all = ids is not None and bool(_flag(request, places, ids.all_generated))
        # What it strips moves what stands behind.
        hidden = _inject(request, places, profile)
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
        upstream_id=upstream_id,
        prompts=prompts,
        framing=Framing.CHAT if chat else profile.framing,
        input_tokens=input_tokens,
        rows=rows,
        units=units,
        hidden_outputs=hidden,
        empty_final_asked=bool(empty_final_asked),
        prompt_echoed=not streaming and not (profile.exclude_input_default if excluded is None else excluded),
        repeats_all=repeats_all,
        stops=stops,
    )


def reserved_units(profile: ModelProfile, prepared: PreparedRequest) -> dict[str, int]:
    """What is set aside of a balance for a request's units: what it says, and for an answer that is not known yet a bound."""
    return {
        rule.unit: rule.reserved if isinstance(rule, Characters) else quantity
        for rule, quantity in zip(profile.units, prepared.units, strict=True)
    }


class Counted(NamedTuple):
    """What the responses so far say: counts where the back end gave them, and how much else there was."""

    input_tokens: int | None
    output_tokens: int | None
    text_parts: int
    units: tuple[int, ...] = ()
    """Of the profile's units, in its order: what the request says and what came."""


class DataPlan(NamedTuple):
    """Where the data that is counted stands in responses that differ in nothing but data."""

    outputs: tuple[str, ...]
    """All, in their order."""
    text: int | None
    """The place of the one text that is kept; None: none is."""
    input: tuple[int, int] | None
    """The place of the prompt's count, and the most that it can be."""
    output: tuple[int, int] | None
    sequences: int
    """How many prompts are in the output's count."""


class AnswerCounter:
    """Adds up a request's responses."""

    __slots__ = (
        "_characters",
        "_ids_output",
        "_ids_sequences",
        "_input",
        "_output",
        "_parts",
        "_prepared",
        "_profile",
        "_sequences",
        "_units",
        "responses",
    )

    def __init__(self, profile: ModelProfile, prepared: PreparedRequest) -> None:
        self._profile = profile
        self._prepared = prepared
        self._characters: Sequence[tuple[int, str]] = ()
        if profile.units:
            self._units = list(prepared.units)
            self._characters = [
                (place, rule.output) for place, rule in enumerate(profile.units) if isinstance(rule, Characters)
            ]
        self._input: int | None = None
        self._output: int | None = None
        self._ids_output: int | None = None
        # Answers that counts, or ids, came for: each has its prompt in front, where that is echoed at all.
        self._sequences = self._ids_sequences = 0
        # Of each response, the bytes of each of its texts.
        self._parts: list[list[bytes]] = []
        self.responses = 0

    def take(self, response: ModelInferResponse) -> None:
        """Count a response and take out what was injected. Raises TensorError if it cannot be read."""
        plan = self._known_plan(response)
        if plan is not None and self.take_data(plan, response.raw_output_contents):
            names = plan.outputs
        else:
            names = self._take_in_full(response)
        hidden = self._prepared.hidden_outputs
        if hidden:
            _strip(response, names, hidden)

    def _known_plan(self, response: ModelInferResponse) -> DataPlan | None:
        """How to read a response of a form that has been seen before, as most have."""
        outputs = response.outputs
        if len(outputs) != len(response.raw_output_contents):
            return None
        forms = self._profile.answer_forms[self._prepared.prompt_echoed]
        key = form_key(outputs)
        if key in forms:
            return forms[key]
        plan = self.plan(response)
        forms.keep(key, plan)
        return plan

    def _take_in_full(self, response: ModelInferResponse) -> tuple[str, ...]:
        """Look at everything; the outputs' names."""
        profile = self._profile
        self.responses += 1
        tensors = list(response.outputs)
        names = [tensor.name for tensor in tensors]
        text_output = profile.text_output if profile.tokenizer is not None else None
        if text_output is not None and text_output in names:
            texts = kserve.read_bytes_output(response, text_output)
            if texts:
                self._parts.append(texts)
        if profile.counts is not None:
            self._take_counts(profile.counts, response, tensors, names)
        if profile.ids is not None:
            self._take_ids(profile.ids, response, names)
        for place, output in self._characters:
            elements = kserve.read_bytes_output(response, output) or ()
            self._units[place] += sum(count_characters(element) for element in elements)
        return tuple(names)

    def plan(self, response: ModelInferResponse) -> DataPlan | None:
        """How to read on without looking at more than data, by a response as it came; None: it must all be looked at."""
        tensors = list(response.outputs)
        names = tuple([tensor.name for tensor in tensors])
        profile = self._profile
        if profile.ids is not None or self._characters or len(set(names)) != len(names):
            return None
        if len(response.raw_output_contents) != len(names):
            return None
        text = profile.text_output if profile.tokenizer is not None else None
        place = None if text is None or text not in names else names.index(text)
        if place is not None and (tensors[place].datatype != "BYTES" or math.prod(tensors[place].shape) != 1):
            return None
        counts, sequences = profile.counts, 0
        if counts is not None and counts.prompt_in_output_count and self._prepared.prompt_echoed:
            echoed = profile.text_output
            sequences = math.prod(tensors[names.index(echoed)].shape) if echoed in names else 1
        found: list[tuple[int, int] | None] = [None, None]
        if counts is not None:
            for number, (flag, name) in enumerate(
                ((counts.input_flag, counts.input_count), (counts.output_flag, counts.output_count))
            ):
                if flag and name in names:
                    position = names.index(name)
                    most = _FOUR_BYTES.get(tensors[position].datatype)
                    if most is None:
                        return None
                    found[number] = position, most
        return DataPlan(names, place, found[0], found[1], sequences)

    def take_data(self, plan: DataPlan, raws: Sequence[bytes]) -> bool:
        """As `take`, of a response that is like the plan's but for its data. False: it must be read in full; nothing of it has
        been counted."""
        text = raws[plan.text] if plan.text is not None else None
        if text is not None and int.from_bytes(text[:4], "little") != len(text) - 4:
            return False
        input_tokens = output_tokens = -1
        if plan.input is not None:
            input_tokens = int.from_bytes(raw := raws[plan.input[0]], "little")
            if len(raw) != 4 or input_tokens > plan.input[1]:
                return False
        if plan.output is not None:
            output_tokens = int.from_bytes(raw := raws[plan.output[0]], "little")
            if len(raw) != 4 or output_tokens > plan.output[1]:
                return False
        self.responses += 1
        if text is not None:
            self._parts.append([text[4:]])
        if input_tokens >= 0 and (self._input is None or input_tokens > self._input):
            self._input = input_tokens
        if output_tokens >= 0:
            counts = self._profile.counts
            assert counts is not None, "who plans for counts has them"
            self._output = output_tokens + (self._output or 0) if counts.deltas else output_tokens
            self._sequences += plan.sequences
        return True

    def _take_counts(
        self, counts: CountFlags, response: ModelInferResponse, tensors: Sequence[Any], names: Sequence[str]
    ) -> None:
        if counts.input_flag:
            tokens = _read_count(response, tensors, names, counts.input_count)
            if tokens is not None and (self._input is None or tokens > self._input):
                self._input = tokens
        if counts.output_flag:
            tokens = _read_count(response, tensors, names, counts.output_count)
            if tokens is not None:
                self._output = tokens + (self._output or 0) if counts.deltas else tokens
                if counts.prompt_in_output_count and self._prepared.prompt_echoed:
                    text = self._profile.text_output
                    self._sequences += math.prod(tensors[names.index(text)].shape) if text in names else 1

    def _take_ids(self, ids: TokenIds, response: ModelInferResponse, names: list[str]) -> None:
        if ids.output_ids not in names:
            return
        lengths = kserve.read_integers_output(response, ids.output_lengths) if ids.output_lengths else None
        if lengths is None:
            values = kserve.read_integers_output(response, ids.output_ids) or ()
            tokens, sequences = sum(value >= 0 for value in values), 1
        else:
            if min(lengths, default=0) < 0 or sum(lengths) > QUANTITY_MAX:
                raise TensorError(ids.output_lengths, f"lengths {lengths[:8]}", f"between 0 and {QUANTITY_MAX} in all")
            tokens, sequences = sum(lengths), len(lengths)
        if self._prepared.repeats_all:
            self._ids_output, self._ids_sequences = tokens, sequences
        else:
            self._ids_output = tokens + (self._ids_output or 0)
            self._ids_sequences += sequences

    def counted(self) -> Counted:
        """All so far."""
        prepared, profile = self._prepared, self._profile
        # The back end's count is that of one prompt.
        input_tokens = prepared.input_tokens if self._input is None or prepared.rows > 1 else self._input
        output_tokens, sequences = self._output, self._sequences
        if profile.ids is not None and self._ids_output is not None:
            # Padding is in the back end's count and not in the lengths.
            output_tokens = self._ids_output
            sequences = self._ids_sequences if profile.ids.prompt_in_output and prepared.prompt_echoed else 0
        elif not profile.counts_output:
            output_tokens = 0
        if sequences and output_tokens and input_tokens:
            output_tokens = max(0, output_tokens - input_tokens * sequences // prepared.rows)
        units = tuple(self._units) if self._characters else prepared.units
        return Counted(input_tokens, output_tokens, len(self._parts), units)

    def texts(self, first_part: int = 0, end_part: int | None = None) -> list[str]:
        """What the model wrote, each of its texts in one piece. A character may be split over two responses, so bytes are
        joined before they are read."""
        parts = self._parts[first_part:end_part]
        joined = [
            b"".join(part[place] for part in parts if place < len(part)).decode(errors="replace")
            for place in range(max((len(part) for part in parts), default=0))
        ]
        prompts = self._prepared.prompts
        if first_part == 0 and self._profile.prompt_in_output_text and self._prepared.prompt_echoed and prompts:
            joined = [text.removeprefix(prompts[min(place, len(prompts) - 1)]) for place, text in enumerate(joined)]
        return joined


def _strip(response: ModelInferResponse, names: tuple[str, ...], hidden: tuple[str, ...]) -> None:
    """Take outputs out of the response, whose outputs' names in order are `names`."""
    first = len(names) - len(hidden)
    raws = response.raw_output_contents
    if first >= 0 and names[first:] == hidden and len(raws) == len(names):
        # As back ends send them: behind all others.
        del raws[first:]
        del response.outputs[first:]
        return
    for name in hidden:
        if name in names:
            kserve.strip_output(response, name)


def _read_count(response: ModelInferResponse, tensors: Sequence[Any], names: Sequence[str], name: str) -> int | None:
    """A count, that of all texts of an answer together; None where there is none, or one that cannot be one: then the tokenizer
    takes its place."""
    if name not in names:
        return None
    index = names.index(name)
    raws = response.raw_output_contents
    # What back ends send: four raw bytes. Everything else takes the way that checks everything.
    if len(raws) == len(names) and len(raw := raws[index]) == 4 and (datatype := tensors[index].datatype) in _FOUR_BYTES:
        tokens = int.from_bytes(raw, "little", signed=datatype == "INT32")
        return tokens if tokens >= 0 else None
    counts = kserve.read_integers_output(response, name) or []
    tokens = sum(counts)
    return tokens if counts and min(counts) >= 0 and tokens <= QUANTITY_MAX else None
