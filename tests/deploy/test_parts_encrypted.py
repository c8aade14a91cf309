"""Production with everything on, end to end: TLS and passwords between all parts, certificates of clients, producers that are
registered, heads that are anchored. Who lacks one of these stays outside. Then every secret of it is looked for in what the
parts logged, in Kafka's topics, in the tables and in every file that they wrote: it stands nowhere.

Real Apache Kafka 4 (SASL_SSL with SCRAM), a real Triton that asks for a certificate, a real clickhouse-server, and each part by
compose's own command. The server is of 2018 and lacks what the product's views and the API need, so chDB in the sink's process
answers them, and a second sink writes the same ledger to the server over TLS.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import ssl
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from standardwebhooks import Webhook
from tritonclient.grpc import service_pb2, service_pb2_grpc

from billing.v1.billing_service_pb2 import GetBalanceRequest
from billing.v1.billing_service_pb2_grpc import BillingServiceStub
from sinks.errors import EngineError
from sinks.loop import run_sink
from sinks.tables import ALL_TABLES, USAGE_EVENTS
from taximeter import compose
from taximeter.config import load
from taximeter.embedded.process import Child
from taximeter.health import State, examine
from taximeter.kafka_trouble import kafka_trouble
from tests.services import require
from tests.services.brokers import consumer_of, read_to_end
from tests.services.certificates import Authority, Issued
from tests.services.clickhouse import MISSING_MESSAGE, ClickHouseServer, server_command
from tests.services.kafka import QUIET, KafkaCluster
from tests.services.ports import free_port
from tests.services.triton import TritonServer, TritonUnavailableError, triton_environment
from tests.serving.notifier.support import Request, receiving
from tests.sinks.old_server import count, create_tables
from tests.taximeter.support import ROOT, environment, said, until

pytestmark = [
    pytest.mark.apache_kafka,
    pytest.mark.clickhouse_server,
    pytest.mark.triton,
    pytest.mark.timeout(900),
]

COMPOSE: Final = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
MODEL: Final = ROOT / "tests" / "serving" / "triton" / "repository" / "smollm2"
PARTS: Final = ("worker", "sink", "gateway", "api", "notifier")
USER: Final = "taximeter"
# Keys of the installation, each in a file of this name.
KEYS: Final = ("seal_key", "command_key", "key_pepper", "loopback_token", "kafka_password", "hook_secret")
WAIT_S: Final = 300.0
NOTHING_ANSWERS: Final = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN)

CONFIGURATION: Final = """
[kafka]
bootstrap = "{kafka}"
security_protocol = "SASL_SSL"
sasl_mechanism = "SCRAM-SHA-512"
sasl_username = "{user}"
sasl_password_file = "{secrets}/kafka_password"
ssl_ca_file = "{inside}"
[ledger]
partitions = 2
state_dir = "{folder}/ledger"
seal_key_file = "{secrets}/seal_key"
command_key_file = "{secrets}/command_key"
registered_producers_only = true
metrics_address = "{worker_health}"
[clickhouse]
chdb_path = "{folder}/chdb"
loopback_port = {loopback}
loopback_token_file = "{secrets}/loopback_token"
user = "{clickhouse_user}"
password_file = "{secrets}/clickhouse_password"
metrics_address = "{sink_health}"
[producer]
id_prefix = "gateway-"
key_file = "{secrets}/producer_key"
[gateway]
port = {gateway}
tls_certificate_file = "{gateway_shows.certificate}"
tls_key_file = "{gateway_shows.key}"
tls_client_ca_file = "{outside}"
upstream = "{triton}"
upstream_ca_file = "{inside}"
upstream_certificate_file = "{gateway_shows_triton.certificate}"
upstream_key_file = "{gateway_shows_triton.key}"
journal_path = "{folder}/journal.sqlite"
key_pepper_file = "{secrets}/key_pepper"
lease_key_file = "{secrets}/lease_key"
metrics_address = "{gateway_health}"
[api]
http_port = {http}
grpc_port = {grpc}
tls_certificate_file = "{api_shows.certificate}"
tls_key_file = "{api_shows.key}"
[notifier]
journal_path = "{folder}/notifier.sqlite"
metrics_address = "{notifier_health}"
[notifier.endpoints.hook]
url = "{hook}"
secret_file = "{secrets}/hook_secret"
ca_file = "{outside}"
allow_private = true
[models.profiles.llama]
backend = "vllm"
"""


class Installation:
    """Services, configuration and parts. All that is secret lies in `secrets`, and nothing else does."""

    def __init__(self, folder: Path, kafka_libs: Path, triton_installed: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.secrets = folder / "secrets"
        self.parts: dict[str, Child] = {}
        # A client's certificate must not open what is inside: two authorities.
        self.inside = Authority(self.secrets / "inside", "inside")
        self.outside = Authority(self.secrets / "outside", "outside")
        for name in (*KEYS, "clickhouse_password"):
            (self.secrets / name).write_text(secrets.token_hex(32))
        self.kafka_port, kafka_shows = free_port(), self.inside.issue("kafka")
        store = self.secrets / "kafka-store.pem"
        store.write_text(kafka_shows.key.read_text() + kafka_shows.certificate.read_text())
        # Beside the listener under test there is the cluster's own, for itself.
        self.kafka = KafkaCluster(
            folder / "kafka",
            kafka_libs,
            listeners={"SECURE": (self.kafka_port, self.kafka_port)},
            settings={
                **QUIET,
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL,CONTROLLER:PLAINTEXT",
                "listener.name.secure.sasl.enabled.mechanisms": "SCRAM-SHA-512",
                "listener.name.secure.scram-sha-512.sasl.jaas.config": (
                    "org.apache.kafka.common.security.scram.ScramLoginModule required;"
                ),
                "listener.name.secure.ssl.keystore.type": "PEM",
                "listener.name.secure.ssl.keystore.location": str(store),
            },
            users={USER: self.secret("kafka_password")},
        )
        shutil.copytree(MODEL, folder / "models" / "llama")
        self.triton = TritonServer(folder / "triton", folder / "models", triton_installed, self.inside)
        self.clickhouse = ClickHouseServer(
            folder / "clickhouse", password=self.secret("clickhouse_password"), shows=self.inside.issue("clickhouse")
        )
        hook_shows, tls = self.outside.issue("hook"), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(hook_shows.certificate, hook_shows.key)
        self.hook = stack.enter_context(receiving(tls))
        self.ports = {name: free_port() for name in ("gateway", "http", "grpc", "loopback")}
        self.health = {name: f"127.0.0.1:{free_port()}" for name in PARTS if name != "api"}
        self.configuration = folder / "taximeter.toml"
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=folder,
                secrets=self.secrets,
                inside=self.inside.certificate,
                outside=self.outside.certificate,
                hook=self.hook.url,
                kafka=f"127.0.0.1:{self.kafka_port}",
                user=USER,
                triton=self.triton.address,
                clickhouse_user=self.clickhouse.user,
                gateway_shows=self.outside.issue("gateway"),
                gateway_shows_triton=self.inside.issue("gateway"),
                api_shows=self.outside.issue("api"),
                **self.ports,
                **{f"{name}_health": address for name, address in self.health.items()},
            )
        )

    def secret(self, name: str) -> str:
        return (self.secrets / name).read_text()

    def run(self, *arguments: str | Path) -> str:
        return said(*arguments, "--config", self.configuration)

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def start(self, *names: str) -> None:
        for name in names:
            argv = [sys.executable, "-m", "taximeter", *COMPOSE["services"][name]["command"]]
            own = environment() | {"TAXIMETER_CONFIG": str(self.configuration), "TAXIMETER_LOG_LEVEL": "debug"}
            child = Child(name, argv, log_path=self.folder / f"{name}.log", cwd=ROOT, environment=own)
            child.start()
            self.parts[name] = child

    def is_well(self, name: str) -> bool:
        assert self.parts[name].alive, f"{name}: {self.parts[name].log_tail()}"
        address = (
            f"https://127.0.0.1:{self.ports['http']}/readyz" if name == "api" else f"http://{self.health[name]}/health/ready"
        )
        try:
            with urllib.request.urlopen(address, timeout=60, context=self.outside.trusting()) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        for child in reversed(self.parts.values()):
            child.stop(120.0)


@pytest.fixture
def installation(tmp_path: Path, apache_kafka_libs: Path) -> Iterator[Installation]:
    require(server_command(), MISSING_MESSAGE)
    try:
        triton_installed = triton_environment()
    except TritonUnavailableError as error:
        require(False, str(error))
        raise
    with contextlib.ExitStack() as stack:
        made = Installation(tmp_path, apache_kafka_libs, triton_installed, stack)
        for service, end in (
            (made.kafka, made.kafka.close),
            (made.triton, made.triton.stop),
            (made.clickhouse, made.clickhouse.stop),
        ):
            stack.callback(end)
            service.start()
        stack.callback(made.stop)
        yield made


def test_all_encrypted_it_bills_keeps_strangers_out_and_writes_no_secret(
    installation: Installation,
) -> None:
    keys = bring_up(installation)
    counted = ask(installation, keys["meter"])
    wait_until_billed(installation, counted)
    the_budgets_warning_comes_signed_over_tls(installation)
    the_api_says_so_over_tls(installation, keys["meter"], counted)
    the_server_has_it_too(installation)
    clients_without_the_right_certificate_are_refused(installation, keys["meter"])
    clients_of_kafka_without_the_right_credentials_are_refused(installation)
    until(lambda: all_is_well(installation), WAIT_S, "that the doctor finds everything well")
    tables = dict(rows_of_all_tables(installation))
    # Before the rest is looked at: what is said while stopping counts.
    for name in PARTS:
        installation.parts[name].stop(120.0)
        assert installation.parts[name].exit_code == 0, f"{name}: {installation.parts[name].log_tail()}"
    no_secret_stands_anywhere(installation, keys, tables)


def bring_up(installation: Installation) -> dict[str, str]:
    """All parts, a registered producer, a tenant with credit; the API keys."""
    # Made from the command key, as docs/threat-model.md says; a producer's needs no ledger to be shown.
    (installation.secrets / "lease_key").write_text(installation.run("lease", "key", "--bare").strip())
    (installation.secrets / "producer_key").write_text(installation.json("producer", "key", "gateway-*")["key"])
    installation.run(*COMPOSE["services"]["topics"]["command"])
    installation.start(*PARTS)
    for name in PARTS:
        until(lambda name=name: installation.is_well(name), WAIT_S, f"that {name} is well")  # type: ignore[misc]  # a bound default
    installation.run("producer", "register", "gateway-*", "--all-tenants")
    installation.run("prices", "apply", ROOT / "deploy" / "prices.toml")
    installation.run("tenant", "create", "acme")
    installation.run("credit", "grant", "acme", "5")
    # Whatever is used reaches it.
    installation.run("budget", "set", "acme", "0.000001", "--warn-at", "1")
    created = installation.json("key", "create", "acme", "--scope", "meter", "--scope", "read")
    return {"meter": created["secret"]}


def client_of(installation: Installation, trusts: Authority, shows: Issued | None) -> triton.InferenceServerClient:
    """An unmodified tritonclient."""
    return triton.InferenceServerClient(
        f"127.0.0.1:{installation.ports['gateway']}",
        ssl=True,
        root_certificates=str(trusts.certificate),
        private_key=None if shows is None else str(shows.key),
        certificate_chain=None if shows is None else str(shows.certificate),
    )


def ask(installation: Installation, key: str) -> dict[str, int]:
    """One answer, as soon as key and balance have come to the gateway; how many tokens it says that it was billed for."""
    inputs = []
    for name, text in (("text_input", "The capital of France is"), ("sampling_parameters", '{"max_tokens": 4}')):
        tensor = triton.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
        inputs.append(tensor)
    told: list[tuple[Any, Any]] = []

    def answered() -> bool:
        told.clear()
        with client_of(installation, installation.outside, installation.outside.issue("client")) as client:
            client.start_stream(lambda result, error: told.append((result, error)), headers={"authorization": f"Bearer {key}"})
            client.async_stream_infer("llama", inputs)
            client.stop_stream()
        return bool(told) and told[-1][1] is None

    until(answered, WAIT_S, "an answer through the gateway")
    parameters = told[-1][0].get_response().parameters
    return {name: parameters[f"taximeter_{name}_tokens"].int64_param for name in ("input", "output")}


def wait_until_billed(installation: Installation, counted: dict[str, int]) -> None:
    """To the token, by a ledger that its seals and its anchored heads prove."""

    def billed() -> list[tuple[int, int, int]]:
        return [
            (row["requests"] - row["refused_requests"], row["uncached_input_tokens"], row["output_tokens"])
            for row in installation.json("usage", "acme", "--by", "model")
        ]

    until(lambda: sum(requests for requests, _, _ in billed()), WAIT_S, "the charge")
    assert billed() == [(1, counted["input"], counted["output"])]
    assert counted["input"] > 0
    assert counted["output"] > 0
    anchors = installation.folder / "anchors"
    installation.run("anchor", "--output", anchors)
    audited = installation.json("audit", "--anchors", anchors)
    assert audited["findings"] == []
    assert audited["anchors"] > 0


def the_budgets_warning_comes_signed_over_tls(installation: Installation) -> None:
    def of_budget() -> list[Request]:
        about = [(request, request.values["data"]) for request in list(installation.hook.requests)]
        return [request for request, alert in about if (alert["rule"], alert["tenant_id"]) == ("budget", "acme")]

    until(of_budget, WAIT_S, "the webhook")
    for request in list(installation.hook.requests):
        Webhook(installation.secret("hook_secret")).verify(request.body, request.headers)


def the_api_says_so_over_tls(installation: Installation, key: str, counted: dict[str, int]) -> None:
    http, headers = f"127.0.0.1:{installation.ports['http']}", {"authorization": f"Bearer {key}"}
    with httpx.Client(
        verify=installation.outside.trusting(), base_url=f"https://{http}", headers=headers, timeout=60
    ) as client:
        answer = client.get("/v1/usage", params={"by": "model"})
    assert answer.status_code == 200, answer.text
    assert "strict-transport-security" in answer.headers
    [row] = answer.json()["rows"]
    assert (row["input_tokens_all"], row["output_tokens_all"]) == (str(counted["input"]), str(counted["output"]))
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"https://{http}/healthz", verify=installation.inside.trusting(), timeout=60)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{http}/healthz", timeout=60)

    def balance(channel: grpc.Channel) -> str:
        with channel:
            stub: Any = BillingServiceStub(channel)  # type: ignore[no-untyped-call]
            return str(stub.GetBalance(GetBalanceRequest(), metadata=tuple(headers.items()), timeout=60).balance.tenant_id)

    address = f"127.0.0.1:{installation.ports['grpc']}"
    assert balance(grpc.secure_channel(address, installation.outside.credentials())) == "acme"
    for channel in (grpc.secure_channel(address, installation.inside.credentials()), grpc.insecure_channel(address)):
        with pytest.raises(grpc.RpcError) as refused:
            balance(channel)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def the_server_has_it_too(installation: Installation) -> None:
    """A second sink follows the ledger over SASL_SSL and writes it to ClickHouse over TLS."""
    server = (
        "clickhouse.engine=server",
        f"clickhouse.port={installation.clickhouse.secure_port}",
        "clickhouse.sink_name=second",
        "clickhouse.tls=true",
    )
    trusted = f"clickhouse.ca_file={installation.inside.certificate}"
    config = load(installation.configuration, (*server, trusted))
    with compose.open_engine(config) as engine:
        engine.create_database()  # type: ignore[attr-defined]  # it is the server's
        create_tables(engine)  # type: ignore[arg-type]
        stop = threading.Event()
        sink = threading.Thread(target=run_sink, args=(compose.sink_settings(config), engine, stop))
        sink.start()
        try:
            until(lambda: count(engine, USAGE_EVENTS), WAIT_S, "usage in the server")  # type: ignore[arg-type]
        finally:
            stop.set()
            sink.join(WAIT_S)
    for wrong, said_of_it in (
        (f"clickhouse.ca_file={installation.outside.certificate}", "certificate verify failed"),
        ("clickhouse.tls=false", "does not answer"),
        ("clickhouse.password=wrong", "Wrong password"),
    ):
        config = load(installation.configuration, (*server, trusted, wrong))
        with compose.open_engine(config) as engine, pytest.raises(EngineError, match=said_of_it):
            engine.query("SELECT 1")


def clients_without_the_right_certificate_are_refused(installation: Installation, key: str) -> None:
    inside, outside = installation.inside, installation.outside
    for trusts, shows in (
        (outside, None),
        (outside, inside.issue("client-of-another")),
        (inside, outside.issue("client-that-is-not-fooled")),
    ):
        with client_of(installation, trusts, shows) as client, pytest.raises(triton.InferenceServerException) as refused:
            client.get_model_metadata("llama", headers={"authorization": f"Bearer {key}"}, client_timeout=60)
        assert "UNAVAILABLE" in str(refused.value.status())
    # Nor is there a way round the meter.
    for credentials in (inside.credentials(), inside.credentials(outside.issue("client-round-the-gateway"))):
        with grpc.secure_channel(installation.triton.address, credentials) as channel, pytest.raises(grpc.RpcError) as round_it:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(service_pb2.ServerLiveRequest(), timeout=60)
        assert round_it.value.code() is grpc.StatusCode.UNAVAILABLE


def clients_of_kafka_without_the_right_credentials_are_refused(installation: Installation) -> None:
    bootstrap = f"127.0.0.1:{installation.kafka_port}"
    right = compose.kafka_security(load(installation.configuration).kafka)
    wrong = right | {"ssl.ca.location": str(installation.outside.certificate)}
    cases: list[tuple[dict[str, str], tuple[int, ...]]] = [
        (right | {"sasl.password": "wrong"}, (KafkaError._AUTHENTICATION,)),
        (right | {"sasl.username": "nobody"}, (KafkaError._AUTHENTICATION,)),
        (right | {"sasl.mechanism": "PLAIN"}, (KafkaError._AUTHENTICATION,)),
        (wrong, (KafkaError._SSL,)),
        ({"security.protocol": "SSL", "ssl.ca.location": right["ssl.ca.location"]}, NOTHING_ANSWERS),
        ({"security.protocol": "PLAINTEXT"}, NOTHING_ANSWERS),
        (right | {"security.protocol": "SASL_PLAINTEXT"}, NOTHING_ANSWERS),
    ]
    for settings, codes in cases:
        wait_until_refused({**settings, "bootstrap.servers": bootstrap, "log_level": "0"}, codes)
    what_is_wrong_is_told_by_its_setting(installation)


def what_is_wrong_is_told_by_its_setting(installation: Installation) -> None:
    kafka, wrong = load(installation.configuration).kafka, installation.folder / "wrong"
    wrong.write_text("a wrong password")
    stranger = installation.outside.certificate
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        (
            {"sasl_password_file": wrong},
            f"kafka.sasl_username '{USER}': the broker refuses this user or the password (kafka.sasl_p",
        ),
        ({"sasl_username": "nobody"}, "kafka.sasl_username 'nobody': the broker refuses this user"),
        ({"sasl_mechanism": "PLAIN"}, "kafka.sasl_mechanism 'PLAIN': the broker takes SCRAM-SHA-512; set that"),
        (
            {"ssl_ca_file": stranger},
            f"kafka.ssl_ca_file {stranger}: the certificate of 127.0.0.1:{installation.kafka_port} is not",
        ),
        ({"security_protocol": "SASL_PLAINTEXT"}, "kafka.security_protocol 'SASL_PLAINTEXT': "),
    ]
    for changes, beginning in cases:
        # A listener of another protocol says nothing, however long it is waited for.
        told = kafka_trouble(kafka.model_copy(update=changes), 1.0 if "security_protocol" in changes else 60.0)
        assert told.startswith(beginning), told
        assert bool(told) == bool(beginning)
        assert "a wrong password" not in told
        assert installation.secret("kafka_password") not in told


def wait_until_refused(settings: dict[str, str], codes: tuple[int, ...]) -> None:
    told: list[KafkaError] = []
    options: dict[str, Any] = {**settings, "error_cb": told.append}
    client = AdminClient(options)

    def refused() -> bool:
        with pytest.raises(KafkaException):
            client.list_topics(timeout=0.5)
        client.poll(0)
        return any(error.code() in codes for error in told)

    until(refused, WAIT_S, f"a refusal of {settings} by one of {codes}")


def all_is_well(installation: Installation) -> bool:
    return all(check.state is State.WELL for check in examine(load(installation.configuration)))


def rows_of_all_tables(installation: Installation) -> Iterator[tuple[str, bytes]]:
    with compose.open_reader(load(installation.configuration)) as reader:
        for table in ALL_TABLES:
            rows = reader.query(f"SELECT hex(formatRowNoNewline('RowBinary', *)) FROM {table.name}").rows
            yield f"table {table.name}", b"\n".join(bytes.fromhex(str(row)) for (row,) in rows)


def no_secret_stands_anywhere(installation: Installation, keys: dict[str, str], tables: dict[str, bytes]) -> None:
    looked_for = {path.name: path.read_text() for path in installation.secrets.iterdir() if path.is_file()}
    looked_for |= {f"API key {name}": secret for name, secret in keys.items()}
    # A private key by a line of it that no other key has.
    looked_for = {name: text.splitlines()[2] if "PRIVATE KEY" in text else text for name, text in looked_for.items()}
    looked_for |= {
        str(path.relative_to(installation.secrets)): path.read_text().splitlines()[2]
        for path in installation.secrets.rglob("*.key")
    }
    assert set(looked_for) > {*KEYS, "lease_key", "producer_key", "clickhouse_password", "outside/gateway.key"}
    places = tables | dict(files_and_topics(installation))
    # The control: what is written is seen.
    written = places_of("acme", places)
    assert {"topic usage.events", "topic usage.ledger", "table usage_events", "table accounts"} <= set(written)
    assert all(places[f"{name}.log"] for name in PARTS)
    found = {name: places_of(secret, places) for name, secret in looked_for.items()}
    assert not any(found.values()), {name: where for name, where in found.items() if where}


def places_of(secret: str, places: dict[str, bytes]) -> list[str]:
    shapes = forms(secret)
    return [name for name, content in places.items() if any(shape in content for shape in shapes)]


def forms(secret: str) -> set[bytes]:
    """The ways in which it might have been written."""
    texts = {secret.encode()}
    with contextlib.suppress(ValueError):
        texts.add(bytes.fromhex(secret))
    return {form for text in texts for form in (text, text.hex().encode(), base64.b64encode(text).rstrip(b"="))}


def files_and_topics(installation: Installation) -> Iterator[tuple[str, bytes]]:
    # ClickHouse merges its files, and takes those away that it has merged: folders, too, which `os.walk` passes over.
    for path in (Path(folder) / name for folder, _, names in os.walk(installation.folder) for name in names):
        # What ClickHouse is told of its users is its own secret; and Kafka keeps 10 MB free for each index of numbers.
        passed_over = path.name == "users.xml" or path.name.endswith("index") or installation.secrets in path.parents
        if path.is_file() and not passed_over:
            with contextlib.suppress(FileNotFoundError):
                yield str(path.relative_to(installation.folder)), path.read_bytes()
    consumer = consumer_of(installation.kafka.bootstrap)
    for name, topic in consumer.list_topics(timeout=60).topics.items():
        content = b""
        for partition in topic.partitions:
            messages, _ = read_to_end(consumer, name, partition, 0)
            content += b"\n".join(part for message in messages for part in (message.key(), message.value()) if part)
        yield f"topic {name}", content
    consumer.close()
