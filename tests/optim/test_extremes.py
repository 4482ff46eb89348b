"""Attacks on gradients whose squares leave float32, and on gradients and outputs that are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trustjax.optim import asam, esam, fisher_sam, gsam, sam, tram

GRADIENT = {"a": jnp.array([3.0, -4.0]), "b": jnp.array([12.0], jnp.bfloat16)}
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5], jnp.bfloat16)}
ATTACKS = {
    "sam": sam(0.5),
    "sam_linf": sam(0.5, norm="linf"),
    "asam": asam(0.5),
    "esam": esam(0.5, gamma=1.0),
    "gsam": gsam(0.5, alpha=0.0),
    "fisher_sam": fisher_sam(0.5, eta=0.0),
    "tram": tram("noise"),
    "tram_plain": tram("noise", adaptive=False),
}
OUTPUTS = {"outputs": jnp.array([[1.0, 0.0]]), "noisy_outputs": jnp.array([[0.0, 1.0]])}
attacks = pytest.mark.parametrize("name", ATTACKS)


def attacked(tx, gradient, **extra_args):
    """The difference of the attacked weights from the parameters, and the state."""
    seen = []

    def grad_fn(params):
        seen.append(jax.tree.map(lambda p, q: p - q, params, PARAMS))
        return gradient

    _, state = tx.update(gradient, tx.init(PARAMS), PARAMS, grad_fn=grad_fn, **extra_args)
    return seen[0], state


@pytest.mark.table
@attacks
@pytest.mark.parametrize("power", [-100, -66, 66, 100])
def test_attacks_do_not_depend_on_the_size_of_the_gradient(name, power):
    sized = jax.tree.map(lambda g: g * jnp.asarray(2.0**power, g.dtype), GRADIENT)
    expected, expected_state = attacked(ATTACKS[name], GRADIENT, **OUTPUTS)
    found, state = attacked(ATTACKS[name], sized, **OUTPUTS)
    assert expected_state.distance > 0
    np.testing.assert_allclose(state.distance, expected_state.distance, rtol=1e-5)
    compare = lambda f, e: np.testing.assert_allclose(
        f.astype(np.float32), e.astype(np.float32), rtol=1e-5, atol=1e-7
    )
    jax.tree.map(compare, found, expected)


@attacks
def test_a_nan_in_the_gradient_is_reported(name):
    """The distance is NaN, and so are the attacked weights, so that the NaN cannot go unnoticed."""
    broken = {**GRADIENT, "a": GRADIENT["a"].at[0].set(jnp.nan)}
    found, state = attacked(ATTACKS[name], broken, **OUTPUTS)
    assert jnp.isnan(state.distance)
    assert jnp.isnan(found["a"][0])


@pytest.mark.table
@pytest.mark.parametrize(
    "divergence",
    ["kl", "reverse_kl", "symmetric_kl", "jensen_shannon", "l2", "mmd", "released_kl"],
)
@pytest.mark.parametrize("ascent", ["paper", "released"])
@pytest.mark.parametrize("broken", ["outputs", "noisy_outputs"])
def test_radius_of_a_broken_network_is_nan(divergence, ascent, broken):
    tx = tram("noise", divergence=divergence, ascent=ascent, max_radius=2.0)
    outputs = {**OUTPUTS, broken: jnp.array([[jnp.nan, 0.0]])}
    found, state = attacked(tx, GRADIENT, **outputs)
    assert jnp.isnan(state.radius)
    assert jnp.isnan(state.distance)
    assert all(jnp.all(jnp.isnan(leaf)) for leaf in jax.tree.leaves(found))
    masked = {name: jnp.concatenate([x, jnp.full((1, 2), jnp.nan)]) for name, x in OUTPUTS.items()}
    _, state = attacked(tx, GRADIENT, **masked, where=jnp.array([True, False]))
    assert jnp.isfinite(state.radius)
    assert state.radius > 0


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e10, 1e15])
def test_fisher_metric_of_huge_and_tiny_gradients(size):
    """The attack is that of float64, although the square of g in F overflows float32."""
    g = np.array([3.0, -4.0]) * size
    metric = 1 + 0.1 * g**2
    expected = 0.5 * g / metric / np.sqrt(np.sum(g**2 / metric))
    tx, zeros = fisher_sam(0.5), jnp.zeros(2)
    # The second gradient is the attacked point itself.
    found, _ = tx.update(jnp.asarray(g, jnp.float32), tx.init(zeros), zeros, grad_fn=lambda p: p)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("descend", ["attacked", "clean"])
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_gsam_splits_at_any_size(descend, size):
    """The result is g' = g_p - alpha (g - <g, g_p> / |g_p|^2 g_p) of float64."""
    g, g_p = np.array([3.0, -4.0, 1.0]), np.array([1.0, 2.0, -0.5])
    tx, zeros = gsam(0.5, alpha=0.4, descend=descend), jnp.zeros(3)
    at_size = lambda x: jnp.asarray(size * x, jnp.float32)
    found, _ = tx.update(at_size(g), tx.init(zeros), zeros, grad_fn=lambda p: at_size(g_p))
    if descend == "attacked":
        expected = g_p - 0.4 * (g - g @ g_p / (g_p @ g_p) * g_p)
    else:
        expected = g + 0.4 * (g_p - g @ g_p / (g @ g) * g)
    np.testing.assert_allclose(found / np.float32(size), expected, rtol=1e-5)


def test_reference_survives_a_broken_batch():
    """A batch of NaN outputs has a NaN radius, and the next batch has not."""
    tx = tram("previous")
    call = lambda state, broken: tx.update(
        GRADIENT,
        state,
        PARAMS,
        grad_fn=lambda p: GRADIENT,
        output_fn=lambda p: p["a"][None] * (jnp.nan if broken else 1.0),
    )[1]
    state = call(tx.init(PARAMS), True)
    assert jnp.isnan(state.radius)
    assert optax.tree.norm(state.reference) == optax.tree.norm(PARAMS)
    assert jnp.isfinite(call(state, False).radius)
