"""What happens to each RPC, in one table. An RPC that is not in it does not exist for a client, and a test holds the table
against the descriptors, so a new one without a policy fails the build.

`OPEN` needs no key: liveness says nothing about a tenant, and orchestrators probe it without credentials. `KEYED` needs a
valid key with one of the scopes and is passed on as it is. `METERED` also costs tokens. Through what needs the scope `operate`
one tenant could change what others get, read what they sent, or take tokens past the meter: no key has it unless an operator
gave it. `ABSENT` is what the back end does not have either.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from billing.v1.account_pb2 import KEY_SCOPE_ADMIN, KEY_SCOPE_METER, KEY_SCOPE_OPERATE, KEY_SCOPE_READ
from serving.kserve import SERVICE_NAME

__all__ = ["HEALTH_SERVICE", "POLICIES", "REFLECTION_SERVICES", "Access", "Policy"]

HEALTH_SERVICE: Final = "grpc.health.v1.Health"
# The same messages under two names; the gateway answers itself, for what it serves: Triton has no reflection.
REFLECTION_SERVICES: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class Access(Enum):
    """Who may call."""

    OPEN = "open"
    KEYED = "keyed"
    METERED = "metered"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Policy:
    """One RPC's rule."""

    name: str
    """What a refusal calls it."""
    access: Access
    scopes: frozenset[int] = frozenset()
    """One of these is enough."""
    message: str = ""
    """Why not everybody may, and what to do instead."""


_ANY_KEY: Final = frozenset({KEY_SCOPE_METER, KEY_SCOPE_READ, KEY_SCOPE_ADMIN, KEY_SCOPE_OPERATE})

_LIVENESS: Final = Policy("liveness", Access.OPEN)
_METADATA: Final = Policy("model-metadata", Access.KEYED, _ANY_KEY)
_INFERENCE: Final = Policy("inference", Access.METERED, frozenset({KEY_SCOPE_METER}))


def _operated(name: str, message: str) -> Policy:
    return Policy(name, Access.KEYED, frozenset({KEY_SCOPE_OPERATE}), message)


_REPOSITORY: Final = _operated(
    "repository-control", "loading and unloading models is done on the back end itself, or with a key of the scope operate"
)
_SHARED_MEMORY: Final = _operated(
    "shared-memory", "shared memory hides what is metered and is shared by all tenants; send tensors in the request"
)
_STATISTICS: Final = _operated(
    "model-statistics", "statistics count the requests of all tenants together; the billing API tells a tenant its own"
)
_SETTINGS: Final = _operated(
    "server-settings", "trace and log settings are those of all tenants; change them on the back end itself"
)

_KSERVE: Final[dict[str, Policy]] = {
    "ServerLive": _LIVENESS,
    "ServerReady": _LIVENESS,
    "ServerMetadata": _METADATA,
    "ModelReady": _METADATA,
    "ModelMetadata": _METADATA,
    "ModelConfig": _METADATA,
    "ModelStatistics": _STATISTICS,
    "RepositoryIndex": _METADATA,
    "ModelInfer": _INFERENCE,
    "ModelStreamInfer": _INFERENCE,
    "RepositoryModelLoad": _REPOSITORY,
    "RepositoryModelUnload": _REPOSITORY,
    "SystemSharedMemoryStatus": _SHARED_MEMORY,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _SHARED_MEMORY,
    "CudaSharedMemoryStatus": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryUnregister": _SHARED_MEMORY,
    "TraceSetting": _SETTINGS,
    "LogSettings": _SETTINGS,
}

POLICIES: Final[dict[tuple[str, str], Policy]] = {
    **{(SERVICE_NAME, method): policy for method, policy in _KSERVE.items()},
    (HEALTH_SERVICE, "Check"): _LIVENESS,
    # A client that hears UNIMPLEMENTED asks Check instead, as gRPC's health protocol says.
    (HEALTH_SERVICE, "Watch"): Policy("health-watch", Access.ABSENT, message="ask Health/Check"),
    **{(service, "ServerReflectionInfo"): Policy("reflection", Access.KEYED, _ANY_KEY) for service in REFLECTION_SERVICES},
}
