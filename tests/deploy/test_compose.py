"""The compose file and the image say what the product takes: commands, configuration, secrets, dependencies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
import yaml

from billing.limits import RECORD_BYTES_MAX
from taximeter.cli import application
from taximeter.config import Config, load

DEPLOY = Path(__file__).parents[2] / "deploy"
OURS = ("topics", "worker", "sink", "gateway", "api", "notifier")
# What each part reads: without one of these files it ends with an error.
SECRETS = {
    "topics": {"seal_key"},
    "worker": {"seal_key", "command_key"},
    "sink": {"seal_key", "clickhouse_password"},
    "gateway": {"key_pepper", "lease_key"},
    "api": {"key_pepper", "command_key", "clickhouse_password"},
    "notifier": set(),
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


@pytest.fixture(scope="module")
def config() -> Config:
    return load(DEPLOY / "taximeter.toml")


@pytest.mark.parametrize("name", OURS)
def test_each_service_runs_a_command_that_there_is(compose: dict[str, Any], name: str) -> None:
    command = typer.main.get_command(application())
    for word in compose["services"][name]["command"]:
        commands = getattr(command, "commands", {})
        assert word in commands, f"{name}: `{word}` is no command"
        command = commands[word]
    assert not hasattr(command, "commands")


@pytest.mark.parametrize("name", OURS)
def test_each_service_has_the_secrets_and_the_configuration_that_it_reads(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert set(service["secrets"]) >= SECRETS[name]
    assert set(service["secrets"]) <= set(compose["secrets"])
    target = service["configs"][0]["target"]
    assert service["environment"]["TAXIMETER_CONFIG"] == target


@pytest.mark.parametrize("name", ["worker", "sink", "gateway", "api", "notifier"])
def test_each_part_has_the_time_to_stop_that_kubernetes_gives_it(compose: dict[str, Any], name: str) -> None:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "base" / f"{name}.yaml").read_text())
    specs = [document["spec"]["template"]["spec"] for document in documents if "template" in document["spec"]]
    needed_s = max(spec["terminationGracePeriodSeconds"] for spec in specs)
    # Without one Docker kills after ten seconds, which a gateway's streams alone may take.
    assert int(compose["services"][name].get("stop_grace_period", "10s").removesuffix("s")) >= needed_s > 10


def test_secret_files_are_those_that_compose_mounts(compose: dict[str, Any], config: Config) -> None:
    named = {
        str(path)
        for section in (config.ledger, config.clickhouse, config.gateway)
        for key, path in section
        if key.endswith("_file") and path is not None
    }
    assert named == {f"/run/secrets/{secret}" for secret in compose["secrets"]} - {"/run/secrets/grafana_password"}


def test_what_must_outlive_a_container_lies_on_a_volume(compose: dict[str, Any], config: Config) -> None:
    places = (
        ("worker", config.ledger.state_dir),
        ("gateway", config.gateway.journal_path),
        ("notifier", config.notifier.journal_path),
    )
    for name, path in places:
        mounts = [volume.split(":")[1] for volume in compose["services"][name]["volumes"]]
        assert any(path.is_relative_to(mount) for mount in mounts), f"{name}: {path} would be lost"


def test_addresses_are_those_of_the_services(compose: dict[str, Any], config: Config) -> None:
    services = compose["services"]
    for address in (config.kafka.bootstrap, config.gateway.upstream, f"{config.clickhouse.host}:0"):
        assert address.split(":")[0] in services
    [endpoint] = config.notifier.endpoints.values()
    assert httpx.URL(endpoint.url).host in services
    assert [f"{config.gateway.port}:{config.gateway.port}"] == services["gateway"]["ports"]
    ports = (config.api.http_port, config.api.grpc_port)
    assert [f"{port}:{port}" for port in ports] == services["api"]["ports"]
    # Who reaches the back end past the gateway is not metered.
    assert "ports" not in services["triton"]


def test_traces_find_their_way_from_each_part_to_grafana(compose: dict[str, Any], config: Config) -> None:
    services = compose["services"]
    [address] = {config.gateway.otlp_endpoint, config.ledger.otlp_endpoint, config.clickhouse.otlp_endpoint}
    told = httpx.URL(address)
    [mount] = [volume.split(":") for volume in services[told.host]["volumes"]]
    assert services[told.host]["command"] == [f"--config={mount[1]}"]
    collector = yaml.safe_load((DEPLOY / mount[0]).read_text())
    listens = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    assert listens == f"0.0.0.0:{told.port}"
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= set(collector[kind])
    assert set(collector["service"]["pipelines"]) == {"traces", "metrics"}, "a gateway tells both"
    [exporter] = collector["service"]["pipelines"]["traces"]["exporters"]
    kept_by = collector["exporters"][exporter]["endpoint"].split(":")[0]
    assert services[kept_by]["environment"]["JAEGER_LISTEN_HOST"] == "0.0.0.0"
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/taximeter.yaml").read_text())["datasources"]
    [source] = [source for source in sources if source["type"] == "jaeger"]
    assert httpx.URL(source["url"]).host == kept_by


def test_kafka_takes_the_largest_record(compose: dict[str, Any]) -> None:
    environment = compose["services"]["kafka"]["environment"]
    assert environment["KAFKA_MESSAGE_MAX_BYTES"] > RECORD_BYTES_MAX
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_each_role_of_the_image_has_its_locked_requirements(compose: dict[str, Any]) -> None:
    roles = {compose["services"][name]["build"]["args"]["ROLE"] for name in OURS}
    for role in roles:
        assert (DEPLOY.parent / "requirements" / f"{role}.txt").is_file()
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (\w+) /build/source/", dockerfile, re.MULTILINE))
    assert copied == {"billing", "producers", "serving", "sinks", "stream_processors", "taximeter"}
