"""Anchors: what they copy and when, in scans, and against the author's helpers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_anchored import GOLDEN

from trustjax.losses import (
    adpo_loss,
    ema_anchor,
    fixed_anchor,
    kl_anchor,
    on_policy_anchor,
    periodic_anchor,
)

ANCHORS = {
    "fixed": fixed_anchor(),
    "ema": ema_anchor(),
    "periodic": periodic_anchor(3),
    "on_policy": on_policy_anchor(),
    "kl": kl_anchor(threshold=0.1, window=2),
}
each_anchor = pytest.mark.parametrize("name", ANCHORS)
PARAMS = {"kernel": jnp.ones((2, 3)), "steps": jnp.array(0), "half": jnp.ones(2, jnp.bfloat16)}


def after(step):
    return {"kernel": PARAMS["kernel"] + step, "steps": jnp.array(step), "half": PARAMS["half"]}


def followed(anchor, steps, distances=None):
    """The weight of the anchor after each step, when the policy's is the number of the step."""
    distances = np.full(steps, 0.2) if distances is None else distances

    def step(state, each):
        number, distance = each
        state = anchor.update(state, number, distance=distance)
        return state, state

    first = anchor.init(jnp.array(0.0))
    last, states = jax.lax.scan(step, first, (np.arange(1.0, steps + 1), distances))
    assert last.updates == steps
    return states


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fixed", [0, 0, 0, 0, 0, 0, 0]),
        ("periodic", [0, 0, 3, 3, 3, 6, 6]),
        ("on_policy", [1, 2, 3, 4, 5, 6, 7]),
        ("kl", [0, 2, 2, 4, 4, 6, 6]),
    ],
)
def test_when_they_move(name, expected):
    states = followed(ANCHORS[name], 7)
    np.testing.assert_array_equal(states.params, expected)
    moves = np.diff([0, *expected]) != 0
    np.testing.assert_array_equal(states.refreshes, np.cumsum(moves))


def test_given_weights():
    """A teacher stays, whatever the student is; without one, the student's first weights do."""
    state = fixed_anchor(jnp.array(5.0)).init(jnp.array(0.0))
    assert fixed_anchor().update(state, jnp.array(1.0)).params == 5
    assert fixed_anchor().init(jnp.array(2.0)).params == 2


def test_average_against_the_author_code(x64):
    helpers = GOLDEN["helpers"]
    first, *rest = np.array(helpers["weights"])
    anchor = ema_anchor(0.9)
    state = anchor.init(first)
    for weights in rest:
        state = anchor.update(state, weights)
    np.testing.assert_allclose(state.params, helpers["average"], rtol=1e-12)


def test_average_of_half_precision():
    """It is kept in float32, where steps of 1 % are not rounded away; counters are copied."""
    anchor = ema_anchor(0.99)
    state = anchor.init(PARAMS)
    assert state.params["half"].dtype == jnp.float32
    moved = after(7) | {"half": PARAMS["half"] + 0.5}
    state = anchor.update(state, moved)
    np.testing.assert_allclose(state.params["half"], 1.005, rtol=1e-6)
    assert state.params["steps"] == 7


def test_trigger_against_the_author_code():
    helpers = GOLDEN["helpers"]
    distances = np.array(helpers["distances"], np.float32)
    states = followed(kl_anchor(threshold=0.1, window=5), len(distances), distances)
    moves = np.diff(np.concatenate([[0], states.refreshes])) > 0
    np.testing.assert_array_equal(moves, helpers["triggered"])
    assert moves.any()


def test_what_does_not_trigger():
    """Distances at the threshold, too few of them, and NaN until it has left the window."""
    anchor = kl_anchor(threshold=0.25, window=2)
    distances = np.array([9, 0.5, 0.25, 0.25, np.nan, 9, 9, 9], np.float32)
    states = followed(anchor, 8, distances)
    np.testing.assert_array_equal(states.refreshes, [0, 1, 1, 1, 1, 1, 2, 2])


@each_anchor
def test_states(name, tmp_path):
    """They keep structure, shapes and dtypes, share no memory with the weights, and are saved."""
    anchor = ANCHORS[name]
    state = anchor.init(PARAMS)
    update = jax.jit(lambda state, params: anchor.update(state, params, distance=jnp.float32(1)))
    moved = update(state, after(1))
    like = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (state, moved))
    assert like[0] == like[1]
    # Donated weights do not take the anchor with them.
    jax.jit(lambda x: x, donate_argnums=0)(jax.tree.map(jnp.copy, PARAMS))
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(PARAMS)}
    assert not pointers & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", moved)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, moved))
    jax.tree.map(np.testing.assert_array_equal, found, moved)


def test_refreshes_sharpen(x64):
    """k refreshes compound to pi_0 q^(k tau)."""
    target = np.array([0.6, 0.25, 0.1, 0.05])
    anchor = periodic_anchor(300)

    @jax.jit
    def step(carry, _):
        policy, state = carry
        loss = functools.partial(adpo_loss, target=target, temperature=0.5)
        policy = policy - 0.5 * jax.grad(lambda x: loss(x, state.params))(policy)
        return (policy, anchor.update(state, policy)), None

    start = jnp.zeros(4)
    (policy, state), _ = jax.lax.scan(step, (start, anchor.init(start)), length=900)
    assert state.refreshes == 3
    expected = target ** (3 * 0.5) / np.sum(target ** (3 * 0.5))
    np.testing.assert_allclose(jax.nn.softmax(policy), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: ema_anchor(1.5), "decay must be <= 1"),
        (lambda: periodic_anchor(0), "every must be >= 1"),
        (lambda: periodic_anchor(2.0), "every must be an int"),
        (lambda: kl_anchor(threshold=0.0), "threshold must be > 0"),
        (lambda: kl_anchor(window=0), "window must be >= 1"),
        (lambda: kl_anchor().update(kl_anchor().init(PARAMS), PARAMS), "distance must be given"),
    ],
)
def test_errors(call, field):
    with pytest.raises(ValueError, match=field):
        call()
