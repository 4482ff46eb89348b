"""The bootstrap against what it must agree with."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.statistics import bootstrap_mean, interquartile_mean, probability_of_improvement

RLIABLE = json.loads((Path(__file__).parent.parent / "golden" / "rliable.json").read_text())
del RLIABLE["origin"]


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


@pytest.mark.parametrize("case", RLIABLE.values(), ids=RLIABLE.keys())
def test_same_numbers_as_rliable(case):
    x, y = (np.array(case[name]).T for name in "xy")  # [tasks, seeds]
    found = interquartile_mean(x)
    point, *interval = case["interquartile_mean"]
    assert found.mean == pytest.approx(point, abs=1e-15)
    # Theirs and ours are draws of other random numbers.
    np.testing.assert_allclose(found[1:], interval, atol=0.03 * np.ptp(x))
    found = probability_of_improvement(list(zip(x, y, strict=True)))
    point, *interval = case["probability_of_improvement"]
    assert found.mean == pytest.approx(point, abs=1e-15)
    np.testing.assert_allclose(found[1:], interval, atol=0.03)


def test_interquartile_mean_leaves_out_the_extremes():
    assert interquartile_mean([[1e9, 1, 2, -1e9], [3, 4, 2, 2]]).mean == 2.25
    assert interquartile_mean([[5.0]]) == (5, 5, 5)


def test_tasks_with_unequal_numbers_of_seeds():
    assert interquartile_mean([[1.0, 2.0], [6.0]]).mean == 3
    assert probability_of_improvement([([1], [0, 2]), ([1], [0])]).mean == 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_averaged(value):
    assert np.isnan(bootstrap_mean([1.0, value])).all()
    assert np.isnan(interquartile_mean([[1.0, 2.0], [3.0, value]])).all()


def test_a_diverged_seed_in_a_comparison():
    assert np.isnan(probability_of_improvement([([1.0, math.nan], [0.0])])).all()
    assert probability_of_improvement([([math.inf], [0.0])]).mean == 1
