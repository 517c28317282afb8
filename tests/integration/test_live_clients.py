"""The clients that docs/websocket.md shows, run as they are there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from lipsync.sentences import HELLO
from tests.conftest import Stack
from tests.integration.waiting import until

CLIENTS = Path(__file__).parents[2] / "docs" / "clients"
SPEECH = HELLO


def node() -> list[str]:
    """The command for Node, with a WebSocket in it."""
    path = shutil.which("node")
    if path is None:
        pytest.skip("node is not installed")
    version = int(
        subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout[1:].split(".")[0]
    )
    if version < 20:
        pytest.skip(f"node {version} has no WebSocket: 20 is needed")
    return [path] if version >= 22 else [path, "--no-warnings", "--experimental-websocket"]


@pytest.fixture(params=["live.py", "live.mjs"])
def client(request: pytest.FixtureRequest) -> list[str]:
    """The command of each client."""
    runner = [sys.executable] if request.param.endswith(".py") else node()
    return [*runner, str(CLIENTS / request.param)]


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_client_speaks_and_sees_it(stack: Stack, client: list[str]) -> None:
    until(lambda: spoken(stack, client), 240)  # at once, unless the machine stands still for the whole sentence


def spoken(stack: Stack, client: list[str]) -> bool:
    """Whether a mouth moves in what a client shows of the sentence."""
    done = run(client, f"ws://{stack.service.http_address}/ws/avatar", SPEECH)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert [event["type"] for event in events] == ["started", "playback_started", "playback_finished"]
    assert events[2]["position"] == (SPEECH.stat().st_size - 44) // 2
    frames = [re.fullmatch(r"frame of background (\d+) at (\d+), speaking=(\d), dropped=\d+", line) for line in lines]
    shown = [(int(match[2]), match[3] == "1") for match in frames if match]
    assert shown == sorted(shown)
    assert len(shown) + len(events) == len(lines)
    return any(speaking for _, speaking in shown)


def test_a_client_is_told_what_is_wrong(stack: Stack, client: list[str]) -> None:
    done = run(client, f"ws://{stack.service.http_address}/ws/nobody", SPEECH)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["reason"] == "TENANT_NOT_FOUND"
    assert "4404" in done.stderr


def test_frames_can_be_kept(stack: Stack, tmp_path: Path) -> None:
    done = run(
        [sys.executable, str(CLIENTS / "live.py")], f"ws://{stack.service.http_address}/ws/plain", SPEECH, tmp_path
    )
    assert done.returncode == 0, done.stderr
    frames = sorted(tmp_path.iterdir())
    assert len(frames) == done.stdout.count("frame of background")
    picture = cv2.imread(str(frames[0]))
    assert picture is not None
    assert picture.shape == (240, 320, 3)


@pytest.mark.parametrize("name", ["live.py", "live.mjs"])
def test_the_page_shows_them(name: str) -> None:
    page = (CLIENTS.parent / "websocket.md").read_text(encoding="utf-8")
    assert (CLIENTS / name).read_text(encoding="utf-8") in page
