"""The `lipsync` command as an operator types it, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

from compositor.features import frame_count
from compositor.pcm import read_wav
from lipsync.sentences import NUMBERS

from ..conftest import Stack
from .processes import children
from .waiting import until

pytestmark = pytest.mark.triton

SPEECH = NUMBERS
SAMPLES, RATE = read_wav(SPEECH.read_bytes())
FRAMES = frame_count(len(SAMPLES), 25)


def lipsync(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lipsync", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_speak_writes_a_video_with_its_sound(stack: Stack, tmp_path: Path) -> None:
    video = tmp_path / "new" / "out.mp4"
    done = lipsync("speak", "avatar", SPEECH, "-o", video, "--server", stack.service.address)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert re.search(rf"{FRAMES} frames of {len(SAMPLES) / RATE:.2f} s of speech in .* real-time factor", words)
    for stage in ("audio features", "inference", "blend", "encode"):
        assert stage in words
    with av.open(video) as container:
        assert container.streams.video[0].frames == FRAMES
        assert float(container.streams.video[0].average_rate or 0) == 25
        assert (
            abs(float(container.streams.audio[0].duration or 0) * float(container.streams.audio[0].time_base or 0) - 4)
            < 0.1
        )


def test_list_and_top_show_what_is_loaded(stack: Stack, tmp_path: Path) -> None:
    done = lipsync("speak", "plain", SPEECH, "-o", tmp_path / "frames", "--server", stack.service.address)
    assert done.returncode == 0, done.stderr

    def listed() -> bool:
        done = lipsync("tenant", "list", "-r", stack.repository, "--triton", stack.triton.grpc)
        rows = {row[0]: row[1:3] for row in (re.split(r"  +", line) for line in done.stdout.splitlines())}
        assert rows.keys() == {"tenant", "avatar", "plain", "sent"}, done.stderr
        return (done.returncode, done.stderr, rows["plain"]) == (0, "", ["ready", "cpu"])

    def seen() -> bool:
        done = lipsync("top", "--once", "--server", stack.service.http_address)
        is_up = done.stdout.startswith(f"Triton {stack.triton.grpc}: up, 0 under way\n")
        is_ready = re.search(rf"^plain +{stack.triton.grpc} +ready +default ", done.stdout, re.MULTILINE)
        return (done.returncode, done.stderr) == (0, "") and is_up and is_ready is not None

    # Each gives up after a few seconds where a busy machine is slow to answer.
    until(listed)
    until(seen)


def test_speak_writes_a_folder_of_frames(stack: Stack, tmp_path: Path) -> None:
    done = lipsync("speak", "plain", SPEECH, "-o", tmp_path / "frames", "--server", stack.service.address)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "frames").glob("frame_*.jpg"))) == FRAMES
    assert (tmp_path / "frames" / "speech.wav").read_bytes() == SPEECH.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speak", "nobody", SPEECH], "NOT_FOUND: no tenant named 'nobody' is installed"),
        (["speak", "avatar", Path(__file__)], "not a WAV"),
        (["speak", "avatar", "missing.wav"], "missing.wav: cannot be read"),
    ],
)
def test_speak_refuses_in_one_line(stack: Stack, tmp_path: Path, arguments: list[str | Path], words: str) -> None:
    done = lipsync(*arguments, "-o", tmp_path / "out.mp4", "--server", stack.service.address)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.mp4").exists()


def test_speak_without_a_service_says_how_to_start_one(tmp_path: Path) -> None:
    done = lipsync("speak", "avatar", SPEECH, "-o", tmp_path / "out.mp4", "--server", "127.0.0.1:1")
    assert done.returncode == 1
    assert "no compositor answers at 127.0.0.1:1; start one with `lipsync up`" in done.stderr


@contextlib.contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lipsync` with a compositor in it, once that listens, and its address; killed at the end if it still runs."""
    command = [sys.executable, "-m", "lipsync", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            port = next(match[1] for line in lines if (match := re.search(r"listens on port (\d+)", line)))
            yield process, f"127.0.0.1:{port}"
        finally:
            process.kill()


def ends_cleanly(process: subprocess.Popen[str], number: signal.Signals) -> None:
    process.send_signal(number)
    assert process.stdout is not None
    rest = process.stdout.read()
    assert process.wait(60) == 0
    assert "stopped" in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_stops_cleanly(
    repository: Path, triton_home: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with serving("up", "-r", repository, "--port", "0", "--http-port", "0") as (process, address):
        done = lipsync("speak", "avatar", SPEECH, "-o", tmp_path / "f", "--server", address)
        assert done.returncode == 0, done.stderr
        ends_cleanly(process, number)


def test_serve_uses_a_triton_that_runs(stack: Stack, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(f"model_repository: {stack.repository}\nserver:\n  port: 0\nhttp:\n  port: 0\n")
    with serving("serve", "--triton", stack.triton.grpc, "-c", config) as (process, address):
        done = lipsync("speak", "plain", SPEECH, "-o", tmp_path / "f", "--server", address)
        assert done.returncode == 0, done.stderr
        ends_cleanly(process, signal.SIGTERM)


def test_a_wrong_setting_stops_the_start(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("server:\n  prot: 1\n  threads: many\n")
    done = lipsync("serve", "-c", config)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert any("server.prot: no such setting; did you mean port?" in line for line in lines)
    assert any("server.threads" in line for line in lines)


def test_a_port_in_use_stops_the_start(stack: Stack) -> None:
    serve = ("serve", "-r", stack.repository, "--triton", stack.triton.grpc)
    for ports in [(stack.service.port, 0), (0, stack.service.http_port)]:
        done = lipsync(*serve, "--port", str(ports[0]), "--http-port", str(ports[1]))
        assert done.returncode == 1
        assert "cannot be bound" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    done = lipsync("serve", "-r", tmp_path, "--triton", "foo")
    assert done.returncode == 1
    assert "--triton: triton.endpoints" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_ends_when_its_triton_is_gone_for_good(repository: Path, triton_home: Path) -> None:
    command = [sys.executable, "-m", "lipsync", "up", "-r", str(repository), "--port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("listens on port" in line for line in iter(process.stdout.readline, ""))
            (keeper,) = children(process.pid)
            os.kill(keeper, signal.SIGKILL)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 1
            assert [line for line in said.splitlines() if line.startswith("error: ")] == [
                "error: Triton ended and could not be started again; its log says why"
            ]
            assert "Traceback" not in said
        finally:
            process.kill()


def test_up_refuses_a_repository_that_is_not_there(tmp_path: Path) -> None:
    done = lipsync("up", "-r", tmp_path / "typo", "--port", "0", "--http-port", "0")
    assert done.returncode == 1
    assert f"error: model_repository: {tmp_path / 'typo'} is no directory; create it" in done.stderr
    assert not (tmp_path / "typo").exists()


def test_up_makes_the_default_repository_and_says_that_it_is_empty(triton_home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lipsync", "up", "--port", "0", "--http-port", "0"]
    environment = {**os.environ, "LIPSYNC_TRITON_HOME": str(triton_home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "no tenants yet; add one with `lipsync tenant add`\n"
            assert any("listens on port" in line for line in iter(process.stdout.readline, ""))
            assert (tmp_path / "model_repository").is_dir()
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_triton_runs_until_it_is_ended(repository: Path, triton_home: Path) -> None:
    command = [sys.executable, "-m", "lipsync", "triton", "-r", str(repository)]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            addresses = re.fullmatch(r"Triton is ready: gRPC (\S+), HTTP (\S+), metrics (\S+)\n", line)
            assert addresses is not None
            with urllib.request.urlopen(f"http://{addresses[2]}/v2/health/ready", timeout=60) as answer:
                assert answer.status == 200
            (keeper,) = children(process.pid)
            process.terminate()
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0
            assert "Traceback" not in said
            assert not Path(f"/proc/{keeper}").exists()
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(f"http://{addresses[2]}/v2/health/ready", timeout=60)
        finally:
            process.kill()


def test_triton_says_what_to_do_about_a_missing_repository(tmp_path: Path) -> None:
    done = lipsync("triton", "-r", tmp_path / "typo", "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    assert done.returncode == 1
    assert "is not a directory: create it, or name another (--repository)" in done.stderr
    assert "Traceback" not in done.stderr
