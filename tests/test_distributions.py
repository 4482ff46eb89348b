"""Distributions of policies: against SciPy, worked numbers, integrals and samples."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from trustjax.distributions import (
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    TanhGaussian,
    batched_index,
    categorical,
)

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "policy.json").read_text(encoding="utf-8")
)
RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(4, 3))
MEAN, LOG_STD, ACTION = RANDOM.normal(size=(3, 4, 2))


def test_categorical(x64):
    policy = Categorical(jnp.asarray(LOGITS))
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    action = np.array([0, 2, 1, 1])
    np.testing.assert_allclose(
        policy.log_prob(action), np.log(probabilities[np.arange(4), action]), rtol=1e-12
    )
    np.testing.assert_allclose(
        policy.entropy(), scipy.stats.entropy(probabilities, axis=-1), rtol=1e-12
    )
    np.testing.assert_array_equal(policy.mode(), LOGITS.argmax(-1))


def test_impossible_actions():
    """Masked by -inf: never drawn, no nan in entropy or slopes."""
    logits = jnp.array([0.0, 1.0, -jnp.inf])
    drawn = jax.vmap(Categorical(logits).sample)(jax.random.split(jax.random.key(0), 200))
    assert set(np.unique(drawn)) == {0, 1}
    expected = Categorical(logits[:2]).entropy()
    np.testing.assert_allclose(Categorical(logits).entropy(), expected, rtol=1e-6)
    for function in (
        lambda x: Categorical(x).entropy(),
        lambda x: Categorical(x).log_prob(jnp.array(1)),
    ):
        assert np.all(np.isfinite(jax.grad(function)(logits)))


def test_gaussian(x64):
    policy = DiagonalGaussian(jnp.asarray(MEAN), jnp.asarray(LOG_STD))
    expected = scipy.stats.norm(MEAN, np.exp(LOG_STD))
    np.testing.assert_allclose(policy.log_prob(ACTION), expected.logpdf(ACTION).sum(-1))
    np.testing.assert_allclose(policy.entropy(), expected.entropy().sum(-1))
    np.testing.assert_array_equal(policy.mode(), MEAN)
    shared = DiagonalGaussian(jnp.asarray(MEAN), jnp.asarray(LOG_STD[0]))
    whole = DiagonalGaussian(jnp.asarray(MEAN), jnp.broadcast_to(LOG_STD[0], MEAN.shape))
    np.testing.assert_array_equal(shared.entropy(), whole.entropy())
    np.testing.assert_array_equal(shared.kl_divergence(policy), whole.kl_divergence(policy))


def test_squashed_golden(x64):
    golden = GOLDEN["squashed"]

    def policy(mean, log_std):
        return TanhGaussian(jnp.array([golden[mean]]), jnp.array([golden[log_std]]))

    action = jnp.tanh(jnp.array([golden["u"]]))
    np.testing.assert_allclose(action, [golden["action"]], rtol=1e-9)
    for mean, log_std, log_prob in (
        ("mean", "log_std", "log_prob"),
        ("old_mean", "old_log_std", "old_log_prob"),
    ):
        found = policy(mean, log_std).log_prob(action)
        np.testing.assert_allclose(found, golden[log_prob], rtol=1e-9)
    bounded = policy("mean", "log_std").log_prob_before_tanh(jnp.array([golden["u"]]), epsilon=1e-6)
    np.testing.assert_allclose(bounded, [golden["log_prob_with_slope"]], rtol=1e-9)


def test_squashed_density_integrates_to_one(x64):
    policy = TanhGaussian(jnp.array([0.4]), jnp.array([-0.3]))
    edges = jnp.linspace(-1, 1, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    density = jnp.exp(jax.vmap(lambda a: policy.log_prob(a[None]))(middles))
    np.testing.assert_allclose(jnp.sum(density) * (edges[1] - edges[0]), 1, rtol=1e-5)


def test_squashed_kl_is_an_expectation(x64):
    one = TanhGaussian(jnp.array([0.4, 0.0]), jnp.array([-0.3, 0.1]))
    two = TanhGaussian(jnp.array([0.1, 0.2]), jnp.array([0.0, 0.0]))
    actions = jax.vmap(one.sample)(jax.random.split(jax.random.key(0), 40_000))
    gaps = jax.vmap(one.log_prob)(actions) - jax.vmap(two.log_prob)(actions)
    error = 4 * jnp.std(gaps) / 200
    assert abs(gaps.mean() - one.kl_divergence(two)) < error


@pytest.mark.parametrize("mean", [0.0, 30.0, -200.0])
def test_squashed_far_out(mean):
    """Means whose tanh rounds to 1: log-densities and slopes stay finite."""
    policy = TanhGaussian(jnp.array([mean]), jnp.array([0.0]))

    def total(mean, log_std):
        action, log_prob = TanhGaussian(mean, log_std).sample_with_log_prob(jax.random.key(0))
        return jnp.sum(action + log_prob)

    assert np.isfinite(policy.log_prob(policy.mode()))
    value, gradients = jax.value_and_grad(total, (0, 1))(*policy)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_samples_match_their_log_probs():
    policy = TanhGaussian(jnp.asarray(MEAN), jnp.asarray(LOG_STD))
    action, each = policy.sample_with_log_prob(jax.random.key(1))
    np.testing.assert_array_equal(action, policy.sample(jax.random.key(1)))
    np.testing.assert_allclose(jnp.sum(each, -1), policy.log_prob(action), rtol=2e-3)


@pytest.mark.parametrize("kind", [DiagonalGaussian, TanhGaussian])
def test_gaussian_samples(kind):
    policy = kind(jnp.array([0.3, -0.2]), jnp.array([-1.0, -2.0]))
    drawn = jax.vmap(policy.sample)(jax.random.split(jax.random.key(2), 20_000))
    if kind is TanhGaussian:
        drawn = jnp.arctanh(drawn)
    np.testing.assert_allclose(drawn.mean(0), policy.mean, atol=0.015)
    np.testing.assert_allclose(drawn.std(0), jnp.exp(policy.log_std), rtol=0.03)


@pytest.mark.parametrize(
    ("policy", "action"),
    [
        (Categorical(jnp.zeros((5, 3))), jnp.zeros(5, jnp.int32)),
        (DiagonalGaussian(jnp.zeros((5, 3)), jnp.zeros(3)), jnp.zeros((5, 3))),
        (TanhGaussian(jnp.zeros((5, 3)), jnp.zeros(3)), jnp.zeros((5, 3))),
    ],
    ids=["categorical", "gaussian", "tanh"],
)
def test_common(policy, action, strict):
    """Shapes, narrow inputs, jit, and shapes that would broadcast."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    for each in (policy, narrow):
        assert each.sample(jax.random.key(0)).shape == action.shape
        assert each.mode().shape == action.shape
        log_prob = jax.jit(type(each).log_prob)(each, action)
        assert log_prob.shape == (5,)
        assert log_prob.dtype == jnp.float32
        np.testing.assert_allclose(each.kl_divergence(each), np.zeros(5))
    entropy = (
        policy.entropy(jax.random.key(0))
        if len(action.shape) == 2 and isinstance(policy, TanhGaussian)
        else policy.entropy()
    )
    assert entropy.shape == (5,)
    with pytest.raises(ValueError, match="action must have shape"):
        policy.log_prob(action[:1])


