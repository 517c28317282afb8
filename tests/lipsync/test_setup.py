"""tools/setup.sh with a Python of our own: what it does when pip fails, and when it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "setup.sh"
# Stands for the system's Python and, through `-m venv`, for that of .venv.
PYTHON = """#!/bin/sh
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip"*)
        echo "Collecting numpy"; echo "said on stderr" >&2; echo "the last words of pip"
        exit "$PIP_STATUS" ;;
    *"print(sys.version"*) echo "3.11 here" ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "requirements.lock").touch()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def set_up(tree: Path, pip_status: int, extra: str = "dev") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{tree / 'bin'}:{os.defpath}", "PIP_STATUS": str(pip_status)}
    command = ["sh", str(tree / "tools" / "setup.sh"), extra]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def test_a_failing_pip_ends_it_without_a_stamp(tree: Path) -> None:
    done = set_up(tree, 1)
    assert done.returncode == 1
    assert "error: pip could not install" in done.stderr
    assert "said on stderr" in done.stderr
    assert done.stderr.endswith("the last words of pip\n")
    assert not (tree / ".venv" / ".stamp-dev").exists()
    # The next run tries again.
    assert "Collecting numpy" in set_up(tree, 1).stderr


def test_a_good_pip_leaves_a_stamp_and_is_not_asked_again(tree: Path) -> None:
    set_up(tree, 1)
    done = set_up(tree, 0)
    assert (done.returncode, "Collecting numpy\n" in done.stderr) == (0, True)
    assert "the last words" not in done.stderr
    assert (tree / ".venv" / ".stamp-dev").exists()
    again = set_up(tree, 0)
    assert (again.returncode, again.stderr) == (0, "")


def test_the_training_extra_is_the_only_one_that_dev_does_not_hold(tree: Path) -> None:
    for program in ("flite", "espeak-ng", "apt-get"):
        (tree / "bin" / program).write_text("#!/bin/sh\n")
        (tree / "bin" / program).chmod(0o755)
    set_up(tree, 0)
    assert "Collecting numpy" not in set_up(tree, 0, "bench").stderr
    first, second = (set_up(tree, 0, "training") for _ in range(2))
    assert (first.returncode, "Collecting numpy\n" in first.stderr) == (0, True)
    assert (second.returncode, "Collecting numpy\n" in second.stderr) == (0, False)
