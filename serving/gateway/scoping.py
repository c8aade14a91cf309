"""What clients name and a back end shares between all of them, made each tenant's own.

A stateful model finds a sequence's state by the number or name that the client chose: without this, whoever guesses another
tenant's reads on in its conversation. All gateways with one pepper give one sequence the same name, so it may move between
them. Requests' own ids need none of this: the gateway assigns them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from serving import kserve

if TYPE_CHECKING:
    from serving.kserve import ModelInferRequest

__all__ = ["SequenceScope"]

_PARAMETER: Final = "sequence_id"
_KEY_BYTES_MAX: Final = 64


class SequenceScope:
    """Renames sequences under an installation's pepper."""

    __slots__ = ("_key",)

    def __init__(self, pepper: bytes) -> None:
        self._key = hashlib.blake2b(pepper, person=b"sequence-scope").digest()[:_KEY_BYTES_MAX]

    def apply(self, request: ModelInferRequest, tenant_id: str) -> None:
        """Give the request's sequence a name that no other tenant can ask for. 0 and the empty name mean that there is none."""
        named = kserve.get_parameter(request, _PARAMETER)
        if not named or isinstance(named, float | bool):
            return
        said = f"{len(tenant_id)}:{tenant_id}{type(named).__name__}:{named}".encode()
        digest = hashlib.blake2b(said, key=self._key, digest_size=16)
        # Of the type that the client chose, because a model is configured for one: 0 is no sequence, and a number has 63 bits.
        renamed: int | str = (
            digest.hexdigest() if isinstance(named, str) else int.from_bytes(digest.digest()[:8], "big") >> 1 or 1
        )
        kserve.set_parameter(request, _PARAMETER, renamed)
