"""Random weights for networks that nobody trained: a seed comes in, float32 arrays that keep activations alive go out.

Bit-identical on every platform and numpy version: PCG64's raw stream is guaranteed by NEP 19 (the distributions of
`Generator` are not), sums run over integers, and the rest are single IEEE operations, which are exactly rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BITS = 24
_ONE = 1 << (_BITS - 1)
# The variance of a uniform variable on [-1, 1).
_UNIFORM_VARIANCE = 1 / 3
# Neighbouring pixels and offsets of channels correlate, which the prediction of variances leaves out; without this
# margin they add up to deviations of 10 to 50 at the end of the avatar model, with it all of its layers stay within 0.2
# to 4.
_MARGIN = 1.1

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Moments:
    """What a tensor's values are expected to look like over inputs and channels: mean and variance."""

    mean: float
    variance: float

    def rectified(self) -> Moments:
        """The moments after ReLU, were the values Gaussian. Rounded, because libm's last bit differs by platform."""
        deviation = math.sqrt(self.variance)
        ratio = self.mean / deviation
        below = 0.5 * (1 + math.erf(ratio / math.sqrt(2)))
        density = math.exp(-0.5 * ratio * ratio) / math.sqrt(2 * math.pi)
        mean = self.mean * below + deviation * density
        square = (self.mean**2 + self.variance) * below + self.mean * deviation * density
        return Moments(round(mean, 6), round(square - mean**2, 6))

    def plus(self, other: Moments) -> Moments:
        """The moments of the sum with an independent tensor."""
        return Moments(self.mean + other.mean, self.variance + other.variance)

    def beside(self, other: Moments, share: float) -> Moments:
        """The moments of a concatenation of which `other` is `share` (0..1)."""
        mean = (1 - share) * self.mean + share * other.mean
        spread = share * (1 - share) * (self.mean - other.mean) ** 2
        return Moments(mean, (1 - share) * self.variance + share * other.variance + spread)


@dataclass(frozen=True)
class Normalisation:
    """The four vectors of a BatchNormalization at inference, and the moments of what it puts out."""

    scale: Array
    shift: Array
    mean: Array
    variance: Array
    output: Moments


class SeededWeights:
    """One stream of weights; the order of the calls is part of what the seed means."""

    def __init__(self, seed: int) -> None:
        self._stream = np.random.PCG64(seed)

    def filters(self, out_channels: int, in_channels: int, kernel: int) -> Filters:
        """He-uniform filters [out, in, kernel, kernel]: variance 2 / fan-in."""
        fan_in = in_channels * kernel * kernel
        integers = self._integers(out_channels * fan_in).reshape(out_channels, fan_in)
        step = math.sqrt(2 / (fan_in * _UNIFORM_VARIANCE)) / _ONE
        return Filters(integers, step, (out_channels, in_channels, kernel, kernel))

    def vector(self, length: int, low: float, high: float) -> Array:
        """Uniform values [length] in [low, high)."""
        return ((low + high) / 2 + self._integers(length) * ((high - low) / 2 / _ONE)).astype(np.float32)

    def normalisation(self, filters: Filters, bias: Array | None, source: Moments) -> Normalisation:
        """Statistics as training would have left them: each channel's expected mean and variance are what `filters`
        make of `source` (and a little more variance), so that the output has mean about 0 and variance about 1; scale
        and shift vary by channel."""
        mean = filters.sums() * source.mean + (0 if bias is None else bias)
        length = len(mean)
        return Normalisation(
            scale=self.vector(length, 0.75, 1.25),
            shift=self.vector(length, -0.25, 0.25),
            mean=mean.astype(np.float32),
            variance=(filters.square_sums() * (_MARGIN * source.variance)).astype(np.float32),
            output=Moments(0.0, 1.0),
        )

    def _integers(self, count: int) -> npt.NDArray[np.int64]:
        """Uniform integers in [-2**23, 2**23)."""
        raw: npt.NDArray[np.uint64] = self._stream.random_raw(count)
        signed: npt.NDArray[np.int64] = (raw >> np.uint64(64 - _BITS)).astype(np.int64) - _ONE
        return signed


@dataclass(frozen=True)
class Filters:
    """Convolution filters as integers [out, fan-in] times a step, whose sums are exact in any order of addition."""

    integers: npt.NDArray[np.int64]
    step: float
    shape: tuple[int, int, int, int]

    def values(self) -> Array:
        """The filters as float32 of `shape`."""
        return (self.integers * self.step).astype(np.float32).reshape(self.shape)

    def sums(self) -> npt.NDArray[np.float64]:
        """Each output channel's sum of weights [out]: its answer to a constant 1."""
        return np.asarray(self.integers.sum(axis=1) * self.step, np.float64)

    def square_sums(self) -> npt.NDArray[np.float64]:
        """Each output channel's sum of squared weights [out]: its answer's variance to white noise of variance 1."""
        return np.asarray((self.integers**2).sum(axis=1) * (self.step * self.step), np.float64)
