"""Sharpness against losses whose maximum in the box is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.geometry import epsilon_sharpness


def test_linear_loss_is_exact(x64):
    """max of g y over the box: epsilon * sum |g| (|x| + 1)."""
    x, g = jnp.array([2.0, -1.0, 0.0]), jnp.array([0.5, -3.0, 1.0])
    loss = lambda w: 10 + jnp.sum(g * w)
    expected = 100 * 1e-2 * float(jnp.sum(jnp.abs(g) * (jnp.abs(x) + 1))) / (1 + float(loss(x)))
    for steps in (1, 4):
        value = epsilon_sharpness(loss, x, epsilon=1e-2, num_steps=steps)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_sharper_minimum_measures_sharper(x64):
    x = {"w": jnp.array([1.0, 1.0]) + 1e-3}
    losses = [lambda p, a=a: a * jnp.sum(jnp.square(p["w"] - 1)) for a in (1.0, 10.0)]
    flat, sharp = (jax.jit(lambda p, f=f: epsilon_sharpness(f, p, epsilon=1e-2))(x) for f in losses)
    assert float(sharp) > 5 * float(flat) > 0


def test_at_a_maximum_it_is_zero():
    """The sharpness is >= 0, because the start itself is in the box."""
    value = epsilon_sharpness(lambda w: -jnp.sum(jnp.square(w)), jnp.zeros(2))
    assert float(value) == 0.0


@pytest.mark.slow
def test_calls_outside_of_jit_do_not_compile_again(compiled):
    x = jnp.ones(3)
    epsilon_sharpness(jnp.sum, x)
    assert compiled
    compiled.clear()
    epsilon_sharpness(lambda w: jnp.sum(w), x)
    assert not compiled


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epsilon": 0.0}, "epsilon must be > 0"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"params": jnp.ones(2, jnp.complex64)}, "real and float32 at least, got a leaf of comp"),
        ({"params": jnp.ones(2, jnp.bfloat16)}, "float32 at least, got a leaf of bfloat16"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        epsilon_sharpness(jnp.sum, arguments.pop("params", jnp.ones(2)), **arguments)
