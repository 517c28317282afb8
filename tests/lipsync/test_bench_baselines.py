"""The baselines: what they make, what they say when they fail, and the whole part, tiny, against the real Triton."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import grpc
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from compositor import jpeg
from compositor.audio import SAMPLE_RATE
from compositor.blending import cut_crop, paste, set_prediction
from compositor.errors import InferenceFailed, LipsyncError
from compositor.features import frame_count
from compositor.geometry import Box
from compositor.jpeg import Encoding
from compositor.pcm import read_wav
from lipsync import architecture
from lipsync.bench import baseline_scene, baselines, predecessor
from lipsync.bench.baseline_stage import COMPOSITE, GENERATE, PLAIN, PREDECESSOR, check_pictures
from lipsync.bench.baselines import Sample
from lipsync.bench.child import Child
from lipsync.bench.contenders import Composite, PlainLoop, Predecessor, Remote, Task, fastest_batch
from lipsync.bench.held_film import HeldFilm, write_film
from lipsync.bench.part import Run, carry_out
from lipsync.bench.plain_loop import AUDIO, VISUAL, Loop, Order
from lipsync.bench.process_memory import ROLLUP, rollup_bytes
from lipsync.bench.relay import Relay
from lipsync.bench.wire import build_visual

FRAMES = 3
RECT = Box(40, 30, 100, 90)


@pytest.fixture(autouse=True)
def opencv_threads() -> Iterator[None]:
    """The part measures with one thread; other tests get theirs back."""
    threads = cv2.getNumThreads()
    yield
    cv2.setNumThreads(threads)


@pytest.fixture
def frames() -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (FRAMES, 160, 200, 3), dtype=np.uint8)
    return [cv2.GaussianBlur(frame, (0, 0), 3).astype(np.uint8) for frame in noise]


@pytest.fixture
def film(frames: list[NDArray[np.uint8]], tmp_path: Path) -> Path:
    """A folder that both baselines read, the do-nothing model in it."""
    folder = tmp_path / "film"
    write_film(folder, frames, [RECT] * FRAMES)
    np.save(folder / VISUAL, build_visual(np.stack([cut_crop(frame, RECT) for frame in frames])))
    np.save(folder / AUDIO, np.zeros((FRAMES, 32, 16, 16), np.float32))
    onnx.save(architecture.do_nothing(), folder / "model.onnx")
    return folder


@pytest.fixture
def task(film: Path) -> Task:
    return Task("some", b"", np.load(film / AUDIO), np.load(film / VISUAL))


@pytest.fixture
def closed_address() -> Iterator[str]:
    """Where nobody answers, nor can begin to meanwhile: the port is taken, but not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_held_film_pastes_as_the_service_does(film: Path, frames: list[NDArray[np.uint8]]) -> None:
    held = HeldFilm(film)
    prediction = np.random.default_rng(1).random((3, 320, 320), np.float32)
    expected = paste(frames[1], set_prediction(cut_crop(frames[1], RECT), prediction), RECT, "hard")
    found = held.composited(1, prediction)
    assert len(held) == FRAMES
    # Levels are rounded here and truncated there; a cubic resize makes up to 2 of 1.
    difference = np.abs(found.astype(int) - expected)
    assert 0 < difference.max() <= 2
    inside = difference[RECT.y : RECT.bottom, RECT.x : RECT.right]
    assert inside.sum() == difference.sum()
    assert np.array_equal(held.composited(1, prediction), found)


