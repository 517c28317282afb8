"""What fits on which device of a server: holdings and wishes go in, yes or no comes out. Only arithmetic.

Two sums are kept for each device: of all that takes memory now, and of what will be left when all that is leaving is
gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..settings import ResidencySettings

MB = 1_000_000


@dataclass(frozen=True)
class Holding:
    """A model that takes, or wants, memory of a server."""

    model: str
    device: str | None
    """None: a copy on every device."""
    bytes: int
    """0: not known."""
    counted: bool
    """Whether it counts for `max_models`."""
    leaving: bool = False


@dataclass
class Sum:
    """Models that count, and bytes of all."""

    models: int = 0
    bytes: int = 0

    def add(self, holding: Holding, size: int, times: int = 1) -> None:
        self.models += times * holding.counted
        self.bytes += times * size


class Budget:
    """The budgets of a server's devices, and what is left of them."""

    def __init__(self, settings: ResidencySettings, devices: Sequence[str], holdings: Iterable[Holding]) -> None:
        holdings = list(holdings)
        known = [holding.bytes for holding in holdings if holding.bytes]
        self._mean = sum(known) // len(known) if known else 0
        self._max_models, self._max_bytes = settings.max_models, settings.max_mb * MB
        self.now = {device: Sum() for device in devices}
        self.soon = {device: Sum() for device in devices}
        self.leaving = dict.fromkeys(devices, 0)
        """How many holdings of each device are leaving."""
        for holding in holdings:
            self.add(holding)

    def size(self, holding: Holding) -> int:
        """Its bytes; where they are not known, the mean of those that are."""
        return holding.bytes or self._mean

    def add(self, holding: Holding) -> None:
        """Takes a holding into account; a wish that was granted, too, or will be when there is room."""
        for device in self._devices(holding):
            self.now[device].add(holding, self.size(holding))
            self.leaving[device] += holding.leaving
            if not holding.leaving:
                self.soon[device].add(holding, self.size(holding))

    def leave(self, holding: Holding) -> None:
        """A holding was told to leave."""
        for device in self._devices(holding):
            self.soon[device].add(holding, self.size(holding), -1)
            self.leaving[device] += 1

    def fits_now(self, wish: Holding, device: str) -> bool:
        """Whether there is room for it on `device` as things are."""
        return self._fits(self.now[device], wish)

    def fits_soon(self, wish: Holding, device: str, without: Sequence[Holding] = (), places: int = 1) -> bool:
        """Whether so many of its kind fit on `device` when all that is leaving, and `without`, is gone."""
        left = Sum(self.soon[device].models, self.soon[device].bytes)
        for holding in without:
            left.add(holding, self.size(holding), -1)
        return self._fits(left, wish, places)

    def _fits(self, left: Sum, wish: Holding, places: int = 1) -> bool:
        # What does not count, or takes nothing, fits even where the others are too many already.
        size = self.size(wish)
        return (not wish.counted or left.models + places <= self._max_models) and (
            not self._max_bytes or not size or left.bytes + places * size <= self._max_bytes
        )

    def _devices(self, holding: Holding) -> list[str]:
        return list(self.now) if holding.device is None else [holding.device]
