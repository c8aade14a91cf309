"""What keeps a configuration out of Kafka is told by its setting; of an encrypted broker: `test_parts_encrypted.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from taximeter.cli import application
from taximeter.embedded.broker import TansuBroker
from taximeter.kafka_trouble import kafka_trouble
from taximeter.platform_config import KafkaConfig


def test_a_broker_that_answers_is_no_trouble(tansu: TansuBroker) -> None:
    assert kafka_trouble(KafkaConfig(bootstrap=tansu.bootstrap), 60.0) == ""


def test_a_listener_of_another_protocol_is_named(tansu: TansuBroker) -> None:
    said = kafka_trouble(KafkaConfig(bootstrap=tansu.bootstrap, security_protocol="SSL"), 1.0)
    assert tansu.bootstrap in said
    assert "'SSL'" in said


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "authority.pem"
    path.write_text("no certificate")
    said = kafka_trouble(KafkaConfig(bootstrap="127.0.0.1:1", security_protocol="SSL", ssl_ca_file=path))
    assert said.startswith(f"kafka.ssl_ca_file {path}: is no such file in PEM form")


def test_a_command_says_which_setting_is_wrong(free_port: Callable[[], int], tmp_path: Path) -> None:
    address, state = f"127.0.0.1:{free_port()}", tmp_path / "state"
    flags = (
        f"kafka.bootstrap={address}",
        f"ledger.state_dir={state}",
        f"ledger.seal_key={'s' * 32}",
        f"ledger.command_key={'c' * 32}",
    )
    asks = [word for flag in (*flags, "kafka.request_timeout_s=0.5") for word in ("--set", flag)]
    result = CliRunner().invoke(application(), ["topics", "apply", *asks])
    assert result.exit_code == 1, result.output
    assert f"kafka.bootstrap '{address}': nobody listens there" in " ".join(result.stderr.split())
