"""What requests of one form say, read by what was found in the first of them: where its texts and flags stand.

A client's requests differ in their data, and hardly ever in their inputs' names, types and shapes. So what those tell is found
once for each model whose back end counts, and of the next request only the data is looked at. What is not plainly as it should
be is left to those who look at everything and say what is wrong with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from serving.gateway.layout import form_key, layout_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.gateway.layout import Place
    from serving.gateway.profiles import ModelProfile
    from serving.kserve import ModelInferRequest

__all__ = ["RequestForm", "form_of"]


class RequestForm(NamedTuple):
    """Places of raw data: of the texts, and of the flags that are there."""

    texts: tuple[int, ...]
    flags: tuple[tuple[int, int], ...]
    """Which of `streaming`, `excluded` and `chat` it is, and where."""

    def read(self, raws: Sequence[bytes]) -> tuple[tuple[str, ...], list[bool | None]] | None:
        """The texts and the three flags; None: the data is not what its place asks for."""
        texts: list[str] = []
        for place in self.texts:
            data = raws[place]
            text = data[4:]
            if len(data) < 4 or int.from_bytes(data[:4], "little") != len(text):
                return None
            try:
                texts.append(text.decode())
            except UnicodeDecodeError:
                return None
        flags: list[bool | None] = [None, None, None]
        for number, place in self.flags:
            data = raws[place]
            if len(data) != 1:
                return None
            flags[number] = data != b"\0"
        return tuple(texts), flags


def form_of(request: ModelInferRequest, profile: ModelProfile) -> RequestForm | None:
    """The form of a request; None: it has none of these, and must be looked at in full."""
    inputs = request.inputs
    # Who names outputs may mean shared memory, and must be asked for more of them.
    if request.outputs or len(inputs) != len(request.raw_input_contents):
        return None
    forms = profile.request_forms
    key = form_key(inputs)
    if key in forms:
        return forms[key]
    form = _learn(request, profile)
    forms.keep(key, form)
    return form


def _learn(request: ModelInferRequest, profile: ModelProfile) -> RequestForm | None:
    layout, counts = layout_of(request), profile.counts
    places = layout.places
    if counts is None or profile.ids is not None or profile.units or not places or layout.shared is not None:
        return None
    if any(flag in places for flag in (counts.input_flag, counts.output_flag, profile.stop_input)):
        return None
    if profile.tokenizer is not None and not all(name in places for name in profile.text_inputs[:1]):
        return None
    texts = [_position(places[name], "BYTES") for name in profile.text_inputs if name in places]
    asked = enumerate((profile.stream_input, profile.exclude_input, profile.chat_input))
    flags = [(number, _position(places[flag], "BOOL")) for number, flag in asked if flag and flag in places]
    found = tuple([place for place in texts if place is not None])
    found_flags = tuple([(number, place) for number, place in flags if place is not None])
    return RequestForm(found, found_flags) if (len(found), len(found_flags)) == (len(texts), len(flags)) else None


def _position(place: Place, datatype: str) -> int | None:
    return place.position if place.is_single and place.datatype == datatype else None
