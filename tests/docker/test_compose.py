"""The compose file as an operator uses it: up, add a tenant, speak, watch; and what keeps what apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lipsync.preparation import Choices
from lipsync.repository import Serving, add_tenant
from lipsync.sentences import NUMBERS
from lipsync.sources import open_source

from ..conftest import silent
from ..integration.waiting import until
from ..monitoring import Prometheus, alerts
from .deployment import COMPOSITOR_IMAGE, FRAMES, Deployment, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

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


def test_both_become_healthy(deployment: Deployment) -> None:
    until(lambda: [deployment.health(name) for name in ("triton", "compositor")] == ["healthy"] * 2, 120)


def test_a_tenant_that_is_added_in_the_container_is_live(inhabited: Deployment) -> None:
    assert inhabited.speak() == FRAMES
    assert "Traceback" not in inhabited.logs("triton")


def test_a_tenant_that_is_added_on_the_host_is_live(inhabited: Deployment, repository: Path, sources: Path) -> None:
    add_tenant(repository, "host", open_source(sources / "avatar"), Choices(), Serving(), silent)
    assert inhabited.speak("host") == FRAMES
    assert json.loads(inhabited.http("/v1/tenants")[1]) == {"tenants": [{"id": "avatar"}, {"id": "host"}]}


def test_the_command_on_the_host_speaks(inhabited: Deployment, tmp_path: Path) -> None:
    server = inhabited.address("compositor", 50052)
    run(sys.executable, "-m", "lipsync", "speak", "avatar", NUMBERS, "-o", tmp_path / "frames", "--server", server)
    assert len(list((tmp_path / "frames").glob("frame_*.jpg"))) == FRAMES


def test_mouths_come_through_shared_memory(inhabited: Deployment) -> None:
    assert inhabited.speak()
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
    assert inhabited.speak() == FRAMES


def test_the_doctor_in_the_container_finds_nothing_wrong(inhabited: Deployment) -> None:
    findings = json.loads(inhabited.compose("run", "--rm", "-T", "lipsync", "doctor", "--json"))
    assert [finding for finding in findings if finding["state"] == "wrong"] == []
    triton = [finding["found"] for finding in findings if finding["check"] == "Triton triton:8001"]
    assert len(triton) == 6
    assert triton[-1] == "it maps shared memory"


def test_prometheus_scrapes_both(inhabited: Deployment) -> None:
    prometheus = Prometheus(f"http://{inhabited.address('prometheus', 9090)}")
    until(lambda: prometheus.scraped() == {"compositor", "triton"}, 60)
    assert inhabited.speak()
    until(lambda: prometheus.values('nv_inference_count{model="avatar"}') > [0], 60)
    assert prometheus.values("lipsync_sessions") == [0]
    assert not prometheus.values("nv_inference_request_failure")
    until(lambda: len(prometheus.ask("rules")["groups"]) == 1)
    (group,) = prometheus.ask("rules")["groups"]
    assert [rule["name"] for rule in group["rules"]] == [alert["alert"] for alert in alerts()]
