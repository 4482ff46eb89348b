"""Frobenius normalisation and Newton-Schulz, against the worked numbers and the SVD."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib._muon import orthogonalize_via_newton_schulz

from trustjax.geometry import frobenius_normalize, newton_schulz

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "auon.json").read_text())
FOUND = GOLDEN["newton_schulz"]


def start():
    return frobenius_normalize(jnp.array(GOLDEN["matrix"], jnp.float64))


@pytest.mark.parametrize(("steps", "name"), [(1, "one"), (5, "five")])
def test_golden(steps, name, x64, strict):
    np.testing.assert_allclose(newton_schulz(start(), steps=steps), FOUND[name], atol=1e-7)


def test_singular_values(x64):
    values = lambda matrix: np.linalg.svd(matrix)[1]
    np.testing.assert_allclose(values(start()), FOUND["singular_values_before"], atol=1e-7)
    one = newton_schulz(start(), steps=1)
    np.testing.assert_allclose(values(one), FOUND["singular_values_after"], atol=1e-7)
    five = newton_schulz(start())
    np.testing.assert_allclose(values(five), FOUND["singular_values_five"], atol=1e-7)


def test_transposes_and_stacks(x64):
    x = start()
    np.testing.assert_allclose(newton_schulz(x.T), newton_schulz(x).T, atol=1e-14)
    stack = jnp.stack([x, -2 * x[::-1]])
    expected = [newton_schulz(frobenius_normalize(each)) for each in stack]
    np.testing.assert_allclose(newton_schulz(frobenius_normalize(stack)), expected, atol=1e-14)


def test_no_steps_change_nothing(x64):
    np.testing.assert_array_equal(newton_schulz(start(), steps=0), start())


def test_equals_the_iteration_of_optax():
    matrix = jnp.array(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)
    theirs = orthogonalize_via_newton_schulz(matrix, jnp.array([3.4445, -4.7750, 2.0315]))
    ours = newton_schulz(frobenius_normalize(matrix))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_of_long_and_of_zero_matrices(dtype):
    """A sum in bfloat16 would stop growing at 256."""
    x = frobenius_normalize(jnp.ones((64, 64), dtype))
    assert x.dtype == dtype
    np.testing.assert_allclose(x.astype(np.float32), 1 / 64, rtol=4e-3)
    np.testing.assert_array_equal(frobenius_normalize(jnp.zeros((2, 3), dtype)), np.zeros((2, 3)))


def test_bad_arguments():
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        newton_schulz(jnp.ones((2, 2)), steps=-1)
    with pytest.raises(ValueError, match=r"two axes or more, got shape \(2,\)"):
        newton_schulz(jnp.ones(2))
