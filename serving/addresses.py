"""Hosts and ports as one text, whichever family of addresses the host is of."""

from __future__ import annotations

__all__ = ["authority", "bare_host"]


def bare_host(host: str) -> str:
    """As sockets take it: an IPv6 address without the brackets that it has beside a port."""
    return host.removeprefix("[").removesuffix("]")


def authority(host: str, port: int) -> str:
    """`HOST:PORT`; an IPv6 address stands in brackets, or its end would be the port."""
    bare = bare_host(host)
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
