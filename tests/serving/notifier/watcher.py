"""A client that watches alerts over gRPC and, whatever happens to the API, goes on from the position of the last one."""

from __future__ import annotations

import secrets
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
from confluent_kafka import Producer
from confluent_kafka.admin import NewTopic

from billing.v1.account_pb2 import KEY_SCOPE_READ, ApiKey
from billing.v1.billing_service_pb2 import WatchAlertsRequest
from billing.v1.billing_service_pb2_grpc import BillingServiceStub
from serving.gateway.credentials import hash_secret
from taximeter.embedded.process import Child
from tests.producers.support import create_topics
from tests.services.ports import free_port
from tests.taximeter.support import ROOT, environment

__all__ = ["ApiUnderTrial", "Watcher"]

_SECRET = "tm-trial"
_PAUSE_S = 0.05
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class ApiUnderTrial:
    """`taximeter api` on a trial's topics, with one operator's key and no database."""

    def __init__(self, folder: Path, config: Path, bootstrap: str, topic_prefix: str, partitions: int) -> None:
        self.port = free_port()
        self._config = config
        pepper = secrets.token_hex(32)
        (folder / "key_pepper").write_text(pepper)
        with config.open("a") as file:
            file.write(
                f"""
        [ledger]
        partitions = {partitions}
        [clickhouse]
        loopback_token_file = "{folder}/key_pepper"
        [gateway]
        key_pepper_file = "{folder}/key_pepper"
        [api]
        grpc_port = {self.port}
        http_port = {free_port()}
        """
            )
        topic = f"{topic_prefix}billing.keys"
        create_topics(bootstrap, NewTopic(topic, partitions, 1))
        key = ApiKey(key_id="key-1", secret_hash=hash_secret(pepper.encode(), _SECRET), scopes=[KEY_SCOPE_READ])
        producer = Producer({"bootstrap.servers": bootstrap})
        producer.produce(topic, key=b"key-1", value=key.SerializeToString())
        assert producer.flush(60) == 0

    def process(self) -> Child:
        """Not started yet."""
        command = [sys.executable, "-m", "taximeter", "api", "--config", str(self._config)]
        return Child("api", command, log_path=self._config.with_name("api.log"), cwd=ROOT, environment=environment())


class Watcher(threading.Thread):
    """Notes what it is told, in order, until it is stopped."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        # `alert-rREVISION`, and how often the connection was lost.
        self.told: list[str] = []
        self.lost = 0
        self.position = ""
        self.failure: grpc.RpcError | None = None
        self._port = port
        self._stopping = threading.Event()
        self._call: Any = None

    def run(self) -> None:
        while not self._stopping.wait(_PAUSE_S):
            try:
                self._watch()
            except grpc.RpcError as error:
                if error.code() not in _AWAY:
                    self.failure = error
                    return
                self.lost += 1

    def stop(self) -> None:
        self._stopping.set()
        if self._call is not None:
            self._call.cancel()
        self.join(60)

    def _watch(self) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            metadata = (("authorization", f"Bearer {_SECRET}"),)
            stub: Any = BillingServiceStub(channel)  # type: ignore[no-untyped-call]
            answers = stub.WatchAlerts(WatchAlertsRequest(after=self.position), metadata=metadata)
            self._call = answers
            for answer in answers:
                if answer.HasField("alert"):
                    self.told.append(f"{answer.alert.alert_id}-r{answer.alert.labels['revision']}")
                # As a client that keeps what it was told together with the position.
                self.position = answer.position
