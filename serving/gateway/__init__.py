"""The metering gateway: KServe v2 in, KServe v2 out, and every inference billed before its last byte leaves."""

from serving.gateway.credentials import hash_secret
from serving.gateway.profiles import CountFlags, ModelProfile, generic, tensorrt_llm, vllm
from serving.gateway.server import GatewayServer, new_event_loop, run_gateway
from serving.gateway.settings import (
    AdmissionSettings,
    DirectorySettings,
    GatewaySettings,
    LimitSettings,
    TlsSettings,
)

__all__ = [
    "AdmissionSettings",
    "CountFlags",
    "DirectorySettings",
    "GatewayServer",
    "GatewaySettings",
    "LimitSettings",
    "ModelProfile",
    "TlsSettings",
    "generic",
    "hash_secret",
    "new_event_loop",
    "run_gateway",
    "tensorrt_llm",
    "vllm",
]