def test_the_plain_loop_makes_the_same_frames_in_every_batch_size(
    film: Path, frames: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    loop = Loop(film / "model.onnx", HeldFilm(film), film, 1)
    found = list(loop.frames(Order(FRAMES, 1)))
    assert len(found) == FRAMES
    assert all(list(loop.frames(Order(FRAMES, size))) == found for size in (2, 3, 24))
    check_pictures({"loop": found, "source": [jpeg.encode(frame, Encoding(75)) for frame in frames]})


def test_the_plain_loop_is_driven_line_by_line(film: Path, task: Task, tmp_path: Path) -> None:
    with Child("lipsync.bench.plain_loop", [str(film), str(film / "model.onnx"), "1"]) as child:
        loop = PlainLoop(child, task, fastest_batch(child, task, [1, 2]))
        seen_s = loop.run(2)
        kept = loop.jpegs(tmp_path)
    expected = Loop(film / "model.onnx", HeldFilm(film), film, 1).frames(Order(FRAMES, 1))
    assert list(kept) == list(expected)
    # The second client waits for the first one's batch.
    assert 0 < seen_s[0] < seen_s[1]


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    child = Child("lipsync.bench.plain_loop", [str(tmp_path), "none.onnx", "1"])
    with pytest.raises(LipsyncError, match=r"plain_loop ended: FileNotFoundError: .*frames\.npy"), child:
        pytest.fail("it has started")


def test_the_kernels_sums_are_those_of_the_process_asked_about(film: Path) -> None:
    with Child("lipsync.bench.plain_loop", [str(film), str(film / "model.onnx"), "1"]) as child:
        found = rollup_bytes(child.pid)
    assert tuple(found) == ROLLUP
    assert found["Rss"] >= np.load(film / VISUAL).nbytes
    with pytest.raises(OSError):
        rollup_bytes(child.pid)


def test_a_child_that_ends_while_it_is_asked_says_why(film: Path, task: Task) -> None:
    child = Child("lipsync.bench.plain_loop", [str(film), str(film / "model.onnx"), "1"])
    with child, pytest.raises(LipsyncError, match="plain_loop ended: ValueError: range"):
        PlainLoop(child, task, 0).run(1)


def test_the_predecessors_messages_have_the_documented_fields() -> None:
    request = predecessor.Request(
        model_id="m", visual_frames=b"v", audio_features=b"a", batch_size=24, start_frame_idx=5
    )
    assert request.SerializeToString() == b"\x0a\x01m\x12\x01v\x1a\x01a\x20\x18\x28\x05"
    response = predecessor.Response.FromString(b"\x08\x01\x1a\x01x\x1a\x01y\x25\x00\x00\x80\x3f")
    assert response.success
    assert list(response.composited_frames) == [b"x", b"y"]


def test_the_predecessor_tells_a_fault_of_tritons_in_its_answer(film: Path, task: Task, closed_address: str) -> None:
    with Child("lipsync.bench.predecessor", [str(film), closed_address]) as child:
        contender = Predecessor(child.announced, child.pid, task)
        with contextlib.closing(contender), pytest.raises(InferenceFailed, match="predecessor's service failed: "):
            contender.run(1)


def test_a_service_that_is_not_there_is_one_line(task: Task, closed_address: str) -> None:
    contender = Composite(closed_address, 1, task)
    with contextlib.closing(contender), pytest.raises(InferenceFailed, match=r"127\.0\.0\.1:\d+: UNAVAILABLE"):
        contender.run(2)


def test_frames_that_are_missing_are_refused(task: Task) -> None:
    class Short(Remote):
        def frames(self, channel: grpc.Channel) -> Iterator[bytes]:
            yield b"only one"

    contender = Short("127.0.0.1:1", 1, task)
    with contextlib.closing(contender), pytest.raises(InferenceFailed, match="sent 1 frames instead of 3"):
        contender.run(1)


def test_a_relay_passes_on_and_counts_both_directions() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(f"127.0.0.1:{server.getsockname()[1]}") as relay:
        host, port = relay.address.split(":")
        with socket.create_connection((host, int(port))) as client, server.accept()[0] as served:
            client.sendall(b"question")
            assert served.recv(100) == b"question"
            served.sendall(b"the answer" * 1000)
            served.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: client.recv(4096), b"")) == b"the answer" * 1000
            assert relay.passed == 8 + 10_000
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_other_pictures_are_refused(frames: list[NDArray[np.uint8]]) -> None:
    first, second, third = (jpeg.encode(frame, Encoding(75)) for frame in frames)
    check_pictures({"a": [first], "b": [jpeg.encode(frames[0], Encoding(76))]})
    with pytest.raises(LipsyncError, match=r"frame 1 by 'a' is another picture than by 'b': \d+\.\d dB"):
        check_pictures({"a": [first, second], "b": [first, third]})
    with pytest.raises(LipsyncError, match="'a' gives 1 frames, 'b' 2"):
        check_pictures({"a": [first], "b": [first, second]})
    with pytest.raises(LipsyncError, match="another size"):
        check_pictures({"a": [first], "b": [jpeg.encode(frames[0][:80], Encoding(75))]})


@pytest.mark.parametrize("count", [1, 4, 24])
def test_the_speech_has_the_batchs_frames_and_survives_its_wav(count: int) -> None:
    samples = baseline_scene.speech(count)
    found, rate = read_wav(baseline_scene.as_wav(samples))
    assert rate == SAMPLE_RATE
    assert np.array_equal(found, samples)
    assert frame_count(len(samples), baseline_scene.FPS) == count
    assert np.abs(samples).max() > 0.01


class Counting:
    """A contender that only counts."""

    pid = 1
    asks_triton = True

    def __init__(self) -> None:
        self.ran = 0

    def run(self, clients: int) -> Sequence[float]:
        self.ran += 1
        return [float(self.ran)] * clients

    def jpegs(self, scratch: Path) -> Sequence[bytes]:
        return []


def test_samples_leave_the_warming_up_out() -> None:
    contenders = {"a": Counting(), "b": Counting()}
    steps: list[tuple[int, int]] = []

    def take(contender: object) -> Sample:
        assert isinstance(contender, Counting)
        return Sample(1, contender.run(1)[0], 0, 0, 0)

    found = baselines.in_turns(contenders, take, 3, lambda *step: steps.append(step))
    assert {name: [sample.first_s for sample in samples] for name, samples in found.items()} == {
        "a": [2, 3, 4],
        "b": [2, 3, 4],
    }
    assert steps[-1] == (3, 3)


def test_a_samples_cpu_is_that_of_all_processes() -> None:
    assert Sample(9, 9, 1, 2, 4).cpu_s == 7


@pytest.mark.triton
def test_the_part_measures_everybody(triton_home: Path, tmp_path: Path, leftovers: Callable[[], list[str]]) -> None:
    found = carry_out(baselines.PART, Run(tmp_path, lambda *_: None, quick=True))
    assert found.failure == ""
    everybody = {PREDECESSOR, PLAIN, COMPOSITE, GENERATE}

    def subjects(quantity: str) -> set[str]:
        figures = [figure for figure in found.figures if figure.quantity == quantity]
        assert all(figure.spread.median > 0 for figure in figures)
        return {figure.subject for figure in figures}

    assert subjects("throughput") == subjects("time to the first frame") == subjects(found.plotted) == everybody
    assert subjects("ratio of time to the first frame") == {f"{name} / {GENERATE}" for name in (PREDECESSOR, PLAIN)}
    sent = {
        (figure.subject, figure.quantity): figure.spread.median
        for figure in found.figures
        if figure.quantity.startswith("bytes on the wire")
    }
    assert len(sent) == 6
    hop = "bytes on the wire, service and Triton"
    # Pictures of the raw model in and out as float32; a frame number and the audio's features.
    assert sent[PREDECESSOR, hop] >= (6 + 3) * 320 * 320 * 4 / 1e3
    assert 32 * 16 * 16 * 4 / 1e3 <= sent[COMPOSITE, hop] < 100
    assert leftovers() == []
