"""The train step: what a penalty adds to the loss, and where its other logits come from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.penalties import FromReference, UnderNoise
from experiments.tasks.objectives import Images
from experiments.tasks.supervised import TrainState, training_step
from trustjax.losses import mesa_penalty, r3f_penalty, trpo_penalty
from trustjax.models import MLP
from trustjax.optim import esam, sam
from trustjax.trust import trust_metrics, trust_metrics_of

RANDOM = np.random.default_rng(0)
MODEL = MLP(num_classes=3, hidden=(5,))
BATCH = {
    "image": jnp.asarray(RANDOM.uniform(size=(6, 2, 2, 1)), jnp.float32),
    "label": jnp.arange(6) % 3,
}
NOISE = 0.3
KEY = jax.random.key(7)
WEIGHT = 2.0
OBJECTIVE = Images(MODEL, NOISE, BATCH["image"])
forward = jax.jit(lambda params, image: MODEL.apply({"params": params}, image))


def cross_entropy(params):
    logits = forward(params, BATCH["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["label"]).mean()


def begin(tx, penalty):
    initial = jax.jit(OBJECTIVE.initial)
    stacked = initial(jax.random.split(KEY, 1))
    params, model_state = jax.tree.map(lambda leaf: leaf[0], stacked)
    reference = penalty and penalty.start(params)
    return TrainState(params, model_state, tx.init(params), reference, jnp.zeros([], jnp.int32))


def run(tx, penalty, steps=3):
    """States before and after every step, and the metrics."""
    step = jax.jit(training_step(OBJECTIVE, tx, penalty))
    states, metrics = [begin(tx, penalty)], []
    for _ in range(steps):
        state, measured = step(states[-1], BATCH, KEY)
        states.append(state)
        metrics.append(measured)
    return states, metrics


def assert_trees_close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), actual, expected
    )


def to_previous(states, index):
    """KL to the function of the step before, by hand."""
    previous = forward(states[max(index - 1, 0)].params, BATCH["image"])
    return lambda params: trpo_penalty(forward(params, BATCH["image"]), previous).mean()


def to_average(states, index):
    average = states[0].params
    for state in states[:index]:
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, state.params)
    logits = forward(average, BATCH["image"])
    return lambda params: mesa_penalty(forward(params, BATCH["image"]), logits).mean()


def to_noised(states, index):
    """Both sides are trained."""
    noise = NOISE * jax.random.normal(jax.random.fold_in(KEY, 1), BATCH["image"].shape)
    return lambda params: r3f_penalty(
        forward(params, BATCH["image"]), forward(params, BATCH["image"] + noise)
    ).mean()


PENALTIES = {
    "trpo": (FromReference(trpo_penalty, WEIGHT), to_previous),
    "mesa": (FromReference(mesa_penalty, WEIGHT, decay=0.9), to_average),
    "r3f": (UnderNoise(r3f_penalty, WEIGHT), to_noised),
}


def step_by_hand(tx, before, added):
    """Parameters after a step, and the loss and the penalty before it."""

    @jax.jit
    def step(params, opt_state):
        gradient_of = jax.grad(lambda params: cross_entropy(params) + WEIGHT * added(params))
        updates, _ = optax.with_extra_args_support(tx).update(
            gradient_of(params), opt_state, params, grad_fn=gradient_of
        )
        return optax.apply_updates(params, updates), cross_entropy(params), added(params)

    return step(before.params, before.opt_state)


@pytest.mark.table
@pytest.mark.parametrize(
    ("name", "rho"),
    [
        ("trpo", 0),
        ("mesa", 0),
        pytest.param("r3f", 0, marks=pytest.mark.slow),
        ("r3f", 0.1),
    ],
)
def test_steps_by_hand(name, rho):
    """Gradients of cross-entropy plus weighted penalty; in the second pass too."""
    penalty, by_hand = PENALTIES[name]
    tx = optax.chain(sam(rho), optax.sgd(0.5)) if rho else optax.sgd(0.5)
    states, metrics = run(tx, penalty, steps=2)
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        params, loss, value = step_by_hand(tx, before, by_hand(states, index))
        assert_trees_close(after.params, params)
        measured = metrics[index]
        np.testing.assert_allclose(measured["train/loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(measured["train/penalty"], value, rtol=1e-3, atol=1e-7)
    assert metrics[-1]["train/penalty"] > 1e-5


def test_without_a_penalty():
    states, metrics = run(optax.sgd(0.5), None)
    assert states[-1].reference is None
    assert set(metrics[0]) == {"train/loss"}
    light, _ = run(optax.sgd(0.5), FromReference(trpo_penalty, weight=0.0))
    assert_trees_close(states[-1].params, light[-1].params)


@pytest.mark.slow
def test_esam_gets_losses_of_examples():
    """The step descends on half of the examples; what the penalty says of all stays."""
    tx = optax.chain(esam(0.1, beta=1.0, gamma=0.5), optax.sgd(0.5))
    with_penalty, _ = run(tx, PENALTIES["r3f"][0], steps=1)
    without, _ = run(tx, None, steps=1)
    all_examples, _ = run(optax.chain(sam(0.1), optax.sgd(0.5)), None, steps=1)
    first = [states[1].params for states in (with_penalty, without, all_examples)]
    gap = lambda a, b: max(
        float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert gap(first[0], first[1]) > 1e-3
    assert gap(first[1], first[2]) > 1e-3


@pytest.mark.parametrize("far", [True, False])
def test_second_passes_that_broke_are_logged(far):
    """Their share among the steps of a chunk, which the loop takes the mean of."""
    rho = lambda count: jnp.where((count == 1) & far, 1e38, 0.1)
    states, metrics = run(optax.chain(sam(rho), optax.sgd(0.5)), None)
    assert [float(each["trust/nonfinite"]) for each in metrics] == [0, far, 0]
    assert int(optax.tree.get(states[-1].opt_state, "nonfinite_count")) == far


@pytest.mark.parametrize(("radius", "used"), [(0.5, 1.0), (0.0, 0.0), (np.nan, np.nan)])
def test_share_of_a_radius_that_is_not_a_number(radius, used):
    """It is not 0, as if nothing had moved."""
    state = sam().init(jnp.ones(2))
    number = jnp.float32(radius)
    metrics = trust_metrics_of((state._replace(radius=number, distance=number),))
    np.testing.assert_equal(float(metrics["trust/used"]), used)
    np.testing.assert_equal(float(trust_metrics(number, number)["trust/used"]), used)
