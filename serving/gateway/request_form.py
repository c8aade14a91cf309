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
    """Places of raw data; None: there is no such input, and so no such word."""

    texts: tuple[int, ...]
    streaming: int | None
    excluded: int | None
    chat: int | None

    def read(self, raws: Sequence[bytes]) -> tuple[tuple[str, ...], bool | None, bool | None, bool | None] | None:
        """The texts and the three flags; None: the data is not what its place asks for."""
        texts: list[str] = []
        for place in self.texts:
            data = raws[place]
            if len(data) < 4 or int.from_bytes(data[:4], "little") != len(data) - 4:
                return None
            try:
                texts.append(data[4:].decode())
            except UnicodeDecodeError:
                return None
        flags: list[bool | None] = []
        for flag in self[1:]:
            if flag is None:
                flags.append(None)
            elif len(data := raws[flag]) == 1:
                flags.append(data != b"\0")
            else:
                return None
        return tuple(texts), flags[0], flags[1], flags[2]


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
    names = [name for name in profile.text_inputs if name in places]
    texts = [_position(places[name], "BYTES") for name in names]
    flags: list[int | None] = []
    for flag in (profile.stream_input, profile.exclude_input, profile.chat_input):
        place = places.get(flag) if flag else None
        flags.append(None if place is None else _position(place, "BOOL"))
        if place is not None and flags[-1] is None:
            return None
    found = tuple([position for position in texts if position is not None])
    return RequestForm(found, flags[0], flags[1], flags[2]) if len(found) == len(texts) else None


def _position(place: Place, datatype: str) -> int | None:
    return place.position if place.is_single and place.datatype == datatype else None
