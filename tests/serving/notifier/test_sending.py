"""One attempt: what is signed, which addresses are reached, and what each answer means."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from serving.notifier import sending as sending_module
from serving.notifier.errors import DeliveryFailed, EndpointGone
from serving.notifier.sending import Sender, is_public, share_s
from serving.notifier.settings import Endpoint
from tests.serving.notifier.support import QUICK, SECRET, Answer, Receiver, endpoint

OTHER = b"o" * 24


@contextlib.asynccontextmanager
async def sending(to: Endpoint, **limits: Any) -> AsyncIterator[Sender]:
    sender = Sender(to, replace(QUICK, **limits))
    try:
        yield sender
    finally:
        await sender.close()


async def test_a_receiver_verifies_it_with_either_secret_and_with_no_other(receiver: Receiver) -> None:
    async with sending(endpoint(receiver.url, secrets=(SECRET, OTHER), bearer="token")) as sender:
        await sender.send("a-r1", '{"a":"é"}'.encode())
    [request] = receiver.requests
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(request.body, request.headers) == {"a": "é"}
    with pytest.raises(WebhookVerificationError):
        Webhook(b"x" * 24).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(request.body + b" ", request.headers)
    assert request.path == "/hook"
    assert request.headers["authorization"] == "Bearer token"
    assert request.headers["content-type"] == "application/json"


async def test_each_answer_that_is_no_success_is_told_by_its_status(receiver: Receiver) -> None:
    elsewhere = {"location": f"{receiver.url}/elsewhere"}
    receiver.answers += [
        Answer(500, body=b"out\nof \x1border" + b"x" * 1_000),
        Answer(302, elsewhere),
        Answer(410),
        Answer(204),
    ]
    async with sending(endpoint(receiver.url)) as sender:
        with pytest.raises(DeliveryFailed, match=r"^HTTP 500: out of  order") as failed:
            await sender.send("a-r1", b"{}")
        assert len(str(failed.value)) < 300
        with pytest.raises(DeliveryFailed, match="redirects are not followed"):
            await sender.send("a-r1", b"{}")
        with pytest.raises(EndpointGone, match="HTTP 410"):
            await sender.send("a-r1", b"{}")
        await sender.send("a-r1", b"{}")
    assert {request.path for request in receiver.requests} == {"/hook"}


@pytest.mark.parametrize(
    ("said", "low_s", "high_s"),
    [
        ("7", 7, 7),
        ("99999", 60, 60),
        (timedelta(hours=5), 60, 60),
        (timedelta(hours=-5), 0, 0),
    ],
)
async def test_retry_after_is_taken_within_its_bound(
    receiver: Receiver, said: str | timedelta, low_s: float, high_s: float
) -> None:
    if isinstance(said, timedelta):
        said = format_datetime(datetime.now(UTC) + said, usegmt=True)
    receiver.answers.append(Answer(503, {"retry-after": said}))
    async with sending(endpoint(receiver.url), retry_after_max_s=60.0) as sender:
        with pytest.raises(DeliveryFailed) as failed:
            await sender.send("a-r1", b"{}")
    assert failed.value.retry_after_s is not None
    assert low_s <= failed.value.retry_after_s <= high_s


async def test_retry_after_that_says_nothing_is_none(receiver: Receiver) -> None:
    receiver.answers.append(Answer(503, {"retry-after": "soon"}))
    async with sending(endpoint(receiver.url)) as sender:
        with pytest.raises(DeliveryFailed) as failed:
            await sender.send("a-r1", b"{}")
    assert failed.value.retry_after_s is None


async def test_a_slow_answer_and_nobody_at_all_are_failures(receiver: Receiver) -> None:
    gate = threading.Event()
    receiver.answers.append(Answer(gate=gate))
    async with sending(endpoint(receiver.url), attempt_timeout_s=0.2) as sender:
        with pytest.raises(DeliveryFailed, match=r"no answer within 0\.2 s"):
            await sender.send("a-r1", b"{}")
    gate.set()
    # Held, and never listened on: nobody else can.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with sending(endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}/secret-path")) as sender:
            with pytest.raises(DeliveryFailed, match="ConnectError") as failed:
                await sender.send("a-r1", b"{}")
    assert "secret-path" not in str(failed.value)


async def test_no_more_of_an_answer_is_read_than_its_bound(receiver: Receiver) -> None:
    receiver.answers += [Answer(500, body=b"x" * 4_000_000)] * 2
    async with sending(endpoint(receiver.url), answer_bytes_max=1_000) as sender:
        for _ in range(2):
            with pytest.raises(DeliveryFailed, match="HTTP 500"):
                await sender.send("a-r1", b"{}")


NOT_PUBLIC = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "fe80::1%eth0",
    "fc00::1",
    "::ffff:10.0.0.1",
    "2002:0a00:0001::",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a9fe:a9fe",
    "::10.0.0.1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_the_internet_does_not_route_are_none(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_others_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1"])
async def test_nothing_private_is_reached_unless_it_may_be(receiver: Receiver, host: str) -> None:
    async with sending(endpoint(f"http://{host}:{receiver.port}/hook", allow_private=False)) as sender:
        with pytest.raises(DeliveryFailed, match=r"is no public address: set allow_private|has no address"):
            await sender.send("a-r1", b"{}")
    assert receiver.requests == []


async def test_the_connection_goes_to_the_address_that_was_looked_at(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is resolved once; what it becomes afterwards reaches nothing."""
    looked: list[str] = []

    def once(host: str, port: int, **_: Any) -> list[Any]:
        looked.append(host)
        assert len(looked) == 1, "looked up twice"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", once)
    monkeypatch.setattr("serving.notifier.sending.is_public", lambda address: address == "127.0.0.1")
    async with sending(endpoint(f"http://hooks.example:{receiver.port}/hook", allow_private=False)) as sender:
        await sender.send("a-r1", b"{}")
    assert receiver.requests[0].headers["host"] == f"hooks.example:{receiver.port}"


