"""Values in float32 against mpmath, where the plain formulas cancel, under- or overflow."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax import geometry
from trustjax.optim import mirror_descent

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "geometry.json").read_text(encoding="utf-8")
)


def grouped(rows, key):
    return [(*group, list(each)) for group, each in itertools.groupby(sorted(rows, key=key), key)]


def stacked(rows, name):
    return np.array([row[name] for row in rows], np.float32)


def near(found, rows):
    np.testing.assert_allclose(found, [row["value"] for row in rows], rtol=3e-5)


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "size", "rows"),
    grouped(GOLDEN["softmax"], lambda row: (row["name"], len(row["p"]))),
)
def test_softmax(name, size, rows):
    """Orders from 0.1 to 100, underflow in p or q, and moves of the logits down to 1e-6."""
    divergence = getattr(geometry, name)
    p, q = stacked(rows, "p"), stacked(rows, "q")
    if "order" in rows[0]:
        call = lambda p, q, order: divergence(p, q, order=order)
        near(jax.jit(jax.vmap(call))(p, q, stacked(rows, "order")), rows)
    else:
        near(jax.jit(divergence)(p, q), rows)


@pytest.mark.parametrize(
    ("order", "size", "rows"),
    grouped(GOLDEN["gaussian"], lambda row: (row["order"], len(row["arguments"][0]))),
)
def test_gaussian(order, size, rows):
    arguments = np.moveaxis(stacked(rows, "arguments"), 1, 0)
    near(jax.jit(functools.partial(geometry.gaussian_renyi, order=order))(*arguments), rows)


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "number", "size", "rows"),
    grouped(GOLDEN["bregman"], lambda row: (row["name"], row["number"] or 0.0, len(row["x"]))),
)
def test_bregman(name, number, size, rows):
    """Moves from 1e-6 of the numbers to ten times their size, through zero and both signs."""
    mirror_map = getattr(geometry, name)(*([number] if number else []))
    divergence = functools.partial(geometry.bregman_divergence, mirror_map)
    near(jax.jit(jax.vmap(divergence))(stacked(rows, "x"), stacked(rows, "y")), rows)


MAPS = {
    "p_norm": geometry.p_norm(1.5),
    "separable_p": geometry.separable_p(3.0),
    "spectral_hypentropy": geometry.spectral_hypentropy(1.0),
}


@pytest.mark.table
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", [(64, 64), (20, 30)])
def test_distance_that_mirror_descent_reports(name, shape):
    """A step of 1e-3, against the definition in float64, whose own rounding is 1e-9 of it."""
    random = np.random.default_rng(0)
    x, gradient = random.normal(size=(2, *shape)).astype(np.float32)
    tx = mirror_descent(1e-3, MAPS[name])
    updates, state = jax.jit(tx.update)(gradient, tx.init(x), x)
    after, before = (np.asarray(z, np.float64) for z in (x + updates, x))
    with jax.enable_x64(True):
        mirror_map = MAPS[name]
        gap = mirror_map.potential(after) - mirror_map.potential(before)
        expected = gap - np.sum(np.asarray(mirror_map.to_dual(before)) * (after - before))
    np.testing.assert_allclose(state.distance, expected, rtol=2e-2)
    assert 0.1 < state.distance / state.radius < 1.1


def test_mmd_of_large_logits():
    """16 x 50257 logits of deviation 2, moved by 1e-3: squared norms are 200 thousand."""
    random = np.random.default_rng(0)
    x = (2 * random.normal(size=(16, 50257))).astype(np.float32)
    y = (x + 1e-3 * random.normal(size=x.shape)).astype(np.float32)
    np.testing.assert_allclose(geometry.mmd(x, y), mmd_float64(x, y), rtol=1e-4)


@pytest.mark.parametrize("move", [1e-2, 1e-4, 1e-6])
def test_mmd_of_small_moves(move):
    """One example occurs twice."""
    random = np.random.default_rng(1)
    x = random.normal(size=(6, 10)).astype(np.float32)
    x[5] = x[4]
    y = (x + move * random.normal(size=x.shape)).astype(np.float32)
    np.testing.assert_allclose(geometry.mmd(x, y), mmd_float64(x, y), rtol=1e-3)
    assert geometry.mmd(x, x) == 0


def mmd_float64(x, y):
    """The definition in longdouble, because the kernels of small moves cancel."""
    points = np.concatenate([x, y]).astype(np.longdouble)
    squares = np.array([[np.sum((a - b) ** 2) for b in points] for a in points])
    bandwidths = np.array([0.1, 0.2, 0.5, 1, 2, 5, 10], np.float32).astype(np.longdouble)
    kernel = np.sum((squares[..., None] + bandwidths**2) ** np.longdouble(-0.5), -1)
    signs = np.repeat([1, -1], len(x)) / np.longdouble(len(x))
    return float(signs @ kernel @ signs)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_norms_of_matrices_and_solutions_at_any_size(size):
    b = size * jnp.array([3.0, -4.0], jnp.float32)
    found = geometry.conjugate_gradient(lambda v: jnp.array([2.0, 5.0]) * v, b)
    np.testing.assert_allclose(found.x / size, [1.5, -0.8], rtol=1e-5)
    normalized = geometry.frobenius_normalize(b[None], epsilon=0.0)
    np.testing.assert_allclose(normalized, [[0.6, -0.8]], rtol=1e-6)
    np.testing.assert_allclose(geometry.l2_distance(b, 0 * b), 5 * size, rtol=1e-6)


def test_constant_features_of_any_number_have_no_similarity():
    """The mean of equal numbers is rounded; what is left must not be scaled up."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    assert geometry.linear_cka(x, np.full((40, 2), 0.1, np.float32)) == 0
