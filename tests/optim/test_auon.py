"""AuON against worked numbers, its bounds, and the optimizers that it is equal to."""

import functools
import json
import math
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from trustjax.models import ViT
from trustjax.optim import auon, hybrid_auon, matrix_labels, scale_by_auon
from trustjax.optim._auon_brake import brake_excess, known_excess, two_moments_suffice

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "auon.json").read_text())
FORMS = {
    "auon": {},
    "auon_head": {"normalize": False, "gamma": 1.5},
    "hybrid": {"ns_steps": 1},
    "hybrid_head": {"ns_steps": 5, "normalize": False, "gamma": 1.5},
}


@functools.cache
def compiled_update(**options):
    tx = scale_by_auon(0.0, **options)
    return jax.jit(lambda matrix: tx.update(matrix, tx.init(matrix)))


def update_of(matrix, **options):
    """The update of one matrix without momentum, and the state."""
    return compiled_update(**options)(matrix)


excess_of = jax.jit(brake_excess)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_golden(form, compiled, x64, strict):
    step = compiled_update(**FORMS[form])
    matrix = jnp.array(GOLDEN["matrix"], jnp.float64)
    update, state = (step if compiled else step.__wrapped__)(matrix)
    np.testing.assert_allclose(update, GOLDEN[form]["update"], atol=2e-8)
    np.testing.assert_allclose(state.distance, np.linalg.norm(update), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_golden_in_float32(form, strict):
    update, _ = update_of(jnp.array(GOLDEN["matrix"], jnp.float32), **FORMS[form])
    assert update.dtype == jnp.float32
    np.testing.assert_allclose(update, GOLDEN[form]["update"], rtol=1e-5, atol=1e-6)


def test_singular_values_keep_their_ratio(x64):
    """Whatever the brake does, the direction is that of the gradient."""
    matrix = np.array(GOLDEN["matrix"])
    update, _ = update_of(jnp.array(matrix))
    values = np.linalg.svd(update)[1]
    np.testing.assert_allclose(values, GOLDEN["auon"]["singular_values"], atol=1e-7)
    np.testing.assert_allclose(values / values[1], (s := np.linalg.svd(matrix)[1]) / s[1])
    cosine = np.sum(update * matrix) / np.linalg.norm(update) / np.linalg.norm(matrix)
    assert cosine == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum(nesterov, x64):
    """The average has no bias correction; the form without norm and brake shows it."""
    found = GOLDEN["momentum"]
    tx = scale_by_auon(nesterov=nesterov, normalize=False, gamma=0.0, brake_epsilon=0.0)
    state = tx.init(jnp.zeros((1, 1)))
    updates = []
    for gradient in found["gradients"]:
        update, state = tx.update(jnp.full((1, 1), gradient, jnp.float64), state)
        updates.append(update.item())
    np.testing.assert_allclose(updates, found["nesterov" if nesterov else "average"], atol=1e-12)


@pytest.mark.parametrize(
    ("form", "exact"), [("auon", True), ("hybrid", True), ("auon_head", False)]
)
def test_scale_invariance(form, exact):
    matrix = jnp.array(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    updates = [update_of(c * matrix, **FORMS[form])[0] for c in (1e-3, 1.0, 1e3)]
    for update in updates:
        if exact:
            np.testing.assert_allclose(update, updates[1], rtol=1e-4, atol=1e-5)
    assert exact == np.allclose(updates[0], updates[2], rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from([(1, 1), (1, 5), (6, 1), (3, 4), (6, 6)]),
    gamma=st.floats(0, 3),
    tail=st.sampled_from([0.5, 2.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_brake_is_within_its_bounds(shape, gamma, tail, seed):
    size = math.prod(shape)
    matrix = np.random.default_rng(seed).standard_t(tail, size=shape)
    entries = jnp.asarray(gamma * matrix / np.linalg.norm(matrix), jnp.float32)
    square = (1 + float(excess_of(entries)[0, 0])) ** 2
    assert 1 + gamma**2 / size <= square * (1 + 1e-5)
    assert square <= (1 + np.sinh(gamma) ** 2 / size) * (1 + 1e-5)


def test_brake_is_right_where_float32_rounds_it_off():
    found = GOLDEN["excess"]
    one_hot = np.zeros((512, 512), np.float32)
    one_hot[3, 7] = 1.0
    np.testing.assert_allclose(excess_of(one_hot).item(), found["one_hot_512"], rtol=1e-3)
    spread = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    spread = spread / np.linalg.norm(spread)
    np.testing.assert_allclose(excess_of(spread).item(), found["gaussian_512"], rtol=1e-3)
    even = np.full((768, 3072), 1.5 / math.sqrt(768 * 3072), np.float32)
    expected = found["even_768x3072_gamma_1.5"]
    np.testing.assert_allclose(excess_of(even).item(), expected, rtol=1e-3)
    naive = jnp.sqrt(jnp.mean(jnp.cosh(even) ** 2)).item() - 1
    assert abs(naive - expected) > 0.1 * expected


@pytest.mark.parametrize("kind", ["one_hot", "normal"])
def test_large_matrices_whose_brake_is_not_measured(kind):
    """The mean of the bounds of r is used where these differ by less than a rounding error."""
    size = 2048
    random = np.random.default_rng(0)
    matrix = random.normal(size=(size, size)) if kind == "normal" else np.zeros((size, size))
    matrix[5, 9] += 1.0
    unit = matrix / np.linalg.norm(matrix)
    for gamma, known in ((1.0, True), (3.0, False)):
        assert (known_excess(gamma, size * size, np.float32) is not None) == known
        brake = np.sqrt(np.mean(np.cosh(gamma * unit) ** 2))
        update, _ = update_of(jnp.asarray(matrix, jnp.float32), nesterov=False, gamma=gamma)
        np.testing.assert_allclose(update[5, 9], (unit / brake)[5, 9], rtol=8e-7)
    # Exact arithmetic: the mean of the bounds is within an eps of float32 of the brake.
    low, high = (np.sqrt(1 + x / size**2) - 1 for x in (1.0, np.sinh(1.0) ** 2))
    found = known_excess(1.0, size * size, np.float32)
    assert low < found < high
    assert known_excess(1.0, size * size, np.float64) is None
    assert known_excess(1.0, 512 * 512, np.float32) is None
    assert jax.jit(lambda gamma: known_excess(gamma, size * size, np.float32) is None)(1.0)


def test_brake_on_entries_of_size_one():
    """Our brake tells heavy tails from spread entries, and does not overflow where cosh does."""
    normal = jnp.array(np.random.default_rng(0).normal(size=(512, 512)), jnp.float32)
    brake = lambda matrix, gamma: 1 / update_of(matrix, brake="rms", gamma=gamma)[1].distance
    # For normal entries the mean of cosh(gamma z)^2 is (1 + exp(2 gamma^2)) / 2.
    for gamma in (0.5, 1.0):
        expected = math.sqrt((1 + math.exp(2 * gamma**2)) / 2)
        assert float(brake(normal, gamma)) == pytest.approx(expected, rel=0.02)
    one_hot = jnp.zeros((64, 64)).at[0, 0].set(3.0)
    expected = math.log(math.cosh(64.0)) + 0.5 * math.log(1 / 4096)
    assert math.log(float(brake(one_hot, 1.0))) == pytest.approx(expected, rel=1e-4)
    update, state = update_of(jnp.zeros((512, 512)).at[0, 0].set(1.0), brake="rms")
    assert np.isfinite(update).all()
    assert state.distance < 1e-30


def test_without_a_brake_it_is_normalised_momentum():
    """The brake of the paper's form is too small to matter: it changes a share of 1 / (2 N)."""
    gradients = np.random.default_rng(0).normal(size=(5, 64, 64)).astype(np.float32)

    def trajectory(gamma):
        tx = auon(0.1, gamma=gamma)
        params = {"kernel": jnp.ones((64, 64))}
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update({"kernel": gradient}, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["kernel"], np.float64) - 1

    expected, momentum = np.zeros((64, 64)), np.zeros((64, 64))
    for gradient in gradients.astype(np.float64):
        momentum = 0.95 * momentum + 0.05 * gradient
        h = 0.95 * momentum + 0.05 * gradient
        expected -= 0.1 * h / np.linalg.norm(h)
    np.testing.assert_allclose(trajectory(0.0), expected, atol=1e-6)
    difference = np.linalg.norm(trajectory(1.0) - expected) / np.linalg.norm(expected)
    assert 0.3 / 4096 < difference < 1 / 4096


def test_the_form_at_head_is_nesterov_sgd():
    gradients = np.random.default_rng(1).normal(size=(5, 64, 64)).astype(np.float32)
    head = optax.chain(scale_by_auon(**FORMS["auon_head"]), optax.scale_by_learning_rate(0.1))
    sgd = optax.sgd(0.1 * 0.05, momentum=0.95, nesterov=True)
    states = [tx.init(jnp.zeros((64, 64))) for tx in (head, sgd)]
    for gradient in gradients:
        (a, states[0]), (b, states[1]) = (
            tx.update(jnp.asarray(gradient), state)
            for tx, state in zip((head, sgd), states, strict=True)
        )
        np.testing.assert_allclose(a, b, rtol=1.2 * np.sinh(1.5) ** 2 / (2 * 4096), atol=1e-7)


def test_stacked_matrices_are_apart():
    stack = jnp.array(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    for options in FORMS.values():
        together, state = update_of(stack, **options)
        alone = [update_of(each, **options) for each in stack]
        np.testing.assert_allclose(together, [update for update, _ in alone], rtol=1e-5, atol=1e-6)
        distances = [each.distance for _, each in alone]
        np.testing.assert_allclose(state.distance, np.mean(distances), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"ns_steps": 1}], ids=["auon", "hybrid"])
def test_dimension_numbers(options):
    """A convolution kernel [3, 3, inputs, outputs] is one matrix, of 9 inputs by outputs."""
    kernel = jnp.array(np.random.default_rng(0).normal(size=(3, 3, 4, 5)), jnp.float32)
    numbers = MuonDimensionNumbers((0, 1, 2), 3)
    update, _ = update_of(kernel, dimension_numbers=lambda _: numbers, shape_factor=True, **options)
    flat, _ = update_of(kernel.reshape(36, 5), shape_factor=True, **options)
    np.testing.assert_allclose(update.reshape(36, 5), flat, rtol=1e-5, atol=1e-7)
    # An attention kernel [inputs, heads, size] with the outputs first.
    back, _ = update_of(
        jnp.transpose(kernel, (3, 2, 0, 1)), shape_factor=True,
        dimension_numbers=MuonDimensionNumbers((2, 3, -3), 0), **options,
    )  # fmt: skip
    np.testing.assert_allclose(back, jnp.transpose(update, (3, 2, 0, 1)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="must name different axes"):
        update_of(kernel, dimension_numbers=MuonDimensionNumbers((0, 1), 1))


def test_shape_factor():
    """The factor is sqrt(outputs / inputs) if there are more outputs than inputs, else 1."""
    wide, tall = jnp.ones((2, 8)), jnp.ones((8, 2))
    for matrix, factor in ((wide, 2.0), (tall, 1.0)):
        plain, scaled = (update_of(matrix, shape_factor=on)[0] for on in (False, True))
        np.testing.assert_allclose(scaled, factor * plain, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_zero_gradient(form):
    update, state = update_of(jnp.zeros((3, 4)), **FORMS[form])
    np.testing.assert_array_equal(update, np.zeros((3, 4)))
    assert state.distance == 0


def test_bfloat16_sums_in_float32():
    """In bfloat16 a sum of 4096 squares would end at 256."""
    update, state = update_of(jnp.ones((64, 64), jnp.bfloat16), mu_dtype=jnp.bfloat16)
    assert update.dtype == state.momentum.dtype == jnp.bfloat16
    np.testing.assert_allclose(update.astype(np.float32), 1 / 64, rtol=4e-3)
    np.testing.assert_allclose(state.distance, 1.0, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_momentum_of_half_precision_is_float32(dtype):
    """Stored in bfloat16 it would stand still: a thousandth of a gradient rounds away."""
    tx = auon(1.0, beta=0.999, nesterov=False, other=optax.sgd(1.0))
    params = {"kernel": jnp.eye(2, dtype=dtype), "bias": jnp.ones(2, dtype)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(200):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    assert updates["kernel"].dtype == dtype
    momentum = optax.tree.get(state, "momentum")["kernel"]
    assert momentum.dtype == jnp.float32
    np.testing.assert_allclose(momentum, 1 - 0.999**200, rtol=1e-4)
    for make in (scale_by_auon, functools.partial(auon, 1.0), functools.partial(hybrid_auon, 1.0)):
        matrix = {"kernel": jnp.eye(2, dtype=dtype)}
        state = make(mu_dtype=jnp.float16).init(matrix)
        assert optax.tree.get(state, "momentum")["kernel"].dtype == jnp.float16
        with pytest.raises(ValueError, match="mu_dtype must be a floating dtype or None, got int8"):
            make(mu_dtype="int8")


@pytest.mark.table
@pytest.mark.parametrize(
    ("form", "shape"),
    [(form, (3, 4)) for form in (*FORMS, "rms")] + [("auon", (240, 256)), ("auon", (1024, 1024))],
    ids=str,
)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_that_under_or_overflow(form, size, shape):
    """In float32, against the update of the same matrix with entries of size one."""
    options = {"brake": "rms"} if form == "rms" else FORMS[form]
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    # The epsilon is the paper's: beside it a matrix of 1e-20 counts as zero.
    tx = scale_by_auon(epsilon=0.0, **options)
    step = jax.jit(lambda g: tx.update(g, tx.init(g)))
    factor = 1.0 if options.get("normalize", True) or options.get("ns_steps") else size
    expected, expected_state = step(matrix)
    update, state = step(matrix * np.float32(size))
    tolerance = {"rtol": 2e-5, "atol": 1e-7 * factor * np.abs(expected).max()}
    np.testing.assert_allclose(update, factor * expected, **tolerance)
    np.testing.assert_allclose(state.distance, factor * expected_state.distance, rtol=2e-5)


@pytest.mark.parametrize("epsilon", [1e-7, 0.0])
def test_extremes_as_in_float64(epsilon, x64):
    matrix = np.array(GOLDEN["matrix"])
    for size in (1e-20, 1.0, 1e20):
        found = [
            update_of(jnp.asarray(size * matrix, dtype), epsilon=epsilon)[0]
            for dtype in (jnp.float32, jnp.float64)
        ]
        np.testing.assert_allclose(*found, rtol=1e-5)
        update, _ = update_of(jnp.zeros((3, 4), jnp.float32), epsilon=epsilon)
        np.testing.assert_array_equal(update, np.zeros((3, 4)))


@pytest.mark.parametrize("shape", [(3, 4), (240, 256), (1024, 1024)], ids=str)
def test_nan_stays_nan(shape):
    for options in ({}, {"brake": "rms"}, {"nesterov": False}):
        update, state = jax.jit(functools.partial(update_of, **options))(
            jnp.ones(shape).at[1, 2].set(jnp.nan)
        )
        assert np.isnan(update).all()
        assert np.isnan(state.distance)


def test_two_moments_give_the_brake():
    """In matrices that are large enough the sums of x^2 and x^4 give r to a rounding error."""
    random = np.random.default_rng(0)
    shape = (240, 256)
    size = math.prod(shape)
    assert two_moments_suffice(1.0, size, np.float32)
    assert not two_moments_suffice(1.0, 64 * 64, np.float32)
    assert not two_moments_suffice(3.0, size, np.float32)
    assert not two_moments_suffice(1.0, size, np.float64)
    few = np.zeros(size)
    few[:3] = (1.0, 0.8, 0.1)
    mixed = random.normal(size=size) * 0.7 / np.sqrt(size)
    mixed[7] += np.sqrt(0.5)
    for entries in (few, mixed, np.ones(size), random.standard_t(1.0, size)):
        unit = (entries / np.linalg.norm(entries)).reshape(shape)
        brake = np.sqrt(np.mean(np.cosh(unit) ** 2))
        _, state = jax.jit(update_of)(jnp.asarray(unit, jnp.float32))
        np.testing.assert_allclose(state.distance, 1 / (1 + 1e-7) / brake, rtol=3e-7)


def test_nothing_is_compiled_again_outside_jit():
    tx = scale_by_auon()
    matrix = jnp.ones((3, 5))
    state = tx.init(matrix)
    tx.update(matrix, state)
    with jax.no_tracing():
        tx.update(matrix, state)


def test_weight_decay_bounds_the_weights():
    """Under a constant gradient the norm of the weights converges to 1 / decay."""
    direction = jnp.array(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    tx = auon(0.1, weight_decay=0.1)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(direction, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros((64, 32))
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=1500)
    assert float(jnp.linalg.norm(params)) == pytest.approx(10.0, rel=1e-3)


def test_which_leaves_are_matrices():
    params = jax.eval_shape(
        ViT(10, patch_size=4, width=8, depth=1, num_heads=2).init,
        jax.random.key(0), jnp.zeros((1, 8, 8, 1)),
    )["params"]  # fmt: skip
    labels = matrix_labels(params)
    assert labels["block_0"]["query"] == {"kernel": "auon", "bias": "other"}
    assert labels["block_0"]["attention_norm"]["scale"] == "other"
    assert labels["head"] == {"kernel": "other", "bias": "other"}
    assert labels["position_embedding"] == labels["class_token"] == "other"
    others = {
        "wte": {"embedding": jnp.ones((4, 2))},
        "lm_head": {"kernel": jnp.ones((2, 4))},
        "overhead": {"kernel": jnp.ones((2, 4))},
        "count": jnp.ones((2, 2), int),
    }
    assert matrix_labels(others) == {
        "wte": {"embedding": "other"},
        "lm_head": {"kernel": "other"},
        "overhead": {"kernel": "auon"},
        "count": "other",
    }


def test_other_leaves_go_to_another_optimizer():
    params = {
        "a": {"kernel": jnp.eye(3)},
        "embed": {"embedding": jnp.ones((3, 3))},
        "b": jnp.ones(3),
    }
    tx = auon(0.1, other=optax.sgd(0.5))
    updates, state = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.5 * np.ones((3, 3)))
    np.testing.assert_allclose(updates["b"], -0.5 * np.ones(3))
    expected = -0.1 * update_of(jnp.eye(3))[0]
    np.testing.assert_allclose(updates["a"]["kernel"], expected, rtol=1e-6)
    assert optax.tree.get(state, "radius") == 1.0
    everything = auon(
        0.1, label_fn=lambda p: jax.tree.map(lambda x: "other", p), other=optax.sgd(1.0)
    )
    updates, _ = everything.update(params, everything.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -np.eye(3))


def test_hybrid_takes_one_step_and_dimension_numbers_for_some_leaves():
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}, "dense": {"kernel": jnp.eye(4)}}
    numbers = {"conv": MuonDimensionNumbers((0, 1, 2), 3), "dense": None}
    tx = hybrid_auon(1.0, beta=0.0, dimension_numbers=numbers)
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    one = update_of(jnp.eye(4), ns_steps=1)[0]
    np.testing.assert_allclose(updates["dense"]["kernel"], -one, rtol=1e-6)
    flat = update_of(jnp.ones((18, 4)), ns_steps=1)[0].reshape(3, 3, 2, 4)
    np.testing.assert_allclose(updates["conv"]["kernel"], -flat, rtol=1e-5)
    with pytest.raises(ValueError, match="ns_steps must be >= 1, got 0"):
        hybrid_auon(1.0, ns_steps=0)


def test_bad_arguments():
    for options, words in (
        ({"beta": 1.5}, "beta must be <= 1, got 1.5"),
        ({"beta": 1.0}, "beta must be < 1, got 1.0"),
        ({"gamma": -1.0}, "gamma must be >= 0, got -1.0"),
        ({"ns_steps": -1}, "ns_steps must be >= 0, got -1"),
        ({"brake": "rsm"}, "brake must be one of 'entries', 'rms', got 'rsm'"),
    ):
        with pytest.raises(ValueError, match=words):
            scale_by_auon(**options)
    with pytest.raises(ValueError, match="static_args='ns_steps'"):
        jax.jit(lambda n: scale_by_auon(ns_steps=n).init(jnp.eye(2)))(1)
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(3,\): use auon"):
        scale_by_auon().init({"bias": jnp.ones(3)})


def test_it_trains():
    """A quadratic loss of a matrix falls by a factor of 100; with the wrong sign it would rise."""
    target = jnp.array(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    loss = lambda w: jnp.sum((w["kernel"] - target) ** 2)
    tx = auon(optax.linear_schedule(0.5, 0.0, 200))
    params = {"kernel": jnp.zeros((6, 4))}
    step = lambda carry, _: (
        (
            optax.apply_updates(
                carry[0], (found := tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0]))[0]
            ),
            found[1],
        ),
        None,
    )
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    assert loss(params) < 0.01 * loss({"kernel": jnp.zeros((6, 4))})


# ---- kinds of leaves, masks and labels


def test_leaves_without_a_gradient_stay():
    """Weight decay moves none of them, while AdamW alone would turn an integer 7 into 6."""
    params = {
        "w": jnp.ones((2, 2)),
        "empty": jnp.ones((0, 5)),
        "count": jnp.array(7),
        "flag": jnp.array(True),
        "none": None,
        "bias": jnp.ones(2),
    }
    tx = auon(0.1)
    for gradient_of_count in (jnp.array(0), np.zeros([], jax.dtypes.float0), None):
        gradient = params | {"count": gradient_of_count, "flag": None}
        updates, state = tx.update(gradient, tx.init(params), params)
        assert updates["none"] is None
        assert updates["flag"] is None
        assert updates["empty"].shape == (0, 5)
        assert not updates["count"]
        assert np.all(np.isfinite(jax.tree.leaves(state)[-1]))
        np.testing.assert_array_less(updates["w"], 0)


def test_scale_by_auon_of_an_empty_matrix():
    params = {"w": jnp.ones((3, 3)), "empty": jnp.ones((3, 0)), "vectors": jnp.ones((0,))}
    tx = scale_by_auon(ns_steps=1)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    alone, expected = tx.update({"w": params["w"]}, tx.init({"w": params["w"]}))
    np.testing.assert_allclose(updates["w"], alone["w"])
    assert state.distance == expected.distance


def test_complex_leaves_are_refused():
    params = {"w": jnp.ones((2, 2)), "z": jnp.ones((2, 2), jnp.complex64)}
    for tx in (auon(0.1), scale_by_auon()):
        with pytest.raises(ValueError, match=r"params\['z'\] is complex64.*real and its imag"):
            tx.init(params)


def test_filtered_equinox_module():
    """Leaves of None are empty subtrees; a tree of labels may be a module, which is callable."""
    model = eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_array)
    labels = jax.tree.map(lambda x: "auon" if x.ndim == 2 else "other", model)
    numbers = jax.tree.map(lambda x: MuonDimensionNumbers(1, 0), model)
    step = jax.jit(lambda tx: tx.update(model, tx.init(model), model)[0], static_argnums=0)
    updates = step(auon(0.1, label_fn=labels, dimension_numbers=numbers))
    close = lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6)
    jax.tree.map(close, updates, step(auon(0.1)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_fn": matrix_labels},  # called with a count, it says "other"
        {"label_fn": lambda params: jax.tree.map(lambda x: "auon", params)},
        {"label_fn": lambda params: jax.tree.map(lambda x: x.ndim, params)},
        {"dimension_numbers": lambda params: jax.tree.map(lambda x: x.ndim, params)},
    ],
)
def test_functions_taken_for_schedules_are_refused(arguments):
    (name,) = arguments
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    make = lambda static: optax.inject_hyperparams(auon, static_args=static)(0.1, **arguments)
    tx = make("ns_steps")

    def step():
        tx.update(params, tx.init(params), params)

    with pytest.raises(ValueError, match=f"{name} must be .*static_args='{name}'"):
        step()


def test_unknown_labels_are_refused():
    with pytest.raises(ValueError, match="got 'muon'"):
        auon(0.1, label_fn={"w": "muon"}).init({"w": jnp.ones((2, 2))})


MATRIX = {"kernel": jnp.ones((2, 3))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: auon(-0.1), "learning_rate must be >= 0, got -0.1"),
        (lambda: auon(float("nan")), "learning_rate must be >= 0, got nan"),
        (lambda: auon([0.1]), r"learning_rate must be one number, got shape \(1,\)"),
        (lambda: hybrid_auon(0.1, weight_decay=-5.0), "weight_decay must be >= 0, got -5.0"),
        (lambda: scale_by_auon(epsilon=-10.0), "epsilon must be >= 0, got -10.0"),
        (lambda: scale_by_auon(brake_epsilon=-2.0), "brake_epsilon must be >= 0, got -2.0"),
        (lambda: scale_by_auon(brake="rms", brake_epsilon=1.0), "brake_epsilon must be left out"),
    ],
)
def test_numbers_that_would_climb_or_not_be_read(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [auon, hybrid_auon])
def test_a_partition_that_hides_the_biases_is_refused(make):
    """The bias of a projection to heads tells that its outputs are two axes, not one."""
    params = {"out": {"kernel": jnp.ones((2, 3, 6)), "bias": jnp.zeros(6)}}
    labels = {"out": {"kernel": "matrix", "bias": "vector"}}
    tx = optax.partition({"matrix": make(1.0), "vector": optax.sgd(1.0)}, labels)
    with pytest.raises(ValueError, match=r"auon does not see the bias beside params\['out'\]\['ke"):
        tx.init(params)
    numbers = lambda updates: jax.tree.map(lambda x: MuonDimensionNumbers((0, 1), (2,)), updates)
    known = make(
        1.0,
        dimension_numbers=numbers,
        label_fn=lambda params: jax.tree.map(lambda _: "auon", params),
    )
    tx = optax.partition({"matrix": known, "vector": optax.sgd(1.0)}, labels)
    inside, _ = tx.update(params, tx.init(params), params)
    whole = make(1.0, label_fn={"out": {"kernel": "auon", "bias": "other"}})
    alone, _ = whole.update(params, whole.init(params), params)
    np.testing.assert_array_equal(inside["out"]["kernel"], alone["out"]["kernel"])
