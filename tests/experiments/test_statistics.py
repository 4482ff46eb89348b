"""Intervals against numbers worked out by hand, their coverage, and rliable's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.analysis.statistics import (
    interquartile_mean,
    mean_interval,
    mean_over_tasks,
    probability_of_improvement,
    seeds_label,
    share_interval,
)

RLIABLE = json.loads((Path(__file__).parent.parent / "golden" / "rliable.json").read_text())
del RLIABLE["origin"]


def test_students_interval():
    # By hand: mean 2, s^2 = 1, t_{0.975, 2} = 4.302653, so 2 +- 4.302653 / sqrt 3.
    assert mean_interval([1, 2, 3]) == pytest.approx((2, -0.4841377, 4.4841377), abs=1e-6)


def test_students_interval_over_tasks():
    # By hand: variances of the means 1/3 and 8/2, so nu = (13/3)^2 / (1/18 + 16), and the half
    # width is t_{0.975, nu} sqrt(13/3) / 2.
    found = mean_over_tasks([[1, 2, 3], [6, 10]])
    assert found.mean == 5
    half = stats.t.ppf(0.975, (13 / 3) ** 2 / (1 / 18 + 16)) * math.sqrt(13 / 3) / 2
    assert found.high - 5 == pytest.approx(half) == pytest.approx(5 - found.low)
    assert mean_over_tasks([[1, 2, 3]]) == mean_interval([1, 2, 3])


@pytest.mark.table
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 10])
@pytest.mark.parametrize(
    ("shape", "least"), [("normal", 0.93), ("uniform", 0.90), ("exponential", 0.85)]
)
def test_coverage(num_seeds, shape, least):
    rng = np.random.default_rng(num_seeds)
    values = getattr(rng, shape)(size=(1000, num_seeds))
    truth = {"normal": 0.0, "uniform": 0.5, "exponential": 1.0}[shape]
    covered = np.mean([low <= truth <= high for _, low, high in map(mean_interval, values)])
    # The percentile bootstrap has 0.51, 0.74, 0.83 and 0.91 on normal values.
    assert least <= covered
    if shape == "normal":
        assert covered <= 0.97


def test_coverage_of_the_bootstrap_from_ten_seeds():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 2, 10))
    found = [interquartile_mean(tasks) for tasks in values]
    assert np.mean([low <= 0 <= high for _, low, high in found]) >= 0.85


def test_too_few_seeds_have_no_interval():
    assert mean_interval([0.5]) == pytest.approx((0.5, math.nan, math.nan), nan_ok=True)
    nine = np.arange(9.0)
    assert np.isnan(interquartile_mean([nine])[1:]).all()
    assert np.isnan(probability_of_improvement([(nine, nine)])[1:]).all()
    ten = np.arange(10.0)
    assert np.isfinite(interquartile_mean([ten])).all()
    assert np.isfinite(probability_of_improvement([(ten, ten)])).all()
    assert np.isnan(interquartile_mean([ten, nine])[1:]).all()


def test_equal_values_are_their_own_interval():
    assert mean_interval([0.25] * 3) == (0.25, 0.25, 0.25)


def test_a_warning_below_five_seeds():
    assert seeds_label(5) == "5 seeds"
    assert seeds_label(4) == "4 seeds (fewer than 5: read with care)"
    assert seeds_label(1) == "1 seed, which gives no interval"


def test_share_of_walkers():
    # Wilson's interval of 8 of 10 (Brown, Cai, DasGupta 2001 by its formula): 0.490, 0.943.
    found = share_interval(0.8, 10)
    assert found == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)
    assert share_interval(1.0, 10).low < 0.75  # all of ten is no certainty


@pytest.mark.parametrize("case", RLIABLE.values(), ids=RLIABLE.keys())
def test_same_numbers_as_rliable(case):
    x, y = (np.array(case[name]).T for name in "xy")  # [tasks, seeds]
    found = interquartile_mean(x, min_seeds=1)
    point, *interval = case["interquartile_mean"]
    assert found.mean == pytest.approx(point, abs=1e-15)
    # Theirs and ours are draws of other random numbers.
    np.testing.assert_allclose(found[1:], interval, atol=0.03 * np.ptp(x))
    found = probability_of_improvement(list(zip(x, y, strict=True)), min_seeds=1)
    point, *interval = case["probability_of_improvement"]
    assert found.mean == pytest.approx(point, abs=1e-15)
    np.testing.assert_allclose(found[1:], interval, atol=0.03)


def test_interquartile_mean_leaves_out_the_extremes():
    assert interquartile_mean([[1e9, 1, 2, -1e9], [3, 4, 2, 2]]).mean == 2.25
    assert interquartile_mean([[5.0]], min_seeds=1) == (5, 5, 5)


def test_tasks_with_unequal_numbers_of_seeds():
    assert interquartile_mean([[1.0, 2.0], [6.0]]).mean == 3
    assert probability_of_improvement([([1], [0, 2]), ([1], [0])]).mean == 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_averaged(value):
    assert np.isnan(mean_interval([1.0, value])).all()
    assert np.isnan(interquartile_mean([[1.0, 2.0], [3.0, value]])).all()


def test_a_diverged_seed_in_a_comparison():
    assert np.isnan(probability_of_improvement([([1.0, math.nan], [0.0])])).all()
    assert probability_of_improvement([([math.inf], [0.0])]).mean == 1
