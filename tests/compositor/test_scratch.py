"""Temporary folders: there while their process lives, swept when it was killed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compositor.errors import DiskFull
from compositor.scratch import PREFIX, scratch_folder, scratch_home, sweep

HOLDING = (
    "import time; from compositor.scratch import scratch_folder\n"
    "with scratch_folder() as path: (path / 'file').write_text('x'); print(path, flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_block(home: Path) -> None:
    with scratch_folder() as path:
        assert path.parent == home
        (path / "file").write_text("x")
    assert not list(home.iterdir())


def test_only_what_the_dead_left_is_swept(home: Path) -> None:
    strangers = [home / "lipsync-else", home / f"{PREFIX}file"]
    strangers[0].mkdir()
    strangers[1].touch()
    with scratch_folder() as own, subprocess.Popen([sys.executable, "-c", HOLDING], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().decode().strip())
        try:
            sweep()
            assert own.exists()
            assert theirs.exists()
        finally:
            other.kill()
        other.wait()
        assert theirs.exists()
        sweep()
        assert own.exists()
        assert not theirs.exists()
    assert sorted(home.iterdir()) == sorted(strangers)


def test_no_place_for_temporary_files_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(DiskFull, match="free some space, or set TMPDIR"):
        scratch_home()
