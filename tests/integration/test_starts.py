"""A start that cannot go well says why and ends; a disk that is full later is told by the health, and passes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from compositor.scratch import PREFIX

from ..conftest import Stack
from ..lipsync.conftest import can_mount
from .processes import (
    FRAMES,
    NOT_SERVING,
    SERVING,
    WAV,
    Service,
    client,
    code_of,
    descendants,
    generate,
    ready,
    serving,
    watch,
    write_settings,
)
from .waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]

FAULTS = [
    ("server: {prot: 1}", "server.prot: no such setting; did you mean port?"),
    ("server: {threads: many}", "server.threads: "),
    ("triton: {gpus: [-1]}", "triton.gpus.0: "),
    ("triton: {endpoints: nowhere}", "triton.endpoints.0: "),
    ("triton: {key_file: MISSING}", "triton.key_file: MISSING cannot be read: No such file or directory"),
    ("triton: {key_file: EMPTY}", "triton.key_file: EMPTY is empty"),
    ("server: {port: TAKEN}", "server.port: 127.0.0.1:TAKEN cannot be bound; is another service on it? choose another"),
    ("http: {port: TAKEN}", "http.port: 127.0.0.1:TAKEN cannot be bound (Address already in use)"),
    ("server: {port: TAKEN, workers: 2}", "server.port: 127.0.0.1:TAKEN cannot be bound (Address already in use)"),
    ("server: {host: no.such.host.invalid}", "server.port: no.such.host.invalid:0 cannot be bound"),
    ("model_repository: MISSING", "model_repository: MISSING is no directory; create it, or name another"),
    ("model_repository: MISSING\nserver: {workers: 2}", "model_repository: MISSING is no directory; create it"),
    ("triton: {key_file: EMPTY}\nserver: {workers: 2}", "triton.key_file: EMPTY is empty"),
    ("server: [", "not usable YAML"),
    ("residency: {min_resident_s: -1}", "residency.min_resident_s: "),
]


@pytest.mark.parametrize(("text", "words"), FAULTS, ids=[text.splitlines()[-1] for text, _ in FAULTS])
def test_a_wrong_setting_stops_the_start(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty.key").touch()
    (tmp_path / "models").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        stands_for = {"TAKEN": taken.getsockname()[1], "MISSING": tmp_path / "none", "EMPTY": tmp_path / "empty.key"}
        for word, value in stands_for.items():
            text, words = text.replace(word, str(value)), words.replace(word, str(value))
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        environment = {"MODEL_REPOSITORY": tmp_path / "models", "SERVER__PORT": 0, "HTTP__PORT": 0}
        done = subprocess.run(
            [sys.executable, "-m", "compositor", path],
            env={**os.environ, **{f"LIPSYNC_{k}": str(v) for k, v in environment.items() if words_of(k) not in text}},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert words in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def words_of(variable: str) -> str:
    """Of a setting in the environment, what a file says that sets it."""
    return variable.lower().replace("__", ": {")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_passes(stack: Stack, tmp_path: Path, workers: int) -> None:
    """A real file system of its own, 32 MiB, filled to its last byte and emptied."""
    if not can_mount():
        pytest.skip("a file system cannot be mounted here, not even in a namespace of one's own")
    folder = tmp_path / "tmp"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=32m none {folder} && exec"
    wrapper = f"""exec {can_mount()} sh -c '{mount} "$@"' sh"""
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc, server={"workers": workers})
    with serving(settings, wrapper=wrapper, TMPDIR=str(folder)) as service, client(service) as (channel, stub):
        states = watch(channel)
        ready(service)
        before = descendants(service.process.pid)
        inside = Path(f"/proc/{service.process.pid}/root{folder}")
        fill(inside / "filling")
        assert next(states).status == NOT_SERVING
        reasons = readiness(service, workers)
        until(lambda: readiness(service, workers) == {(503, "DISK_FULL")})
        assert reasons <= {(503, "DISK_FULL"), (200, "")}
        message = httpx.get(f"http://{service.http_address}/readyz", timeout=60).json()["error"]["message"]
        assert message.startswith(f"{folder}: ")
        assert "free some space there, or set TMPDIR to a folder with room" in message
        assert f"not ready: {folder}: " in service.said
        # Whoever comes all the same is served where nothing has to be written.
        assert sum(answer.WhichOneof("event") == "frame" for answer in generate(stub)) == FRAMES
        assert code_of(generate(stub, tenant="nobody")) == "NOT_FOUND"
        film = httpx.post(f"http://{service.http_address}/v1/tenants/avatar/speak?format=mp4", content=WAV, timeout=60)
        assert (film.status_code, film.json()["error"]["reason"]) == (503, "DISK_FULL")
        assert httpx.get(f"http://{service.http_address}/metrics", timeout=60).status_code == 200
        (inside / "filling").unlink()
        assert next(states).status == SERVING
        until(lambda: readiness(service, workers) == {(200, "")})
        assert descendants(service.process.pid) == before, "no worker died of it"
        film = httpx.post(f"http://{service.http_address}/v1/tenants/avatar/speak?format=mp4", content=WAV, timeout=60)
        assert film.status_code == 200
        assert service.stop() == 0
        assert "Traceback" not in service.said


def test_a_disk_that_fills_while_a_video_is_written_is_told(stack: Stack, tmp_path: Path) -> None:
    """By the limit on a file's size, which the film meets half-way. There is room for what comes after."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc)
    variables = {"TMPDIR": str(folder), "LIPSYNC_TRITON__SHARED_MEMORY": "off"}
    with serving(settings, wrapper="ulimit -f 64; exec", **variables) as service:
        ready(service)
        url = f"http://{service.http_address}/v1/tenants/avatar/speak"
        film = httpx.post(url, params={"format": "mp4"}, content=WAV, timeout=60)
        assert film.status_code == 503
        assert film.headers["Retry-After"] == "1"
        assert film.json()["error"] == {
            "status": "UNAVAILABLE",
            "reason": "DISK_FULL",
            "message": f"{folder}: no room for the video (File too large); free some space there, or set TMPDIR to a "
            "folder with room",
            "field": "",
            "retry_after_s": 1.0,
        }
        assert not list(folder.glob(f"{PREFIX}*"))
        assert httpx.post(url, content=WAV, timeout=60).status_code == 200
        assert service.stop() == 0
        assert "Traceback" not in service.said


