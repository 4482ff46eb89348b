"""One step in two calls, for trainers that only know `tx.update(grads, state, params)`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import QUADRATIC, SOFTMAX, array, assert_close, logits, quadratic, softmax_loss

from trustjax.optim import alternating, asam, clean_params, sam, tram

BASES = {
    "sgd": lambda: optax.sgd(0.01, momentum=0.9),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
}


def trainer(tx, loss, w, calls, **extra_args):
    """The weights and states after each call, [calls, ...]."""

    def call(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w, **extra_args)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, state)

    run = lambda w: jax.lax.scan(call, (w, tx.init(w)), length=calls)[1]
    return jax.tree.map(np.asarray, jax.jit(run)(w))


@pytest.mark.table
@pytest.mark.parametrize("attack", [lambda: sam(0.05), lambda: asam(0.5)], ids=["sam", "asam"])
@pytest.mark.parametrize("base", BASES)
def test_two_calls_make_one_step(attack, base, precision):
    """Every second call ends where the chain with `grad_fn` does."""
    w = array(QUADRATIC["w"])
    one_call = optax.chain(attack(), BASES[base]())
    expected, chained = trainer(one_call, quadratic, w, 4, grad_fn=jax.grad(quadratic))
    seen, state = trainer(alternating(attack(), BASES[base]()), quadratic, w, 8)
    clean = jax.vmap(clean_params)(state, seen)
    assert_close(seen[1::2], expected)
    # The clean weights do not move while an attack is pending.
    assert_close(clean[1::2], expected)
    assert_close(clean[0::2], np.concatenate([w[None], expected[:-1]]))
    np.testing.assert_array_equal(state.pending, [True, False] * 4)
    np.testing.assert_allclose(state.attack_state.distance, np.repeat(chained[0].distance, 2), 1e-6)
    # Both count steps, not calls.
    np.testing.assert_array_equal(state.attack_state.count, [1, 1, 2, 2, 3, 3, 4, 4])
    if base == "adamw":
        count = optax.tree.get(state.base_state, "count")
        np.testing.assert_array_equal(count, [0, 1, 1, 2, 2, 3, 3, 4])


def test_odd_calls_make_the_attack(precision):
    w = array(QUADRATIC["w"])
    seen, _ = trainer(alternating(sam(0.05), optax.sgd(0.01)), quadratic, w, 2)
    assert_close(seen[0] - w, QUADRATIC["sam"]["attack"], scale=0.2)
    assert_close(seen[1], QUADRATIC["sam"]["new_w"])


def test_tram_takes_its_arguments_in_odd_calls(x64):
    w, golden = array(SOFTMAX["w"]), SOFTMAX["trajectories"]["previous"]
    tx = alternating(tram("previous"), optax.sgd(SOFTMAX["learning_rate"]))
    seen, state = trainer(tx, softmax_loss, w, 8, output_fn=logits)
    assert_close(seen[-1], golden["w_after_4"])
    assert_close(state.attack_state.radius[::2], golden["radius"])


def test_a_plain_transform_is_the_attack_itself(precision):
    """The update of a plain transform is the attack, sign included."""
    w = array(QUADRATIC["w"])
    attack = optax.chain(optax.contrib.normalize(), optax.scale(0.05))
    seen, _ = trainer(alternating(attack, optax.sgd(0.01)), quadratic, w, 2)
    assert_close(seen[0] - w, QUADRATIC["sam"]["attack"], scale=0.2)
    assert_close(seen[1], QUADRATIC["sam"]["new_w"])


def test_integer_leaf_is_left_alone():
    """A step counter has a float0 as its gradient under allow_int, which the base has to mask."""
    params = {"w": jnp.array([2.0, -1.0]), "count": jnp.array(7)}
    is_float = lambda tree: jax.tree.map(lambda p: jnp.issubdtype(p.dtype, jnp.floating), tree)
    tx = alternating(sam(0.05), optax.masked(optax.sgd(0.01), is_float))
    grad = jax.grad(lambda p: quadratic(p["w"]), allow_int=True)

    @jax.jit
    def call(params, state):
        updates, state = tx.update(grad(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = call(params, state)
        assert params["count"] == clean_params(state, params)["count"] == 7
    np.testing.assert_allclose(params["w"], QUADRATIC["sam"]["new_w"], rtol=1e-6)


def test_clean_params_looks_into_wrapped_states():
    w = array(QUADRATIC["w"])
    tx = optax.chain(optax.clip_by_global_norm(1e3), alternating(sam(0.5), optax.sgd(0.01)))
    updates, state = jax.jit(tx.update)(jax.grad(quadratic)(w), tx.init(w), w)
    np.testing.assert_array_equal(clean_params(state, w + updates), w)
    assert np.abs(updates).max() > 0.1


def test_clean_params_of_other_states():
    w = array(QUADRATIC["w"])
    twice = optax.chain(*(alternating(sam(), optax.sgd(0.01)) for _ in range(2)))
    for tx, found in ((optax.sgd(0.01), 0), (twice, 2)):
        with pytest.raises(ValueError, match=f"must hold one AlternatingState, got {found}"):
            clean_params(tx.init(w), w)


def test_params_are_required():
    w, tx = array(QUADRATIC["w"]), alternating(sam(), optax.sgd(0.01))
    with pytest.raises(ValueError, match=r"alternating needs params: call tx\.update\(grads, sta"):
        tx.update(w, tx.init(w))


@pytest.mark.slow
def test_calls_outside_of_jit_do_not_compile_again(compiled):
    w = jnp.array([2.0, -1.0])
    tx = alternating(sam(0.05), optax.sgd(0.01))
    state, grad = tx.init(w), jax.grad(quadratic)

    def pair(w, state):
        for _ in range(2):
            updates, state = tx.update(grad(w), state, w)
            w = optax.apply_updates(w, updates)
        return w, state

    w, state = pair(w, state)
    assert compiled
    compiled.clear()
    pair(w, state)
    assert not compiled


def test_complex_leaf_that_the_attack_leaves_alone_is_stepped():
    params = {"w": jnp.array([2.0, -1.0]), "z": jnp.array([1 + 1j], jnp.complex64)}
    tx = alternating(sam(0.05, mask={"w": True, "z": False}), optax.sgd(0.1))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["z"], 0.9 * np.array([1 + 1j]), rtol=1e-6)
