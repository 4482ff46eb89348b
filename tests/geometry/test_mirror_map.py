"""Mirror maps: the identities that define one, limits of their parameters, numbers at zero."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.geometry import (
    bregman_divergence,
    euclidean,
    hypentropy,
    kl_divergence,
    negative_entropy,
    p_norm,
    separable_p,
    simplex,
    spectral_hypentropy,
)

MAPS = {
    "euclidean": euclidean(),
    "negative_entropy": negative_entropy(),
    "simplex": simplex(),
    "p_norm_1.1": p_norm(1.1),
    "p_norm_1.5": p_norm(1.5),
    "p_norm_4": p_norm(4.0),
    "separable_p_1.5": separable_p(1.5),
    "separable_p_3": separable_p(3.0),
    "hypentropy_1": hypentropy(1.0),
    "hypentropy_0.001": hypentropy(1e-3),
    "spectral_hypentropy": spectral_hypentropy(0.5),
}
FUNCTIONS = ("potential", "to_dual", "to_primal", "divergence", "move", "bound")
# Compiled, as they are called at many points.
MAPS = {
    name: each._replace(**{f: jax.jit(getattr(each, f)) for f in FUNCTIONS})
    for name, each in MAPS.items()
}
# Those for which the bound is one for steps of any length.
LOCAL = ("euclidean", "negative_entropy", "separable_p_1.5", "hypentropy_1")
BOUNDED = ("euclidean", "simplex", "p_norm_1.1", "p_norm_1.5")
maps = pytest.mark.parametrize("name", MAPS)


def points(name, count, seed, size=5):
    """Random points in the domain of the map, of both signs if it has both."""
    random = np.random.default_rng(seed)
    shape = (count, 4, 3) if name == "spectral_hypentropy" else (count, size)
    drawn = random.normal(size=shape)
    if name == "simplex":
        drawn = np.exp(drawn) / np.exp(drawn).sum(-1, keepdims=True)
    if name == "negative_entropy":
        drawn = np.exp(drawn)
    return [jnp.asarray(x) for x in drawn]


@pytest.mark.table
@maps
@pytest.mark.usefixtures("x64")
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_three_points(name, seed):
    """B(x, z) = B(x, y) + B(y, z) + <grad psi(y) - grad psi(z), x - y>, and B >= 0."""
    mirror_map = MAPS[name]
    x, y, z = points(name, 3, seed)
    with jax.enable_x64(True):
        divergence = functools.partial(bregman_divergence, mirror_map)
        turned = jnp.sum((mirror_map.to_dual(y) - mirror_map.to_dual(z)) * (x - y))
        expected = divergence(x, y) + divergence(y, z) + turned
        np.testing.assert_allclose(divergence(x, z), expected, rtol=1e-8, atol=1e-12)
        assert divergence(x, y) > 0
        np.testing.assert_allclose(divergence(x, x), 0, atol=1e-12)


@pytest.mark.table
@maps
def test_divergence_is_that_of_the_potential(name, x64):
    mirror_map = MAPS[name]
    x, y = points(name, 2, 0)
    gap = mirror_map.potential(x) - mirror_map.potential(y)
    expected = gap - jnp.sum(jax.grad(mirror_map.potential)(y) * (x - y))
    np.testing.assert_allclose(bregman_divergence(mirror_map, x, y), expected, rtol=1e-9)


@maps
def test_dual_is_the_gradient_and_primal_its_inverse(name, x64):
    mirror_map = MAPS[name]
    (x,) = points(name, 1, 1)
    dual = mirror_map.to_dual(x)
    np.testing.assert_allclose(dual, jax.grad(mirror_map.potential)(x), rtol=1e-9)
    np.testing.assert_allclose(mirror_map.to_primal(dual), x, rtol=1e-9)


@maps
def test_inverse_in_float32(name):
    mirror_map = MAPS[name]
    (x,) = points(name, 1, 1)
    x = x.astype(jnp.float32)
    found = mirror_map.to_primal(mirror_map.to_dual(x))
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(x))))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("negative_entropy", "hypentropy_1")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in MAPS
        if name != "spectral_hypentropy"  # JAX lacks that derivative of singular values
    ],
)
def test_hessian_of_the_divergence(name, x64):
    """At x = y it is the Hessian of the potential, with respect to either argument."""
    mirror_map = MAPS[name]
    (x,) = points(name, 1, 6)
    expected = jax.jit(jax.hessian(mirror_map.potential))(x)
    for argument in (0, 1):
        hessian = jax.jit(jax.hessian(mirror_map.divergence, argnums=argument))(x, x)
        np.testing.assert_allclose(hessian, expected, rtol=1e-6, atol=1e-9)


@maps
@pytest.mark.parametrize("rate", [1e-3, 0.3, 3.0])
def test_move_is_a_step_in_the_dual(name, rate, x64):
    mirror_map = MAPS[name]
    x, _ = points(name, 2, 2)
    step = rate * jnp.asarray(np.random.default_rng(3).normal(size=x.shape))
    expected = mirror_map.to_primal(mirror_map.to_dual(x) - step)
    np.testing.assert_allclose(x + mirror_map.move(x, step), expected, rtol=1e-8, atol=1e-12)


@maps
def test_bound(name, x64):
    """It holds for any step if the map is strongly convex in a norm, otherwise for small ones."""
    mirror_map = MAPS[name]
    for seed in range(20):
        (x,) = points(name, 1, seed)
        direction = jnp.asarray(np.random.default_rng(seed).normal(size=x.shape))
        for rate in (1e-3, 0.1, 3.0) if name in BOUNDED else (1e-3,):
            step = rate * direction
            distance = bregman_divergence(mirror_map, x + mirror_map.move(x, step), x)
            bound = mirror_map.bound(x, step)
            slack = 1.01 if name in BOUNDED else 1.05
            if name != "p_norm_4":
                assert distance <= slack * bound
            if rate == 1e-3 and name in LOCAL:
                np.testing.assert_allclose(distance, bound, rtol=0.05)


def test_simplex_divergence_is_kl(x64):
    x, y = points("simplex", 2, 5)
    found = bregman_divergence(simplex(), x, y)
    np.testing.assert_allclose(found, kl_divergence(jnp.log(x), jnp.log(y)), rtol=1e-10)


def test_simplex_of_any_axis(x64):
    x, y = (jnp.stack(points("simplex", 4, seed)) for seed in (0, 1))
    np.testing.assert_allclose(simplex(axis=0).move(x.T, y.T), simplex().move(x, y).T, rtol=1e-12)
    np.testing.assert_allclose(simplex(axis=0).bound(x.T, y.T), simplex().bound(x, y))


def test_two_is_gradient_descent(x64):
    (x,) = points("euclidean", 1, 0)
    step = jnp.array([0.3, -2.0, 0.1, 0.0, 5.0])
    for mirror_map in (p_norm(2.0), separable_p(2.0)):
        np.testing.assert_allclose(mirror_map.move(x, step), -step, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(mirror_map.bound(x, step), 0.5 * jnp.sum(step**2), rtol=1e-12)


def test_ends_of_hypentropy(x64):
    """beta to infinity: gradient descent with rate beta t; beta to 0: EG+- with u v = beta^2/4."""
    (x,) = points("euclidean", 1, 0)
    step = jnp.array([0.3, -2.0, 0.1, 0.0, 1.0])
    wide = hypentropy(1e5)
    np.testing.assert_allclose(wide.move(x, step / 1e5), -step, rtol=1e-6, atol=1e-9)
    beta = 1e-3
    u, v = ((sign * x + jnp.sqrt(x**2 + beta**2)) / 2 for sign in (1, -1))
    moved = u * jnp.exp(-step) - v * jnp.exp(step)
    np.testing.assert_allclose(x + hypentropy(beta).move(x, step), moved, rtol=1e-8)
    positive = jnp.abs(x)
    small = positive + hypentropy(1e-9).move(positive, step)
    np.testing.assert_allclose(small, positive * jnp.exp(-step), rtol=1e-9)


def test_hypentropy_does_not_cancel_in_float32():
    """x cosh s - sqrt(x^2 + beta^2) sinh s loses three digits here."""
    x, step = jnp.array([1.0, -1.0]), jnp.array([5.0, -5.0])
    found = x + hypentropy(1e-6).move(x, step)
    np.testing.assert_allclose(found, [math.exp(-5), -math.exp(-5)], rtol=2e-5)
    naive = x * jnp.cosh(step) - jnp.hypot(x, 1e-6) * jnp.sinh(step)
    assert jnp.max(jnp.abs(naive / found - 1)) > 1e-4


@pytest.mark.table
@maps
def test_small_divergences_in_float32(name):
    """The points are a ten-thousandth apart, where psi(x) - psi(y) has no digit left."""
    mirror_map = MAPS[name]
    x, other = points(name, 2, 4)
    y = x * (1 + 1e-4 * jnp.sin(other))
    if name == "simplex":
        y = y / y.sum()
    with jax.enable_x64(True):
        exact = bregman_divergence(mirror_map, np.float64(x), np.float64(y))
    found = bregman_divergence(mirror_map, x, y)
    assert found >= 0
    if name in ("euclidean", "negative_entropy", "simplex", "hypentropy_1", "hypentropy_0.001"):
        np.testing.assert_allclose(found, exact, rtol=2e-2)


@pytest.mark.table
@maps
def test_zeros(name):
    """Points, steps and gradients through both are finite at zero; a zero step does not move."""
    mirror_map = MAPS[name]
    (x,) = points(name, 1, 0)
    x = jnp.zeros_like(x) if name != "simplex" else jnp.zeros_like(x).at[1].set(1.0)
    for step in (jnp.zeros_like(x), jnp.ones_like(x).at[0].set(-0.5)):
        for value in (
            mirror_map.move(x, step),
            mirror_map.bound(x, step),
            bregman_divergence(mirror_map, x, x),
            mirror_map.potential(x),
        ):
            assert jnp.all(jnp.isfinite(value))
        if name != "spectral_hypentropy":  # whose singular values coincide at zero
            slopes = jax.grad(lambda x, s: jnp.sum(mirror_map.move(x, s)), argnums=(0, 1))(x, step)
            assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes)
    np.testing.assert_allclose(mirror_map.move(x, jnp.zeros_like(x)), jnp.zeros_like(x), atol=1e-7)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_p_norm_at_any_size(size):
    """Powers of such numbers under- or overflow in float32."""
    x = jnp.array([3.0, -1.0, 0.5], jnp.float32)
    step = jnp.array([0.2, 0.1, -1.0], jnp.float32)
    for p in (1.05, 1.5, 6.0):
        expected = p_norm(p).move(x, step)
        found = p_norm(p).move(x * size, step * size) / size
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_zeros_stay_zero():
    x = jnp.array([0.0, 0.4, 0.6])
    step = jnp.array([-5.0, 1.0, 0.0])
    assert simplex().move(x, step)[0] == 0
    assert negative_entropy().move(x, step)[0] == 0


def test_divergence_of_trees():
    x = {"a": jnp.array([1.0, 2.0]), "n": jnp.array([1, 2])}
    y = {"a": jnp.array([0.0, 0.0]), "n": jnp.array([3, 4])}
    assert bregman_divergence(euclidean(), x, y) == 2.5
    assert bregman_divergence(euclidean(), {}, {}) == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: p_norm(1.0), "p must be > 1, got 1"),
        (lambda: separable_p(0.5), "p must be > 1, got 0.5"),
        (lambda: hypentropy(0.0), "beta must be > 0, got 0"),
        (lambda: spectral_hypentropy(-1.0), "beta must be > 0, got -1"),
        (lambda: spectral_hypentropy().to_dual(jnp.ones(3)), r"takes matrices, got shape \(3,\)"),
    ],
)
def test_bad_numbers(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.table
@pytest.mark.parametrize("make", [p_norm, separable_p, hypentropy, spectral_hypentropy])
def test_number_may_be_traced(make):
    x = jnp.array([[1.0, -2.0], [0.5, 0.3]])
    numbers = jnp.array([1.5, 3.0])
    found = jax.vmap(lambda number: make(number).move(x, 0.1 * x))(numbers)
    for number, each in zip(numbers, found, strict=True):
        np.testing.assert_allclose(each, make(float(number)).move(x, 0.1 * x), rtol=1e-4, atol=1e-6)
