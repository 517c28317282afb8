"""What of a tenant's requests counts as late, and what says nothing of how much there is to do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from compositor.call import Stages
from compositor.errors import DeadlinePassed, InferenceFailed, LipsyncError, Overloaded, TritonUnavailable
from compositor.rendering import Rendered
from compositor.sessions.pressure import SLOTS, Pressure
from compositor.sessions.stage import Ask
from compositor.sessions.timeliness import Timeliness

from .stage import SimulatedClock

LEFT_S, SLOT_S = 0.12, 0.5


class Requests:
    """Requests of one tenant, five a slot, that take a while and end somehow."""

    def __init__(self) -> None:
        self.clock, self.pressure = SimulatedClock(), Pressure(0.05, 4)
        self.timeliness = Timeliness("anna", self.pressure, self.clock)

    def asks(self, count: int = 2) -> list[Ask]:
        return [Ask(0, np.zeros((32, 16, 16), np.float32), partial(Rendered), self.clock.now_s() + LEFT_S)] * count

    def make(self, takes_s: float, error: LipsyncError | None = None, load_s: float = 0.0) -> None:
        asks, stages = self.asks(), Stages()
        self.timeliness.check(asks)
        with self.timeliness.request(asks, stages):
            self.clock.stall(takes_s)
            stages.load_s = load_s
            if error is not None:
                raise error

    def make_all(self, takes_s: float, error: LipsyncError | None = None, load_s: float = 0.0) -> float:
        """The share of late pictures after so many that nothing else is measured."""
        for _ in range(5 * (SLOTS + 1)):
            if error is None:
                self.make(takes_s, error, load_s)
            else:
                with pytest.raises(type(error)):
                    self.make(takes_s, error, load_s)
            self.clock.stall(max(0.0, SLOT_S / 5 - takes_s))
        self.pressure.look(self.clock.now_s())
        return self.pressure.share


@pytest.mark.parametrize(("takes_s", "share"), [(0.01, 0), (0.1, 0), (0.13, 1)])
def test_pictures_are_late_by_when_they_are_due(takes_s: float, share: float) -> None:
    assert Requests().make_all(takes_s) == share


@pytest.mark.parametrize("error", [Overloaded("no request was free"), DeadlinePassed("no answer")])
def test_those_that_never_came_are_late(error: LipsyncError) -> None:
    assert Requests().make_all(LEFT_S, error) == 1


@pytest.mark.parametrize("error", [None, Overloaded("no room"), DeadlinePassed("not loaded yet")])
def test_who_waited_for_a_model_is_not_counted(error: LipsyncError | None) -> None:
    requests = Requests()
    assert requests.make_all(LEFT_S + 0.01, error, load_s=LEFT_S) == 0
    requests.make(0.01)


def test_a_failure_of_the_model_is_not_counted() -> None:
    assert Requests().make_all(0.01, InferenceFailed("nonsense")) == 0


def test_a_triton_that_is_away_says_nothing_of_the_load() -> None:
    assert Requests().make_all(LEFT_S, TritonUnavailable("it is gone")) == 0


def test_what_would_come_too_late_is_not_asked_for_and_counts() -> None:
    requests = Requests()
    asks = requests.asks()
    requests.clock.stall(LEFT_S)
    for _ in range(5 * (SLOTS + 1)):
        with pytest.raises(Overloaded):
            requests.timeliness.check(asks)
        requests.clock.stall(SLOT_S / 5)
    assert requests.pressure.share == 1