def fill(path: Path) -> None:
    """Makes a file that takes all room that the disk has."""
    size = 0
    with path.open("wb") as file:
        while room := (status := os.statvfs(path)).f_bavail * status.f_frsize:
            with contextlib.suppress(OSError):  # the service's own look, a small file, came or went meanwhile
                os.posix_fallocate(file.fileno(), size, room)
                size += room


def readiness(service: Service, workers: int) -> set[tuple[int, str]]:
    """What the workers say: so many answers that each has been asked."""
    answers = [httpx.get(f"http://{service.http_address}/readyz", timeout=60) for _ in range(20 * workers)]
    return {
        (answer.status_code, "" if answer.status_code == 200 else answer.json()["error"]["reason"])
        for answer in answers
    }


def test_a_log_that_cannot_be_written_keeps_nobody_from_serving(stack: Stack, tmp_path: Path) -> None:
    """/dev/full stands for a disk that is full where the log goes; `lipsync serve` tells its ports elsewhere."""
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc)
    command = [sys.executable, "-m", "lipsync", "serve", "--config", str(settings)]
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().partition("(gRPC) and ")[2].split()[0])
            until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=60).status_code == 200)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_many_files_may_be_open(stack: Stack, tmp_path: Path) -> None:
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc)
    for limits, low in (("ulimit -Sn 256; exec", False), ("ulimit -n 256; exec", True)):
        with serving(settings, wrapper=limits) as service:
            text = Path(f"/proc/{service.process.pid}/limits").read_text()
            soft, hard = next(line for line in text.splitlines() if line.startswith("Max open files")).split()[3:5]
            assert soft == hard
            assert ("at most 256 files may be open" in service.said) == low
            assert service.stop() == 0
