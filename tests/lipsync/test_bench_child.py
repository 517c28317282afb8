"""Children of the benchmark: what they say is heard, whatever else they write, and how they end is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from compositor.errors import LipsyncError
from lipsync.bench.child import Child

COMPLAINING = """
import sys
from lipsync.bench.child import announce, wait_for_end

sys.stderr.write("Task was destroyed\\n" * 10_000)
announce("ready")
wait_for_end()
"""
ANSWERING = """
import sys
from lipsync.bench.child import announce

announce("ready")
for line in sys.stdin:
    sys.stderr.write("Task was destroyed\\n" * 10_000)
    announce(f"heard {line.strip()}")
"""
ENDING = """
import sys
from lipsync.bench.child import announce

if "at once" not in sys.argv:
    announce("ready")
    sys.stdin.readline()
sys.exit("complaint\\nno such place")
"""
SILENT = "raise SystemExit(3)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules that are written there can be started."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def child(folder: Path, source: str, *arguments: str) -> Child:
    (folder / "bench_child_of_test.py").write_text(source)
    return Child("bench_child_of_test", arguments)


def test_a_child_that_complains_much_before_its_first_line_is_heard(folder: Path) -> None:
    with child(folder, COMPLAINING) as complaining:
        assert complaining.announced == "ready"


def test_a_child_that_complains_much_before_it_answers_is_heard(folder: Path) -> None:
    with child(folder, ANSWERING) as answering:
        for number in range(3):
            answering.say(str(number))
            assert answering.hear() == f"heard {number}"


def test_the_last_line_of_a_child_that_ends_is_told(folder: Path) -> None:
    with pytest.raises(LipsyncError, match=r"bench_child_of_test ended: no such place$"):
        child(folder, ENDING, "at once").__enter__()
    with child(folder, ENDING) as ending:
        ending.say("go on")
        with pytest.raises(LipsyncError, match=r"no such place$"):
            ending.hear()


def test_a_child_that_ends_without_a_word_has_its_status_told(folder: Path) -> None:
    with pytest.raises(LipsyncError, match=r"ended: status 3$"):
        child(folder, SILENT).__enter__()