@pytest.mark.parametrize("action", [-1, 3, 100, -3])
def test_actions_that_there_are_not(action):
    """NaN, eager and compiled; the log-probability of 0 would be that of a certain action."""
    policy = Categorical(jnp.array([[0.0, 1.0, -jnp.inf], [0.0, 0.0, 0.0]]))
    actions = jnp.array([action, 1])
    for log_prob in (Categorical.log_prob, jax.jit(Categorical.log_prob)):
        found = log_prob(policy, actions)
        assert np.isnan(found[0])
        assert found[1] == pytest.approx(-np.log(3))
    assert policy.log_prob(jnp.array([2, 2]))[0] == -np.inf
    assert np.isnan(batched_index(jnp.ones((2, 3)), actions)[0])
    for wrong in (jnp.array([0.5, 1.0]), jnp.array([True, False])):
        with pytest.raises(ValueError, match="action must have an integer dtype, got"):
            policy.log_prob(wrong)


@pytest.mark.parametrize("kind", [DiagonalGaussian, TanhGaussian])
@pytest.mark.parametrize("log_std", [-100.0, -1e4, 60.0])
def test_extreme_widths(kind, log_std):
    """The density at the mean is finite however narrow, and so are its slopes."""

    def log_prob(mean, log_std):
        return kind(mean, log_std).log_prob(jnp.zeros(1))

    value, slopes = jax.value_and_grad(log_prob, (0, 1))(jnp.zeros(1), jnp.full(1, log_std))
    assert value == pytest.approx(-log_std - 0.5 * np.log(2 * np.pi), rel=1e-5)
    np.testing.assert_array_equal(slopes, [[0], [-1]])


