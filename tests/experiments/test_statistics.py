"""The bootstrap against what it must agree with."""

import numpy as np

from experiments.statistics import bootstrap_mean


def test_close_to_the_normal_interval_for_many_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(
        [mean, low, high], values.mean() + half * np.array([0, -1, 1]), atol=0.02
    )


def test_the_same_values_give_the_same_interval():
    values = [0.9, 0.91, 0.87, 0.95, 0.9]
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert min(values) < bootstrap_mean(values).low < bootstrap_mean(values).high < max(values)


def test_equal_or_single_values_are_their_own_interval():
    assert bootstrap_mean([0.5]) == (0.5, 0.5, 0.5)
    assert bootstrap_mean([0.25] * 3) == (0.25, 0.25, 0.25)
