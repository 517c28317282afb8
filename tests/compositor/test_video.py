"""Video files: frames and speech side by side, complete or not at all."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from compositor.errors import DiskFull, InvalidInput
from compositor.video import Video

RATE, FPS = 16_000, 25
Tone = Callable[[float, int], np.ndarray[Any, Any]]


def picture(value: int, width: int = 65, height: int = 49) -> bytes:
    _, data = cv2.imencode(".jpg", np.full((height, width, 3), value, np.uint8))
    return data.tobytes()


def test_frames_and_speech_last_equally_long(tmp_path: Path, tone: Tone) -> None:
    path = tmp_path / "new" / "out.mp4"
    video = Video(path, tone(2, RATE), RATE, FPS)
    for number in range(2 * FPS):
        video.put(picture(5 * number))
    video.close()
    with av.open(path) as container:
        frames, sound = container.streams.video[0], container.streams.audio[0]
        assert (frames.width, frames.height, frames.frames, frames.average_rate) == (64, 48, 2 * FPS, FPS)
        for stream in (frames, sound):
            assert stream.duration is not None
            assert stream.time_base is not None
            assert abs(float(stream.duration * stream.time_base) - 2) < 0.1
        levels = [float(frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]
    assert levels == sorted(levels)
    assert [each.name for each in path.parent.iterdir()] == ["out.mp4"]


def test_speech_lies_beside_its_frames(tmp_path: Path, tone: Tone) -> None:
    """A player that reads from the beginning needs both. Left to itself, the muxer waits for 10 s of speech only."""
    video = Video(tmp_path / "out.mp4", tone(14, RATE), RATE, FPS)
    for number in range(14 * FPS):
        video.put(picture(number % 256))
    video.close()
    with av.open(tmp_path / "out.mp4") as container:
        times: dict[str, float] = {"video": 0, "audio": 0}
        for packet in sorted(
            (packet for packet in container.demux() if packet.pos), key=lambda packet: packet.pos or 0
        ):
            assert packet.pts is not None
            times[packet.stream.type] = float(packet.pts * packet.time_base)
            assert abs(times["video"] - times["audio"]) < 1.5


@pytest.mark.parametrize("rate", [8_000, 11_111, 22_050, 192_000])
def test_speech_of_any_rate_has_its_length_and_its_pitch(tmp_path: Path, rate: int) -> None:
    """AAC knows 13 rates, WAV files have others."""
    samples = (np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate) / 2).astype(np.float32)
    video = Video(tmp_path / "out.mp4", samples, rate, FPS)
    for _ in range(2 * FPS):
        video.put(picture(0))
    video.close()
    with av.open(tmp_path / "out.mp4") as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        known = container.streams.audio[0].rate
    assert abs(len(heard) / known - 2) < 0.2
    middle = heard[known // 2 : 3 * known // 2]
    assert abs(np.argmax(np.abs(np.fft.rfft(middle))) - 1000) <= 2


def test_speech_longer_than_the_frames_is_whole(tmp_path: Path, tone: Tone) -> None:
    video = Video(tmp_path / "out.mp4", tone(1, RATE), RATE, FPS)
    video.put(picture(0))
    video.close()
    with av.open(tmp_path / "out.mp4") as container:
        heard = sum(frame.samples for frame in container.decode(audio=0))
    assert heard >= RATE


def test_what_is_given_up_leaves_the_file_of_before(tmp_path: Path, tone: Tone) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"before")
    video = Video(path, tone(1, RATE), RATE, FPS)
    video.put(picture(0))
    video.discard()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["out.jpg", "out.nosuch", "out"])
def test_a_format_that_holds_no_video_is_refused(tmp_path: Path, tone: Tone, name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be written as a video"):
        Video(tmp_path / name, tone(1, RATE), RATE, FPS)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def files_of(size: int) -> Iterator[None]:
    """No file gets larger than so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("size", "frames"), [(0, 2 * FPS), (100_000, 2 * FPS), (1_000, 1)])
def test_a_disk_that_fills_is_said(tmp_path: Path, tone: Tone, size: int, frames: int) -> None:
    """At the first byte, among the frames, and as what was held back is written in the end."""
    path = tmp_path / "out.mp4"
    path.write_bytes(b"before")
    video = Video(path, tone(2, RATE), RATE, FPS)
    with files_of(size), pytest.raises(DiskFull) as caught:
        film_noise(video, frames)
    assert caught.value.message == (
        f"{path}: cannot be written (File too large); free some space there, or name another folder"
    )
    video.discard()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    assert "out.part.mp4" not in {path.name for path in open_files()}


def film_noise(video: Video, frames: int) -> None:
    """Frames that no encoder makes small, and the end."""
    rng = np.random.default_rng(0)
    for _ in range(frames):
        video.put(cv2.imencode(".jpg", rng.integers(0, 256, (240, 320, 3), np.uint8))[1].tobytes())
    video.close()


def open_files() -> list[Path]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(link.readlink())
    return found
