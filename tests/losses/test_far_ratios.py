"""Ratios of policies far beyond what a float32 holds, and actions that cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.losses import (
    mdpo_actor_loss,
    mdpo_forward_loss,
    mdpo_loss,
    ppo_clip_loss,
    ppo_kl_loss,
    sac_actor_loss,
    sac_critic_loss,
    temperature_loss,
    trpo_surrogate,
    vtrace,
)

INF, NAN = np.inf, np.nan
LARGE = np.finfo(np.float32).max / 2
FAR = np.array([100.0, -100.0, 1e4, -1e4, 88.8, -110.0, 3e38, -3e38], np.float32)


def without_kl(loss, **numbers):
    return lambda x, old, advantage: loss(x, old, advantage, jnp.zeros_like(x), **numbers)


SURROGATES = {
    "trpo": trpo_surrogate,
    "ppo_clip": ppo_clip_loss,
    "ppo_kl": without_kl(ppo_kl_loss, coefficient=1.0),
    "mdpo": without_kl(mdpo_loss, step_size=1.0),
}
each_surrogate = pytest.mark.parametrize("name", SURROGATES)


@functools.partial(jax.jit, static_argnums=0)
def values_and_slopes(loss, *each):
    return jax.vmap(jax.value_and_grad(loss))(*each)


def value_and_slope(loss, log_prob, old, advantage):
    each = (np.asarray(x, np.float32) for x in (log_prob, old, advantage))
    return values_and_slopes(loss, *np.broadcast_arrays(*each))


def test_the_clipped_branch_has_no_slope():
    slope = jax.jit(jax.grad(lambda x: ppo_clip_loss(x, 0 * x, jnp.ones(2)).mean()))
    np.testing.assert_array_equal(slope(jnp.array([100.0, 0.0])), [0, -0.5])


@pytest.mark.parametrize(
    ("advantage", "values", "slopes"),
    [
        (1.0, [-1.2, 0] * 4, [0, 0] * 4),
        (-1.0, [LARGE, 0.8] * 4, [LARGE, 0] * 4),
        (0.0, [0, 0] * 4, [0, 0] * 4),
    ],
)
def test_clip_far_away(advantage, values, slopes):
    """As in exact arithmetic, but for ratios that float32 cannot hold."""
    found = value_and_slope(ppo_clip_loss, FAR, 0.0, advantage)
    np.testing.assert_allclose(found[0], values, rtol=1e-4)
    np.testing.assert_allclose(found[1], slopes, rtol=1e-4)


@each_surrogate
@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0, -0.0, 1e-30])
def test_float32_agrees_with_float64(name, advantage):
    """Wherever float32 holds the numbers."""
    ratios = np.linspace(-86, 87, 30).astype(np.float32)
    ratios = np.concatenate([ratios, FAR[:2]])
    value, slope = value_and_slope(SURROGATES[name], ratios, 0.0, advantage)
    with jax.enable_x64(True):
        each = (np.asarray(x, np.float64) for x in np.broadcast_arrays(ratios, 0, advantage))
        exact = values_and_slopes(SURROGATES[name], *each)
    with np.errstate(over="ignore", under="ignore"):
        expected = [np.asarray(x).astype(np.float32) for x in exact]
    for found, other in zip((value, slope), expected, strict=True):
        held = np.isfinite(other) & (np.abs(ratios) < 87.5)
        np.testing.assert_allclose(found[held], other[held], rtol=2e-5, atol=1e-37)
        assert not np.isnan(found).any()


@each_surrogate
def test_impossible_actions(name):
    """The new policy's alone has r = 0; both policies' have r = 1, and nothing moves them."""
    new, old = np.array([-INF, -INF, -1.0]), np.array([-1.0, -INF, -1.0])
    value, slope = value_and_slope(SURROGATES[name], new, old, 0.5)
    sign = 1 if name == "trpo" else -1
    np.testing.assert_array_equal(value, [0, sign * 0.5, sign * 0.5])
    np.testing.assert_array_equal(slope, [0, 0, sign * 0.5])


@each_surrogate
@pytest.mark.parametrize("size", [1.0, -1.0, 0.0, 1e3, -1e3])
def test_masks_keep_slopes_finite(name, size):
    x = np.concatenate([FAR, np.array([-INF, INF, 0.5], np.float32)])
    old = np.where(np.arange(11) == 8, -INF, 0).astype(np.float32)
    seen = np.arange(11) == 10

    def mean(x, mask_advantage):
        advantage = jnp.where(seen | ~mask_advantage, size, 0)
        return jnp.mean(SURROGATES[name](x, old, advantage), where=seen)

    slope_of = jax.jit(jax.grad(mean))
    for mask_advantage in (True, False):
        slope = slope_of(x, mask_advantage)
        np.testing.assert_array_equal(slope[:10], 0)
        assert np.isfinite(slope[10])


def test_what_went_too_far_is_driven_back():
    """The slope does not vanish where the ratio is cut."""
    x = jnp.array([100.0, 1e4, 3e38])
    slope = jax.jit(jax.grad(lambda x: ppo_clip_loss(x, 0 * x, -jnp.ones(3)).sum()))(x)
    np.testing.assert_allclose(slope, LARGE, rtol=1e-4)


@each_surrogate
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_nan_stays_nan(name, advantage):
    value, _ = value_and_slope(SURROGATES[name], [NAN], 0.0, advantage)
    assert np.isnan(value).all()
    value, _ = value_and_slope(SURROGATES[name], FAR, 0.0, NAN)
    assert np.isnan(value).all()


@pytest.mark.parametrize("clip", [0.0, 1.0, 1.5])
def test_clips_at_the_edges(clip):
    """At r = 1 nothing is clipped yet; from 1 on there is no lower bound."""
    value, slope = value_and_slope(
        functools.partial(ppo_clip_loss, clip=clip), [0.0, 0.0, -50.0], 0.0, [1.0, -1.0, -1.0]
    )
    small = np.exp(-50) if clip else 1.0
    np.testing.assert_allclose(value, [-1, 1, small], rtol=1e-5)
    np.testing.assert_allclose(slope, [-1, 1, small if clip else 0], rtol=1e-5)


@pytest.mark.parametrize("clips", [{}, {"clip_rho": 3.0}, {"clip_rho": INF, "clip_c": INF}])
def test_vtrace(clips):
    """Errors of zero stay zero, whatever their weight."""
    zero, none = jnp.zeros(8), jnp.zeros(8, bool)
    targets = jax.jit(functools.partial(vtrace, discount=0.9, lambda_=0.5, **clips))
    found = targets(jnp.asarray(FAR), zero, zero, zero, none, none)
    np.testing.assert_array_equal(found, np.zeros((2, 8)))
    # What follows a termination is not looked at.
    after = jnp.array([NAN, *zero[1:]])
    found = targets(zero, zero, zero, after, none.at[0].set(True), none)
    np.testing.assert_array_equal(found, np.zeros((2, 8)))


def test_temperature():
    loss = lambda x, log_prob: temperature_loss(x, log_prob, target_entropy=1.0)
    for at_target in (100.0, -200.0):
        value, slope = jax.value_and_grad(loss)(jnp.float32(at_target), jnp.float32(-1.0))
        assert (value, slope) == (0, 0)
    value, slope = jax.value_and_grad(loss)(jnp.float32(100), jnp.float32(-3.0))
    np.testing.assert_allclose((value, slope), INF)


def test_no_weight_on_an_impossible_action():
    """A weight of zero takes no part in the sum, though log pi is -inf."""
    numbers = {"step_size": 2.0, "temperature": 0.5}  # at which SAC and MDPO are the same
    one = jnp.float32
    assert mdpo_actor_loss(one(-1), one(-INF), one(2), **numbers) == -2.5
    assert sac_actor_loss(one(-INF), one(2), temperature=0.0) == -2
    zero = one(0)
    found = sac_critic_loss(
        zero, zero, one(1), one(-INF), jnp.array(False), discount=0.5, temperature=0.0
    )
    assert found == 0.125
    weights_underflow = mdpo_forward_loss(
        jnp.array([-1.0, -INF]), jnp.array([-1.0, -1.0]), jnp.array([0.0, -500.0]),
        drawn=False, **numbers,
    )  # fmt: skip
    assert weights_underflow == 1
