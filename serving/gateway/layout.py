"""Where a request's inputs are and what they say of themselves: one walk for whoever reads several of them, and none for a form
of request that was seen before.

A client's requests differ in their data, and hardly ever in the names, types and shapes of their tensors. So what a walk finds
is remembered by exactly those; requests that have their data beside them, typed, are walked each time.
"""

from __future__ import annotations

from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from serving import kserve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from serving.kserve import ModelInferRequest

__all__ = ["FormKey", "Forms", "Layout", "Place", "form_key", "layout_of"]

FormKey = tuple[bytes, ...]
_Found = TypeVar("_Found")
_serialize: Final = methodcaller("SerializeToString")
_KEPT_MAX: Final = 256
_TENSOR_BYTES_MAX: Final = 256
# What a flag's or a text's shape is with the back ends that have flags.
_SINGLE: Final[tuple[list[int], ...]] = ([1], [1, 1], [])


class Place(NamedTuple):
    """One input."""

    position: int | None
    """Of its data in `raw_input_contents`; None: it has no place there."""
    datatype: str
    is_single: bool
    """By its shape it has one element."""


class Layout(NamedTuple):
    """All inputs of a request; of two with one name it is the first, as everywhere."""

    places: Mapping[str, Place]
    shared: str | None
    """The first input whose data is in shared memory."""


def form_key(tensors: Iterable[Any]) -> FormKey:
    """What tensors say of themselves: of those that have their data beside them, raw, all but that."""
    return tuple(map(_serialize, tensors))


class Forms(dict[FormKey, _Found]):
    """What was found of messages, by their form. Bounded, whatever peers send: when it is full, it begins anew."""

    def keep(self, key: FormKey, found: _Found) -> None:
        if len(key) <= _TENSOR_BYTES_MAX and max(map(len, key), default=0) <= _TENSOR_BYTES_MAX:
            if len(self) >= _KEPT_MAX:
                self.clear()
            self[key] = found


_known: Forms[Layout] = Forms()


def layout_of(request: ModelInferRequest) -> Layout:
    """Of all inputs of `request`."""
    inputs = request.inputs
    if len(inputs) != len(request.raw_input_contents):
        return _walk(inputs)
    key = form_key(inputs)
    layout = _known.get(key)
    if layout is None:
        layout = _walk(inputs)
        _known.keep(key, layout)
    return layout


def _walk(inputs: Any) -> Layout:
    places: dict[str, Place] = {}
    shared: str | None = None
    position = 0
    for tensor in inputs:
        is_shared = kserve.has_shared_memory(tensor)
        if is_shared and shared is None:
            shared = tensor.name
        is_raw = not is_shared and not tensor.HasField("contents")
        place = Place(position if is_raw else None, tensor.datatype, list(tensor.shape) in _SINGLE)
        places.setdefault(tensor.name, place)
        position += is_raw
    return Layout(places, shared)
