"""NVIDIA Triton Inference Server as a plain process, from the wheel `nvidia-pytriton`.

Promise: `TritonServer(folder, repository, environment)` is a real Triton on loopback that serves the Python models of a model
repository. `triton_environment` installs server and libraries once into the user's cache, from the hash-locked
`requirements/triton.txt`; they are never mixed with our own environment, because the server's Python back end embeds the
system's Python and wants an older numpy. Nothing outlives the process that started it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from taximeter.embedded.process import Child
from tests.services.certificates import Authority
from tests.services.ports import free_port

__all__ = ["TritonServer", "TritonUnavailableError", "triton_environment"]

_HOST = "127.0.0.1"
_REQUIREMENTS = Path(__file__).parents[2] / "requirements"
_LOCKS = (_REQUIREMENTS / "triton.txt", _REQUIREMENTS / "model.txt")
_INSTALL_TIMEOUT_S = 900.0
_START_TIMEOUT_S = 240.0
_STOP_GRACE_S = 15.0


class TritonUnavailableError(RuntimeError):
    """This machine cannot run Triton; the text says what to install."""


def triton_environment() -> Path:
    """The folder of Triton and all that its models import, installed on the first call."""
    python = os.environ.get("TAXIMETER_TRITON_PYTHON", "/usr/bin/python3")
    version = _python_version(python)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _LOCKS)).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taximeter"
    folder = cache / f"triton-{version}-{digest}"
    if not folder.is_dir():
        _install(folder, python, version)
    return folder


def _python_version(python: str) -> str:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise TritonUnavailableError("the wheel nvidia-pytriton is for Linux on x86-64 alone")
    if shutil.which(python) is None:
        raise TritonUnavailableError(f"there is no {python}; set TAXIMETER_TRITON_PYTHON to the system's Python")
    said = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", said], capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def _install(folder: Path, python: str, version: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Installed beside and renamed, so that a folder under the final name is whole, whoever else installs.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / "environment"
        uv = [sys.executable, "-m", "uv"]
        _run([*uv, "venv", "--quiet", "--python", python, str(target)], "Triton's environment could not be made")
        install = [*uv, "pip", "install", "--quiet", "--python", str(target / "bin" / "python"), "--require-hashes"]
        for lock, options in zip(_LOCKS, ([], ["--no-deps"]), strict=True):
            _run([*install, *options, "--requirement", str(lock)], "Triton's libraries could not be installed")
        server = _server_folder(target)
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise TritonUnavailableError(f"Triton's Python back end has no stub for Python {version} ({python})")
        linked = _run(["ldd", str(stub)], "the Python back end's stub could not be looked at")
        missing = sorted({line.split()[0] for line in linked.splitlines() if "not found" in line})
        if missing:
            raise TritonUnavailableError(f"there is no {', '.join(missing)}; on Debian: apt-get install libpython{version}")
        shutil.copy(stub, server / "backends" / "python")
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _server_folder(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages/pytriton/tritonserver")
    return folder


def _run(command: list[str], trouble: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TritonUnavailableError(f"{trouble} in {_INSTALL_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise TritonUnavailableError(f"{trouble}:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


class TritonServer:
    """One server. Use `start`, then `address`; `production_log` has what its models say that they produced. With an authority
    it shows a certificate of it, and answers who shows one too.
    """

    def __init__(self, folder: Path, repository: Path, environment: Path, authority: Authority | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.production_log = folder / "production.jsonl"
        port = free_port()
        self.address = f"{_HOST}:{port}"
        server = _server_folder(environment)
        options = {
            "model-repository": repository,
            "backend-directory": server / "backends",
            "backend-config": f"python,shm-region-prefix-name=taximeter-{port}-",
            "disable-auto-complete-config": "",
            "model-control-mode": "explicit",
            "load-model": "*",
            "allow-http": "false",
            "allow-metrics": "false",
            "grpc-address": _HOST,
            "grpc-port": port,
            "exit-timeout-secs": 5,
        }
        self._credentials = None
        if authority is not None:
            own = authority.issue("triton")
            self._credentials = authority.credentials(own)
            options |= {
                "grpc-use-ssl-mutual": "true",
                "grpc-server-cert": own.certificate,
                "grpc-server-key": own.key,
                "grpc-root-cert": authority.certificate,
            }
        arguments = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in options.items()]
        self.process = Child(
            "Triton",
            [str(server / "bin" / "tritonserver"), *arguments],
            log_path=folder / "server.log",
            cwd=folder,
            environment={
                # The Python back end takes the environment whose `python3` it finds first.
                "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
                "HOME": str(folder),
                "PRODUCTION_LOG": str(self.production_log),
            },
        )

    def start(self) -> None:
        """Start it, and return when all models are loaded."""
        self.process.start()
        self.process.wait_until(self._is_ready, _START_TIMEOUT_S)

    def _is_ready(self) -> bool:
        credentials = self._credentials
        opened = grpc.secure_channel(self.address, credentials) if credentials else grpc.insecure_channel(self.address)
        with opened as channel:
            try:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready)
            except grpc.RpcError:
                return False

    def stop(self) -> None:
        self.process.stop(_STOP_GRACE_S)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"Triton is in {triton_environment()}\n")
    except TritonUnavailableError as unavailable:
        sys.exit(str(unavailable))
