"""The experiment on choices: its losses, splits and wrong labels, and what its methods learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.tasks.choice_methods import ChosenPairs, ListwiseChoice, Method, TopChoice
from experiments.tasks.choices import (
    REFERENCE,
    Choices,
    _Data,
    held_out,
    network_inputs,
    with_wrong_labels,
)
from trustjax.data import ChoiceDataset
from trustjax.losses import dpo_loss
from trustjax.models import MLP

PAIRS = ChosenPairs(functools.partial(dpo_loss, beta=1.0))
TASK = Choices(
    model=functools.partial(MLP, hidden=()),
    methods={
        "mle": Method(ListwiseChoice(), anchored=False),
        "dpo": Method(PAIRS),
    },
    data=("car",),
    optimizer=optax.adam(0.05),
    noise_levels=(0.0, 0.4),
    train_share=0.7,
    trusted_share=0.1,
    reference_steps=60,
    steps=120,
    batch_size=64,
    seed=0,
    num_seeds=2,
    precision="float32",
)


@pytest.fixture(scope="module")
def data():
    """Choices by a known logit model with utility 2 x, by 500 people with four choices each."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(2000, 3, 2)).astype(np.float32)
    available = rng.random((2000, 3)) < 0.8
    available[:, 0] = True
    utilities = np.where(available, 2 * items[..., 0] + rng.gumbel(size=(2000, 3)), -np.inf)
    items *= available[..., None]
    return ChoiceDataset(
        items, rng.normal(size=(2000, 1)).astype(np.float32), available,
        utilities.argmax(1).astype(np.int32), np.arange(2000, dtype=np.int32) // 4,
        ("a", "b", "c"), ("x", "z"), ("age",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(data):
    TASK.validate()
    return [{"stage": "car", "step": 1} | row for row in TASK.measure(data)]


def test_losses_by_hand():
    """Scores (1, 0, -1) with the second chosen and, in the second row, the third unavailable."""
    scores = jnp.array([[1.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    chosen = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    available = jnp.array([[True, True, True], [True, True, False]])
    whole, two = np.log(np.exp(1) + 1 + np.exp(-1)), np.log(1 + np.exp(1))
    listwise = jax.jit(ListwiseChoice())(scores, chosen, available)
    np.testing.assert_allclose(listwise, [whole, two], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(TopChoice())(scores, chosen, available), listwise, rtol=1e-6)
    soft = jax.jit(ListwiseChoice(smoothing=0.2))(scores, chosen, available)
    np.testing.assert_allclose(soft, [whole - 0.1 * 1 + 0.1 * 1, two - 0.2 * 1], rtol=1e-6)
    pairs = jax.jit(PAIRS)(scores, chosen, available)
    np.testing.assert_allclose(pairs, [(two + np.log(1 + np.exp(-1))) / 2, two], rtol=1e-6)


def test_a_single_alternative_has_no_loss():
    scores, chosen = jnp.array([[0.3, 0.0]]), jnp.array([[1.0, 0.0]])
    available = jnp.array([[True, False]])
    for loss in (ListwiseChoice(0.1), TopChoice(), PAIRS):
        both = jax.jit(jax.value_and_grad(lambda s, of=loss: of(s, chosen, available).sum()))
        value, gradient = both(scores)
        assert value == 0
        assert not gradient.any()


def test_wrong_labels(data):
    """Their share, that they are available, and that a larger share has the same and more."""
    arrays = _Data(jnp.zeros(()), jnp.asarray(data.available), jnp.asarray(data.choices))
    noised = [with_wrong_labels(arrays, jax.random.key(0), level) for level in (0.0, 0.2, 0.4)]
    np.testing.assert_array_equal(noised[0], data.choices)
    can = data.available.sum(1) > 1
    wrong = [np.asarray(each) != data.choices for each in noised]
    for level, is_wrong in zip((0.2, 0.4), wrong[1:], strict=True):
        np.testing.assert_allclose(is_wrong[can].mean(), level, atol=0.03)
    assert not wrong[2][~can].any()
    assert not (wrong[1] & ~wrong[2]).any()
    assert data.available[np.arange(2000), noised[2]].all()


def test_nobody_is_on_both_sides(data):
    first, second = (TASK._split(data.people, seed) for seed in (0, 1))
    for rows in (first, second):
        train, test = (set(data.people[np.asarray(each)]) for each in (rows.train, rows.test))
        assert not train & test
        assert len(rows.train) == 1400
        np.testing.assert_array_equal(rows.trusted, rows.train[:140])
    assert set(np.asarray(first.test)) != set(np.asarray(second.test))


def test_inputs_are_standardised(data):
    inputs = network_inputs(data)
    assert inputs.shape == (2000, 3, 2 + 3 + 1)
    np.testing.assert_allclose(inputs[data.available][:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(inputs[data.available][:, :2].std(0), 1, rtol=1e-4)
    assert not inputs[~data.available][:, :2].any()
    np.testing.assert_array_equal(inputs[0, :, 2:5], np.eye(3))


def test_held_out_by_hand():
    """Confidences .8 (right), .8 (wrong) and .6 (right): |.8 - .5| 2 / 3 + |.6 - 1| / 3."""
    log_probs = jnp.log(jnp.array([[0.8, 0.2, 1.0], [0.2, 0.8, 1.0], [0.6, 0.4, 1.0]]))
    available = jnp.array([[True, True, False]] * 3)
    found = held_out(log_probs, jnp.array([0, 0, 0]), available)
    np.testing.assert_allclose(found["log_likelihood"], np.log(0.8 * 0.2 * 0.6) / 3, rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(found["calibration_error"], (0.6 + 0.4) / 3, rtol=1e-5)


def test_likelihood_is_calibrated_and_noise_hurts(rows):
    found = TASK.summarize(rows).values["car"]
    clean, noised = (found["mle"][level] for level in ("0", "0.4"))
    assert clean["log_likelihood"]["mean"] > noised["log_likelihood"]["mean"] + 0.05
    assert clean["calibration_error"]["mean"] < 0.08 < noised["calibration_error"]["mean"]
    assert clean["gain/accuracy"]["mean"] == 0
    levels = (found[REFERENCE][level]["accuracy"] for level in ("0", "0.4"))
    assert next(levels) == next(levels)  # it never sees a wrong label


def test_an_anchored_policy_counts_the_reference_twice(rows):
    """Policy = anchor * implied^tau: the implied model is the likelihood's, the policy is sharper.

    Fails if the anchor is uniform.
    """
    found = TASK.summarize(rows).values["car"]
    mle, policy, implied = (
        found[name]["0"]["log_likelihood"]["mean"] for name in ("mle", "dpo", "dpo/implied")
    )
    assert abs(implied - mle) < 0.05
    assert policy < implied - 0.02
    assert found["dpo"]["0"]["calibration_error"]["mean"] > 0.05


def test_plot(rows, tmp_path):
    TASK.plot(rows, tmp_path)
    assert (tmp_path / "choices.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ("fishing",)}, "data must be one of 'swissmetro'"),
        ({"data": ()}, "data must hold different values"),
        ({"noise_levels": (0.0, 1.0)}, "noise_levels must be < 1"),
        ({"train_share": 1.0}, "train_share must be < 1"),
        (
            {"methods": {"adpo": Method(ListwiseChoice(), refreshes=6)}},
            "methods.adpo.refreshes must be one less than a divisor of steps = 120, got 6",
        ),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TASK, **changes).validate()
