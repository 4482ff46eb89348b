"""Mirror descent: worked numbers, closed forms, momentum in the dual, projections, bad input."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import array, assert_close

from trustjax import geometry
from trustjax.geometry import (
    bregman_divergence,
    euclidean,
    hypentropy,
    negative_entropy,
    p_norm,
    separable_p,
    simplex,
)
from trustjax.optim import mirror_descent

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "mirror.json").read_text(encoding="utf-8")
)
RATE = GOLDEN["rate"]


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield


def near(actual, expected):
    """The steps agree to ten digits in float64, and to 1e-5 in float32."""
    rtol = 1e-9 if jax.config.jax_enable_x64 else 1e-5
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.max(np.abs(expected)))


def stepped(tx, x, gradient):
    state = tx.init(x)
    updates, state = jax.jit(tx.update)(gradient, state, x)
    return x + updates, state


@pytest.mark.table
@pytest.mark.parametrize("name", GOLDEN["on_point"])
def test_golden_step(name, precision):
    arguments, expected = GOLDEN["on_point"][name]
    mirror_map = getattr(geometry, name.split()[0])(*arguments)
    x, gradient = array(GOLDEN["point"]), array(GOLDEN["gradient"])
    found, _ = stepped(mirror_descent(RATE, mirror_map), x, gradient)
    near(found, expected)


def test_golden_steps_on_probabilities(precision):
    x, gradient = array(GOLDEN["probabilities"]), array(GOLDEN["gradient"])
    expected = GOLDEN["on_probabilities"]
    found, state = stepped(mirror_descent(RATE, simplex()), x, gradient)
    near(found, expected["simplex"])
    np.testing.assert_allclose(state.distance, GOLDEN["kl_of_simplex_step"], rtol=1e-5)
    found, _ = stepped(mirror_descent(RATE, negative_entropy()), x, gradient)
    near(found, expected["negative_entropy"])
    projected = mirror_descent(
        RATE, euclidean(), projection=lambda x: optax.projections.projection_simplex(x)
    )
    found, state = stepped(projected, x, gradient)
    near(found, expected["euclidean_projected"])
    np.testing.assert_allclose(state.distance, 0.5 * np.sum((found - x) ** 2), rtol=1e-4)


def test_golden_divergence(precision):
    x, gradient = array(GOLDEN["point"]), array(GOLDEN["gradient"])
    found, state = stepped(mirror_descent(RATE, hypentropy(1.0)), x, gradient)
    np.testing.assert_allclose(state.distance, GOLDEN["divergence_of_hypentropy_1_step"], rtol=1e-5)
    found = jax.jit(lambda *points: bregman_divergence(hypentropy(1.0), *points))(found, x)
    np.testing.assert_allclose(state.distance, found, rtol=1e-6)


def test_entropic_descent_of_beck_and_teboulle(precision):
    """The start is uniform, and the rates are sqrt(2 log n / k), given as a schedule."""
    golden = GOLDEN["entropic"]
    rate = lambda count: jnp.sqrt(2 * np.log(3) / (count + 1))
    tx, x = mirror_descent(rate, simplex()), array([1 / 3] * 3)
    state, update = tx.init(x), jax.jit(tx.update)
    for expected in golden["steps"]:
        updates, state = update(array(golden["gradient"]), state, x)
        x = x + updates
        near(x, expected)


def test_exponentiated_gradient_is_its_closed_form(x64):
    """After k steps it is the softmax of log(start) minus the sum of the gradients."""
    random = np.random.default_rng(0)
    gradients = jnp.asarray(random.normal(size=(50, 4, 6)))
    start = jax.nn.softmax(jnp.asarray(random.normal(size=(4, 6))))
    tx = mirror_descent(0.1, simplex())

    def body(carry, gradient):
        x, state = carry
        updates, state = tx.update(gradient, state, x)
        return (x + updates, state), None

    (x, _), _ = jax.lax.scan(body, (start, tx.init(start)), gradients)
    expected = jax.nn.softmax(jnp.log(start) - 0.1 * gradients.sum(0))
    np.testing.assert_allclose(x, expected, rtol=1e-10)


def test_ten_thousand_steps_on_the_simplex_in_float32():
    tx, start = mirror_descent(0.05, simplex()), jnp.full(7, 1 / 7)

    def body(carry, key):
        x, state = carry
        updates, state = tx.update(jax.random.normal(key, (7,)), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), jnp.array([jnp.abs(x.sum() - 1), x.min()])

    keys = jax.random.split(jax.random.key(0), 10_000)
    _, measured = jax.lax.scan(body, (start, tx.init(start)), keys)
    assert measured[:, 0].max() < 1e-6
    assert measured[:, 1].min() >= 0


def test_two_is_sgd_and_momentum_is_in_the_dual(x64):
    """After a trace the dual point makes heavy-ball steps."""
    random = np.random.default_rng(1)
    gradients = jnp.asarray(random.normal(size=(20, 5)))
    start = jnp.asarray(random.normal(size=5))
    cases = {
        "two": (mirror_descent(0.1, p_norm(2.0)), optax.sgd(0.1), lambda x: x, lambda z: z),
        "momentum": (
            optax.chain(optax.trace(0.9), mirror_descent(0.1, separable_p(3.0))),
            optax.sgd(0.1, momentum=0.9),
            separable_p(3.0).to_dual,
            separable_p(3.0).to_primal,
        ),
    }

    def trajectories(tx, sgd, to_dual, to_primal):
        def step(carry, gradient):
            x, z, state, sgd_state = carry
            updates, state = tx.update(gradient, state, x)
            x = x + updates
            updates, sgd_state = sgd.update(gradient, sgd_state, z)
            z = z + updates
            return (x, z, state, sgd_state), (x, to_primal(z))

        dual = to_dual(start)
        return jax.lax.scan(step, (start, dual, tx.init(start), sgd.init(dual)), gradients)[1]

    for case in cases.values():
        found, expected = jax.jit(lambda case=case: trajectories(*case))()
        assert found.shape == (20, 5)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_state_and_trees():
    """The divergence is summed over leaves, integers stay, and bfloat16 is computed in float32."""
    params = {
        "a": jnp.array([1.0, -2.0]), "b": jnp.ones(3, jnp.bfloat16), "n": jnp.array([1, 2])
    }  # fmt: skip
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(3, jnp.bfloat16), "n": params["n"] * 0}
    tx = mirror_descent(0.1, euclidean())
    state = tx.init(params)
    assert (state.radius, state.distance, state.count) == (0, 0, 0)
    updates, state = jax.jit(tx.update)(gradient, state, params)
    assert updates["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["n"], gradient["n"])
    np.testing.assert_allclose([state.radius, state.distance], 0.125, rtol=1e-5)
    assert state.count == 1
    assert state.distance.dtype == jnp.float32
    for empty in ({}, {"n": params["n"]}):
        _, state = tx.update(empty, tx.init(empty), empty)
        assert (state.radius, state.distance) == (0, 0)


@pytest.mark.parametrize(
    ("mirror_map", "leaf", "words"),
    [
        (simplex(), [0.5, 0.6], r"simplex takes probabilities .* axis -1; params\['w'\]"),
        (simplex(), [-0.5, 1.5], "simplex takes probabilities"),
        (negative_entropy(), [1.0, -1.0], "negative_entropy takes numbers >= 0"),
        (geometry.spectral_hypentropy(), [1.0, -1.0], "takes matrices"),
    ],
)
def test_weights_outside_of_the_domain(mirror_map, leaf, words):
    with pytest.raises(ValueError, match=words):
        mirror_descent(0.1, mirror_map).init({"w": jnp.array(leaf)})
    jax.eval_shape(mirror_descent(0.1, mirror_map).init, {"w": jnp.array(leaf)})  # traced


def test_bad_arguments():
    with pytest.raises(ValueError, match="learning_rate must be >= 0, got -1"):
        mirror_descent(-1.0, euclidean())
    tx, x = mirror_descent(0.1, euclidean()), jnp.ones(2)
    with pytest.raises(ValueError, match=r"needs params: call tx\.update\(grads, state, params"):
        tx.update(x, tx.init(x))
    assert_close(tx.update(x, tx.init(x), x, loss=3.0)[0], [-0.1, -0.1])  # extras are ignored


@pytest.mark.parametrize("name", ["p_norm", "separable_p", "spectral_hypentropy"])
@pytest.mark.parametrize("p", [1.1, 6.0, 10.0])
def test_without_a_gradient_nothing_moves(name, p):
    """The way to the dual coordinates and back is not exact, and underflows for small weights."""
    make = getattr(geometry, name)
    tx = mirror_descent(0.1, make(0.1) if name == "spectral_hypentropy" else make(p))
    x = 0.05 * jax.random.normal(jax.random.key(0), (8, 6)).at[0, 0].set(1e-6)
    moves, state = tx.update(jnp.zeros_like(x), tx.init(x), x)
    assert not np.any(moves)
    assert state.radius == 0
    assert state.distance < 1e-11


@pytest.mark.parametrize("name", ["p_norm", "separable_p"])
def test_steps_there_and_back_do_not_shrink_the_weights(name):
    """With rounding of one sign, 2000 steps would take 0.1 % of the norm."""
    mirror_map = getattr(geometry, name)(6.0)
    tx = mirror_descent(1e-3, mirror_map)
    x = 0.05 * jax.random.normal(jax.random.key(0), (1000,))
    gradient = mirror_map.to_dual(x)

    def step(carry, sign):
        x, state = carry
        moves, state = tx.update(sign * gradient, state, x)
        return (x + moves, state), None

    (after, _), _ = jax.lax.scan(step, (x, tx.init(x)), jnp.resize(jnp.array([1.0, -1.0]), 2000))
    np.testing.assert_allclose(jnp.linalg.norm(after), jnp.linalg.norm(x), rtol=3e-5)
