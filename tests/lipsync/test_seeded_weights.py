"""Seeded weights have the variances they claim, and Moments predicts what really happens to Gaussian values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.seeded_weights import Moments, SeededWeights


def test_filters_are_he_uniform() -> None:
    values = SeededWeights(0).filters(64, 32, 3).values()
    assert values.shape == (64, 32, 3, 3)
    assert values.dtype == np.float32
    assert values.var() == pytest.approx(2 / (32 * 9), rel=0.05)
    assert abs(values.mean()) < 0.005
    assert np.abs(values).max() <= np.sqrt(6 / (32 * 9))


def test_sums_are_those_of_the_values() -> None:
    filters = SeededWeights(1).filters(8, 16, 3)
    flat = filters.values().reshape(8, -1).astype(np.float64)
    np.testing.assert_allclose(filters.sums(), flat.sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(filters.square_sums(), (flat**2).sum(axis=1), rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(low=st.floats(-10, 10), width=st.floats(0.01, 10))
def test_vectors_stay_in_their_range(low: float, width: float) -> None:
    vector = SeededWeights(2).vector(500, low, low + width)
    assert vector.dtype == np.float32
    assert low - 1e-5 <= vector.min() < vector.max() <= low + width + 1e-5
    assert np.ptp(vector) > 0.9 * width


def test_a_stream_goes_on() -> None:
    weights = SeededWeights(3)
    assert weights.vector(4, 0, 1).tolist() != weights.vector(4, 0, 1).tolist()
    assert SeededWeights(3).vector(4, 0, 1).tolist() != SeededWeights(4).vector(4, 0, 1).tolist()


@settings(deadline=None, max_examples=40)
@given(mean=st.floats(-2, 2), deviation=st.floats(0.2, 3))
def test_rectified_moments_are_those_of_a_gaussian(mean: float, deviation: float) -> None:
    sample = np.maximum(np.random.default_rng(0).normal(mean, deviation, 200_000), 0)
    predicted = Moments(mean, deviation**2).rectified()
    assert predicted.mean == pytest.approx(sample.mean(), abs=0.01 * deviation)
    assert predicted.variance == pytest.approx(sample.var(), abs=0.03 * deviation**2)


def test_moments_of_sums_and_concatenations() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(1, 2, 300_000), random.normal(-1, 1, 100_000)
    assert Moments(1, 4).plus(Moments(-1, 1)) == Moments(0, 5)
    beside = Moments(1, 4).beside(Moments(-1, 1), 0.25)
    joined = np.concatenate([x, y])
    assert beside.mean == pytest.approx(joined.mean(), abs=0.02)
    assert beside.variance == pytest.approx(joined.var(), abs=0.05)


def test_normalisation_makes_unit_values() -> None:
    weights = SeededWeights(5)
    filters = weights.filters(128, 64, 1)
    bias = weights.vector(128, -0.1, 0.1)
    drawn = weights.normalisation(filters, bias, Moments(0.4, 0.3))
    x = np.random.default_rng(0).normal(0.4, np.sqrt(0.3), (64, 4000))
    y = filters.values().reshape(128, 64) @ x + bias[:, None]
    z = (y - drawn.mean[:, None]) / np.sqrt(drawn.variance[:, None])
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=0.1)
    assert np.abs(z.std(axis=1) - 1).max() < 0.12
    assert drawn.scale.min() >= 0.75
    assert drawn.shift.max() <= 0.25
