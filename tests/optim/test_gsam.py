"""GSAM against numbers worked out elsewhere, and how it splits the two gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    QUADRATIC,
    SOFTMAX,
    array,
    assert_close,
    check_golden,
    quadratic,
    softmax_loss,
)

from trustjax.optim import alternating, gsam, radius_schedule, sam


def gradient_of(tx, w, loss=softmax_loss):
    """The gradient that `update` returns at w."""
    grad = jax.grad(loss)
    return jax.jit(lambda w: tx.update(grad(w), tx.init(w), w, grad_fn=grad)[0])(w)


@pytest.mark.table
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_quadratic(wrap, precision, strict):
    row = QUADRATIC["gsam"]
    numbers, state = check_golden(gsam(0.05, row["alpha"]), quadratic, QUADRATIC, row, wrap=wrap)
    attacked = gradient_of(gsam(0.05, 0.0), array(QUADRATIC["w"]), quadratic)
    assert_close((attacked - numbers["gradient"]) / 0.4, row["perpendicular"], scale=10)
    assert_close([state.radius, state.distance], [0.05, 0.05])


def test_no_weight_is_sam(precision):
    check_golden(gsam(0.05, 0.0), softmax_loss, SOFTMAX, SOFTMAX["steps"]["sam"])


def by_hand(params, weights, alpha, descend, attacked=("a", "b")):
    """A step in NumPy on half the weighted squared norm, of radius 0.7 scaled by abs(w) + 0.1."""
    names = ("a", "b")
    w, curvature = (
        np.concatenate([np.ravel(tree[n]) for n in names]) for tree in (params, weights)
    )
    is_attacked = np.concatenate([np.full(params[n].size, n in attacked) for n in names])
    g, scale = curvature * w, np.abs(w) + 0.1
    step = np.where(is_attacked, scale**2 * g, 0)
    attack = 0.7 * step / np.linalg.norm(np.where(is_attacked, scale * g, 0))
    g_p = curvature * (w + attack)
    split = lambda x, onto: x - (x @ onto) / (onto @ onto) * onto
    return g_p - alpha * split(g, g_p) if descend == "attacked" else g + alpha * split(g_p, g)


@pytest.mark.parametrize("descend", ["attacked", "clean"])
@pytest.mark.parametrize("attacked", [("a", "b"), ("b",)], ids=["whole", "masked"])
def test_two_leaves_by_hand(descend, attacked, x64):
    """Products are global; a leaf that is not attacked still takes part in the decomposition."""
    random = np.random.default_rng(1)
    params, weights = ({"a": random.normal(size=(2, 3)), "b": random.normal(size=4)} for _ in "ab")
    squares = lambda p: sum(jnp.sum(weights[n] * jnp.square(p[n])) for n in p) / 2
    tx = gsam(
        0.7,
        0.3,
        descend=descend,
        adaptive=True,
        eta=0.1,
        mask={name: name in attacked for name in params},
    )
    actual = gradient_of(tx, jax.tree.map(jnp.asarray, params), squares)
    actual = np.concatenate([np.ravel(actual[name]) for name in ("a", "b")])
    expected = by_hand(params, weights, 0.3, descend, attacked)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    plain = by_hand(params, weights, 0.0, descend, attacked)
    assert np.abs(actual - plain).max() > 1e-2


def test_the_weight_may_be_traced(x64):
    """The gradient is linear in alpha, which may be a tracer."""
    w = array(SOFTMAX["w"])
    none, half, whole = jax.vmap(lambda alpha: gradient_of(gsam(0.5, alpha), w))(
        array([0.0, 0.5, 1.0])
    )
    np.testing.assert_allclose(none + whole, 2 * half, rtol=1e-12)
    assert np.abs(whole - none).max() > 1e-3


def test_what_is_split_off_is_perpendicular(x64):
    """The part that is removed is orthogonal to the attacked gradient, or to the clean one."""
    w = array(SOFTMAX["w"])
    g, g_p = jax.grad(softmax_loss)(w), gradient_of(sam(1.0), w)
    for descend, base in (("attacked", g_p), ("clean", g)):
        part = gradient_of(gsam(1.0, 0.5, descend=descend), w) - base
        assert abs(np.sum(part * base)) < 1e-15
        assert np.abs(part).max() > 1e-3


def test_zero_gradients_are_finite():
    """If the attacked gradient vanishes, there is nothing to project on."""
    w, g, tx = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.1]), gsam(0.1, 0.4)
    gradient, _ = tx.update(g, tx.init(w), w, grad_fn=jnp.zeros_like)
    np.testing.assert_allclose(gradient, -0.4 * g)
    gradient, state = tx.update(jnp.zeros(2), tx.init(w), w, grad_fn=jnp.zeros_like)
    np.testing.assert_array_equal(gradient, [0, 0])
    assert state.distance == 0


def test_schedules_follow_the_count():
    w, grad = array(QUADRATIC["w"]), jax.grad(quadratic)
    tx = gsam(lambda count: 0.05 * count, lambda count: 0.4 * count)
    first, state = tx.update(grad(w), tx.init(w), w, grad_fn=grad)
    second, state = tx.update(grad(w), state, w, grad_fn=grad)
    np.testing.assert_array_equal(first, grad(w))
    assert_close(second, QUADRATIC["gsam"]["gradient"])
    assert float(state.radius) == pytest.approx(0.05)


# ---- the radius tied to the learning rate


def test_radius_moves_between_its_ends_as_the_rate_does():
    warm = optax.warmup_cosine_decay_schedule(0.01, 0.1, 3, 10, 0.01)
    rho = radius_schedule(
        warm, rho_min=0.1, rho_max=0.6, learning_rate_max=0.1, learning_rate_min=0.01
    )
    steps = np.arange(12)
    expected = 0.1 + 0.5 * (np.array([warm(step) for step in steps]) - 0.01) / 0.09
    np.testing.assert_allclose([rho(step) for step in steps], expected, rtol=1e-5)
    assert max(expected) == pytest.approx(0.6)
    assert expected[-1] == pytest.approx(0.1)
    w = array(QUADRATIC["w"])
    tx = gsam(rho)
    _, state = tx.update(w, tx.init(w), w, grad_fn=lambda p: p)
    assert float(state.radius) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("peak", [0.1, 0.3])
def test_radius_stays_between_its_ends(peak):
    """The rate starts at 0, below its lower bound, and peaks above its upper bound."""
    warm = optax.warmup_cosine_decay_schedule(0.0, peak, 5, 20, 0.0)
    ends = {"learning_rate_max": 0.1, "learning_rate_min": 0.01}
    rho = radius_schedule(warm, rho_min=0.01, rho_max=0.1, **ends)
    radii = np.array([rho(step) for step in range(22)])
    assert radii.min() == radii[0] == np.float32(0.01)
    assert radii.max() == radii[5] == np.float32(0.1)
    expected = 0.01 + 0.09 * (np.array([warm(step) for step in range(22)]) - 0.01) / 0.09
    inside = (expected > 0.01) & (expected < 0.1)
    np.testing.assert_allclose(radii[inside], expected[inside], rtol=1e-5)
    # A rate without an end below it, all the way from the lowest to the highest float.
    for rate in (-np.inf, -1.0, 1e30, np.inf):
        at = radius_schedule(lambda _, rate=rate: rate, rho_min=0.01, rho_max=0.1, **ends)(0)
        assert at == np.float32(0.01 if rate < 0 else 0.1)


def test_constant_rate_has_the_largest_radius():
    constant = optax.constant_schedule(0.1)
    ends = {"learning_rate_max": 0.1, "learning_rate_min": 0.1}
    assert float(radius_schedule(constant, rho_min=0.1, rho_max=0.6, **ends)(5)) == np.float32(0.6)


def test_radius_schedule_with_traced_numbers():
    radii = lambda peak: radius_schedule(
        optax.linear_schedule(peak, 0.0, 4), rho_min=0.0, rho_max=0.6, learning_rate_max=peak
    )(1)
    np.testing.assert_allclose(jax.vmap(radii)(jnp.array([0.1, 0.3])), 0.45, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.1}, "learning_rate must be a schedule, got 0.1"),
        ({"rho_min": -0.1}, "rho_min must be >= 0, got -0.1"),
        ({"rho_max": 0.05}, "rho_max must be >= 0.1, got 0.05"),
        ({"learning_rate_min": 0.2}, "learning_rate_max must be >= 0.2, got 0.1"),
    ],
)
def test_radius_schedule_refuses(changes, words):
    good = {"learning_rate": optax.constant_schedule(0.1), "rho_min": 0.1, "rho_max": 0.6}
    with pytest.raises(ValueError, match=words):
        radius_schedule(**good | {"learning_rate_max": 0.1} | changes)


# ---- errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gsam(-0.1), "rho must be >= 0, got -0.1"),
        (lambda: gsam(alpha=-1.0), "alpha must be >= 0, got -1.0"),
        (lambda: gsam(eta=-1.0), "eta must be >= 0, got -1.0"),
        (lambda: gsam(descend="both"), "descend must be one of 'attacked', 'clean', got 'both'"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_it_cannot_be_spread_over_two_calls():
    w, tx = array(QUADRATIC["w"]), alternating(gsam(), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"gsam joins the two gradients .* cannot .* alternating"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="gsam needs grad_fn: call") as error:
        gsam().update(w, gsam().init(w), w)
    assert "alternating" not in str(error.value)
