"""Images, built once, and the whole service from them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from compositor.manifest import tenant_names
from lipsync.avatar import write_source
from lipsync.avatar_model import loudness_encoder

from ..integration.waiting import until
from .deployment import (
    COMPOSITOR_IMAGE,
    PYTHON_IMAGE,
    ROOT,
    TOOLS_IMAGE,
    TRITON_IMAGE,
    Deployment,
    compose_command,
    has_image,
    run,
)

HERE = Path(__file__).parent
PROMETHEUS_IMAGE = "lipsync-prometheus:test"
OWNER = 1000
"""Who the containers run as, where root runs the tests."""


@pytest.fixture(scope="session")
def command() -> list[str]:
    """Compose, after seeing that an engine answers and has the base images."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed")
    engine = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if engine.returncode != 0:
        pytest.skip("no Docker Engine answers")
    found = compose_command()
    if found is None:
        pytest.skip("Compose is not installed")
    for image in (PYTHON_IMAGE, TRITON_IMAGE):
        if not has_image(image):
            pytest.skip(f"the engine has no image {image}: pull it first")
    return found


@pytest.fixture(scope="session")
def prometheus_image(command: list[str]) -> str:
    """Debian's Prometheus in an image that is used as the official one is."""
    run("docker", "build", "-q", "--build-arg", f"PYTHON_IMAGE={PYTHON_IMAGE}", "-t", PROMETHEUS_IMAGE, HERE)
    return PROMETHEUS_IMAGE


@pytest.fixture(scope="session")
def overlays(command: list[str]) -> list[Path]:
    """What is laid over compose.yaml: no GPU, settings, and a backend where the image of Triton has none for ONNX."""
    backend = "/opt/tritonserver/backends/onnxruntime/libtriton_onnxruntime.so"
    probe = ["docker", "run", "--rm", "--entrypoint", "test", TRITON_IMAGE, "-e", backend]
    files = [ROOT / "deploy" / "compose.yaml", ROOT / "deploy" / "compose.cpu.yaml", HERE / "settings.yaml"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        files.append(HERE / "python_backend.yaml")
    return files


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a tenant's source, readable by everybody."""
    root = tmp_path_factory.mktemp("sources")
    onnx.save(loudness_encoder(), root / "encoder.onnx")
    write_source(root / "avatar", frames=6, width=640, height=360)
    for path in (root, *root.rglob("*")):
        path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    return root


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository, empty."""
    folder = tmp_path_factory.mktemp("models")
    os.chown(folder, os.getuid() or OWNER, -1)
    # Bind mounts pass the folders above it by; inside, its owner is all that counts.
    folder.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compositor's settings: to begin with, those of the repository."""
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text((ROOT / "deploy" / "settings.yaml").read_text())
    return path


@pytest.fixture(scope="session")
def deployment(
    command: list[str], overlays: list[Path], prometheus_image: str, repository: Path, settings: Path
) -> Iterator[Deployment]:
    """The service, built and up, with an empty repository; down at the end, and nothing left."""
    environment = {
        "MODEL_REPOSITORY": str(repository),
        "PYTHON_BACKEND": str(ROOT / "deploy" / "backends" / "onnxruntime"),
        "PYTHON_IMAGE": PYTHON_IMAGE,
        "TRITON_IMAGE": TRITON_IMAGE,
        "LIPSYNC_IMAGE": COMPOSITOR_IMAGE,
        "LIPSYNC_TOOLS_IMAGE": TOOLS_IMAGE,
        "PROMETHEUS_IMAGE": prometheus_image,
        "LIPSYNC_UID": str(os.getuid() or OWNER),
        "SETTINGS": str(settings),
        **{f"{name}_PORT": "0" for name in ("LIPSYNC_GRPC", "LIPSYNC_HTTP", "PROMETHEUS", "GRAFANA")},
    }
    service = Deployment(f"lipsync-test-{secrets.token_hex(4)}", command, overlays, environment)
    try:
        service.compose("build", "compositor", "lipsync", timeout_s=1500)
        service.compose("--profile", "monitoring", "up", "-d", "triton", "compositor", "prometheus")
        yield service
    finally:
        service.compose("--profile", "monitoring", "--profile", "tools", "down", "-v", "--remove-orphans")


@pytest.fixture(scope="session")
def inhabited(deployment: Deployment, repository: Path, sources: Path) -> Deployment:
    """With an encoder and the tenant `avatar`, both added in the container while the service runs."""
    until(deployment.ready, 120)
    for arguments in (["encoder", "add", "src/encoder.onnx"], ["tenant", "add", "avatar", "src/avatar"]):
        deployment.compose("run", "--rm", "-T", "-v", f"{sources}:/work/src:ro", "lipsync", *arguments)
    assert tenant_names(repository) == ["avatar"]
    return deployment