async def test_an_address_that_swallows_packets_leaves_the_next_its_part(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.2", "127.0.0.1")]

    def share(left_s: float, addresses: int) -> float:
        parts.append((left_s, addresses))
        # Nobody waits half an attempt to see nothing come.
        return 0.2 if addresses == 2 else left_s

    parts: list[tuple[float, int]] = []
    # Its queue is full: whoever connects hears nothing, as of an address behind a firewall that drops.
    with (
        socket.create_server(("127.0.0.2", receiver.port), backlog=0) as hole,
        socket.create_connection(hole.getsockname(), 60),
    ):
        monkeypatch.setattr(socket, "getaddrinfo", both)
        monkeypatch.setattr(sending_module, "share_s", share)
        async with sending(endpoint(f"http://hooks.example:{receiver.port}/hook"), attempt_timeout_s=120.0) as sender:
            await sender.send("a-r1", b"{}")
    assert len(receiver.requests) == 1
    (whole_s, first), (rest_s, last) = parts
    assert (first, last) == (2, 1)
    assert 0 < rest_s < whole_s <= 120


def test_addresses_share_what_is_left_of_an_attempt() -> None:
    assert (share_s(10.0, 4), share_s(7.5, 3), share_s(-1.0, 1)) == (2.5, 2.5, 0.0)


async def test_a_resolver_that_hangs_holds_no_other_endpoint(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, resolve = threading.Event(), socket.getaddrinfo

    def look_up(host: str, port: int, **options: Any) -> Any:
        if host == "slow.example":
            gate.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return resolve(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with (
        sending(endpoint("http://slow.example/hook", "slow"), attempt_timeout_s=60.0) as slow,
        sending(endpoint(f"http://localhost:{receiver.port}/hook")) as quick,
    ):
        # More than the event loop has threads for everybody.
        waiting = [asyncio.ensure_future(slow.send("a-r1", b"{}")) for _ in range(64)]
        await asyncio.sleep(0)
        await quick.send("a-r1", b"{}")
        gate.set()
        failures = await asyncio.gather(*waiting, return_exceptions=True)
    assert len(receiver.requests) == 1
    assert {str(failure) for failure in failures} == {"its name has no address (try again)"}
