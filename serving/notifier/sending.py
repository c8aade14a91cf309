"""One attempt to deliver: to whom a connection may be opened, what is signed, and what the answer means.

Promise: an attempt ends within its time, which the addresses of a name share until one of them answers. It reads no more of an
answer than the bound, follows no redirect and no proxy of the environment. A name is resolved here, on a thread of the
endpoint's own, since a resolver that hangs holds its thread; where the endpoint may not be in a private network, every address
is looked at. The connection goes to what was looked at: a name that changes its address in between reaches nothing else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import httpx
from standardwebhooks import Webhook

from serving.notifier.errors import DeliveryFailed, EndpointGone

if TYPE_CHECKING:
    from serving.notifier.errors import Outcome
    from serving.notifier.settings import Endpoint, NotifierLimits

__all__ = ["Sender", "is_public", "share_s"]

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
# A private network's own NAT64, and the older form of carrying IPv4, which leads nowhere on the Internet.
_LOCAL: Final = (ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("::/96"))
_REASON_CHARS_MAX: Final = 200
_PORTS: Final = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether the Internet routes it, also when it stands in an IPv6 address that carries one of IPv4."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if found.is_site_local or any(found in network for network in _LOCAL):
            return False
    return found.is_global and not found.is_multicast


class Sender:
    """Sends to one endpoint. Make it on the running event loop; `close` it."""

    def __init__(self, endpoint: Endpoint, limits: NotifierLimits) -> None:
        self._endpoint, self._limits = endpoint, limits
        self._url = httpx.URL(endpoint.url)
        self._resolver = ThreadPoolExecutor(1, f"resolver-{endpoint.name}")
        self._signers = [Webhook(secret) for secret in endpoint.secrets]
        # Nothing is ever spoken but the address's own scheme: redirects are not followed.
        verify: ssl.SSLContext | bool = self._url.scheme == "https"
        if endpoint.ca_file is not None:
            verify = ssl.create_default_context(cafile=endpoint.ca_file)
        self._client = httpx.AsyncClient(
            verify=verify,
            trust_env=False,
            follow_redirects=False,
            timeout=limits.attempt_timeout_s,
            limits=httpx.Limits(max_connections=limits.attempts_at_once, max_keepalive_connections=limits.attempts_at_once),
            headers={"user-agent": f"taximeter-notifier/{version('taximeter')}", "content-type": "application/json"},
        )

    async def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)
        await self._client.aclose()

    async def send(self, webhook_id: str, body: bytes) -> None:
        """Returns when the receiver has taken it. Raises DeliveryFailed."""
        try:
            async with asyncio.timeout(self._limits.attempt_timeout_s):
                await self._send(webhook_id, body)
        except TimeoutError:
            raise DeliveryFailed(f"no answer within {self._limits.attempt_timeout_s:g} s", "timed_out") from None
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
            outcome: Outcome = "timed_out" if isinstance(error, httpx.TimeoutException) else "unreachable"
            raise DeliveryFailed(f"{type(error).__name__}: {_printable(str(error))}", outcome) from error

    async def _send(self, webhook_id: str, body: bytes) -> None:
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + self._limits.attempt_timeout_s
        headers = self._headers(webhook_id, body) | {"host": self._url.netloc.decode()}
        addresses = await self._addresses()
        unreached: httpx.ConnectError | httpx.ConnectTimeout | None = None
        for tried, address in enumerate(addresses):
            # One that swallows what is sent to it leaves the others their part.
            connect_s = share_s(deadline_s - clock(), len(addresses) - tried)
            try:
                return await self._post(self._url.copy_with(host=address), headers, body, connect_s)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                unreached = error
        assert unreached is not None, "a name has an address, or the look-up fails"
        raise unreached

    def _headers(self, webhook_id: str, body: bytes) -> dict[str, str]:
        now = datetime.now(UTC)
        headers = {"webhook-id": webhook_id, "webhook-timestamp": str(int(now.timestamp()))}
        if self._signers:
            headers["webhook-signature"] = " ".join(signer.sign(webhook_id, now, body.decode()) for signer in self._signers)
        if self._endpoint.bearer:
            headers["authorization"] = f"Bearer {self._endpoint.bearer}"
        return headers

    async def _addresses(self) -> list[str]:
        host, port = self._url.host, self._url.port or _PORTS[self._url.scheme]
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._resolver, look_up)
        except OSError as error:
            raise DeliveryFailed(f"its name has no address ({error.strerror or error})", "unreachable") from error
        addresses = list(dict.fromkeys(str(place[4][0]) for place in found))
        for address in addresses:
            if not (self._endpoint.allow_private or is_public(address)):
                problem = f"{address} is no public address: set allow_private if the endpoint is meant to be there"
                raise DeliveryFailed(problem, "refused")
        return addresses

    async def _post(self, url: httpx.URL, headers: dict[str, str], body: bytes, connect_s: float) -> None:
        # The certificate is that of the name, whatever address the connection goes to.
        extensions = {"sni_hostname": self._url.host}
        timeout = httpx.Timeout(self._limits.attempt_timeout_s, connect=connect_s)
        async with self._client.stream(
            "POST", url, headers=headers, content=body, extensions=extensions, timeout=timeout
        ) as answer:
            said = await self._read(answer)
            if answer.is_success:
                return
            reason = f"HTTP {answer.status_code}" + (f": {said}" if said else "")
            if answer.status_code == httpx.codes.GONE:
                raise EndpointGone(reason)
            if answer.is_redirect:
                reason = f"HTTP {answer.status_code}: redirects are not followed; set the address that it names"
            raise DeliveryFailed(reason, "failed" if answer.is_server_error else "refused", self._retry_after_s(answer))

    async def _read(self, answer: httpx.Response) -> str:
        """The answer's beginning, and no more of it than is allowed."""
        beginning = bytearray()
        size = 0
        async for chunk in answer.aiter_raw():
            beginning += chunk[: 4 * _REASON_CHARS_MAX - len(beginning)]
            size += len(chunk)
            if size > self._limits.answer_bytes_max:
                break
        return _printable(beginning.decode("utf-8", "replace"))

    def _retry_after_s(self, answer: httpx.Response) -> float | None:
        """Seconds, or a date, as RFC 9110 has it."""
        text = answer.headers.get("retry-after", "").strip()
        if not text:
            return None
        if text.isascii() and text.isdigit():
            asked_s = float(text[:12])
        else:
            try:
                until = parsedate_to_datetime(text)
                asked_s = (until - datetime.now(until.tzinfo)).total_seconds()
            except (ValueError, OverflowError):
                return None
        return min(max(0.0, asked_s), self._limits.retry_after_max_s)


def share_s(left_s: float, addresses: int) -> float:
    """How long the first of so many addresses may take to be connected to: each an equal part of what is left."""
    return max(left_s, 0.0) / addresses


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text[:_REASON_CHARS_MAX]).strip()
