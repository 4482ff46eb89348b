"""TRAM against numbers worked out elsewhere, and against its own claims."""

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
    logits,
    quadratic,
    softmax_loss,
)

from trustjax.geometry import kl_divergence
from trustjax.optim import asam, tram

NOISE = SOFTMAX["noise"]
STEPS = {
    "tram": {},
    "tram_plain": {"adaptive": False},
    "released": {"ascent": "released", "divergence": "released_kl"},
    "released_plain": {"ascent": "released", "divergence": "released_kl", "adaptive": False},
}
FORCED_RADIUS = {
    "tram_002": {},
    "tram_002_released_adaptive": {"ascent": "released"},
    "tram_002_released_plain": {"ascent": "released", "adaptive": False},
}


def softmax_arguments(w, noise=0.0):
    """Every argument that `update` may ask for on the softmax problem."""
    return {
        "grad_fn": jax.grad(softmax_loss),
        "outputs": logits(w),
        "output_fn": logits,
        "noisy_outputs": logits(w, noise),
    }


def softmax_call(tx, w, reference=None, wrap=jax.jit, **changes):
    """The result of `update` at w after `init` at the reference."""

    def call(reference, w):
        arguments = softmax_arguments(w) | changes
        return tx.update(jax.grad(softmax_loss)(w), tx.init(reference), w, **arguments)

    return wrap(call)(w if reference is None else reference, w)


@pytest.mark.parametrize("name", FORCED_RADIUS)
def test_quadratic(name, precision, strict):
    """The divergence is forced to 0.02."""
    tx = tram("initial", divergence=lambda *_: array(0.02), **FORCED_RADIUS[name])
    _, state = check_golden(
        tx,
        quadratic,
        QUADRATIC,
        QUADRATIC[name],
        arguments=lambda w: {"output_fn": lambda p: p},
        scale={"attack": 0.02, "rise": 0.1},
    )
    assert_close(state.radius, 0.02)


@pytest.mark.parametrize("name", STEPS)
def test_softmax_eager(name, x64, strict):
    check_softmax(name, lambda f: f)


@pytest.mark.table
@pytest.mark.parametrize("name", STEPS)
def test_softmax(name, precision, strict):
    check_softmax(name, jax.jit)


def check_softmax(name, wrap):
    numbers, state = check_golden(
        tram("previous", **STEPS[name]),
        softmax_loss,
        SOFTMAX,
        SOFTMAX["steps"][name],
        start=array(SOFTMAX["reference"]),
        arguments=softmax_arguments,
        wrap=wrap,
        scale={"attack": 0.02, "rise": 0.02},
    )
    attack, w = numbers["attack"], array(SOFTMAX["w"])
    kl = SOFTMAX["released_kl" if name.startswith("released") else "kl"]
    np.testing.assert_allclose(state.radius, kl, rtol=1e-14 if w.dtype == "float64" else 1e-6)
    length = np.linalg.norm(attack / w) if STEPS[name].get("adaptive", True) else None
    if name == "tram":  # the paper's ball: ||eps / w|| = d
        np.testing.assert_allclose([state.distance, length], kl, rtol=1e-4)
    elif name == "released":  # another length, and told as it is
        np.testing.assert_allclose(state.distance, length, rtol=1e-4)
        assert abs(length / kl - 1) > 0.1


def radii_of(cases, w, reference, noise=0.0):
    """Radius and length of the attack of each transform, from one compilation."""

    def calls(reference, w):
        arguments = softmax_arguments(w, noise) | {"grad_fn": lambda p: p}
        states = [tx.update(w, tx.init(reference), w, **arguments)[1] for tx in cases]
        return [[state.radius, state.distance] for state in states]

    return np.array(jax.jit(calls)(reference, w))


