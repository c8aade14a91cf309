"""The metering gateway: KServe v2 in, KServe v2 out, and every inference billed before its last byte leaves.

What ends a request, and what its usage event says:

    completed                                 COMPLETED: the back end's counts, else the tokenizer's
    the back end saw less of the prompt       TRUNCATED: the back end's counts
    the client cancels or is gone             CANCELLED: input, and all output until the back end had stopped, if it says when;
                                              else all that it had sent by then
    the deadline passes                       DEADLINE_EXCEEDED: the same
    a back end's error before the first chunk BACKEND_ERROR: price 0
    a back end's error later                  BACKEND_ERROR_PARTIAL: what was delivered (`bill_partial_answers` off: price 0)
    the gateway stops or dies                 INTERRUPTED: what was delivered
    the back end is not there                 asked again, `upstream_attempts` times in all; billed once
    key, account, model, prompt, concurrency  REJECTED, with the reason: price 0, never forwarded
    an unknown key, stale state, full journal no event: there is no tenant, or nowhere to write it; counted in the metrics

The last response that a client sees says what is billed, in its parameters `taximeter_request_id`, `taximeter_input_tokens`,
`taximeter_output_tokens` and `taximeter_count_source`, and one for each unit that it used. docs/outcomes.md names the tests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from serving.gateway.credentials import hash_secret
    from serving.gateway.profiles import CountFlags, ModelProfile, generic, tensorrt_llm, vllm
    from serving.gateway.server import GatewayServer, run_gateway
    from serving.gateway.settings import (
        AdmissionSettings,
        DirectorySettings,
        GatewaySettings,
        LimitSettings,
        TlsSettings,
        UpstreamTls,
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
    "UpstreamTls",
    "generic",
    "hash_secret",
    "run_gateway",
    "tensorrt_llm",
    "vllm",
]

# Whoever needs the keys of an installation alone, the billing API, need not have what the gateway itself stands on.
_HOMES: Final = {
    "credentials": ("hash_secret",),
    "profiles": ("CountFlags", "ModelProfile", "generic", "tensorrt_llm", "vllm"),
    "server": ("GatewayServer", "run_gateway"),
    "settings": ("AdmissionSettings", "DirectorySettings", "GatewaySettings", "LimitSettings", "TlsSettings", "UpstreamTls"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
