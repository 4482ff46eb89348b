"""Norms of parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax._dtypes import is_floating, reduction_dtype, widened
from trustjax.geometry import global_norm
from trustjax.geometry.norm import vector_norm

TREE = {"a": np.array([3.0, 0.0], np.float32), "b": [np.array([[4.0], [12.0]], np.float32)]}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_whole_tree_is_one_vector(wrap, strict):
    norm = wrap(global_norm)(TREE)
    assert norm == 13.0
    assert norm.dtype == jnp.float32


def test_leaves_that_are_not_floating_are_skipped(strict):
    others = {
        "count": np.array(7),
        "flag": np.array(True),
        "key": jax.random.key(0),
        "float0": np.zeros(2, jax.dtypes.float0),
        "none": None,
        "name": "w",
    }
    assert not any(is_floating(leaf) for leaf in jax.tree.leaves(others))
    assert global_norm({**others, "tree": TREE}) == 13.0
    assert global_norm(others) == global_norm({}) == 0.0


def test_small_floats_are_summed_in_float32(strict):
    """4096 ones of bfloat16: their sum of squares, in bfloat16, would stop at 256."""
    ones = jnp.ones(4096, jnp.bfloat16)
    norm = jax.jit(global_norm)({"a": ones, "b": jnp.zeros(1, jnp.float32)})
    assert norm == 64.0
    assert norm.dtype == jnp.float32
    # 300 squared is more than float16 holds.
    assert jax.jit(global_norm)(jnp.full(4, 300.0, jnp.float16)) == 600.0


def test_widest_dtype_wins(x64, strict):
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float64)}
    assert reduction_dtype(tree) == reduction_dtype(tree["b"]) == jnp.float64
    assert reduction_dtype(tree["a"]) == reduction_dtype({}) == jnp.float32
    assert global_norm(tree).dtype == jnp.float64
    for dtype, wide in (("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")):
        assert widened(jnp.ones(2, dtype)).dtype == wide


def test_splitting_leaves_changes_nothing(x64):
    values = np.random.default_rng(0).normal(size=12)
    parts = {"a": values[:5].reshape(5, 1), "b": (values[5:6], values[6:].reshape(2, 3))}
    both = jax.jit(lambda whole, parts: (global_norm(whole), global_norm(parts)))(values, parts)
    np.testing.assert_allclose(both, np.linalg.norm(values), rtol=1e-14)


# ---- sizes whose squares under- or overflow

NUMBERS = np.array([[3.0, -4.0, 0.0], [12.0, 0.0, 0.0]], np.float32)
SIZES = (1e-30, 1e-20, 1e-12, 1.0, 1e12, 1e20, 1e30)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_norms_at_any_size(wrap, strict):
    """In float32, squares underflow below 1e-19 and overflow above 1e19."""
    for size in SIZES:
        x = NUMBERS * np.float32(size)
        np.testing.assert_allclose(wrap(global_norm)({"a": x[0], "b": x[1:]}), 13 * size, rtol=1e-6)
        rows = wrap(lambda x: vector_norm(x, -1))(x)
        np.testing.assert_allclose(rows, [5 * size, 12 * size], rtol=1e-6)
    assert vector_norm(NUMBERS, (0, 1), keepdims=True).shape == (1, 1)
    assert vector_norm(jnp.zeros((2, 0)), -1).shape == (2,)
    assert global_norm({"a": jnp.zeros((0, 3)), "b": jnp.full(1, 2.0)}) == 2.0


def test_one_norm_a_row_whatever_the_other_rows():
    """Sizes may differ from row to row, under vmap and in one array, also in half precision."""
    rows = jnp.array([NUMBERS[0] * size for size in (*SIZES, 0.0)], jnp.float32)
    expected = np.array([5 * size for size in (*SIZES, 0.0)])
    mapped = jax.vmap(global_norm)(rows)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    np.testing.assert_allclose(vector_norm(rows, 1), expected, rtol=1e-6)
    np.testing.assert_allclose(global_norm(jnp.full(4, 1e-7, jnp.float16)), 2e-7, rtol=0.2)


@pytest.mark.table
@pytest.mark.parametrize("norm", [global_norm, vector_norm, lambda x: vector_norm(x, (0, 1))])
def test_slopes_of_norms(norm):
    """x over the norm at any size, also where vmap runs both branches; 0 at zero."""
    gradients = jax.jit(jax.vmap(jax.grad(norm)))(
        jnp.stack([jnp.float32(size) * NUMBERS for size in (*SIZES, 0.0)])
    )
    for gradient in gradients[:-1]:
        np.testing.assert_allclose(gradient, NUMBERS / 13, rtol=1e-6)
    np.testing.assert_array_equal(gradients[-1], np.zeros_like(NUMBERS))
    np.testing.assert_allclose(jax.jit(jax.grad(norm))(NUMBERS), NUMBERS / 13, rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(jax.grad(norm))(0 * NUMBERS), 0 * NUMBERS)
    hessian = jax.hessian(norm)(jnp.array([[3.0, 4.0]]))[0, :, 0]
    np.testing.assert_allclose(hessian, np.array([[16, -12], [-12, 9]]) / 125, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_what_is_not_finite_stays_so(wrap):
    for size in (1.0, 1e-30, 1e30):
        for value in (np.nan, np.inf, -np.inf):
            x = jnp.array([[1.0, -2.0, 0.0]], jnp.float32) * size
            found = wrap(global_norm)(x.at[0, 2].set(value))
            np.testing.assert_array_equal(found, np.full(found.shape, np.abs(value)))


def test_eager_calls_compile_once(caplog):
    x = jnp.ones(37)
    global_norm(x)
    with jax.log_compiles():
        global_norm(x + 1)
    assert not [each for each in caplog.messages if "_root_of_squares" in each]