def test_divergences(precision):
    reversed_kl = lambda reference, outputs, _: kl_divergence(outputs, reference).mean()
    cases = [
        (tram("initial", divergence="kl"), "kl"),
        (tram("initial", divergence="reverse_kl"), "reverse_kl"),
        (tram("initial", divergence="symmetric_kl"), "symmetric_kl"),
        (tram("initial", divergence="released_kl"), "released_kl"),
        # The released code divides the others by the batch of 3 once more, and KL by 2 classes.
        (tram("initial", divergence="reverse_kl", scale=1 / 6), "released_reverse_kl"),
        (tram("initial", divergence="mmd"), "mmd"),
        (tram("initial", divergence="mmd", scale=1 / 3), "released_mmd"),
        (tram("initial", divergence="l2"), "l2"),
        (tram("initial", divergence="l2", scale=1 / 3), "released_l2"),
        (tram("initial", divergence=reversed_kl), "reverse_kl"),
    ]
    transforms, names = zip(*cases, strict=True)
    radii = radii_of(transforms, array(SOFTMAX["w"]), array(SOFTMAX["reference"]))
    for name, (radius, distance) in zip(names, radii, strict=True):
        assert_close(radius, SOFTMAX[name])
        assert_close(distance, SOFTMAX[name])


def test_noise(precision, strict):
    _, state = check_golden(
        tram("noise"),
        softmax_loss,
        SOFTMAX,
        NOISE,
        arguments=lambda w: softmax_arguments(w, NOISE["z"]),
        scale={"attack": 0.02},
    )
    assert state.reference is None
    rtol = 1e-13 if precision == "float64" else 1e-5
    np.testing.assert_allclose(state.radius, NOISE["kl"], rtol=rtol)
    w, released = array(SOFTMAX["w"]), tram("noise", divergence="released_kl")
    radius = radii_of([released], w, w, NOISE["z"])[0, 0]
    np.testing.assert_allclose(radius, NOISE["released_kl"], rtol=rtol)


@jax.jit
def mean_kl(reference, w):
    return kl_divergence(logits(reference), logits(w)).mean()


