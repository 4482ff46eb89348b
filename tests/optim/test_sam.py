"""SAM and ASAM against numbers worked out elsewhere."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    GOLDEN,
    QUADRATIC,
    SOFTMAX,
    array,
    assert_close,
    attack_of,
    check_golden,
    quadratic,
    softmax_loss,
)

from trustjax.optim import asam, sam

QUADRATIC_ROWS = {
    "sam": lambda: sam(0.05),
    "sam_linf": lambda: sam(0.05, norm="linf"),
    "asam_eta_0": lambda: asam(0.5, eta=0.0),
    "asam_eta_001": lambda: asam(0.5, eta=0.01),
}


@pytest.mark.parametrize("name", QUADRATIC_ROWS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_quadratic(name, wrap, precision, strict):
    _, state = check_golden(
        QUADRATIC_ROWS[name](), quadratic, QUADRATIC, QUADRATIC[name], wrap=wrap
    )
    rho = 0.5 if name.startswith("asam") else 0.05
    assert_close([state.radius, state.distance], [rho, rho])


def test_samsung_scales_only_weights(precision):
    """The released ASAM scales the leaf called weight and takes T = 1 on the bias."""
    row, w = QUADRATIC["asam_first_weight_only"], array(QUADRATIC["w"])
    tx = sam(0.5, adaptive={"weight": True, "bias": False}, eta=0.01)
    params = {"weight": w[0], "bias": w[1]}
    loss = lambda p: quadratic(jnp.stack([p["weight"], p["bias"]]))
    attack = attack_of(tx, tx.init(params), params, loss)
    assert_close([attack["weight"], attack["bias"]], row["attack"])
    tx = optax.chain(tx, optax.sgd(0.01))
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, grad_fn=jax.grad(loss))
    new = optax.apply_updates(params, updates)
    assert_close([new["weight"], new["bias"]], row["new_w"])


def test_momentum_trajectory(precision):
    tx, w = optax.chain(sam(0.05), optax.sgd(0.01, momentum=0.9)), array(QUADRATIC["w"])
    state = tx.init(w)
    for expected in QUADRATIC["sam_momentum_09"]:
        updates, state = tx.update(jax.grad(quadratic)(w), state, w, grad_fn=jax.grad(quadratic))
        w = optax.apply_updates(w, updates)
        assert_close(w, expected)


def test_second_order_terms_are_dropped(x64):
    """Differentiating the whole update gives nothing through the attack."""
    w, tx = array(QUADRATIC["w"]), sam(0.05)

    def attacked_loss(v):
        # grad_fn sees v + attack(v); with the attack constant, d loss / dv is the SAM gradient.
        seen = []
        attack_grad = lambda p: seen.append(p) or p
        tx.update(jax.grad(quadratic)(v), tx.init(v), v, grad_fn=attack_grad)
        return quadratic(seen[0])

    gradient = jax.grad(attacked_loss)(w)
    assert_close(gradient, QUADRATIC["sam"]["gradient"])
    assert np.abs(gradient - array(QUADRATIC["gradient_through_attack"])).max() > 4e-4


@pytest.mark.parametrize("name", ["sam", "asam_eta_0"])
def test_softmax(name, precision):
    tx = sam(0.05) if name == "sam" else asam(0.5, eta=0.0)
    check_golden(tx, softmax_loss, SOFTMAX, SOFTMAX["steps"][name])


def test_scale_invariance(x64):
    golden = GOLDEN["scale_invariance"]
    loss = lambda p: 0.5 * jnp.square(p[0] * p[1] - 1)
    for c, plain in ((1.0, golden["sam_c_1"]), (10.0, golden["sam_c_10"])):
        p = jnp.array([2 * c, 3 / c])
        for tx, expected in ((asam(0.1, eta=0.0), golden["asam"]), (sam(0.1), plain)):
            assert_close(loss(p + attack_of(tx, tx.init(p), p, loss)), expected)


def test_agrees_with_optax():
    """optax.contrib.sam computes the same step wherever it is defined."""
    w = array(QUADRATIC["w"])
    attack = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    theirs = optax.contrib.sam(optax.sgd(0.01), attack, opaque_mode=True)
    grad = jax.grad(quadratic)
    expected, _ = theirs.update(grad(w), theirs.init(w), w, grad_fn=lambda p, _: grad(p))
    ours = optax.chain(sam(0.05), optax.sgd(0.01))
    updates, _ = ours.update(grad(w), ours.init(w), w, grad_fn=grad)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_schedule_sets_the_radius():
    tx, w = sam(optax.linear_schedule(0.0, 1.0, 4)), array(QUADRATIC["w"])
    state, radii = tx.init(w), []
    for _ in range(5):
        _, state = tx.update(jax.grad(quadratic)(w), state, w, grad_fn=jax.grad(quadratic))
        radii.append(float(state.radius))
    assert radii == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert float(state.distance) == pytest.approx(1.0)


def test_mask_freezes_leaves_under_attack():
    """A leaf that is not attacked is in no norm; its gradient is taken at the attacked weights."""
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    loss = lambda p: jnp.sum(p["a"] * p["b"])
    tx = sam(1.0, mask={"a": True, "b": False})
    gradient, state = tx.update(
        jax.grad(loss)(params), tx.init(params), params, grad_fn=jax.grad(loss)
    )
    assert gradient == {"a": jnp.array([4.0]), "b": jnp.array([4.0])}  # a was moved from 3 to 4
    assert float(state.distance) == 1.0


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.floats(0.01, 2.0),
    st.floats(0.1, 100.0),
)
def test_properties(weights, direction, rho, factor):
    """The attack has length rho and goes uphill, whatever the scale of the loss and the leaves."""
    w, g = np.array(weights, np.float32), np.array(direction, np.float32)
    if np.linalg.norm(g) < 1e-3:
        return
    for tx, scale in ((sam(rho), np.ones(4)), (asam(rho, eta=0.1), np.abs(w) + 0.1)):
        whole = attack_of(tx, tx.init(w), w, lambda p: jnp.sum(p * g))
        scaled = attack_of(tx, tx.init(w), w, lambda p: factor * jnp.sum(p * g))
        np.testing.assert_allclose(np.linalg.norm(whole / scale), rho, rtol=1e-4)
        np.testing.assert_allclose(scaled, whole, rtol=1e-4, atol=1e-6)
        assert np.sum(np.asarray(whole) * g) > 0
        parts = {"a": w[:1], "b": w[1:]}
        loss = lambda p: jnp.sum(p["a"] * g[:1]) + jnp.sum(p["b"] * g[1:])
        split = attack_of(tx, tx.init(parts), parts, loss)
        np.testing.assert_allclose(
            np.concatenate([split["a"], split["b"]]), whole, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sam(-0.1), "rho must be >= 0, got -0.1"),
        (lambda: sam(float("nan")), "rho must be >= 0, got nan"),
        (lambda: asam(0.5, eta=-1.0), "eta must be >= 0, got -1.0"),
        (lambda: sam(norm="l1"), "norm must be one of 'l2', 'linf', got 'l1'"),
    ],
)
def test_bad_numbers(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_grad_fn_with_a_value_is_refused():
    w, tx = jnp.ones(2), sam()
    with pytest.raises(ValueError, match="gradients alone"):
        tx.update(w, tx.init(w), w, grad_fn=jax.value_and_grad(quadratic))


def test_gradients_are_matched_by_name():
    """An OrderedDict keeps its own order, in which the leaves would be swapped."""
    grad = jax.grad(lambda p: jnp.sum(p["a"]) + 100 * jnp.sum(p["b"]))
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}

    def second(params):
        found = grad(params)
        return OrderedDict(b=found["b"], a=found["a"])

    tx = sam(0.0)
    update, _ = tx.update(grad(params), tx.init(params), params, grad_fn=second)
    np.testing.assert_array_equal(update["a"], 1)
    np.testing.assert_array_equal(update["b"], 100)


@pytest.mark.parametrize("rho", [jnp.array([0.1, 0.2]), [0.1], True, "0.1"])
def test_a_radius_that_is_no_number(rho):
    with pytest.raises(ValueError, match=r"rho must be (one|a) number"):
        sam(rho)
