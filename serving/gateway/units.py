"""What a request uses beside tokens: a unit's name, and how its quantity is read off a request or its answer.

What stands in the request (audio, steps) is known before it is forwarded and is billed as soon as it is; what stands in the
answer (characters) is billed as far as the answer came. All of it is whole numbers, rounded up once per request where it must
be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from billing.limits import QUANTITY_MAX
from serving import kserve
from serving.kserve import TensorError

if TYPE_CHECKING:
    from serving.kserve import ModelInferRequest

__all__ = ["AudioMilliseconds", "Characters", "ImageSteps", "PerRequest", "UnitRule", "count_characters"]

# In UTF-8 every character has one byte that is none of these, so a character that two responses share counts once.
_CONTINUATION: Final = bytes(range(0x80, 0xC0))


def count_characters(text: bytes) -> int:
    """The Unicode code points of UTF-8 text, also of a piece that begins or ends within one."""
    return len(text.translate(None, _CONTINUATION))


def _checked(tensor: str, quantity: int) -> int:
    if not 0 <= quantity <= QUANTITY_MAX:
        raise TensorError(tensor, f"makes a quantity of {quantity}", f"must be between 0 and {QUANTITY_MAX}")
    return quantity


@dataclass(frozen=True, slots=True)
class PerRequest:
    """Each inference is one."""

    unit: str = "requests"

    def of_request(self, request: ModelInferRequest) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Characters:
    """The code points of a text output, all its elements together."""

    output: str = "text_output"
    unit: str = "characters"
    reserved: int = 20_000
    """What is set aside of a balance for an answer, whose length nobody knows before."""

    def of_request(self, request: ModelInferRequest) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class AudioMilliseconds:
    """How long the audio of the request lasts: its samples, or, where the model takes several padded to one length, the lengths
    that are stated beside them."""

    input: str = "audio"
    lengths_input: str = ""
    sample_rate_hz: int = 16_000
    unit: str = "audio_ms"

    def __post_init__(self) -> None:
        if self.sample_rate_hz < 1:
            raise ValueError(f"sample_rate_hz: {self.sample_rate_hz}: must be at least 1")

    def of_request(self, request: ModelInferRequest) -> int:
        samples = kserve.count_elements(request, self.input)
        if samples is None:
            raise TensorError(self.input, "missing", "send the audio's samples: they are what is billed")
        lengths = kserve.read_integers_input(request, self.lengths_input) if self.lengths_input else None
        if lengths is not None:
            stated = sum(lengths)
            if min(lengths, default=0) < 0 or stated > samples:
                raise TensorError(self.lengths_input, f"{stated} samples in all", f"{self.input} has {samples}")
            samples = stated
        return _checked(self.input, -(-samples * 1_000 // self.sample_rate_hz))


@dataclass(frozen=True, slots=True)
class ImageSteps:
    """Denoising steps, times the images that are asked for."""

    steps_input: str = "steps"
    steps_default: int = 50
    """What the model does when a request states none."""
    images_input: str = "samples"
    images_default: int = 1
    unit: str = "image_steps"

    def __post_init__(self) -> None:
        for name in ("steps_default", "images_default"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}: must be at least 1")

    def of_request(self, request: ModelInferRequest) -> int:
        factors = [
            self._read(request, self.steps_input, self.steps_default),
            self._read(request, self.images_input, self.images_default),
        ]
        return _checked(self.steps_input, math.prod(factors))

    @staticmethod
    def _read(request: ModelInferRequest, name: str, default: int) -> int:
        stated = kserve.read_integer_input(request, name) if name else None
        if stated is None:
            return default
        if stated < 0:
            raise TensorError(name, stated, "must not be negative")
        return stated


UnitRule: TypeAlias = PerRequest | Characters | AudioMilliseconds | ImageSteps
