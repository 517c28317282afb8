"""The compose file, brought up under a name of its own: commands, addresses, containers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lipsync.sentences import NUMBERS

ROOT = Path(__file__).parents[2]
PYTHON_IMAGE = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")
TRITON_IMAGE = os.environ.get("TRITON_IMAGE", "nvcr.io/nvidia/tritonserver:24.10-py3")
COMPOSITOR_IMAGE, TOOLS_IMAGE = "triton-lipsync:test", "triton-lipsync-tools:test"
FRAMES = 101
"""Of NUMBERS, 4 s at 25 frames a second, its end included."""


def run(*command: str | Path, environment: Mapping[str, str] | None = None, timeout_s: float = 600) -> str:
    """What a command prints. Fails with what it says where its status is not 0."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def compose_command() -> list[str] | None:
    """Compose 2 as Docker's plugin, or whatever calls itself docker-compose; None where there is neither."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def has_image(name: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0


@dataclass(frozen=True)
class Deployment:
    """One project of Compose. files: what is laid over compose.yaml, in order."""

    project: str
    command: list[str]
    files: list[Path]
    environment: dict[str, str] = field(default_factory=dict)

    def compose(self, *arguments: str, timeout_s: float = 600) -> str:
        files = [part for file in self.files for part in ("-f", str(file))]
        return run(
            *self.command, "-p", self.project, *files, *arguments, environment=self.environment, timeout_s=timeout_s
        )

    def container(self, service: str) -> str:
        """The id of a service's container, whether it runs or not."""
        return self.compose("ps", "-a", "-q", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("docker", "inspect", self.container(service)))[0]
        return found

    def health(self, service: str) -> str:
        state = self.inspect(service)["State"]
        return str(state["Health"]["Status"]) if state["Running"] else "not running"

    def logs(self, service: str) -> str:
        return self.compose("logs", "--no-color", service)

    def said(self, service: str) -> str:
        """What a container has written so far, since it was made, and nothing else."""
        done = subprocess.run(["docker", "logs", self.container(service)], capture_output=True, text=True, check=True)
        return done.stderr

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command in a container that runs, whatever comes of it."""
        whole = ["docker", "exec", self.container(service), *command]
        return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=False)

    def address(self, service: str, port: int) -> str:
        """Where the host finds a published port, host:port."""
        return run("docker", "port", self.container(service), str(port)).splitlines()[0]

    def http(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of the compositor's answer; 0 where there is none."""
        url = f"http://{self.address('compositor', 8086)}{path}"
        try:
            with urllib.request.urlopen(url, body, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def ready(self) -> bool:
        return self.http("/readyz")[0] == 200

    def speak(self, tenant: str = "avatar") -> int:
        """Frames of a WAV that is posted; 0 where the answer is an error."""
        status, body = self.http(f"/v1/tenants/{tenant}/speak?format=mjpeg", NUMBERS.read_bytes())
        return body.count(b"Content-Type: image/jpeg") if status == 200 else 0
