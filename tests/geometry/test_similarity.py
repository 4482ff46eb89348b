"""Linear CKA against its definition and its invariances."""

import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.geometry import linear_cka

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(40, 5)), RANDOM.normal(size=(40, 3))


def gram_cka(x, y):
    """The other form of the definition: HSIC of the two centred Gram matrices."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def test_equals_the_gram_form(x64, strict):
    mixed = np.concatenate([X[:, :2] @ RANDOM.normal(size=(2, 2)), Y[:, :1]], axis=1)
    for other in (Y, mixed):
        value = linear_cka(jnp.asarray(X), jnp.asarray(other))
        np.testing.assert_allclose(value, gram_cka(X, other), rtol=1e-10)


def test_invariances():
    rotation, _ = np.linalg.qr(RANDOM.normal(size=(5, 5)))
    value = linear_cka(jnp.asarray(X), X @ rotation * 1e10 + 3.0)
    np.testing.assert_allclose(value, 1.0, rtol=1e-5)
    np.testing.assert_allclose(linear_cka(jnp.asarray(X), Y), linear_cka(Y, X), rtol=1e-5)


def test_constant_features_give_zero():
    assert float(linear_cka(jnp.asarray(X), np.ones((40, 2)))) == 0.0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"equal length, got \(40, 5\) and \(39, 3\)"):
        linear_cka(jnp.asarray(X), Y[1:])
