"""The compose file as an operator uses it: build, up, add a tenant, speak, watch, kill Triton, recover, down."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from compositor.manifest import tenant_names
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_tenant
from lipsync.sentences import NUMBERS
from lipsync.sources import open_source

from ..conftest import silent
from ..integration.waiting import until
from ..monitoring import Prometheus, alerts
from .deployment import COMPOSITOR_IMAGE, ROOT, TOOLS_IMAGE, Deployment, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

FRAMES = 101
"""Of the spoken sentence, 4 s at 25 frames a second, its end included."""
CLIENT = """
import sys, tritonclient.grpc as wire
client = wire.InferenceServerClient("triton:8001")
headers = {"triton-grpc-protocol-lipsync-key": sys.argv[1]} if len(sys.argv) > 1 else None
for ask in (
    lambda: client.load_model("avatar", headers=headers),
    lambda: client.unload_model("avatar", headers=headers),
    lambda: client.get_model_repository_index(headers=headers),
    lambda: client.register_system_shared_memory("x", "/x", 1, headers=headers),
):
    try:
        ask()
        print("done")
    except wire.InferenceServerException as error:
        print(error.message())
"""


def frames_of(body: bytes) -> int:
    """Frames in a multipart answer."""
    return body.count(b"Content-Type: image/jpeg")


def speak(deployment: Deployment, tenant: str = "avatar") -> int:
    """Frames of a WAV that is posted; 0 where the answer is an error."""
    status, body = deployment.http(f"/v1/tenants/{tenant}/speak?format=mjpeg", NUMBERS.read_bytes())
    return frames_of(body) if status == 200 else 0


def ready(deployment: Deployment) -> bool:
    return deployment.http("/readyz")[0] == 200


@pytest.fixture(scope="module")
def repository(deployment: Deployment) -> Path:
    return Path(deployment.environment["MODEL_REPOSITORY"])


@pytest.fixture(scope="module")
def inhabited(deployment: Deployment, repository: Path, sources: Path) -> Deployment:
    """With an encoder and the tenant `avatar`, both added in the container while the service runs."""
    until(lambda: ready(deployment), 120)
    for arguments in (["encoder", "add", "src/encoder.onnx"], ["tenant", "add", "avatar", "src/avatar"]):
        deployment.compose("run", "--rm", "-T", "-v", f"{sources}:/work/src:ro", "lipsync", *arguments)
    assert tenant_names(repository) == ["avatar"]
    return deployment


def test_both_become_healthy(deployment: Deployment) -> None:
    until(lambda: [deployment.health(name) for name in ("triton", "compositor")] == ["healthy"] * 2, 120)


def test_a_tenant_that_is_added_in_the_container_is_live(inhabited: Deployment) -> None:
    assert speak(inhabited) == FRAMES


def test_a_tenant_that_is_added_on_the_host_is_live(inhabited: Deployment, repository: Path, sources: Path) -> None:
    add_tenant(repository, "host", open_source(sources / "avatar"), Choices(), Serving(), silent)
    assert speak(inhabited, "host") == FRAMES
    assert json.loads(inhabited.http("/v1/tenants")[1]) == {"tenants": [{"id": "avatar"}, {"id": "host"}]}


def test_the_command_on_the_host_speaks(inhabited: Deployment, tmp_path: Path) -> None:
    server = inhabited.address("compositor", 50052)
    run(sys.executable, "-m", "lipsync", "speak", "avatar", NUMBERS, "-o", tmp_path / "frames", "--server", server)
    assert len(list((tmp_path / "frames").glob("frame_*.jpg"))) == FRAMES


def test_mouths_come_through_shared_memory(inhabited: Deployment) -> None:
    assert speak(inhabited)
    assert "shared memory mapped" in inhabited.logs("compositor")
    assert "no shared memory" not in inhabited.logs("compositor")


def test_the_compositor_can_do_little(deployment: Deployment) -> None:
    assert deployment.execute("compositor", "id", "-u").stdout.strip() == deployment.environment["LIPSYNC_UID"]
    for folder in ("/", "/app", "/models", "/opt/lipsync", "/run/lipsync", "/etc"):
        refused = deployment.execute("compositor", "touch", f"{folder}/written")
        assert refused.returncode == 1
        assert re.search("Read-only file system|Permission denied", refused.stderr)
    status = deployment.execute("compositor", "cat", "/proc/1/status").stdout
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert deployment.inspect("compositor")["HostConfig"]["ReadonlyRootfs"]


def test_no_tool_that_builds_is_in_the_image(deployment: Deployment) -> None:
    find = "for name in cc gcc g++ clang make cmake git ld; do command -v $name; done; python -c 'import pip'"
    done = subprocess.run(
        ["docker", "run", "--rm", COMPOSITOR_IMAGE, "bash", "-c", find], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert "No module named 'pip'" in done.stderr


def test_triton_is_reached_from_inside_only(inhabited: Deployment) -> None:
    assert not any(inhabited.inspect("triton")["NetworkSettings"]["Ports"].values())
    outside = f"{inhabited.project}_outside"
    ask = "import socket; socket.create_connection(('triton', 8001), 5)"
    done = subprocess.run(
        ["docker", "run", "--rm", "--network", outside, COMPOSITOR_IMAGE, "python", "-c", ask],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "gaierror" in done.stderr


@pytest.mark.parametrize("key", [[], ["wrong"]])
def test_loads_and_shared_memory_want_the_key(inhabited: Deployment, key: list[str]) -> None:
    inside = f"{inhabited.project}_inside"
    said = run("docker", "run", "--rm", "--network", inside, COMPOSITOR_IMAGE, "python", "-c", CLIENT, *key)
    lines = said.splitlines()
    assert len(lines) == 4
    assert all("This protocol is restricted" in line for line in lines)
    assert speak(inhabited) == FRAMES


def test_the_doctor_in_the_container_finds_nothing_wrong(inhabited: Deployment) -> None:
    findings = json.loads(inhabited.compose("run", "--rm", "-T", "lipsync", "doctor", "--json"))
    assert [finding for finding in findings if finding["state"] == "wrong"] == []
    triton = [finding["found"] for finding in findings if finding["check"] == "Triton triton:8001"]
    assert len(triton) == 6
    assert triton[-1] == "it maps shared memory"


def test_prometheus_scrapes_both(inhabited: Deployment) -> None:
    prometheus = Prometheus(f"http://{inhabited.address('prometheus', 9090)}")
    until(lambda: prometheus.scraped() == {"compositor", "triton"}, 60)
    assert speak(inhabited)
    until(lambda: prometheus.values('nv_inference_count{model="avatar"}') > [0], 60)
    assert prometheus.values("lipsync_sessions") == [0]
    assert not prometheus.values("nv_inference_request_failure")
    until(lambda: len(prometheus.ask("rules")["groups"]) == 1)
    (group,) = prometheus.ask("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [alert["alert"] for alert in alerts()]


def test_triton_killed_is_up_again_and_costs_no_request(inhabited: Deployment) -> None:
    assert speak(inhabited)
    before = inhabited.inspect("triton")
    kill = (
        "for exe in /proc/[0-9]*/exe; do case $(readlink $exe) in */tritonserver) kill -9 ${exe//[!0-9]/};; esac; done"
    )
    assert inhabited.execute("triton", "bash", "-c", kill).returncode in (0, 137)
    # At once: it waits for Triton, which comes back on another address perhaps.
    assert speak(inhabited) == FRAMES
    after = inhabited.inspect("triton")
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert after["State"]["StartedAt"] > before["State"]["StartedAt"]
    until(lambda: ready(inhabited), 60)
    assert inhabited.logs("compositor").count("shared memory mapped") == 2


def test_what_a_killed_triton_left_in_memory_is_gone(inhabited: Deployment) -> None:
    listing = inhabited.execute("triton", "ls", "/dev/shm").stdout.split()
    running = inhabited.execute("triton", "bash", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'").stdout
    assert [name for name in listing if name not in running] == []


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


def test_it_drains_and_goes(inhabited: Deployment) -> None:
    containers = {name: inhabited.container(name) for name in ("compositor", "triton", "prometheus")}
    inhabited.compose("--profile", "monitoring", "stop")
    ended = {name: json.loads(run("docker", "inspect", each))[0]["State"] for name, each in containers.items()}
    assert ended["compositor"]["ExitCode"] == 0
    assert ended["triton"]["ExitCode"] == 0
    assert inhabited.logs("compositor").rstrip().endswith("stopped")
    inhabited.compose("--profile", "monitoring", "--profile", "tools", "down", "-v", "--remove-orphans")
    label = f"label=com.docker.compose.project={inhabited.project}"
    for kind in (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"]):
        assert run("docker", *kind, "--filter", label) == ""
