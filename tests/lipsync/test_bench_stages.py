"""Where the compositor's CPU goes: py-spy's samples, their stages, and both parts against the real Triton."""

from __future__ import annotations

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from compositor import blending
from compositor.errors import LipsyncError
from lipsync.bench import accounting, efficiency, profiler, service, stages
from lipsync.bench.caller import Turn, Yield, calling
from lipsync.bench.figures import PartReport, Report
from lipsync.bench.part import Part, Run, carry_out
from lipsync.bench.profiler import Frame, Profile, Stack
from lipsync.bench.report import write

BLENDING = blending.__file__
WORKER = Frame("_worker", "/usr/lib/python3.11/concurrent/futures/thread.py", 83)


def line_of(path: str, text: str) -> int:
    return next(number for number, line in enumerate(Path(path).read_text().splitlines(), 1) if text in line)


def stack(*frames: Frame, thread: int = 1, samples: int = 1) -> Stack:
    return Stack(thread, frames, samples)


def test_samples_are_read_with_their_thread_and_calls() -> None:
    text = (
        "thread (7): MainThread;<module> (<string>:1);paste (/a/compositor/blending.py:64);0x7f (cv2/cv2.so) 12\n"
        "thread (8): Thread-1 (_poll_wrapper);run (/usr/lib/threading.py:982) 3\n"
        "process 9 1\n"
        "thread (9): idle 1\n"
    )
    first, second, third = profiler.stacks(text)
    assert first == Stack(
        7,
        (
            Frame("<module>", "<string>", 1),
            Frame("paste", "/a/compositor/blending.py", 64),
            Frame("0x7f", "cv2/cv2.so"),
        ),
        12,
    )
    assert (second.thread, second.samples, second.frames[-1].function) == (8, 3, "run")
    assert third.frames == ()


@pytest.mark.parametrize(
    ("frames", "stage"),
    [
        ([Frame("paste", BLENDING, line_of(BLENDING, "background.copy()"))], accounting.BLEND),
        (
            [Frame("splice", "/a/compositor/jpeg.py", 301), Frame("encode", "/a/compositor/jpeg.py", 9)],
            accounting.ENCODE,
        ),
        ([Frame("splice", "/a/compositor/jpeg.py", 301), Frame("0x1", "libc.so.6")], accounting.SPLICE),
        ([Frame("render", "/a/compositor/rendering.py", 42)], accounting.LOOK_UP),
        ([WORKER, Frame("Future.set_result", "/usr/lib/concurrent/futures/_base.py", 550)], accounting.HAND_OVER),
        ([Frame("push", "/a/compositor/features.py", 3)], accounting.FEATURES),
        ([Frame("UnaryUnaryCall._invoke", "/a/grpc/aio/_call.py", 5), Frame("0x1", "cygrpc.so")], accounting.REQUEST),
        ([Frame("Handle._run", "asyncio/events.py", 80), Frame("0x1", "grpc/_cython/cygrpc.so")], accounting.SEND),
        ([Frame("Handle._run", "asyncio/events.py", 80)], accounting.OTHER),
        ([Frame("EpollSelector.select", "selectors.py", 468)], "waiting"),
        ([Frame("send", "socket.py", 1), Frame("pthread_cond_timedwait", "libc.so.6")], "waiting"),
        ([Frame("Thread.run", "/usr/lib/threading.py", 982), Frame("0x1", "cygrpc.so")], accounting.OWN_THREADS),
        ([Frame("0x1", "libc.so.6")], "waiting"),
        ([], "waiting"),
    ],
)
def test_a_stack_belongs_to_the_stage_of_its_most_telling_call(frames: list[Frame], stage: str) -> None:
    assert accounting.stage_of(stack(*frames)) == stage


def test_the_source_line_tells_the_resize_from_the_blend(tmp_path: Path) -> None:
    folder = tmp_path / "compositor"
    folder.mkdir()
    source = folder / "blending.py"
    source.write_text("cv2.resize(crop, size)\nout += ring\n")
    assert accounting.stage_of(stack(Frame("paste", str(source), 1))) == accounting.RESIZE
    assert accounting.stage_of(stack(Frame("paste", str(source), 2))) == accounting.BLEND


def test_a_threads_cpu_is_shared_out_among_what_it_did() -> None:
    push, poll = Frame("push", "/a/compositor/features.py", 3), Frame("EpollSelector.select", "selectors.py", 468)
    splice = Frame("splice", "/a/compositor/jpeg.py", 301)
    stacks = [
        stack(push, samples=1),
        stack(splice, samples=3),
        stack(poll, samples=96),
        stack(splice, thread=2, samples=50),
        stack(poll, thread=3, samples=5),
    ]
    spent = {(1, "main"): 4.0, (2, "render"): 2.0, (3, "idle"): 1.0, (4, "event_engine"): 3.0}
    found = accounting.shares(Profile(stacks, spent))
    assert tuple(found) == accounting.STAGES
    assert sum(found.values()) == pytest.approx(1)
    assert found[accounting.FEATURES] == pytest.approx(0.1)
    assert found[accounting.SPLICE] == pytest.approx(0.5)
    assert found[accounting.OWN_THREADS] == pytest.approx(0.3)
    assert found[accounting.OTHER] == pytest.approx(0.1)


