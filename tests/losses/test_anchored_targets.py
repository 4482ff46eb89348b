"""Targets and adaptive temperatures of ADPO against worked numbers, and their bounds."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from test_anchored import GOLDEN

from trustjax.losses import (
    bradley_terry_targets,
    group_relative,
    hard_targets,
    kde_targets,
    reward_targets,
    smooth_hybrid_temperature,
    target_entropy_temperature,
)
from trustjax.parallel import make_mesh

NAN, INF = np.nan, np.inf
worked = functools.partial(np.testing.assert_allclose, rtol=2e-9, atol=2e-10)
OUTLIER = np.array([0.2, 0.5, -0.1, 25])
TARGETS = {
    "hard": hard_targets,
    "rewards": reward_targets,
    "plain": functools.partial(reward_targets, scale="none"),
    "kde": kde_targets,
    "kde_fixed": functools.partial(kde_targets, bandwidth=0.5),
}
each_target = pytest.mark.parametrize("name", TARGETS)
rewards_of = jax.jit(reward_targets, static_argnames=("scale", "ddof"))
kde_of = jax.jit(kde_targets)
entropy_rule = jax.jit(target_entropy_temperature)
hybrid_rule = jax.jit(smooth_hybrid_temperature)


# ---- worked numbers


def test_rewards(x64, strict):
    one = np.array([1.0, 0, 0, 0])
    worked(reward_targets(one), [0.9479149899, *[0.0173616700] * 3])
    worked(reward_targets(one, scale="none"), [0.7112345942, *[0.0962551353] * 3])


def test_divisor_and_epsilon(x64):
    """The deviation of (1, 0, 0, 0) is 1/2 with ddof 1 and sqrt(3)/4 with ddof 0."""
    one = np.array([1.0, 0, 0, 0])
    for ddof, epsilon in ((1, 0.0), (0, 0.0), (1, 0.3), (0, 1e-4)):
        z = (one - 0.25) / (one.std(ddof=ddof) + epsilon) / 0.5
        found = rewards_of(one, ddof=ddof, epsilon=epsilon)
        worked(found, np.exp(z) / np.exp(z).sum())
    # As the advantages of the group-relative methods.
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    expected = jax.jit(lambda x: jax.nn.softmax(group_relative(x, epsilon=1e-6) / 0.5))(rewards)
    worked(rewards_of(rewards, epsilon=1e-6), expected)


def test_kde(x64, strict):
    raw = rewards_of(OUTLIER, scale="none", temperature=1.0)
    worked(raw[-1], 0.9999999999)
    kde = functools.partial(kde_of, OUTLIER)
    worked(
        kde(bandwidth=0.5, temperature=1.0),
        [0.0666440495, 0.1240868576, 0.0317551816, 0.7775139112],
    )
    worked(kde(bandwidth=0.5), [0.0071020229, 0.0246212945, 0.0016124584, 0.9666642243])
    by_rule = [0.0681348059, 0.0764015984, 0.0605575266, 0.7949060691]
    worked(kde(temperature=1.0), by_rule)
    # Masked rewards count neither for the ranks nor for the bandwidth.
    padded, where = np.insert(OUTLIER, 2, NAN), np.insert(np.ones(4, bool), 2, False)
    worked(kde_of(padded, temperature=1.0, where=where), np.insert(by_rule, 2, 0))


def test_kde_against_definition(x64):
    rewards = np.random.default_rng(1).standard_cauchy((3, 7))
    h = np.array([0.3, 1.0, 2.0])
    gaps = (rewards[:, :, None] - rewards[:, None]) / h[:, None, None]
    share = np.asarray(jax.scipy.stats.norm.cdf(gaps)).mean(-1)
    expected = jax.nn.softmax(np.log(share / (1 - share)) / 0.5)
    np.testing.assert_allclose(kde_of(rewards, bandwidth=h), expected, rtol=1e-8)


def test_entropy_rule(x64):
    found = entropy_rule(np.array([0.6, 0.25, 0.1, 0.05]), base=0.8)
    worked(found, 0.5019062974)
    helpers = GOLDEN["helpers"]
    worked(entropy_rule(np.array(helpers["target"])), helpers["temperature"])
    # A target that says nothing leaves half of the temperature, and one that is certain all of it.
    plain = functools.partial(entropy_rule, epsilon=0.0)
    worked(plain(np.full(4, 0.25)), 0.4)
    worked(plain(np.eye(4)[0]), 0.8)
    worked(plain(np.full(4, 0.25), alpha=1.0), 0.05)
    # Padding does not count.
    where = np.array([True, True, False, False])
    worked(plain(np.array([0.5, 0.5, NAN, NAN]), where=where), 0.4)
    worked(plain(np.array([1.0, 0]), where=np.array([True, False])), 0.8)


@pytest.mark.parametrize(
    ("entropy", "reward", "halves", "ones"),
    [
        (0.8, 0.1, 1.192, 1.584),
        (0.1, 0.1, 1.164, 1.528),
        (0.1, 0.9, 0.876, 0.952),
        (0.8, 0.9, 1.128, 1.456),
        (0.0, 1.0, 0.8, 0.8),
        (0.0, 0.0, 1.2, 1.6),
    ],
)
def test_hybrid_rule(entropy, reward, halves, ones, x64):
    """Two more groups span the range of the mean rewards."""
    entropies = np.array([entropy, 0, 0])
    rewards = np.array([[reward + 1, reward - 1], [0, 0], [1, 1]])
    for weight, expected in ((0.5, halves), (1.0, ones)):
        found = hybrid_rule(entropies, rewards, alpha=weight, beta=weight)
        worked(found[0], expected)


def test_hybrid_rule_at_its_edges(x64):
    same = hybrid_rule(np.zeros(2), np.ones((2, 3)), beta=1.0)
    worked(same, [1.2, 1.2])  # equal rewards count as one half
    far = hybrid_rule(np.array([-3.0, 7]), np.array([[0.0], [1]]), maximum=1.5)
    worked(far, [1.2, 1.5])
    # A group without candidates does not stretch the range.
    rewards, where = np.array([[0.0, 1], [9, 9], [1, 1]]), np.array([[True], [False], [True]])
    found = hybrid_rule(np.zeros(3), rewards, where=where)
    worked(found[::2], [1.2, 0.8])


def test_hybrid_rule_over_devices(x64):
    """The range is that of all devices."""
    random = np.random.default_rng(0)
    entropies, rewards = random.uniform(size=16), random.normal(size=(16, 4))
    rows = PartitionSpec("data")
    found = jax.jit(
        jax.shard_map(
            functools.partial(smooth_hybrid_temperature, axis_name="data"),
            mesh=make_mesh(8), in_specs=rows, out_specs=rows,
        )
    )(entropies, rewards)  # fmt: skip
    worked(found, hybrid_rule(entropies, rewards))


# ---- properties


finite = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
groups = arrays.arrays(np.float64, (3, 6), elements=finite)


@functools.partial(jax.jit, static_argnames="name")
def found(name, rewards, where):
    return TARGETS[name](rewards, where=where)


@each_target
@hypothesis.given(rewards=groups, where=arrays.arrays(bool, (3, 6)))
@hypothesis.settings(deadline=None, max_examples=25)
def test_distributions_that_keep_the_order(name, rewards, where):
    with jax.enable_x64(True):
        target = np.asarray(found(name, rewards, where))
        padded = np.asarray(found(name, np.where(where, rewards, NAN), where))
    np.testing.assert_array_equal(target, padded)
    np.testing.assert_allclose(target.sum(-1), where.any(-1), rtol=1e-9)
    assert (target >= 0).all()
    assert not target[~where].any()
    for group, chosen, kept in zip(rewards, target, where, strict=True):
        order = np.argsort(group[kept])
        assert (np.diff(chosen[kept][order]) >= -1e-12).all()


@hypothesis.given(rewards=groups, width=st.floats(1e-3, 1e3))
@hypothesis.settings(deadline=None, max_examples=25)
def test_no_outlier_passes_the_bound(rewards, width):
    """|logit| <= log(2 P - 1), so no two probabilities differ by more than (2 P - 1)^2."""
    with jax.enable_x64(True):
        target = np.asarray(at_width(rewards, width))
    assert (target.max(-1) <= 11**2 * target.min(-1) * (1 + 1e-9)).all()


at_width = jax.jit(lambda rewards, width: kde_targets(rewards, bandwidth=width, temperature=1.0))


# ---- extremes


@pytest.mark.table
@each_target
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes(name, dtype):
    """Cauchy rewards, groups of equal rewards, of one candidate and of none."""
    rewards = np.random.default_rng(0).standard_cauchy((6, 5)) * 1e4
    rewards[1] = 0.1
    rewards[2] = [1e30, -1e30, 0, 1, 2]
    rewards[3] = [1e-30, 0, 0, 0, 0]
    where = np.ones((6, 5), bool)
    where[4, 1:], where[5] = False, False
    target = found(name, jnp.asarray(rewards, dtype), where)
    assert target.dtype == jnp.float32
    np.testing.assert_allclose(target.sum(-1), [1, 1, 1, 1, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(target[1], 0.2, rtol=1e-6)
    np.testing.assert_array_equal(target[4], [1, 0, 0, 0, 0])
    assert target[2].argmax() == 0


@each_target
def test_nan_is_seen(name):
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    rewards[1, 2] = NAN
    np.testing.assert_array_equal(
        np.isnan(found(name, rewards, True)).any(-1), [False, True, False]
    )


@each_target
def test_targets_are_constants(name):
    @jax.jit
    @jax.grad
    def slope(x):
        target = TARGETS[name](x)
        return jnp.sum(jnp.arange(5) * target) + target_entropy_temperature(target * x)

    assert not slope(jnp.arange(5.0)).any()


def test_constants():
    slopes = jax.grad(lambda *x: bradley_terry_targets(*x), (0, 1))(1.0, 2.0)
    assert not any(slopes)
    hybrid = lambda h, r: jnp.sum(smooth_hybrid_temperature(h, r))
    slopes = jax.jit(jax.grad(hybrid, (0, 1)))(jnp.array([0.2, 0.4]), jnp.array([[1.0, 0], [3, 1]]))
    assert not any(slope.any() for slope in slopes)


def test_the_unit_of_the_rewards_does_not_matter():
    """Deviations of tiny and of huge rewards neither vanish nor overflow."""
    z = np.array([1.0, -2, 0.5, 0.5])
    expected = rewards_of(z, epsilon=0.0)
    for scale in (1e-25, 1e25):
        np.testing.assert_allclose(rewards_of(scale * z, epsilon=0.0), expected, rtol=1e-5)


def test_rewards_that_differ_by_rounding_are_equal():
    one, two, three = np.float32(1.1), np.float32(2.2), np.float32(3.3)
    rewards = jnp.array([(one + two) + three, (three + two) + one] * 2)
    assert rewards[0] != rewards[1]
    np.testing.assert_array_equal(reward_targets(rewards), 0.25)
    assert reward_targets(rewards, tolerance=0.0)[0] > 0.4


# ---- bad input


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda x: reward_targets(x, scale="max"), "scale must be one of 'std', 'none'"),
        (lambda x: reward_targets(x, ddof=2), "ddof must be <= 1"),
        (lambda x: reward_targets(x, epsilon=-1.0), "epsilon must be >= 0"),
        (lambda x: reward_targets(x, temperature=0.0), "temperature must be > 0"),
        (lambda x: reward_targets(x[..., :0]), "rewards must have at least 1 candidates"),
        (lambda x: kde_targets(x, bandwidth=0.0), "bandwidth must be > 0"),
        (lambda x: kde_targets(x, bandwidth=np.ones(2)), "bandwidth must be a number or one per"),
        (lambda x: bradley_terry_targets(x, x[0]), "rejected_rewards must have the shape"),
        (lambda x: target_entropy_temperature(x, minimum=0.0), "minimum must be > 0"),
        (lambda x: smooth_hybrid_temperature(x, x), "entropy must have the shape"),
        (lambda x: smooth_hybrid_temperature(x[:, 0], x, base=-1.0), "base must be > 0"),
    ],
)
def test_errors(call, field):
    with pytest.raises(ValueError, match=field):
        call(np.ones((3, 4)))
