"""Norms of parameter trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.geometry import global_norm
from trustjax.geometry.norm import is_floating, reduction_dtype, widened

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
