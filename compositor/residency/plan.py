"""Who is loaded next, where, and who leaves for it: wishes and a budget go in, decisions come out. Only arithmetic.

Wishes are served in the order in which they came: who must wait for room keeps it from those who came later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .budget import Budget, Holding

Policy = Literal["least_loaded", "round_robin"]


@dataclass(frozen=True)
class Wish:
    """A model that is to be loaded."""

    holding: Holding
    """What it will take; `device` is where the server has it already, and None where it does not."""
    held: bool = False
    """The server has it already: it takes no more room."""
    blocked: bool = False
    """An older copy of it, or one that leaves for it, is not gone yet: it keeps its place, and waits."""


@dataclass
class Plan:
    """What to do now; who is named nowhere waits."""

    grants: dict[str, str] = field(default_factory=dict)
    """Models to load, and on which device."""
    evictions: list[str] = field(default_factory=list)
    """Models to unload."""
    refusals: list[str] = field(default_factory=list)
    """Models for which there is no room, and none under way."""
    ahead: list[str] = field(default_factory=list)
    """Models to unload for whoever comes next."""
    waits: list[str] = field(default_factory=list)
    """Models that have a place as soon as it is free."""


class DeviceOrder:
    """In which order a server's devices are tried for a model."""

    def __init__(self, policy: Policy, devices: Sequence[str]) -> None:
        self._policy, self._devices = policy, list(devices)

    def order(self, budget: Budget) -> list[str]:
        if self._policy == "round_robin":
            return list(self._devices)
        loads = budget.soon
        return sorted(self._devices, key=lambda device: (loads[device].models, loads[device].bytes))

    def took(self, device: str) -> None:
        """A model goes there: others are first next time."""
        self._devices.remove(device)
        self._devices.append(device)


def make_plan(
    wishes: Iterable[Wish],
    budget: Budget,
    candidates: Sequence[Holding],
    placement: DeviceOrder,
    loads: int,
    headroom: int = 0,
) -> Plan:
    """What to do about wishes, first come first served.

    candidates: who may be unloaded, in the order of leaving. loads: how many may begin now. headroom: places that are
    to be free on each device when all wishes are served, so that the next ones need not wait. `budget` is changed.
    """
    plan, left = Plan(), list(candidates)
    for wish in wishes:
        model = wish.holding.model
        # Where all its devices stay as they are, nobody need leave for it.
        if wish.held:
            if loads > len(plan.grants):
                plan.grants[model] = wish.holding.device or placement.order(budget)[0]
            continue
        order = placement.order(budget)
        device = next((each for each in order if budget.fits_now(wish.holding, each)), None)
        if device is None:
            device = next((each for each in order if budget.fits_soon(wish.holding, each)), None)
            if device is None:
                device = _make_room(wish.holding, budget, order, left, plan)
            if device is None:
                plan.refusals.append(model)
                continue
            plan.waits.append(model)
        elif not wish.blocked and loads > len(plan.grants):
            plan.grants[model] = device
            placement.took(device)
        budget.add(_on(wish.holding, device))
    plan.ahead += leave_early(headroom, budget, left)
    if any(budget.leaving.values()):
        # Once that is gone, there may be room; it may also be for somebody further back that it leaves.
        plan.refusals.clear()
    return plan


def leave_early(places: int, budget: Budget, candidates: Sequence[Holding]) -> list[str]:
    """Who leaves so that each device has so many places of mean size free; where that cannot be, so that it keeps to
    its budget."""
    left, evictions = list(candidates), list[str]()
    for device in budget.now:
        mine = [each for each in left if each.device in (device, None)]
        leaving, enough = _first_who_make(places, budget, mine, device)
        if not enough:
            leaving, _ = _first_who_make(0, budget, mine, device)
        for each in leaving:
            left.remove(each)
            budget.leave(each)
            evictions.append(each.model)
    return evictions


def _first_who_make(
    places: int, budget: Budget, candidates: Sequence[Holding], device: str
) -> tuple[list[Holding], bool]:
    """As many of the candidates as must leave for so many places on a device, and whether that is enough."""
    wish, leaving = Holding("", device, 0, counted=True), list[Holding]()
    for candidate in candidates:
        if budget.fits_soon(wish, device, leaving, places):
            break
        leaving.append(candidate)
    return leaving, budget.fits_soon(wish, device, leaving, places)


def _make_room(
    wish: Holding, budget: Budget, order: Sequence[str], candidates: list[Holding], plan: Plan
) -> str | None:
    """The first device where the wish fits once some candidates have left, who are told to; None, and nobody is told,
    where there is none."""
    for device in order:
        leaving: list[Holding] = []
        for candidate in candidates:
            if candidate.device in (device, None) and _helps(wish, candidate, budget, device):
                leaving.append(candidate)
            if leaving and budget.fits_soon(wish, device, without=leaving):
                for each in leaving:
                    candidates.remove(each)
                    budget.leave(each)
                    plan.evictions.append(each.model)
                return device
    return None


def _helps(wish: Holding, candidate: Holding, budget: Budget, device: str) -> bool:
    return (wish.counted and candidate.counted) or budget.size(candidate) > 0


def _on(wish: Holding, device: str) -> Holding:
    return Holding(wish.model, device, wish.bytes, wish.counted)
