"""The images that the compose file builds: what is in them, and what is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .deployment import COMPOSITOR_IMAGE, ROOT, TOOLS_IMAGE, Deployment, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]


def test_no_tool_that_builds_is_in_the_image(deployment: Deployment) -> None:
    find = "for name in cc gcc g++ clang make cmake git ld; do command -v $name; done; python -c 'import pip'"
    done = subprocess.run(
        ["docker", "run", "--rm", COMPOSITOR_IMAGE, "bash", "-c", find], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert "No module named 'pip'" in done.stderr


def test_no_secret_is_in_a_layer(command: list[str], tmp_path: Path) -> None:
    """Built anew from a folder in which secrets lie about; the rest is the same, so the layers are, too."""
    context = tmp_path / "context"
    for name in ("compositor", "tools/lipsync", "deploy"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "requirements.lock", ".dockerignore"):
        shutil.copy2(ROOT / name, context)
    secret = os.urandom(16).hex().encode()
    places = [".env", ".git/config", "deploy/.env", "deploy/triton.key", "model_repository/x/1/model.onnx"]
    places += [
        "compositor/.env",
        "compositor/web/.netrc",
        "tools/lipsync/.ssh/id_ed25519",
        "out/x",
        ".venv/x",
        "key.pem",
    ]
    for place in places:
        path = context / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(secret)
    for target in ("compositor", "tools"):
        image = f"lipsync-secrets:{target}"
        dockerfile = context / "deploy" / "compositor" / "Dockerfile"
        run("docker", "build", "-q", "-f", dockerfile, "--target", target, "-t", image, context, timeout_s=900)
        try:
            run("docker", "save", image, "-o", tmp_path / "image.tar")
        finally:
            run("docker", "image", "rm", image)
        names = set()
        for name, data in files_of(tmp_path / "image.tar"):
            assert secret not in data, name
            names.add(name)
        assert "app/compositor/settings.py" in names


def files_of(image: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in every layer, and of the image's description."""
    with tarfile.open(image) as outer:
        for member in outer:
            content = outer.extractfile(member)
            if content is None:
                continue
            try:
                with tarfile.open(fileobj=content) as layer:
                    for file in layer:
                        data = layer.extractfile(file) if file.isfile() else None
                        if data is not None:
                            yield file.name, data.read()
            except tarfile.ReadError:
                content.seek(0)
                yield member.name, content.read()


def test_the_images_sizes_are_as_stated(deployment: Deployment) -> None:
    """MB on top of the base image, as docs/operations.md has them."""
    page = (ROOT / "docs" / "operations.md").read_text()
    base = size_of(deployment.environment["PYTHON_IMAGE"])
    for name, image in (("compositor", COMPOSITOR_IMAGE), ("tools", TOOLS_IMAGE)):
        stated = re.search(rf"`{name}`[^|]*\| (\d+) MB", page)
        assert stated is not None
        assert size_of(image) - base == pytest.approx(int(stated[1]), rel=0.15)


def size_of(image: str) -> float:
    """MB."""
    return int(run("docker", "image", "inspect", "-f", "{{.Size}}", image)) / 1e6
