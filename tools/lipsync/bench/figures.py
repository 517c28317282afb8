"""What a benchmark finds: samples come in, medians with their spread, targets and reports come out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, their 10th and 90th percentile, and how many there were."""

    median: float
    p10: float
    p90: float
    repetitions: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        values = np.fromiter(samples, np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError("a figure needs samples, all of them finite")
        p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
        return cls(median, p10, p90, values.size)

    @classmethod
    def once(cls, value: float) -> Spread:
        """Something that does not vary or was measured once."""
        return cls.of([value])

    def times(self, factor: float) -> Spread:
        """In another unit, that is `factor` (positive) to one of this."""
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor, self.repetitions)


def ratios(dividend: Sequence[float], divisor: Sequence[float]) -> Spread:
    """How many times the divisor the dividend is, round by round: what the machine's mood does to both cancels out."""
    return Spread.of(a / b for a, b in zip(dividend, divisor, strict=True))


@dataclass(frozen=True)
class Figure:
    """One measured number: `quantity` of `subject` in the case `case`, in `unit`."""

    case: str
    subject: str
    quantity: str
    unit: str
    spread: Spread


@dataclass(frozen=True)
class Target:
    """What a figure should reach: at least or at most `limit`."""

    what: str
    spread: Spread
    bound: Literal["at least", "at most", "below"]
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        value = self.spread.median
        return {"at least": value >= self.limit, "at most": value <= self.limit, "below": value < self.limit}[
            self.bound
        ]


@dataclass(frozen=True)
class PartReport:
    """What one part found. `plotted` is the quantity that the plot shows; a part that failed has only `failure`.

    files: what shall lie beside the report, text by name such as `flame.svg`.
    """

    name: str
    title: str
    how: str = ""
    plotted: str = ""
    figures: Sequence[Figure] = ()
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()
    wall_s: float = 0.0
    cpu_s: float = 0.0
    failure: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One run: where, when, with what, and what each part found."""

    date: str
    command: str
    quick: bool
    commit: str
    machine: Mapping[str, str | int | float]
    versions: Mapping[str, str]
    load_average: Mapping[str, float]
    parts: Sequence[PartReport] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every part ran; targets are findings, not faults."""
        return not any(part.failure for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """Nested dictionaries and lists of plain values; each target says whether it is `met`, files are names only."""
        values = asdict(self)
        for part, plain in zip(self.parts, values["parts"], strict=True):
            plain["files"] = list(part.files)
            for target, entry in zip(part.targets, plain["targets"], strict=True):
                entry["met"] = target.met
        return values
