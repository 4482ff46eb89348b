"""Penalties against worked numbers and NumPy: values, derivatives, masks, and SMART's attack."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.losses import (
    bregman_penalty,
    mesa_penalty,
    r3f_penalty,
    smart_penalty,
    smart_perturbation,
    trpo_penalty,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "tram_sam.json").read_text(encoding="utf-8")
)["softmax"]
PENALTIES = {
    "trpo": trpo_penalty,
    "r3f": r3f_penalty,
    "r3f_symmetric": functools.partial(r3f_penalty, symmetric=True),
    "mesa": mesa_penalty,
    "mesa_released": functools.partial(mesa_penalty, temperature=5.0),
    "smart": smart_penalty,
    "bregman": bregman_penalty,
}
# Those that hold the other function constant.
TARGETS = ("trpo", "mesa", "mesa_released", "bregman")
penalties = pytest.mark.parametrize("name", PENALTIES)

RANDOM = np.random.default_rng(0)
LOGITS, OTHER = RANDOM.normal(size=(2, 4, 3, 5))


def softmax(z, temperature=1.0):
    exponential = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    return exponential / exponential.sum(-1, keepdims=True)


def kl(p, q):
    return np.sum(p * np.log(p / q), -1)


def by_hand(name, logits, other):
    """The value per example, in NumPy."""
    temperature = 5.0 if name == "mesa_released" else 1.0
    p, q = softmax(logits, temperature), softmax(other, temperature)
    if name in ("trpo", "r3f"):
        return kl(q, p)
    if name.startswith("mesa"):
        return temperature**2 * kl(q, p)
    return kl(q, p) + kl(p, q)


def slopes_by_hand(name, logits, other):
    """The derivatives of each value by its own logits, in closed form."""
    temperature = 5.0 if name == "mesa_released" else 1.0
    p, q = softmax(logits, temperature), softmax(other, temperature)
    # KL(a || b) by the logits of b is b - a, by those of a: a (log(a / b) - KL).
    by_first = lambda a, b: a * (np.log(a / b) - kl(a, b)[..., None])
    slope, other_slope = temperature * (p - q), by_first(q, p)
    if name in ("r3f_symmetric", "smart", "bregman"):
        slope, other_slope = slope + by_first(p, q), other_slope + q - p
    return slope, np.zeros_like(q) if name in TARGETS else other_slope


@jax.jit
def all_of(logits, other, where=None):
    """Values and slopes of every penalty, from one compilation."""

    def one(penalty):
        total = lambda *pair: (jnp.sum(values := penalty(*pair, where=where)), values)
        slopes, values = jax.grad(total, (0, 1), has_aux=True)(logits, other)
        return values, slopes

    return {name: one(penalty) for name, penalty in PENALTIES.items()}


# ---- values


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_golden(wrap, x64, strict):
    x, w, reference = (np.array(GOLDEN[name], float) for name in ("x", "w", "reference"))
    logits, previous = x @ w, x @ reference
    noised = (x + np.array(GOLDEN["noise"]["z"])) @ w
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(wrap(trpo_penalty)(logits, previous), GOLDEN["kl_per_example"])
    close(wrap(mesa_penalty)(logits, previous), GOLDEN["kl_per_example"])
    close(wrap(r3f_penalty)(logits, noised), GOLDEN["noise"]["kl_per_example"])
    symmetric = functools.partial(r3f_penalty, symmetric=True)
    for penalty in (symmetric, smart_penalty, bregman_penalty):
        close(np.mean(wrap(penalty)(logits, previous)), GOLDEN["symmetric_kl"])


@penalties
def test_against_numpy(name, x64, strict):
    values = PENALTIES[name](LOGITS, OTHER)
    assert values.shape == (4, 3)
    np.testing.assert_allclose(values, by_hand(name, LOGITS, OTHER), rtol=1e-12)


@pytest.mark.table
@penalties
def test_slopes(name, x64):
    """Gradients agree with their closed form, and none flows into a target."""
    _, actual = all_of(LOGITS, OTHER)[name]
    for slope, expected in zip(actual, slopes_by_hand(name, LOGITS, OTHER), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-10, atol=1e-14)


@penalties
def test_finite_differences(name, x64):
    """Gradients agree with finite differences along a random direction of the trained logits."""
    direction, step = RANDOM.normal(size=LOGITS.shape), 1e-5
    total = lambda logits: np.sum(all_of(logits, OTHER)[name][0])
    measured = (total(LOGITS + step * direction) - total(LOGITS - step * direction)) / (2 * step)
    slope, _ = all_of(LOGITS, OTHER)[name][1]
    np.testing.assert_allclose(np.sum(slope * direction), measured, rtol=1e-7)


# ---- numerics


@pytest.mark.table
@penalties
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_logits(name, dtype):
    """Value and gradient are exactly zero, with impossible classes too."""
    logits = jnp.asarray(LOGITS, dtype).at[0, 0, 1].set(-jnp.inf)
    values, slopes = all_of(logits, logits)[name]
    assert not np.any(values)
    assert not any(np.any(np.asarray(slope, np.float32)) for slope in slopes)


@penalties
def test_half_precision(name, strict):
    """Sums over classes are float32; gradients have the dtype of their logits."""
    logits, other = (jnp.asarray(x, jnp.bfloat16) for x in (LOGITS, OTHER))
    values, slopes = all_of(logits, other)[name]
    assert values.dtype == jnp.float32
    exact = by_hand(name, *(np.asarray(x, np.float64) for x in (logits, other)))
    np.testing.assert_allclose(values, exact, rtol=1e-5)
    assert {slope.dtype for slope in slopes} == {jnp.dtype(jnp.bfloat16)}
    mixed = jax.eval_shape(PENALTIES[name], logits, jnp.asarray(OTHER, jnp.float32))
    assert mixed.dtype == jnp.float32


@pytest.mark.table
@penalties
def test_masked_examples(name, x64):
    """They have zero value and gradient, even if their logits are not numbers."""
    where = np.array([[True], [False], [True], [False]])
    spoilt = np.where(where[..., None], LOGITS, np.nan)
    values, slopes = all_of(spoilt, OTHER, where)[name]
    np.testing.assert_array_equal(values[1::2], 0)
    np.testing.assert_allclose(values[::2], by_hand(name, LOGITS, OTHER)[::2], rtol=1e-12)
    for slope, expected in zip(slopes, slopes_by_hand(name, LOGITS, OTHER), strict=True):
        np.testing.assert_array_equal(slope[1::2], 0)
        np.testing.assert_allclose(slope[::2], expected[::2], rtol=1e-10, atol=1e-14)


@pytest.mark.table
@penalties
def test_empty_mask(name):
    where = np.zeros((4, 3), bool)
    logits, other = (jnp.asarray(x, jnp.float32) for x in (LOGITS, OTHER))
    values, (slope, _) = all_of(logits, other, where)[name]
    assert not np.any(values)
    assert not np.any(slope)


@pytest.mark.table
@penalties
def test_under_vmap_and_jit(name):
    logits, other = (jnp.asarray(x, jnp.float32) for x in (LOGITS, OTHER))
    together = jax.vmap(jax.vmap(all_of))(logits, other)[name][0]
    np.testing.assert_allclose(together, all_of(logits, other)[name][0], rtol=1e-5)


# ---- SMART's inner maximisation, on a linear softmax model

WEIGHTS, INPUTS = RANDOM.normal(size=(6, 5)), RANDOM.normal(size=(4, 3, 6))


def model(inputs):
    return inputs @ jnp.asarray(WEIGHTS, inputs.dtype)


def perturbed(inputs, key, function=model, **options):
    return jax.jit(functools.partial(smart_perturbation, function, **options))(inputs, key)


@pytest.mark.table
@pytest.mark.parametrize("axis", [-1, (-2, -1)])
@pytest.mark.parametrize("steps", [1, 3])
def test_smart_against_numpy(axis, steps, x64):
    """Each step goes along the gradient over its largest entry and is projected into the box."""
    key, radius, eta, sigma = jax.random.key(3), 0.05, 0.03, 0.01
    options = {"radius": radius, "step_size": eta, "noise": sigma, "axis": axis, "steps": steps}
    actual = perturbed(INPUTS, key, **options)

    moved = INPUTS + sigma * np.asarray(jax.random.normal(key, INPUTS.shape))
    for _ in range(steps):
        slope, _ = slopes_by_hand("bregman", moved @ WEIGHTS, INPUTS @ WEIGHTS)
        gradient = slope @ WEIGHTS.T
        direction = gradient / np.abs(gradient).max(axis, keepdims=True)
        moved = np.clip(moved + eta * direction, INPUTS - radius, INPUTS + radius)
    np.testing.assert_allclose(actual, moved, rtol=1e-9)
    at_the_edge = np.isclose(np.abs(actual - INPUTS), radius)
    assert at_the_edge.any() == (steps == 3)


def test_released_smart_against_numpy(x64):
    """One step from the clean inputs, along the gradient of one KL, with a guarded norm."""
    key, eta, sigma = jax.random.key(3), 1e-3, 1e-5
    actual = perturbed(INPUTS, key, form="released")
    start = INPUTS + sigma * np.asarray(jax.random.normal(key, INPUTS.shape))
    slope, _ = slopes_by_hand("trpo", start @ WEIGHTS, INPUTS @ WEIGHTS)
    gradient = slope @ WEIGHTS.T / len(INPUTS)
    norm = np.abs(gradient).max(-1, keepdims=True)
    expected = INPUTS + eta * gradient / (norm + 1e-6)
    np.testing.assert_allclose(actual - INPUTS, expected - INPUTS, rtol=1e-6, atol=1e-12)
    assert np.abs(actual - INPUTS).max() < 0.99 * eta  # the guard is felt


def test_smart_finds_worse_inputs_than_chance():
    inputs, radius = jnp.asarray(INPUTS, jnp.float32), 0.1
    worst = perturbed(inputs, jax.random.key(0), radius=radius, step_size=radius, noise=0.01)
    rise = jax.jit(lambda moved: smart_penalty(model(inputs), model(moved)))
    assert np.abs(worst - inputs).max() <= radius * 1.0001
    for key in jax.random.split(jax.random.key(1), 5):
        corner = inputs + radius * jax.random.rademacher(key, inputs.shape, jnp.float32)
        assert rise(worst).mean() > rise(corner).mean()


@pytest.mark.slow
def test_smart_perturbation_is_held_constant(x64):
    """No gradient flows through it, neither from the weights nor from the inputs."""

    def penalty(scale, inputs, worst=None):
        scaled = lambda x: scale * model(x)
        if worst is None:
            worst = smart_perturbation(scaled, inputs, jax.random.key(0), radius=0.1, step_size=0.1)
        return jnp.sum(smart_penalty(scaled(inputs), scaled(worst)))

    worst = smart_perturbation(model, INPUTS, jax.random.key(0), radius=0.1, step_size=0.1)
    actual = jax.grad(penalty, (0, 1))(1.0, INPUTS)
    expected = jax.grad(penalty, (0, 1))(1.0, INPUTS, worst)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9), actual, expected)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_smart_without_a_gradient(form, strict):
    """A constant function leaves the start or the inputs, and one that is not finite the inputs."""
    inputs, key = jnp.asarray(INPUTS, jnp.float32), jax.random.key(0)
    constant = perturbed(inputs, key, lambda x: jnp.zeros(x.shape), form=form)
    assert np.abs(constant - inputs).max() < 1e-4
    broken = perturbed(inputs, key, lambda x: x * jnp.float32(jnp.nan), form=form)
    np.testing.assert_array_equal(broken, inputs)


def test_smart_skips_what_is_masked():
    """An excluded example keeps its random start."""
    where = np.array([[True], [False], [True], [False]])
    inputs = jnp.asarray(INPUTS, jnp.float32)
    moved = perturbed(inputs, jax.random.key(0), where=where)
    lengths = np.abs(moved - inputs).max((1, 2))
    assert np.all(lengths[::2] > 9e-4)
    assert np.all(lengths[1::2] < 1e-4)


def test_smart_keeps_the_dtype():
    inputs = jnp.asarray(INPUTS, jnp.bfloat16)
    moved = perturbed(inputs, jax.random.key(0), radius=0.5, step_size=0.5, noise=0.1)
    assert moved.dtype == jnp.bfloat16
    assert np.abs(np.asarray(moved - inputs, np.float32)).max() > 0.4


# ---- errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: trpo_penalty(x, x[1:]), r"logits and previous_logits must have the same shape"),
        (lambda x: r3f_penalty(x, x[1:]), r"noised_logits .*\(4, 3, 5\) and \(3, 3, 5\)"),
        (lambda x: mesa_penalty(x, x[1:]), "logits and average_logits must have the same shape"),
        (lambda x: mesa_penalty(x, x, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda x: smart_penalty(x, x[1:]), "logits and perturbed_logits must have the same shape"),
        (lambda x: bregman_penalty(x, x[1:]), "previous_logits must have the same shape"),
        (lambda x: smart_perturbation(model, x, None, radius=0.0), "radius must be > 0, got 0.0"),
        (lambda x: smart_perturbation(model, x, None, step_size=-1.0), "step_size must be > 0"),
        (lambda x: smart_perturbation(model, x, None, noise=0.0), "noise must be > 0, got 0.0"),
        (lambda x: smart_perturbation(model, x, None, steps=0), "steps must be >= 1, got 0"),
        (lambda x: smart_perturbation(model, x, None, form="code"), "form must be one of 'paper'"),
        (
            lambda x: smart_perturbation(model, x, None, form="released", steps=2),
            "steps must be 1 with form='released', got 2",
        ),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.float32(LOGITS))