def test_several_actions_are_independent() -> None:
    """By the sums of the distributions of the single actions, here of two and of three choices."""
    logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
    new = categorical(logits[0], (2, 3))
    assert isinstance(new, MultiCategorical)

    @jax.jit
    def together(logits: jax.Array, action: jax.Array) -> list[jax.Array]:
        new, old = (categorical(each, (2, 3)) for each in logits)
        return [new.log_prob(action), new.entropy(), new.kl_divergence(old), new.mode()]

    @jax.jit
    def one_by_one(logits: jax.Array, action: jax.Array) -> list[jax.Array]:
        parts = [[Categorical(x) for x in jnp.split(each, [2], -1)] for each in logits]
        return [
            sum(part.log_prob(action[:, i]) for i, part in enumerate(parts[0])),
            sum(part.entropy() for part in parts[0]),
            sum(p.kl_divergence(q) for p, q in zip(*parts, strict=True)),
            jnp.stack([part.mode() for part in parts[0]], -1),
        ]

    action = np.array([[0, 2], [1, 1], [1, 0], [0, 0]])
    for found, expected in zip(together(logits, action), one_by_one(logits, action), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    samples = jax.jit(jax.vmap(new.sample))(jax.random.split(jax.random.key(1), 500))
    assert samples.dtype == jnp.int32
    np.testing.assert_array_equal(samples.max((0, 1)), [1, 2])
    action[0, 0] = 7
    assert np.isnan(together(logits, action)[0][0])


@pytest.mark.parametrize("num_actions", [4, (1, 3), (4,)])
def test_masked_actions(num_actions: int | tuple[int, ...]) -> None:
    """Probability 0 in everything, gradients finite; the rest as if the others did not exist."""
    logits, other = jax.random.normal(jax.random.key(0), (2, 4))
    mask = jnp.array([True, False, True, True])
    distribution = categorical(logits, num_actions, mask)
    samples = jax.jit(jax.vmap(distribution.sample))(jax.random.split(jax.random.key(1), 200))
    last = samples if num_actions == 4 else samples[:, -1]
    assert not np.any(last == (0 if num_actions == (1, 3) else 1))

    def measures(logits: jax.Array, mask: jax.Array) -> jax.Array:
        new, old = (categorical(each, num_actions, mask) for each in (logits, other))
        return jnp.stack(
            [new.log_prob(distribution.mode()), new.entropy(), new.kl_divergence(old)]  # type: ignore[arg-type]
        )

    @jax.jit
    def without_mask(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        others = categorical(jnp.where(mask, logits, -jnp.inf), num_actions)
        return others.log_prob(distribution.mode()), others.entropy()  # type: ignore[arg-type]

    kept, gradient = jax.jit(lambda *g: (measures(*g), jax.jacobian(measures)(*g)))(logits, mask)
    np.testing.assert_allclose(kept[:2], jnp.stack(without_mask(logits)), rtol=1e-5)
    assert 0 <= kept[2] < 10
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 1], 0)


def test_a_mask_that_excludes_all_excludes_nothing() -> None:
    distribution = categorical(jnp.arange(5.0), (2, 3), jnp.zeros(5, bool))
    np.testing.assert_allclose(distribution.entropy(), np.log(2) + np.log(3), rtol=1e-6)
