"""What a fuzz target is: a decoder under test, the inputs to begin from, and what it may raise.

Promise: `attempt` returns when the decoder took the input or refused it with one of its documented errors; everything else is
a finding. A target's own assertions say what must hold of what was taken.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Reader", "Target", "attempt", "mutations", "scratch"]

_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF)
_NUMBERS = tuple(2**bits - offset for bits in (7, 8, 16, 31, 32, 40, 63, 64) for offset in (0, 1))


@dataclass(frozen=True)
class Target:
    """`run` takes bytes and may raise `refusals`. `share` of the time and of the mutations: slow ones get more and fewer."""

    run: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    refusals: tuple[type[Exception], ...] = ()
    mutations: int = 400


def attempt(target: Target, data: bytes) -> None:
    """Run `data` through the decoder; a documented refusal is a good answer."""
    try:
        target.run(data)
    except target.refusals as error:
        said = str(error).encode()
    else:
        return
    # It says something, and what it says can be written.
    assert said


@cache
def scratch() -> Path:
    """A folder for files under test: in memory where there is such a file system."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))


class Reader:
    """Takes small numbers and pieces from the front of an input; at its end there are zeros and empty pieces."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def number(self, size: int = 1) -> int:
        return int.from_bytes(self.take(size), "little")

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def piece(self) -> bytes:
        """Bytes behind their length in two bytes."""
        return self.take(self.number(2))

    @staticmethod
    def join(*parts: int | bytes) -> bytes:
        """What `number()` and `piece()` read back."""
        return b"".join(
            part.to_bytes(1, "little") if isinstance(part, int) else len(part).to_bytes(2, "little") + part for part in parts
        )


def mutations(seeds: Sequence[bytes], count: int, choices: random.Random) -> Iterator[bytes]:
    """Seeds with a few bytes changed, removed, doubled, or taken from another seed: the quick run, without a fuzzer."""
    for _ in range(count):
        data = bytearray(choices.choice(seeds))
        for _ in range(choices.choice((1, 1, 2, 4, 8))):
            _mutate(data, seeds, choices)
        yield bytes(data)


def _mutate(data: bytearray, seeds: Sequence[bytes], choices: random.Random) -> None:
    at = choices.randrange(len(data) + 1)
    size = choices.choice((1, 1, 2, 4, 8, 64))
    match choices.randrange(7):
        case 0 if at < len(data):
            data[at] ^= 1 << choices.randrange(8)
        case 1 if at < len(data):
            data[at] = choices.choice(_INTERESTING)
        case 2:
            del data[at : at + size]
        case 3:
            data[at:at] = choices.randbytes(size)
        case 4:
            number = choices.choice(_NUMBERS)
            data[at : at + 8] = (number & 2**64 - 1).to_bytes(8, choices.choice(("little", "big")))
        case 5:
            other = choices.choice(seeds)
            start = choices.randrange(len(other) + 1)
            data[at:at] = other[start : start + choices.choice((4, 16, 256))]
        case _:
            data[at:at] = data[at : at + size] * choices.choice((1, 2, 16))
