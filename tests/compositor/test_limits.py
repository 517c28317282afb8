from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from compositor.limits import FEW_FILES, allow_open_files


@pytest.fixture
def hard() -> Iterator[int]:
    """The hard limit on open files; both are what they were afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_becomes_the_hard_one(hard: int, caplog: pytest.LogCaptureFixture) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    assert allow_open_files() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert allow_open_files() == hard
    assert bool(caplog.messages) == (hard < FEW_FILES)


def test_few_files_are_said(hard: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    assert allow_open_files() == 1024
    assert "at most 1024 files may be open" in caplog.text
    assert "ulimit -Hn" in caplog.text


def test_a_limit_that_cannot_be_raised_stays(
    hard: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 8192))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert allow_open_files() == 1024
    assert "the limit on open files stays at 1024: not allowed" in caplog.text
    monkeypatch.undo()
