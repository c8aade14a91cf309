"""A gateway of the version before, beside those of this one on one installation: gateways are upgraded one at a time."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from taximeter.config import load
from taximeter.embedded.process import Child
from tests.services.ports import free_port
from tests.services.version_before import tree_before
from tests.taximeter.support import STOP_GRACE_S, Up, environment, until

__all__ = ["gateway_before"]

# A file of its own: this version's has keys that the one before does not know, and refuses.
_CONFIGURATION: Final = """
[kafka]
bootstrap = "{now.kafka.bootstrap}"
[ledger]
partitions = {now.ledger.partitions}
command_key_file = "{now.ledger.command_key_file}"
[gateway]
port = {port}
upstream = "{now.gateway.upstream}"
journal_path = "{folder}/of-before/journal.sqlite"
key_pepper_file = "{now.gateway.key_pepper_file}"
metrics_address = "{health}"
{profiles}
"""


def _profile(named: tuple[str, Any]) -> str:
    name, profile = named
    decoupled = "" if profile.decoupled is None else f"decoupled = {str(profile.decoupled).lower()}"
    return f'[models.profiles.{name}]\nbackend = "{profile.backend}"\ntokenizer = ""\n{decoupled}'


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/health/ready", timeout=60) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def gateway_before(up: Up, folder: Path) -> Iterator[int]:
    """Its port, once it is ready; at the end it must stop by itself."""
    (folder / "before").mkdir()
    tree, port, health, path = tree_before(folder / "before"), free_port(), f"127.0.0.1:{free_port()}", folder / "before.toml"
    now = load(up.data_dir.config_path)
    profiles = "\n".join(map(_profile, now.models.profiles.items()))
    path.write_text(_CONFIGURATION.format(now=now, port=port, health=health, folder=folder, profiles=profiles))
    command = [sys.executable, "-m", "taximeter", "gateway", "--config", str(path)]
    child = Child("gateway before", command, log_path=folder / "gateway-before.log", cwd=tree, environment=environment())
    child.start()
    try:
        until(lambda: not child.alive or _is_ready(health), what="the gateway of before")
        assert child.alive, child.log_tail()
        yield port
    finally:
        child.stop(STOP_GRACE_S)
    assert child.exit_code == 0, child.log_tail()
