"""`lipsync demo` for real, with a small avatar in place of the large one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import pytest

from compositor.features import frame_count
from compositor.manifest import tenant_names
from compositor.pcm import read_wav
from lipsync.sentences import HELLO

pytestmark = pytest.mark.triton

SPEECH = HELLO
SAMPLES, RATE = read_wav(SPEECH.read_bytes())
SMALL = (
    "import functools, compositor.triton.endpoint, lipsync.commands.demo as d\n"
    # A Triton that stands still for a while on a busy machine would be complained of.
    "compositor.triton.endpoint.LOOK_S = 30\n"
    "d.write_source = functools.partial(d.write_source, frames=6, width=640, height=360)\n"
    "from lipsync.app import main; main()"
)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", SMALL, "demo", *map(str, arguments)]


def demo(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, cwd=cwd, timeout=200)


def test_it_adds_its_tenant_once_and_writes_a_whole_video(triton_home: Path, tmp_path: Path) -> None:
    video = tmp_path / "new" / "demo.mp4"
    for run in range(2):
        done = demo("-r", tmp_path / "models", "-o", video, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"wrote {video}\n" in done.stdout
        assert ("tenant demo added" in done.stdout) == (run == 0)
        bars = {line.split()[0] for line in done.stderr.splitlines() if line.strip()}
        assert bars - {"read", "draw", "prepare", "check", "memory", "demo"} == set(), "it stops without a complaint"
        assert tenant_names(tmp_path / "models") == ["demo"]
        with av.open(video) as container:
            picture, sound = container.streams.video[0], container.streams.audio[0]
            assert picture.frames == frame_count(len(SAMPLES), 25)
            assert (picture.width, picture.height) == (640, 360)
            assert sound.duration is not None
            assert sound.time_base is not None
            assert abs(float(sound.duration * sound.time_base) - len(SAMPLES) / RATE) < 0.1
        assert [path.name for path in video.parent.iterdir()] == ["demo.mp4"]
        video.unlink()


def test_a_wrong_speech_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for wav, words in [(tmp_path / "typo.wav", "typo.wav: cannot be read"), (Path(__file__), "not a WAV")]:
        done = demo("--wav", wav, "-r", tmp_path / "models", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_demo_ends_at_once_and_leaves_no_video(triton_home: Path, tmp_path: Path) -> None:
    assert demo("-r", tmp_path / "models", "-o", "first.mp4", cwd=tmp_path).returncode == 0
    # Waits at its fifth frame until the signal has arrived, so that it is always in the middle.
    code = (
        "import compositor.video as v, lipsync.commands.demo as d\n"
        "put, speak_to, told = v.Video.put, d.speak_to, []\n"
        "def slow(self, data):\n"
        "    put(self, data)\n"
        "    if self._count == 5: print('speaking', flush=True); assert told[0].wait(60)\n"
        "def noted(*arguments):\n"
        "    told.append(arguments[-1])\n"
        "    return speak_to(*arguments)\n"
        "v.Video.put, d.speak_to = slow, noted\n"
    )
    arguments = command("-r", tmp_path / "models", "-o", "second.mp4")
    arguments[2] = code + arguments[2]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as speaking:
        assert speaking.stdout is not None
        assert speaking.stdout.readline() == "speaking\n"
        os.kill(speaking.pid, signal.SIGINT)
        out, err = speaking.communicate(timeout=60)
    assert speaking.returncode == 130
    assert "wrote" not in out
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["first.mp4"]
