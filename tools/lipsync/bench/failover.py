"""Part `failover`: three real Tritons behind one compositor, and tenants in use on one that is killed, or hangs: how
long they have no answer, and what their callers see of it.

Each round is another Triton's, with tenants that were never asked for before, so that nothing has to be undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from compositor.errors import LipsyncError
from compositor.triton.placement import ranked
from lipsync.service_stats import Stats, read_stats
from lipsync.tritonserver import EmbeddedTriton

from . import service
from .copies import add_small_tenant, link_tenants
from .figures import Figure, PartReport, Spread, Target
from .part import Part, Run
from .tenant_callers import FRAMES, Remote, Side, words_of

TITLE = "A Triton that is lost"
KILLED, HUNG = "killed (SIGKILL)", "hangs (SIGSTOP)"
GAP = "longest time without an answer"
_SERVERS = 3
_FPS = 25
_PERIOD_S = FRAMES / _FPS
_FIRST = "tenant-first"
_WIDTH, _HEIGHT = 320, 240
_TIMEOUT_S = 30.0
_BACK_S = 60.0


@dataclass(frozen=True)
class Sizes:
    """How often a Triton is lost, and who is on it."""

    kills: int = 3
    hangs: int = 2
    tenants: int = 4
    """In use on the Triton that is lost."""
    before_s: float = 1.0
    """How long they are called before it is."""
    after_s: float = 2.5
    """How long at least they are called afterwards, once each or more; what is under way then goes on to its end."""


QUICK = Sizes(kills=1, hangs=1, before_s=0.2, after_s=1.0)


@dataclass
class Calls:
    """One tenant's: when each was answered (monotonic clock, seconds), and how often which words came instead."""

    tenant: str
    answered_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    ended_s: float = 0.0

    def longest_gap_s(self, since_s: float) -> float:
        """The longest time without an answer that did not end before `since_s`."""
        ends = itertools.pairwise([*self.answered_s, self.ended_s])
        return max(end - begin for begin, end in ends if end > since_s)


@dataclass(frozen=True)
class Loss:
    """One round: which way a Triton was lost, and for each of its tenants the longest time without an answer."""

    how: str
    gaps_s: Sequence[float]
    failures: Counter[str]
    elsewhere: int
    """Of its tenants, those that another Triton loaded."""