def test_waiting_for_a_lock_is_known_by_where_others_wait() -> None:
    loop, sends = Frame("Handle._run", "asyncio/events.py", 80), Frame("0x55", "grpc/_cython/cygrpc.so")
    stacks = [
        stack(loop, Frame("pthread_cond_timedwait", "libc.so.6"), Frame("0x7f0000001f16", "libc.so.6"), samples=7),
        stack(loop, sends, Frame("0x7f0000002193", "/usr/lib/libc.so.6"), samples=8),
        stack(loop, sends, Frame("0x7f00000f2193", "libc.so.6"), samples=1),
        stack(loop, samples=1),
    ]
    found = accounting.shares(Profile(stacks, {(1, "main"): 1.0}))
    assert found[accounting.SEND] == found[accounting.OTHER] == 0.5


def test_a_profile_without_cpu_has_no_shares() -> None:
    with pytest.raises(ValueError, match="no CPU"):
        accounting.shares(Profile([], {(1, "main"): 0.0}))


def test_the_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(profiler.ProfilerMissing, match="py-spy is not installed"):
        profiler.find()


def test_a_process_that_cannot_be_profiled_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "py-spy"
    program.write_text("#!/bin/sh\necho 'Error: Permission Denied: ptrace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(profiler, "find", lambda: str(program))
    with pytest.raises(profiler.ProfilerMissing, match="Permission Denied: ptrace"):
        profiler.draw(1, 1, tmp_path / "flame.svg")


def test_a_flame_graph_that_fails_leaves_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def draw(*_: object) -> str:
        raise profiler.ProfilerMissing("py-spy did not end")

    splice = stack(Frame("splice", "/a/compositor/jpeg.py", 301))
    monkeypatch.setattr(profiler, "record", lambda *_: Profile([splice], {(1, "main"): 1.0}))
    monkeypatch.setattr(profiler, "draw", draw)
    table, files, fault = stages._profile(tmp_path, 1, stages.Sizes())
    assert table[accounting.SPLICE] == 1
    assert (files, fault) == ({}, "No flame graph: py-spy did not end.")


def test_threads_are_read_with_their_names() -> None:
    spent = profiler.thread_cpu_s(os.getpid())
    assert sum(spent.values()) > 0
    assert all(name for _, name in spent)


def test_a_yield_is_per_second_and_per_frame() -> None:
    found = Yield(50, 2.0, {"compositor": 0.1, "triton": 0.3, "caller": 0.1})
    assert found.fps == 25
    assert found.cpu_ms("compositor") == 2
    assert efficiency.cpu_limit(found, 2) == 200
    with pytest.raises(LipsyncError, match=r"no frame came within 2\.0 s"):
        Yield(0, 2.0, {"compositor": 0.1}).cpu_ms("compositor")


def test_a_parts_files_lie_beside_the_report(tmp_path: Path) -> None:
    part = PartReport("stages", "Stages", files={"flame.svg": "<svg/>"})
    write(tmp_path, "report", Report("now", "lipsync", False, "abc", {}, {}, {}, [part]))
    assert (tmp_path / "report-flame.svg").read_text() == "<svg/>"
    assert "(report-flame.svg)" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["parts"][0]["files"] == ["flame.svg"]


def test_a_call_that_fails_is_a_failure_of_the_turn(tmp_path: Path) -> None:
    with (
        service.running(tmp_path, "127.0.0.1:1", tmp_path) as served,
        calling("grpc", served.address) as caller,
        pytest.raises(LipsyncError, match=r"a call to the compositor failed: .*nobody"),
    ):
        caller.take(Turn("nobody", "composite", 1, 1, 0.1))


@pytest.mark.triton
@pytest.mark.parametrize("part", [stages.PART, efficiency.PART], ids=["stages", "efficiency"])
def test_a_part_measures_against_triton(part: Part, triton_home: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = carry_out(part, Run(tmp_path, lambda *progress: seen.append(progress), quick=True))
    assert found.failure == ""
    assert found.targets
    assert {figure.quantity for figure in found.figures} >= {found.plotted}
    assert all(figure.spread.median > 0 for figure in found.figures)
    assert seen[-1][1] == seen[-1][2]
    if part is stages.PART and not any(note.startswith("No stage table") for note in found.notes):
        table = [figure for figure in found.figures if figure.quantity == "CPU a frame by stage"]
        # Of a second only, so not every stage has a sample.
        assert {figure.subject for figure in table} & {accounting.RESIZE, accounting.BLEND, accounting.ENCODE}
        ElementTree.fromstring(found.files["flame.svg"])
