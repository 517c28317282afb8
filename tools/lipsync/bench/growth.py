"""Whether something grows without end: samples taken along a run come in, the growth a cycle from mid-run on comes out.
Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .figures import Spread

_APART = 0.25
"""Pairs of samples that lie closer together, as a share of what is looked at, say more of noise than of growth."""


@dataclass(frozen=True)
class Sample:
    """What was seen after so many cycles and seconds: values by what they are of."""

    cycles: int
    seconds: float
    values: Mapping[str, float]


def second_half(samples: Sequence[Sample]) -> list[Sample]:
    """Those from the middle of the cycles on. By then what is only filled once (caches, arenas) is full."""
    return [sample for sample in samples if 2 * sample.cycles >= samples[-1].cycles]


def growth(samples: Sequence[Sample], name: str) -> Spread:
    """Growth of a value a cycle: the slopes between pairs of samples that are well apart, whose median is the estimate
    of Theil and Sen, which a few outliers do not move.

    Raises ValueError where there are no such pairs: fewer than two samples, or all after the same number of cycles.
    """
    cycles = np.array([sample.cycles for sample in samples], np.float64)
    values = np.array([sample.values[name] for sample in samples], np.float64)
    first, last = np.triu_indices(len(samples), 1)
    distance = cycles[last] - cycles[first]
    apart = (distance > 0) & (distance >= _APART * np.ptp(cycles)) if len(samples) else distance > 0
    return Spread.of((values[last] - values[first])[apart] / distance[apart])
