"""Fisher-vector products and conjugate gradients: worked numbers, exact inverses, convergence."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trustjax.geometry import (
    conjugate_gradient,
    fisher_vector_product,
    kl_divergence,
    reverse_kl,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "natural.json").read_text(encoding="utf-8")
)
FISHER, ASCENT = (np.array(GOLDEN[name]) for name in ("fisher", "ascent"))


@pytest.mark.parametrize("divergence", [kl_divergence, reverse_kl])
def test_softmax(divergence, x64):
    """The Hessian is the same for both directions of KL: diag(p) - p p'."""
    golden = GOLDEN["softmax"]
    logits, vector = (jnp.array(golden[name]) for name in ("logits", "vector"))
    found = fisher_vector_product(lambda new: divergence(logits, new), logits, vector)
    np.testing.assert_allclose(found, golden["product"], rtol=1e-9)
    damped = fisher_vector_product(lambda new: divergence(logits, new), logits, vector, damping=0.5)
    np.testing.assert_allclose(damped, found + 0.5 * vector, rtol=1e-9)


def test_product_is_the_hessian_of_a_network(x64):
    """The product agrees with jax.hessian over a tree of parameters."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(8, 3)))
    params = {"b": jnp.zeros(4), "w": jnp.asarray(random.normal(size=(3, 4)))}
    logits = lambda params: jnp.tanh(x @ params["w"] + params["b"])
    old = logits(params)
    divergence = lambda params: jnp.mean(kl_divergence(old, logits(params)))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda flat: divergence(unravel(flat))))(flat)
    vector = jnp.asarray(random.normal(size=flat.shape))
    found = fisher_vector_product(divergence, params, unravel(vector))
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], hessian @ vector, rtol=1e-8)


def test_golden_solution(x64):
    """Two dimensions take two steps, and the first one is along b."""
    golden = GOLDEN["undamped"]
    one = conjugate_gradient(lambda v: FISHER @ v, jnp.array(ASCENT), steps=1)
    np.testing.assert_allclose(one.x, golden["first"], rtol=1e-9)
    found = conjugate_gradient(lambda v: FISHER @ v, jnp.array(ASCENT))
    np.testing.assert_allclose(found.x, golden["solution"], rtol=1e-9)
    assert found.num_steps == 2
    np.testing.assert_allclose(found.residual, 0, atol=1e-12)
    damped = conjugate_gradient(lambda v: FISHER @ v + 0.1 * v, jnp.array(ASCENT))
    np.testing.assert_allclose(damped.x, GOLDEN["damped"]["solution"], rtol=1e-9)


@settings(deadline=None, max_examples=15)
@given(size=st.integers(1, 8), seed=st.integers(0, 2**16), steps=st.integers(0, 12))
def test_any_positive_definite_matrix(size, seed, steps):
    """The residual is b - A x after any number of steps, and 0 after as many as dimensions."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(size, size))
    matrix, b = root @ root.T + 0.3 * np.eye(size), random.normal(size=size)
    with jax.enable_x64(True):
        found = conjugate_gradient(lambda v: matrix @ v, jnp.asarray(b), steps=steps, tolerance=0.0)
        np.testing.assert_allclose(found.residual, b - matrix @ found.x, atol=1e-9)
        assert found.num_steps <= steps
        if steps >= size:
            np.testing.assert_allclose(found.x, np.linalg.solve(matrix, b), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: jax.jit(jax.vmap(f))], ids=["jit", "vmap"])
def test_no_nan_after_convergence(wrap):
    """A hundred steps in two dimensions, right-hand sides of zero, lanes that end earlier."""
    solve = wrap(
        lambda b: conjugate_gradient(lambda v: jnp.asarray(FISHER, b.dtype) @ v, b, steps=100)
    )
    b = np.array([[1.0, -0.5], [0.0, 0.0], [1e-20, 0.0], [1e3, 1.0]], np.float32)
    found = [solve(b)] if wrap is not jax.jit else [solve(row) for row in b]
    x = np.concatenate([np.atleast_2d(each.x) for each in found])
    assert np.all(np.isfinite(x))
    np.testing.assert_allclose(x[0], GOLDEN["undamped"]["solution"], rtol=1e-4)
    np.testing.assert_array_equal(x[1], 0)


def test_matrix_that_is_not_positive():
    found = conjugate_gradient(lambda v: -v, jnp.ones(3))
    np.testing.assert_array_equal(found.x, 0)
    assert found.num_steps == 1


def test_bad_numbers():
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        conjugate_gradient(lambda v: v, jnp.ones(2), steps=-1)
    with pytest.raises(ValueError, match="damping must be >= 0, got -1"):
        fisher_vector_product(jnp.sum, jnp.ones(2), jnp.ones(2), damping=-1.0)
