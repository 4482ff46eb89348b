"""Noisy bandits: their formula, the frequencies of their noise, pairing, extremes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from trustjax.envs.bandit import (
    CLEAN,
    SCENARIOS,
    Bandit,
    Corruption,
    corruptions,
    make_bandit,
    sample_groups,
    true_rewards,
    win_mass,
)

NAMES = list(SCENARIOS)


@pytest.fixture(scope="module")
def found():
    """All scenarios of two seeds in one compiled program, with the same key for a seed."""

    def groups(key, corruption):
        of_bandit, of_groups = jax.random.split(key)
        return sample_groups(of_groups, make_bandit(of_bandit), corruption, num_groups=4096)

    over_scenarios = jax.vmap(groups, in_axes=(None, 0))
    both = jax.jit(jax.vmap(over_scenarios, in_axes=(0, None)))
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.tree.map(np.asarray, both(keys, corruptions(NAMES)))


def test_rewards_by_hand():
    """w = (.5, .5, .5, .5), x = (1, 2), phi = (0, 1), (-4, 1): tanh(2) + 2 / 8, tanh(0) - 2 / 8."""
    bandit = Bandit(jnp.full(4, 0.5))
    x, phi = jnp.array([1.0, 2.0]), jnp.array([[0.0, 1.0], [-4.0, 1.0]])
    np.testing.assert_allclose(true_rewards(bandit, x, phi), [np.tanh(2) + 0.25, -0.25], rtol=1e-6)


def test_scenarios_are_those_of_the_sheet():
    assert len(SCENARIOS) == 12
    assert SCENARIOS["outliers/medium"] == Corruption(noise=0.5, outliers=0.1)
    assert SCENARIOS["shift/heavy"] == Corruption(shift=2.0)
    assert SCENARIOS["adversarial/light"] == Corruption(flips=0.1)
    assert SCENARIOS["cauchy/medium"] == Corruption(cauchy=0.3)
    assert Corruption() == CLEAN
    np.testing.assert_allclose(corruptions(NAMES).flips[6:9], [0.1, 0.2, 0.3])


def test_rewards_of_both_seeds(found):
    """The product x . phi / 8 has a spread of sqrt(16) / 8, and tanh is of a standard normal."""
    rewards = found.rewards[:, NAMES.index("cauchy/light")]
    inner = np.einsum("sgd,sgpd->sgp", found.contexts[:, -1], found.items[:, -1]) / 8
    np.testing.assert_allclose(inner.std(), 0.5, rtol=0.02)
    assert np.abs(rewards - inner).max() <= 1
    # w . [x, phi] is standard normal, as w has norm 1: the median of |tanh z| is tanh(0.6745).
    np.testing.assert_allclose(np.median(np.abs(rewards - inner)), np.tanh(0.6745), rtol=0.03)
    assert not np.allclose(found.rewards[0], found.rewards[1])


def test_what_is_corrupted_and_how_often(found):
    """Each family by the share, the spread or the quartiles of what it does."""
    for name, each in SCENARIOS.items():
        index = NAMES.index(name)
        error = (found.observed - found.rewards)[:, index]
        mean = found.contexts[:, index].mean()
        np.testing.assert_allclose(mean, each.shift, atol=0.01)
        if name.startswith("shift"):
            assert not error.any()
        elif name.startswith("adversarial"):
            flipped = np.isclose(found.observed, -found.rewards, atol=1e-6)[:, index].all(-1)
            kept = (error == 0).all(-1)
            assert (flipped ^ kept).all(), "whole groups"
            np.testing.assert_allclose(flipped.mean(), each.flips, atol=0.015)
        elif name.startswith("outliers"):
            width = float(each.noise)
            wide = np.hypot(width, 10)
            for bound in (width, 10.0):
                inside, far = (scipy.stats.norm(0, w).sf(bound) * 2 for w in (width, wide))
                expected = (1 - each.outliers) * inside + each.outliers * far
                np.testing.assert_allclose(np.mean(np.abs(error) > bound), expected, rtol=0.07)
        else:
            quartiles = np.quantile(error, [0.25, 0.5, 0.75])
            scale = float(each.cauchy)
            np.testing.assert_allclose(quartiles, [-scale, 0, scale], atol=0.05 * scale)


def test_scenarios_share_their_draws(found):
    """Severities differ by a factor alone; unshifted contexts and all items are equal."""
    np.testing.assert_array_equal(found.items[:, 0], found.items[:, -1])
    np.testing.assert_array_equal(found.contexts[:, 0], found.contexts[:, -1])
    light, heavy = (
        (found.observed - found.rewards)[:, NAMES.index(f"cauchy/{level}")]
        for level in ("light", "heavy")
    )
    np.testing.assert_allclose(heavy, 10 * light, rtol=1e-4, atol=1e-5)


def test_all_numbers_are_finite(found):
    assert all(np.isfinite(leaf).all() for leaf in found)
    assert np.abs(found.observed).max() > 1e3  # and the tails are heavy


def test_win_mass():
    log_probs = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]))
    rewards = jnp.array([[0.0, 2.0, 1.0], [3.0, -1.0, 0.0]])
    np.testing.assert_allclose(win_mass(log_probs, rewards), [0.2, 0.5], rtol=1e-6)


def test_refused():
    bandit = make_bandit(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="num_features must be >= 1, got 0"):
        make_bandit(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="num_groups must be >= 1, got 0"):
        sample_groups(jax.random.key(0), bandit, num_groups=0)
    with pytest.raises(ValueError, match="num_items must be >= 2, got 1"):
        sample_groups(jax.random.key(0), bandit, num_groups=1, num_items=1)
    with pytest.raises(ValueError, match="names must be one of 'outliers/light'"):
        corruptions(["shift/none"])
    with pytest.raises(ValueError, match="names must hold a scenario"):
        corruptions([])
    with pytest.raises(ValueError, match="contexts must have 3 features"):
        true_rewards(bandit, jnp.zeros((2, 4)), jnp.zeros((2, 5, 3)))
    with pytest.raises(ValueError, match="items must have the shape of contexts"):
        true_rewards(bandit, jnp.zeros((3, 3)), jnp.zeros((2, 5, 3)))
    with pytest.raises(ValueError, match="rewards must have the shape"):
        win_mass(jnp.zeros((2, 4)), jnp.zeros((2, 3)))
