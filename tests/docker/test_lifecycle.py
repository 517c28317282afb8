"""What happens to the service while it runs: Triton is killed, a disk is full, settings change, it is told to stop."""

from __future__ import annotations

import json
import queue
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from compositor import jpeg
from compositor.pcm import read_wav
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from lipsync.live_client import Recording, Speech, pcm16, talk
from lipsync.sentences import NUMBERS

from ..integration.waiting import until
from .deployment import FRAMES, Deployment, run

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

SAMPLES, RATE = read_wav(NUMBERS.read_bytes())


def test_triton_killed_is_up_again_and_costs_no_request(inhabited: Deployment) -> None:
    assert inhabited.speak()
    before = inhabited.inspect("triton")
    kill = (
        "for exe in /proc/[0-9]*/exe; do case $(readlink $exe) in */tritonserver) kill -9 ${exe//[!0-9]/};; esac; done"
    )
    assert inhabited.execute("triton", "bash", "-c", kill).returncode in (0, 137)
    # At once: it waits for Triton, which comes back on another address perhaps.
    assert inhabited.speak() == FRAMES
    after = inhabited.inspect("triton")
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert after["State"]["StartedAt"] > before["State"]["StartedAt"]
    until(lambda: inhabited.ready(), 60)
    assert inhabited.logs("compositor").count("shared memory mapped") == 2


def test_what_a_killed_triton_left_in_memory_is_gone(inhabited: Deployment) -> None:
    listing = inhabited.execute("triton", "ls", "/dev/shm").stdout.split()
    running = inhabited.execute("triton", "bash", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'").stdout
    left = [name for name in listing if name not in running]
    # That of the compositor's region, which has no name any more.
    assert len(left) == 1
    assert left[0].startswith("lipsync-lock-")


def test_a_full_disk_is_told_and_passes(inhabited: Deployment) -> None:
    assert inhabited.ready()
    inhabited.execute("compositor", "dd", "if=/dev/zero", "of=/tmp/full", "bs=1M")
    try:
        until(lambda: not inhabited.ready(), 60)
        status, body = inhabited.http("/readyz")
        assert status == 503
        fault = json.loads(body)["error"]
        assert (fault["status"], fault["reason"]) == ("UNAVAILABLE", "DISK_FULL")
        assert fault["message"].startswith("/tmp: ")
        # Frames need no file.
        assert inhabited.speak() == FRAMES
    finally:
        assert inhabited.execute("compositor", "rm", "/tmp/full").returncode == 0
    until(inhabited.ready, 60)


def test_logs_are_json_where_the_settings_say_so(inhabited: Deployment, settings: Path) -> None:
    settings.write_text("logging: {format: json}\n")
    inhabited.compose("restart", "compositor")
    until(inhabited.ready, 60)
    with tempfile.TemporaryFile() as file:
        address = inhabited.address("compositor", 50052)
        account = talk(address, "avatar", Speech(SAMPLES[: RATE // 2], RATE), Recording(file), lambda pts: None)

    session = account.started.session
    until(lambda: any(line.get("session") == session and "reason" in line for line in lines_of(inhabited)))
    lines = lines_of(inhabited)
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "process", "message"}
    (end,) = [line for line in lines if line.get("session") == session and "reason" in line]
    assert (end["tenant"], end["reason"]) == ("avatar", "OK")
    assert int(str(end["dropped"])) >= account.dropped
    assert "ready to serve" in [line["message"] for line in lines]


def lines_of(deployment: Deployment) -> list[dict[str, object]]:
    """What the compositor has logged since its last start, of which every line must be JSON."""
    lines = deployment.said("compositor").splitlines()
    stops = [number for number, line in enumerate(lines) if line.endswith("stopped")]
    return [json.loads(line) for line in lines[stops[-1] + 1 :]]


def test_a_live_session_is_heard_out_when_it_is_told_to_stop(inhabited: Deployment) -> None:
    """Told by `docker compose stop`, as the speech begins to be shown."""
    container = inhabited.container("compositor")
    with ThreadPoolExecutor() as pool, grpc.insecure_channel(inhabited.address("compositor", 50052)) as channel:
        responses, code = [], None
        try:
            for response in pb_grpc.LipsyncStub(channel).Speak(speech()):  # type: ignore[no-untyped-call]
                responses.append(response)
                if response.HasField("playback_started"):
                    stopping = pool.submit(inhabited.compose, "stop", "compositor")
        except grpc.RpcError as error:
            code = error.code()
        stopping.result()

    assert code is grpc.StatusCode.UNAVAILABLE
    (finished,) = [each.playback_finished for each in responses if each.HasField("playback_finished")]
    assert not finished.interrupted
    assert finished.position == len(SAMPLES)
    frames = [each.frame for each in responses if each.HasField("frame")]
    assert frames[-1].pts >= finished.pts - RATE / 25
    assert {jpeg.decode(frame.data).shape for frame in frames} == {(360, 640, 3)}
    state = json.loads(run("docker", "inspect", container))[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert "draining, at most 10 s: 1 live session" in inhabited.said("compositor")
    assert "cut off" not in inhabited.said("compositor")
    inhabited.compose("start", "compositor")
    until(inhabited.ready, 60)
    assert inhabited.speak() == FRAMES


def speech() -> Iterator[pb.SpeakRequest]:
    """A sentence, all at once; the client stays until it is told to go."""
    yield pb.SpeakRequest(
        start=pb.SpeakRequest.Start(tenant="avatar", sample_rate=RATE, flow=pb.SpeakRequest.PLAIN, audio=False)
    )
    yield pb.SpeakRequest(audio=pb.SpeakRequest.Audio(data=pcm16(SAMPLES)))
    yield pb.SpeakRequest(segment_end=pb.SpeakRequest.SegmentEnd())
    yield from iter(queue.SimpleQueue[pb.SpeakRequest]().get, None)


def test_it_drains_and_goes(inhabited: Deployment) -> None:
    containers = {name: inhabited.container(name) for name in ("compositor", "triton", "prometheus")}
    inhabited.compose("--profile", "monitoring", "stop")
    ended = {name: json.loads(run("docker", "inspect", each))[0]["State"] for name, each in containers.items()}
    assert ended["compositor"]["ExitCode"] == 0
    assert ended["triton"]["ExitCode"] == 0
    assert lines_of(inhabited)[-1]["message"] == "stopped"
    inhabited.compose("--profile", "monitoring", "--profile", "tools", "down", "-v", "--remove-orphans")
    label = f"label=com.docker.compose.project={inhabited.project}"
    for kind in (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"]):
        assert run("docker", *kind, "--filter", label) == ""
