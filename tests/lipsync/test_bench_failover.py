"""What callers see of a Triton that is lost: their calls, the longest time without an answer, figures, the part."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from compositor.errors import LipsyncError
from compositor.triton.placement import ranked
from lipsync.bench import failover, parts
from lipsync.bench.failover import HUNG, KILLED, Calls, Loss, Sizes, call, homed
from lipsync.bench.part import Run, carry_out

ENDPOINTS = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]


def test_the_longest_gap_is_of_those_that_end_after_the_loss() -> None:
    calls = Calls("t", [1.0, 9.0, 10.0, 12.0, 13.0], ended_s=13.0)
    assert calls.longest_gap_s(since_s=8.5) == 8
    assert calls.longest_gap_s(since_s=9.5) == 2
    assert calls.longest_gap_s(since_s=12.5) == 1


def test_who_had_no_answer_to_the_end_waited_until_then() -> None:
    assert Calls("t", [1.0, 2.0], ended_s=30.0).longest_gap_s(since_s=2.5) == 28


def test_tenants_are_chosen_by_their_home() -> None:
    for home in ENDPOINTS:
        names = homed("round", home, ENDPOINTS, 4)
        assert len(set(names)) == 4
        assert all(ranked(name, ENDPOINTS)[0] == home for name in names)


class Scripted:
    """A service that, once it is lost, answers nothing for a while; `broken` fails from then on."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.back = asyncio.Event()
        self.called = Counter[str]()

    async def composite(self, tenant: str, timeout_s: float) -> float:
        self.called[tenant] += 1
        if self.lost.is_set():
            await self.back.wait()
            if tenant == "broken":
                raise ValueError(f"{tenant} gave no frames")
        return 0.0

    async def generate(self, tenant: str, timeout_s: float) -> float:
        raise NotImplementedError


def test_callers_go_on_until_what_was_under_way_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # No pauses, and but a turn of the loop before and after the loss: calls are under way whatever the clock says.
    monkeypatch.setattr(failover, "_PERIOD_S", 0.0)

    async def main() -> list[Calls]:
        side = Scripted()

        def lose() -> None:
            side.lost.set()
            asyncio.get_running_loop().call_later(0.3, side.back.set)

        return await call(side, ["fine", "broken"], lose, Sizes(before_s=0.0, after_s=0.0))

    begin_s = time.monotonic()
    fine, broken = asyncio.run(main())
    took_s = time.monotonic() - begin_s
    assert not fine.failures
    assert 0.29 < fine.longest_gap_s(begin_s) <= took_s
    assert broken.failures == {"... gave no frames": 1}
    assert broken.ended_s > broken.answered_s[-1] + 0.29


def test_tenants_that_have_no_answer_before_the_loss_end_the_part() -> None:
    async def main() -> None:
        side = Scripted()
        side.lost.set()
        side.back.set()
        await call(side, ["fine", "broken"], lambda: None, Sizes())

    with pytest.raises(LipsyncError, match="no frames"):
        asyncio.run(main())


LOSSES = [
    Loss(KILLED, [0.5, 0.75], Counter(), 2),
    Loss(KILLED, [1.0, 1.5], Counter(), 2),
    Loss(HUNG, [2.5, 3.0], Counter({"UNAVAILABLE: gone": 2}), 1),
]


def test_the_targets_are_of_the_slowest_and_of_calls_that_failed() -> None:
    slowest, failed = failover.targets_of(Sizes(), LOSSES)
    assert (slowest.spread.median, slowest.met) == (1.5, True)
    assert (failed.spread.median, failed.met) == (2, False)
    slow = [replace(LOSSES[0], gaps_s=[0.1, 2.0]), *LOSSES[1:2]]
    assert [target.met for target in failover.targets_of(Sizes(), slow)] == [False, True]
    assert list(failover.notes_of(LOSSES)) == ["Failed 2 times: UNAVAILABLE: gone"]


def test_the_figures_tell_a_kill_from_a_hang() -> None:
    figures = {(figure.case, figure.subject): figure.spread.median for figure in failover.figures_of(Sizes(), LOSSES)}
    killed, hung = (f"4 active tenants, {how}" for how in (KILLED, HUNG))
    assert figures[killed, "each tenant"] == pytest.approx(0.875)
    assert figures[killed, "slowest tenant"] == pytest.approx(1.125)
    assert figures[killed, "calls"] == 0
    assert (figures[hung, "slowest tenant"], figures[hung, "calls"], figures[hung, "tenants"]) == (3.0, 2, 1)
    assert not any(case == hung for case, _ in ((each.case, 0) for each in failover.figures_of(Sizes(), LOSSES[:2])))


@pytest.fixture
def held_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Triton that is killed stays so until its tenants have been called, however long that takes."""
    keepers, wait_until_back = list[int](), failover._wait_until_back

    def kill(pid: int, number: signal.Signals) -> None:
        if number is signal.SIGKILL:
            keepers.append(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
            os.kill(keepers[-1], signal.SIGSTOP)
        os.kill(pid, number)

    def let_go() -> None:
        while keepers:
            os.kill(keepers.pop(), signal.SIGCONT)

    def let_go_and_wait(http: str, endpoint: str) -> None:
        let_go()
        wait_until_back(http, endpoint)

    monkeypatch.setattr(failover, "os", SimpleNamespace(kill=kill))
    monkeypatch.setattr(failover, "_wait_until_back", let_go_and_wait)
    yield
    let_go()


@pytest.mark.triton
@pytest.mark.usefixtures("held_down")
def test_the_part_measures_against_triton(triton_home: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    part = next(part for part in parts.PARTS if part.name == "failover")
    found = carry_out(part, Run(tmp_path, lambda *progress: told.append(progress), quick=True))
    assert found.failure == ""
    assert {figure.quantity for figure in found.figures} >= {found.plotted}
    for how in (KILLED, HUNG):
        figures = {each.subject: each.spread.median for each in found.figures if each.case.endswith(how)}
        assert figures["calls"] == 0, found.notes
        assert figures["tenants"] == 4
        assert 0 < figures["each tenant"] <= figures["slowest tenant"]
    assert len(found.targets) == 2
    assert told[-1][1] == told[-1][2]