def trajectory(tx, w, steps):
    """Weights [steps, 2, 2] before each call of `update` and the radii [steps] of the calls."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(softmax_loss)(w), state, w, **softmax_arguments(w))
        new = optax.apply_updates(w, updates)
        return (new, state), (w, new, optax.tree.get(state, "radius"))

    run = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=steps)[1])
    return jax.tree.map(np.asarray, run(w))


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_trajectory(reference, precision):
    golden = SOFTMAX["trajectories"][reference]
    tx = optax.chain(tram(reference), optax.sgd(SOFTMAX["learning_rate"]))
    _, after, radii = trajectory(tx, array(SOFTMAX["w"]), 4)
    # d is what is left of weights that are ten times larger than their move.
    assert_close(radii, golden["radius"], scale=0.05)
    assert_close(after[-1], golden["w_after_4"])


def test_distance_from_the_start_grows_and_from_the_last_step_shrinks():
    w = array(SOFTMAX["w"])
    radii = {
        reference: trajectory(optax.chain(tram(reference), optax.sgd(0.1)), w, 12)[2]
        for reference in ("previous", "initial")
    }
    assert radii["previous"][0] == radii["initial"][0] == 0.0
    assert np.all(np.diff(radii["previous"][1:]) < 0)
    assert np.all(np.diff(radii["initial"]) > 0)


@pytest.mark.parametrize(("decay", "same_as"), [(0.0, "previous"), (1.0, "initial")])
def test_ends_of_the_moving_average(decay, same_as, x64):
    run = lambda tx: trajectory(optax.chain(tx, optax.sgd(0.1)), array(SOFTMAX["w"]), 4)
    for actual, expected in zip(run(tram("ema", decay=decay)), run(tram(same_as)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-14)


def test_moving_average_by_hand(x64):
    """The average takes the weights before their update, so it lags by one step."""
    tx = optax.chain(tram("ema", decay=0.7), optax.sgd(0.1))
    before, _, radii = trajectory(tx, array(SOFTMAX["w"]), 5)
    average = before[0]
    for w, radius in zip(before, radii, strict=True):
        np.testing.assert_allclose(radius, mean_kl(average, w), rtol=1e-12)
        average = 0.7 * average + 0.3 * w


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_average_moves_in_every_dtype(dtype):
    """After 3000 steps at decay 0.999 it has gone 95 % of the way; the model sees its own dtype."""
    tx, start = tram("ema"), jnp.ones(4, dtype)
    seen = set()

    def output_fn(params):
        seen.add(str(params.dtype))
        return params[None]

    def step(state, _):
        extra_args = {"grad_fn": lambda p: p, "output_fn": output_fn}
        return tx.update(start, state, 2 * start, **extra_args)[1], None

    run = jax.jit(lambda: jax.lax.scan(step, tx.init(start), length=3000)[0])
    average = run().reference
    assert average.dtype == "float32"
    assert seen == {dtype}
    np.testing.assert_allclose(average, 2 - 0.999**3000, rtol=1e-3)


def test_dtype_of_the_average():
    start = {"w": jnp.ones(2, jnp.bfloat16), "count": jnp.array(3)}
    dtypes = lambda tx: jax.tree.map(lambda leaf: str(leaf.dtype), tx.init(start).reference)
    assert dtypes(tram("ema")) == {"w": "float32", "count": "int32"}
    assert dtypes(tram("ema", accumulator_dtype=jnp.float16)) == {"w": "float16", "count": "int32"}
    assert dtypes(tram("previous"))["w"] == dtypes(tram("initial"))["w"] == "bfloat16"
    with jax.enable_x64(True):
        assert tram("ema").init(jnp.ones(2, "float64")).reference.dtype == "float64"


def test_micro_batches(x64):
    """With refresh_every=k before MultiSteps(base, k) the reference is of the previous step."""
    base = optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    tx = optax.chain(tram("previous", refresh_every=3), base)
    before, _, radii = trajectory(tx, array(SOFTMAX["w"]), 9)
    moved = np.any(np.diff(before, axis=0) != 0, axis=(1, 2))
    np.testing.assert_array_equal(moved, [False, False, True] * 2 + [False, False])
    previous = [before[max(0, 3 * (call // 3 - 1))] for call in range(9)]
    expected = [mean_kl(*pair) for pair in zip(previous, before, strict=True)]
    np.testing.assert_allclose(radii, expected, rtol=1e-12)
    np.testing.assert_array_equal(radii > 0, [False] * 3 + [True] * 6)
    # Without it all calls but the first of a step compare the weights with themselves.
    _, _, naive = trajectory(optax.chain(tram("previous"), base), array(SOFTMAX["w"]), 9)
    np.testing.assert_array_equal(naive > 0, [False] * 3 + [True, False, False] * 2)


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_a_radius_that_is_not_a_number_leaves_the_reference(refresh_every):
    start, params = jnp.zeros(3), jnp.ones(3)
    tx = tram("previous", refresh_every=refresh_every)
    outputs, count = jnp.full((4, 3), jnp.nan), jnp.array(refresh_every - 1)

    @jax.jit
    def state_after(params):
        state = tx.init(start)._replace(count=count)
        functions = {"grad_fn": lambda params: params, "output_fn": lambda params: outputs}
        return tx.update(params, state, params, outputs=outputs, **functions)[1]

    state = state_after(params)
    assert np.isnan(state.radius)
    np.testing.assert_array_equal(state.reference, start)


def test_scale_and_bound():
    cases = [
        (tram("initial", max_radius=0.01), 0.01),
        (tram("initial", max_radius=0.02), SOFTMAX["kl"]),
        (tram("initial", max_radius=optax.linear_schedule(0.004, 0.0, 4)), 0.004),
        (tram("initial", max_radius=0.01, scale=0.5), SOFTMAX["kl"] / 2),
        (tram("initial", scale=optax.constant_schedule(2.0)), SOFTMAX["kl"] * 2),
        (tram("initial", scale=0.0), 0.0),
    ]
    transforms, expected = zip(*cases, strict=True)
    actual = radii_of(transforms, array(SOFTMAX["w"]), array(SOFTMAX["reference"]))
    np.testing.assert_allclose(actual, np.stack([expected, expected], -1), rtol=1e-5)


def test_schedules_follow_the_count():
    tx = optax.chain(
        tram("initial", divergence=lambda *_: array(1.0), scale=lambda count: 0.01 * count),
        optax.sgd(0.1),
    )
    _, _, radii = trajectory(tx, array(SOFTMAX["w"]), 3)
    np.testing.assert_allclose(radii, [0.0, 0.01, 0.02], rtol=1e-6)


def test_masked_examples_do_not_count():
    cases = [tram("initial", divergence=d) for d in ("kl", "jensen_shannon", "l2", "mmd")]
    w, reference = array(SOFTMAX["w"]), array(SOFTMAX["reference"])

    @jax.jit
    def radii(where):
        arguments = softmax_arguments(w) | {"grad_fn": lambda p: p, "where": where}
        return [tx.update(w, tx.init(reference), w, **arguments)[1].radius for tx in cases]

    values = np.array(SOFTMAX["kl_per_example"])
    for where in ([True, True, True], [True, False, True], [False, True, False]):
        kl, jensen_shannon, l2, mmd = radii(np.array(where))
        np.testing.assert_allclose(kl, values[where].mean(), rtol=1e-4)
        assert min(jensen_shannon, l2, mmd) > 0
    assert radii(np.zeros(3, bool)) == [0.0] * 4


def test_empty_mask_is_a_step_of_the_base_optimizer():
    w = array(SOFTMAX["w"])
    gradient, state = softmax_call(
        tram("initial"), w, array(SOFTMAX["reference"]), where=jnp.zeros(3, bool)
    )
    assert float(state.radius) == float(state.distance) == 0.0
    np.testing.assert_allclose(gradient, array(SOFTMAX["gradient"]), rtol=1e-5)


def test_tokens_are_averaged_under_their_mask():
    """With outputs [batch, time, classes] and where [batch, time] the mean is over tokens,
    not over sequences."""
    reference, outputs = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    where = np.arange(4) < np.array([[4], [1], [2]])
    tx, w = tram("initial"), jnp.ones(2)
    extra_args = {"grad_fn": lambda p: p, "output_fn": lambda _: reference, "where": where}
    _, state = jax.jit(lambda o: tx.update(w, tx.init(w), w, outputs=o, **extra_args))(outputs)
    tokens = np.asarray(jax.jit(kl_divergence)(reference, outputs))
    np.testing.assert_allclose(state.radius, tokens[where].mean(), rtol=1e-5)


def test_missing_outputs_are_computed():
    w, reference = array(SOFTMAX["w"]), array(SOFTMAX["reference"])
    expected = softmax_call(tram("previous"), w, reference)
    actual = softmax_call(tram("previous"), w, reference, outputs=None)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), actual, expected)
    # With noise there is no need of output_fn, unless outputs are missing.
    noisy = logits(w, 0.1)
    for missing in ("output_fn", "outputs"):
        _, state = softmax_call(tram("noise"), w, **{"noisy_outputs": noisy, missing: None})
        assert float(state.radius) > 0


@pytest.mark.parametrize("arguments", [{}, {"eta": 0.05}, {"mask": [[True, False]] * 2}])
def test_a_given_radius_makes_asam(arguments):
    if "mask" in arguments:
        split = lambda w: {"left": w[:, :1], "right": w[:, 1:]}
        join = lambda p: jnp.concatenate([p["left"], p["right"]], 1)
        arguments = {"mask": {"left": True, "right": False}}
    else:
        split = join = lambda w: w
    w, loss = split(array(SOFTMAX["w"])), lambda p: softmax_loss(join(p))
    ours = tram("previous", divergence=lambda *_: jnp.asarray(0.3), **arguments)
    theirs = asam(0.3, **({"eta": 0.0} | arguments))
    grad_fn = jax.grad(loss)
    compare = jax.jit(
        lambda w: (
            ours.update(grad_fn(w), ours.init(w), w, grad_fn=grad_fn, output_fn=lambda p: p)[0],
            theirs.update(grad_fn(w), theirs.init(w), w, grad_fn=grad_fn)[0],
        )
    )
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), *compare(w))


def test_nothing_is_differentiated_through_the_radius(x64):
    """The attacked loss, differentiated through the whole update, has the gradient of TRAM."""
    tx, state = tram("initial"), tram("initial").init(array(SOFTMAX["reference"]))

    def attacked_loss(w):
        seen = []
        arguments = softmax_arguments(w) | {"grad_fn": lambda p: seen.append(p) or p}
        tx.update(jax.grad(softmax_loss)(w), state, w, **arguments)
        return softmax_loss(seen[0])

    w = array(SOFTMAX["w"])
    expected = (w - array(SOFTMAX["steps"]["tram"]["new_w"]).reshape(2, 2)) / 0.1
    np.testing.assert_allclose(jax.jit(jax.grad(attacked_loss))(w), expected, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tram("prev"), "reference must be one of 'previous', 'initial', 'ema', 'noise'"),
        (lambda: tram(divergence="KL"), "divergence must be one of 'kl', .*, got 'KL'"),
        (lambda: tram(ascent="code"), "ascent must be one of 'paper', 'released', got 'code'"),
        (lambda: tram(eta=-1.0), "eta must be >= 0, got -1.0"),
        (lambda: tram(scale=-1.0), "scale must be >= 0, got -1.0"),
        (lambda: tram(max_radius=-0.5), "max_radius must be >= 0, got -0.5"),
        (lambda: tram("ema", decay=1.5), "decay must be <= 1, got 1.5"),
        (lambda: tram("ema", decay=-0.5), "decay must be >= 0, got -0.5"),
        (lambda: tram(refresh_every=0), "refresh_every must be >= 1, got 0"),
        (lambda: tram("ema", accumulator_dtype=int), "accumulator_dtype must be a floating dtype"),
        (lambda: tram("noise", accumulator_dtype="float32"), "average of .*got reference='noise'"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("reference", "missing", "words"),
    [
        ("previous", ("output_fn",), r"tram\('previous'\) needs output_fn: call .*output_fn="),
        ("initial", ("output_fn", "outputs"), r"tram\('initial'\) needs outputs and output_fn"),
        (
            "noise",
            ("noisy_outputs",),
            r"tram\('noise'\) needs noisy_outputs: call .*noisy_outputs=",
        ),
        ("noise", ("outputs", "output_fn"), r"tram\('noise'\) needs outputs"),
    ],
)
def test_missing_arguments(reference, missing, words):
    with pytest.raises(ValueError, match=words):
        softmax_call(tram(reference), array(SOFTMAX["w"]), **dict.fromkeys(missing))


def test_count_and_radius_are_readable_in_a_chain():
    tx = optax.chain(tram("initial"), optax.adamw(1e-2))
    _, state = softmax_call(tx, array(SOFTMAX["w"]), array(SOFTMAX["reference"]))
    np.testing.assert_allclose(optax.tree.get(state, "radius"), SOFTMAX["kl"], rtol=1e-5)
    assert state[0].count == 1


def test_a_divergence_of_each_example_is_refused():
    """It would give every column of the weights a radius of its own."""
    x, w = jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([[0.6, -0.2], [0.05, 0.4]])
    tx = tram(
        "noise", divergence=lambda reference, outputs, where: kl_divergence(reference, outputs)
    )
    with pytest.raises(ValueError, match=r"divergence must return one number, got shape \(2,\)"):
        tx.update(w, tx.init(w), w, grad_fn=lambda p: p, outputs=x @ w, noisy_outputs=(x + 0.3) @ w)
