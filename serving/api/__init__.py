"""The billing API: what operators and tenants ask and change, over gRPC and HTTP/JSON; docs/api.md."""

from serving.api.server import ApiServer, run_api
from serving.api.settings import AlertSource, ApiLimits, ApiSettings, KeySource, TlsFiles

__all__ = ["AlertSource", "ApiLimits", "ApiServer", "ApiSettings", "KeySource", "TlsFiles", "run_api"]
