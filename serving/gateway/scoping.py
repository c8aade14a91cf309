"""What clients name and a back end shares between all of them, made each tenant's own: sequences, and requests that are to be
stopped.

A stateful model finds a sequence's state by the number or name that the client chose: without this, whoever guesses another
tenant's reads on in its conversation. All gateways with one pepper give one sequence the same name, so it may move between
them. Requests' own ids need none of this: the gateway assigns them. But TensorRT-LLM stops a request when another one comes
with its id and says `stop`; the client knows only its own, so that must be led to the request that it means, and to none of
another tenant.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from serving import kserve

if TYPE_CHECKING:
    from serving.kserve import ModelInferRequest

__all__ = ["RunningRequests", "SequenceScope"]

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


class RunningRequests:
    """Which requests of a tenant run under a client's ID. Belongs to one event loop."""

    __slots__ = ("_upstream_ids",)

    def __init__(self) -> None:
        self._upstream_ids: dict[tuple[str, str], list[str]] = {}

    def add(self, tenant_id: str, client_id: str, upstream_id: str) -> None:
        """The request runs; without an ID of the client's nobody can name it."""
        if client_id:
            self._upstream_ids.setdefault((tenant_id, client_id), []).append(upstream_id)

    def remove(self, tenant_id: str, client_id: str, upstream_id: str) -> None:
        """It has ended. Does nothing for one that was never added."""
        running = self._upstream_ids.get((tenant_id, client_id), [])
        if upstream_id in running:
            running.remove(upstream_id)
            if not running:
                del self._upstream_ids[tenant_id, client_id]

    def newest(self, tenant_id: str, client_id: str) -> str | None:
        """The back end's ID of the request that the tenant means by its own; the last one, where it used that for several."""
        running = self._upstream_ids.get((tenant_id, client_id))
        return running[-1] if running else None
