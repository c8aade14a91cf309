"""The data directory: one `up` at a time, found while it runs and not after, and secrets that only the owner can
read.
"""

from __future__ import annotations

import fcntl
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from taximeter.embedded.state import DataDir, RunState
from taximeter.errors import ConfigError, TaximeterError
from taximeter.secret_files import SECRET_NAMES, ensure_secrets


def test_the_one_that_runs_is_found_and_a_second_is_refused(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    state = RunState(1, data_dir.config_path, {"gateway": 8001}, {"sink": 7})
    assert data_dir.running() is None
    with data_dir.lock():
        assert data_dir.running() is None
        data_dir.write(state)
        assert data_dir.running() == state
        with pytest.raises(TaximeterError, match="in use by another"), data_dir.lock():
            pass
    assert data_dir.running() is None


def test_one_that_starts_waits_for_those_who_look_and_is_not_refused_for_them(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)

    def start() -> RunState | None:
        with data_dir.lock():
            data_dir.write(RunState(1, data_dir.config_path))
            return data_dir.running()

    assert start() is not None
    with (tmp_path / "run" / "lock").open("rb") as looking, ThreadPoolExecutor(1) as pool:
        # As `running` does, here for as long as a process may be stopped in it.
        fcntl.flock(looking, fcntl.LOCK_SH)
        started = pool.submit(start)
        with pytest.raises(TimeoutError):
            started.result(0.3)
        fcntl.flock(looking, fcntl.LOCK_UN)
        assert started.result(60) is not None


def test_one_that_was_killed_is_not_found(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from taximeter.embedded.state import *\n"
        "d = DataDir(Path(sys.argv[1]))\n"
        "with d.lock(): d.write(RunState(os.getpid(), d.config_path)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False, timeout=120)
    assert ended.returncode < 0
    assert (tmp_path / "run" / "state.json").exists()
    assert DataDir(tmp_path).running() is None
    with DataDir(tmp_path).lock():
        assert DataDir(tmp_path).running() is None


def test_secrets_are_made_once_for_the_owner_alone(tmp_path: Path) -> None:
    first = ensure_secrets(tmp_path / "secrets")
    values = {name: path.read_bytes() for name, path in first.items()}
    assert set(values) == set(SECRET_NAMES)
    assert len(set(values.values())) == len(SECRET_NAMES)
    assert all(len(value) == 64 for value in values.values())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in first.values())
    assert {name: path.read_bytes() for name, path in ensure_secrets(tmp_path / "secrets").items()} == values


def test_a_secret_that_others_can_read_or_that_is_empty_is_refused(tmp_path: Path) -> None:
    path = ensure_secrets(tmp_path)["seal_key"]
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"seal_key has mode 0644.*chmod 600"):
        ensure_secrets(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="seal_key is empty"):
        ensure_secrets(tmp_path)
