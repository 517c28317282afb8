"""Wall and CPU time: callables come in, what each of their rounds cost comes out.

The machine is never quiet, so contestants take turns within every round, and only ratios of one round are compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lipsync.triton_processes import session_members

from .figures import Spread, ratios

Step = Callable[[int, int], None]
"""Called with (rounds done, rounds in total)."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a unit of work took: on the wall, of this process's CPU (all threads), and of the server's CPU. And
    what the slowest call of the round took on the wall, whatever its units."""

    wall_s: float
    cpu_s: float
    server_cpu_s: float = 0.0
    slowest_call_s: float = 0.0


@dataclass(frozen=True)
class Contestant:
    """What is measured. `run` is called `calls` times a round and does `units` units of work a call."""

    run: Callable[[], object]
    calls: int = 1
    units: int = 1


def process_clock(pid: int) -> int:
    """The CPU clock of a process, all its threads, for `time.clock_gettime`, as clock_getcpuclockid(3) makes it.

    Exact, where /proc/<pid>/stat counts in ticks of 10 ms.
    """
    return (~pid << 3) | 2


def living_cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds of those processes that still live, since each began."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime(process_clock(pid))
    return total


class Clock:
    """Reads this process's time and, where given, that of a session's processes, which must live on meanwhile."""

    def __init__(self, session: int | None = None) -> None:
        """session: the session id of the server's processes, such as `EmbeddedTriton.keeper_pid`."""
        self._clocks = [process_clock(pid) for pid in session_members(session)] if session is not None else []

    def cost(self, contestant: Contestant) -> Cost:
        """The cost of one unit of work, averaged over one round."""
        server = self._server_s()
        cpu, moments = time.process_time(), [time.perf_counter()]
        for _ in range(contestant.calls):
            contestant.run()
            moments.append(time.perf_counter())
        cpu = time.process_time() - cpu
        server = self._server_s() - server
        units = contestant.calls * contestant.units
        slowest = max(end - begin for begin, end in pairwise(moments))
        return Cost((moments[-1] - moments[0]) / units, cpu / units, server / units, slowest)

    def _server_s(self) -> float:
        return sum(time.clock_gettime(clock) for clock in self._clocks)


@dataclass(frozen=True)
class Rounds:
    """The costs of each contestant, round by round."""

    costs: Mapping[str, Sequence[Cost]]

    def wall_s(self, name: str) -> Spread:
        return Spread.of(cost.wall_s for cost in self.costs[name])

    def cpu_s(self, name: str) -> Spread:
        return Spread.of(cost.cpu_s for cost in self.costs[name])

    def server_cpu_s(self, name: str) -> Spread:
        return Spread.of(cost.server_cpu_s for cost in self.costs[name])

    def slowest_call_s(self, name: str) -> Spread:
        return Spread.of(cost.slowest_call_s for cost in self.costs[name])

    def wall_ratio(self, dividend: str, divisor: str) -> Spread:
        return ratios([cost.wall_s for cost in self.costs[dividend]], [cost.wall_s for cost in self.costs[divisor]])

    def cpu_ratio(self, dividend: str, divisor: str) -> Spread:
        return ratios([cost.cpu_s for cost in self.costs[dividend]], [cost.cpu_s for cost in self.costs[divisor]])


def take_turns(contestants: Mapping[str, Contestant], rounds: int, clock: Clock, step: Step) -> Rounds:
    """Lets every contestant run once to warm up, then measures them in turns; each round begins with another one."""
    names = list(contestants)
    for contestant in contestants.values():
        contestant.run()
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            costs[name].append(clock.cost(contestants[name]))
        step(number + 1, rounds)
    return Rounds(costs)
