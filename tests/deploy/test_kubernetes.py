"""The Kubernetes manifests say what the product takes: commands, settings, secrets, ports, probes, volumes, the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer.main
import yaml

from taximeter.cli import application
from taximeter.config import Config, load

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
BASE = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    each for name in BASE["resources"] for each in yaml.safe_load_all((FOLDER / "base" / name).read_text())
]
# What a CronJob makes is a Job like others.
WORKLOADS = {
    each["metadata"]["name"]: each["spec"]["jobTemplate"] if each["kind"] == "CronJob" else each
    for each in OBJECTS
    if each["kind"] in {"StatefulSet", "Deployment", "Job", "CronJob"}
}
# What each part reads: without one of these files it ends with an error, and with more it could do more than it has to.
SECRETS = {
    "taximeter-topics": {"seal_key", "command_key"},
    "taximeter-worker": {"seal_key", "command_key"},
    "taximeter-sink": {"seal_key", "command_key", "clickhouse_password"},
    "taximeter-gateway": {"key_pepper", "lease_key"},
    "taximeter-api": {"key_pepper", "command_key", "clickhouse_password"},
    "taximeter-notifier": set(),
    "taximeter-backup": {"seal_key"},
}
KEYS = {
    "taximeter-ledger": {"seal_key", "command_key"},
    "taximeter-gateway": {"key_pepper", "lease_key"},
    "taximeter-clickhouse": {"clickhouse_password"},
}
METRICS = {
    "taximeter-worker": "ledger",
    "taximeter-sink": "clickhouse",
    "taximeter-gateway": "gateway",
    "taximeter-api": "api",
    "taximeter-notifier": "notifier",
}


@pytest.fixture(scope="module")
def config() -> Config:
    return load(FOLDER / "base" / "taximeter.toml")


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = WORKLOADS[name]["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (only,) = pod(name)["containers"]
    found: dict[str, Any] = only
    return found


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each["spec"] for each in OBJECTS if each["kind"] == kind}


def test_every_part_is_there() -> None:
    assert set(WORKLOADS) == set(SECRETS)
    assert {image["name"] for image in BASE["images"]} == {container(name)["image"] for name in WORKLOADS}


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_container_runs_a_command_that_there_is(name: str) -> None:
    command = typer.main.get_command(application())
    words = list(container(name)["args"])
    while hasattr(command, "commands"):
        word = words.pop(0)
        assert word in command.commands, f"{name}: `{word}` is no command"
        command = command.commands[word]
    # What is left are its arguments, as it takes them.
    command.make_context(name, words)


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_variable_is_a_key_of_the_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in container(name)["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "from-the-field"))
    loaded = load(FOLDER / "base" / "taximeter.toml")
    if name == "taximeter-gateway":
        assert loaded.gateway.server_id == "from-the-field"
    # Kubernetes' own variables of services begin as ours do, and would be refused.
    assert pod(name)["enableServiceLinks"] is False


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_part_mounts_the_secrets_that_it_reads_and_no_others(name: str, config: Config) -> None:
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}
    claims = {claim["metadata"]["name"] for claim in WORKLOADS[name]["spec"].get("volumeClaimTemplates", [])}
    assert set(mounts) == {*volumes, *claims}
    secrets = {each: _keys_of(volume["secret"]) for each, volume in volumes.items() if "secret" in volume}
    assert set().union(*secrets.values()) == SECRETS[name]
    files = {
        path
        for section in (config.ledger, config.clickhouse, config.gateway)
        for key, path in section
        if key.endswith("_file") and path is not None
    }
    for each, keys in secrets.items():
        for key in keys:
            assert Path(mounts[each]) / key in files
    assert len(files) == len({key for keys in KEYS.values() for key in keys})


def _keys_of(volume: dict[str, Any]) -> set[str]:
    """What a pod sees of a secret: all of it, or what is named, under its own name."""
    items = volume.get("items", [{"key": key, "path": key} for key in KEYS[volume["secretName"]]])
    assert all(item["key"] == item["path"] for item in items)
    return {item["key"] for item in items} & KEYS[volume["secretName"]]


@pytest.mark.parametrize("name", WORKLOADS)
def test_nobody_runs_as_root_or_writes_but_where_it_has_to(name: str) -> None:
    assert pod(name)["securityContext"]["runAsNonRoot"] is True
    assert pod(name)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod(name)["automountServiceAccountToken"] is False
    dockerfile = (FOLDER.parent / "Dockerfile").read_text()
    assert f"USER {pod(name)['securityContext']['runAsUser']}\n" in dockerfile
    allowed = container(name)["securityContext"]
    assert allowed == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    resources = container(name)["resources"]
    assert {"cpu", "memory"} <= set(resources["requests"])
    assert "memory" in resources["limits"]


@pytest.mark.parametrize("name", METRICS)
def test_probes_and_scrapes_ask_where_the_part_answers(name: str, config: Config) -> None:
    address = getattr(config, METRICS[name]).metrics_address
    ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
    assert address == f"0.0.0.0:{ports['metrics']}"
    annotations = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(ports["metrics"])}
    source = (FOLDER.parents[1] / "taximeter" / "metrics.py").read_text()
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container(name)[kind]
        if "httpGet" in probe:
            assert ports[probe["httpGet"]["port"]]
            assert f'case "{probe["httpGet"]["path"]}"' in source
        else:
            assert ports[probe["tcpSocket"]["port"]] == config.gateway.port


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("taximeter-worker", "ledger.state_dir"),
        ("taximeter-gateway", "gateway.journal_path"),
        ("taximeter-notifier", "notifier.journal_path"),
    ],
)
def test_what_must_outlive_a_pod_lies_on_a_claim_that_stays(name: str, path: str, config: Config) -> None:
    section, key = path.split(".")
    spec = WORKLOADS[name]["spec"]
    (claim,) = spec["volumeClaimTemplates"]
    (mount,) = [mount for mount in container(name)["volumeMounts"] if mount["name"] == claim["metadata"]["name"]]
    assert getattr(getattr(config, section), key).is_relative_to(mount["mountPath"])
    assert spec["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    assert named("Service")[spec["serviceName"]]["clusterIP"] == "None"
    size = claim["spec"]["resources"]["requests"]["storage"]
    if name == "taximeter-gateway":
        assert config.producer.journal_bytes_max < int(size.removesuffix("Gi")) << 30, (
            "the disk would refuse before the journal"
        )
        assert config.gateway.replicas == spec["replicas"]


def test_backups_are_taken_one_at_a_time_onto_a_claim_that_is_no_pods(config: Config) -> None:
    (cron,) = named("CronJob").values()
    assert re.fullmatch(r"\d+ \* \* \* \*", cron["schedule"]), "hourly, as docs/operating.md says"
    assert cron["concurrencyPolicy"] == "Forbid"
    folder = Path(container("taximeter-backup")["args"][-1])
    (mount,) = [mount for mount in container("taximeter-backup")["volumeMounts"] if mount["name"] == "backup"]
    assert folder.is_relative_to(mount["mountPath"])
    assert folder != Path(mount["mountPath"]), "a volume's own folder has what its file system keeps there"
    (volume,) = [volume for volume in pod("taximeter-backup")["volumes"] if volume["name"] == "backup"]
    assert volume["persistentVolumeClaim"]["claimName"] in named("PersistentVolumeClaim")
    assert config.ledger.anchor_file is None, "else it is to be mounted here, too"


def test_selectors_find_the_pods_that_they_mean() -> None:
    labels = {name: each["spec"]["template"]["metadata"]["labels"] for name, each in WORKLOADS.items()}
    for name, each in WORKLOADS.items():
        if "selector" in each["spec"]:
            assert each["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    for name, budget in named("PodDisruptionBudget").items():
        assert budget == {"maxUnavailable": 1, "selector": {"matchLabels": {"app.kubernetes.io/name": name}}}
        assert name in labels
    for name, service in named("Service").items():
        (found,) = [each for each, said in labels.items() if service["selector"].items() <= said.items()]
        ports = {port["name"]: port["containerPort"] for port in container(found)["ports"]}
        assert {port["targetPort"]: port["port"] for port in service["ports"]}.items() <= ports.items(), name


def test_the_network_lets_through_what_the_configuration_needs(config: Config) -> None:
    policies = named("NetworkPolicy")

    def ports(name: str, direction: str) -> set[int]:
        return {port["port"] for rule in policies[name].get(direction, []) for port in rule["ports"]}

    assert ports("taximeter", "ingress") == {9464}
    assert int(config.kafka.bootstrap.split(":")[1]) in ports("taximeter", "egress")
    assert ports("taximeter-gateway", "ingress") == {config.gateway.port}
    assert ports("taximeter-gateway", "egress") == {int(config.gateway.upstream.split(":")[1])}
    assert ports("taximeter-sink", "egress") == {config.clickhouse.port}
    assert ports("taximeter-api", "ingress") == {config.api.http_port, config.api.grpc_port}
    assert ports("taximeter-api", "egress") == {config.clickhouse.port}
    assert config.ledger.snapshot_url.startswith("s3://")
    assert ports("taximeter-worker", "egress") == {443}
    [endpoint] = config.notifier.endpoints.values()
    assert ports("taximeter-notifier", "egress") == {httpx.URL(endpoint.url).port, 443}
    parts = {name: each["spec"]["template"]["metadata"]["labels"] for name, each in WORKLOADS.items()}
    for policy in policies.values():
        assert any(policy["podSelector"]["matchLabels"].items() <= labels.items() for labels in parts.values())
    alone = yaml.safe_load((FOLDER / "model-servers.yaml").read_text())["spec"]["ingress"]
    ((source,),) = (rule["from"] for rule in alone)
    assert source["podSelector"]["matchLabels"].items() <= parts["taximeter-gateway"].items()


def test_workers_scale_by_the_lag_of_the_group_that_they_are_in(config: Config) -> None:
    (scaling,) = yaml.safe_load_all((FOLDER / "keda" / "scaling.yaml").read_text())
    spec = scaling["spec"]
    assert spec["scaleTargetRef"]["name"] in WORKLOADS
    assert spec["maxReplicaCount"] == config.ledger.partitions
    assert {trigger["metadata"]["topic"] for trigger in spec["triggers"]} == {"usage.events", "billing.commands"}
    for trigger in spec["triggers"]:
        assert trigger["metadata"]["consumerGroup"] == config.ledger.consumer_group
        assert trigger["metadata"]["bootstrapServers"] == config.kafka.bootstrap
        assert all(isinstance(value, str) for value in trigger["metadata"].values()), "KEDA takes texts alone"


def test_every_secret_that_is_named_is_said_how_to_make() -> None:
    said = (FOLDER / "base" / "kustomization.yaml").read_text()
    for secret, keys in KEYS.items():
        line = re.search(rf"create secret generic {secret} (.+)", said)
        assert line is not None
        assert set(re.findall(r"--from-file=(\w+)", line[1])) == keys