def part(sizes: Sizes | None = None) -> Part:
    """The part at these sizes."""

    def run(run: Run) -> PartReport:
        return measure(run, QUICK if run.quick else sizes or Sizes())

    return Part("failover", TITLE, run)


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Loses one Triton after the other, and reports."""
    repository = run.folder / "repository"
    add_small_tenant(run.folder, repository, _FIRST, _WIDTH, _HEIGHT, FRAMES)
    ways = [KILLED] * sizes.kills + [HUNG] * sizes.hangs
    losses: list[Loss] = []
    with contextlib.ExitStack() as stack:
        tritons = [stack.enter_context(EmbeddedTriton(repository)) for _ in range(_SERVERS)]
        endpoints = [triton.grpc for triton in tritons]
        served = stack.enter_context(service.running(repository, ",".join(endpoints), run.folder))
        service.wait_until_ready(served.address)
        for number, how in enumerate(ways):
            run.progress("losses", number, len(ways))
            victim = tritons[number % _SERVERS]
            names = homed(f"round-{number}", victim.grpc, endpoints, sizes.tenants)
            list(link_tenants(repository, _FIRST, names))
            losses.append(_lose(how, victim, names, served, sizes))
        run.progress("losses", len(ways), len(ways))
    figures, targets = list(figures_of(sizes, losses)), targets_of(sizes, losses)
    return PartReport("failover", TITLE, _how(sizes), GAP, figures, targets, list(notes_of(losses)))


def _how(sizes: Sizes) -> str:
    return (
        f"{_SERVERS} embedded Tritons with their Python-based backend behind one compositor, settings as by default. "
        f"{sizes.tenants} tenants of one of them are in use, each by a caller that asks for {FRAMES} frames every "
        f"{1000 * _PERIOD_S:.0f} ms, by Composite. Then that Triton is killed, which its keeper mends by starting it "
        f"again, or stopped for {sizes.after_s:g} s at least. The longest time without an answer lies between two "
        f"answers of a tenant, the pause between its calls included. A call that fails is not made again."
    )


def homed(prefix: str, home: str, endpoints: Sequence[str], count: int) -> list[str]:
    """So many names of tenants whose home that Triton is."""
    names = (f"{prefix}-{number}" for number in itertools.count())
    return list(itertools.islice((name for name in names if ranked(name, endpoints)[0] == home), count))


def _lose(how: str, victim: EmbeddedTriton, names: Sequence[str], served: service.Service, sizes: Sizes) -> Loss:
    """One round. Raises LipsyncError where the Triton does not come back."""
    pid = victim.pid
    if pid is None:
        raise LipsyncError(f"the Triton at {victim.grpc} does not run")
    lost_s = 0.0

    def lose() -> None:
        nonlocal lost_s
        lost_s = time.monotonic()
        os.kill(pid, signal.SIGKILL if how == KILLED else signal.SIGSTOP)

    try:
        calls = asyncio.run(_called(served.address, names, lose, sizes))
    finally:
        if how == HUNG:
            os.kill(pid, signal.SIGCONT)
    stats = read_stats(served.http)
    others = {model["name"] for model in stats["models"] if model["endpoint"] != victim.grpc}
    _wait_until_back(served.http, victim.grpc)
    gaps_s, failures = [each.longest_gap_s(lost_s) for each in calls], sum((each.failures for each in calls), Counter())
    return Loss(how, gaps_s, failures, len(others & set(names)))


async def _called(address: str, names: Sequence[str], lose: Callable[[], None], sizes: Sizes) -> list[Calls]:
    async with grpc.aio.insecure_channel(address) as channel:
        return await call(Remote(channel), names, lose, sizes)


async def call(side: Side, names: Sequence[str], lose: Callable[[], None], sizes: Sizes) -> list[Calls]:
    """Calls these tenants, side by side, while their Triton is lost. Raises LipsyncError where that cannot begin."""
    lost, over, calls = asyncio.Event(), asyncio.Event(), [Calls(name) for name in names]
    await asyncio.gather(*(_call_once(side, each) for each in calls))
    for each in calls:
        if each.failures:
            raise LipsyncError(f"a first call failed: {next(iter(each.failures))}")
    callers = [asyncio.create_task(_call_until(side, each, lost, over)) for each in calls]
    await asyncio.sleep(sizes.before_s)
    lose()
    lost.set()
    await asyncio.sleep(sizes.after_s)
    over.set()
    await asyncio.gather(*callers)
    return calls


async def _call_until(side: Side, calls: Calls, lost: asyncio.Event, over: asyncio.Event) -> None:
    called_since = False
    while not (over.is_set() and called_since):
        due_s, called_since = time.monotonic() + _PERIOD_S, lost.is_set()
        await _call_once(side, calls)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
    calls.ended_s = time.monotonic() if calls.failures else calls.answered_s[-1]


async def _call_once(side: Side, calls: Calls) -> None:
    try:
        await side.composite(calls.tenant, _TIMEOUT_S)
    except (grpc.RpcError, ValueError) as error:
        calls.failures[words_of(error).replace(calls.tenant, "...")] += 1
    else:
        calls.answered_s.append(time.monotonic())


def _wait_until_back(http: str, endpoint: str) -> None:
    give_up_s = time.monotonic() + _BACK_S
    while not _is_up(read_stats(http), endpoint):
        if time.monotonic() > give_up_s:
            raise LipsyncError(f"the Triton at {endpoint} was not back within {_BACK_S:g} s")
        time.sleep(0.02)


def _is_up(stats: Stats, endpoint: str) -> bool:
    return any(each["up"] for each in stats["endpoints"] if each["endpoint"] == endpoint)


def figures_of(sizes: Sizes, losses: Sequence[Loss]) -> Iterator[Figure]:
    """Both ways of being lost."""
    for how in (KILLED, HUNG):
        rounds = [loss for loss in losses if loss.how == how]
        if not rounds:
            continue
        case = f"{sizes.tenants} active tenants, {how}"
        gaps_s, slowest_s = [gap_s for loss in rounds for gap_s in loss.gaps_s], [max(loss.gaps_s) for loss in rounds]
        yield Figure(case, "each tenant", GAP, "s", Spread.of(gaps_s))
        yield Figure(case, "slowest tenant", GAP, "s", Spread.of(slowest_s))
        yield Figure(case, "calls", "failed", "", Spread.once(sum(loss.failures.total() for loss in rounds)))
        yield Figure(case, "tenants", "served elsewhere", "", Spread.of(loss.elsewhere for loss in rounds))


def targets_of(sizes: Sizes, losses: Sequence[Loss]) -> list[Target]:
    """What losing one of several Tritons shall not cost."""
    killed = [max(loss.gaps_s) for loss in losses if loss.how == KILLED]
    failed = sum(loss.failures.total() for loss in losses)
    what = f"{sizes.tenants} active tenants of a Triton that was killed: without an answer, the slowest of all"
    return [
        Target(what, Spread.once(max(killed)), "below", 2, "s"),
        Target("calls that failed as a Triton was killed or hung", Spread.once(failed), "at most", 0, ""),
    ]


def notes_of(losses: Sequence[Loss]) -> Iterator[str]:
    """Failures in their own words."""
    for words, count in sum((loss.failures for loss in losses), Counter[str]()).items():
        yield f"Failed {count} times: {words}"
