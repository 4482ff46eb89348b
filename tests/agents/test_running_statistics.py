"""Running statistics: how they are merged, and what of an iteration they see and scale."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from trustjax.agents import PPO, on_policy, ppo
from trustjax.agents.rollout import EpisodeStats, accumulate_episode_stats
from trustjax.agents.running_statistics import (
    Statistics,
    explained_variance,
    initial_statistics,
    merged,
    normalized,
    scaled,
    standardized,
)
from trustjax.parallel import make_mesh

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "statistics.json").read_text(encoding="utf-8")
)
KEY = jax.random.key(0)
DATA = np.random.default_rng(0).normal(3, 2, (24, 2))


def statistics_of(x):
    x = np.asarray(x, float)
    return Statistics(*map(jnp.asarray, (np.mean(x, 0), np.var(x, 0), float(len(x)))))


merge = jax.jit(merged)


def check_close(found, expected, **tolerances):
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, **tolerances)


# ---- merging


def test_merge_golden(x64):
    golden = GOLDEN["merge"]
    found = merged(statistics_of(golden["first"]), jnp.array(golden["second"], float))
    check_close(found, (golden["mean"], golden["variance"], 5), rtol=1e-12)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.sampled_from([1, 8, 16]), min_size=1))
def test_any_split_gives_the_same(cuts):
    with jax.enable_x64(True):
        first, *rest = np.split(DATA, sorted(cuts))
        found = statistics_of(first)
        for part in rest:
            found = merge(found, jnp.asarray(part))
        check_close(found, statistics_of(DATA), rtol=1e-10)


def test_far_from_zero():
    """In float32, where the mean of squares less the square of the mean would be noise."""
    found = merge(initial_statistics((2,)), jnp.asarray(DATA[:12] + 1e4, jnp.float32))
    found = merge(found, jnp.asarray(DATA[12:] + 1e4, jnp.float32))
    np.testing.assert_allclose(found.variance, np.var(DATA, 0), rtol=1e-2)
    found = merge(statistics_of(DATA[:12] + 1e4), jnp.asarray(DATA[12:] + 1e4, jnp.float32))
    np.testing.assert_allclose(found.variance, np.var(DATA, 0), rtol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 1e5, -1e6, 7.3])
@pytest.mark.parametrize("parts", [1, 2, 100])
def test_far_from_zero_exactly(offset, parts):
    """Numbers offset +- 1 in float32, whose variance is 1."""
    data = (offset + np.tile([1.0, -1.0], 5_000)).astype(np.float32)
    found = initial_statistics(())
    for part in np.split(data, parts):
        found = merge(found, part)
    np.testing.assert_allclose(found.mean, np.float32(offset), rtol=2e-7, atol=1e-6)
    np.testing.assert_allclose(found.variance, 1, rtol=1e-4)
    assert found.size == 10_000


def test_equal_numbers_have_no_variance():
    """Not that of the rounding of their sum, which normalising would blow up."""
    for number in (0.1, 12345.678, -3e7):
        found = merge(initial_statistics(()), jnp.full(9_999, number))
        assert found.variance <= (2e-7 * number) ** 2
        np.testing.assert_allclose(normalized(jnp.full(3, number), found, 10.0), 0, atol=1e-2)


def test_the_start_does_not_count():
    start = initial_statistics((2,))
    np.testing.assert_array_equal(start.mean, 0)
    np.testing.assert_array_equal(start.variance, 1)
    assert start.size == 0
    found = merged(start, jnp.asarray(DATA.reshape(4, 6, 2), jnp.float32))
    check_close(found, statistics_of(DATA), rtol=1e-6)
    with pytest.raises(ValueError, match=r"batch must not be empty, got shape \(0, 2\)"):
        merged(start, jnp.zeros((0, 2)))


@functools.cache
def on_eight_devices(function):
    split = PartitionSpec("data")
    mapped = jax.shard_map(
        function, mesh=make_mesh(8), in_specs=split, out_specs=PartitionSpec(), check_vma=False
    )
    return jax.jit(mapped)


def test_devices_merge_their_parts(x64):
    merge = on_eight_devices(lambda x: merged(statistics_of(DATA), x, axis_name="data"))
    found = merge(DATA**2)
    check_close(found, statistics_of(np.concatenate([DATA, DATA**2])), rtol=1e-12)


# ---- what is scaled


def test_normalized_and_scaled():
    statistics = Statistics(jnp.array([1.0, -1.0]), jnp.array([4.0, 0.25]), jnp.array(9.0))
    x = np.array([[3.0, -1.0], [0.0, -9.0]], np.float32)
    np.testing.assert_allclose(normalized(x, statistics, 10.0), [[1, 0], [-0.5, -10]], rtol=1e-6)
    np.testing.assert_allclose(scaled(x, statistics, 5.0), [[1.5, -2], [0, -5]], rtol=1e-6)
    assert normalized(x, None, 1.0) is x
    assert scaled(x, None, 1.0) is x


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_scaling_keeps_signs(rewards):
    """A mean that was subtracted would turn a small reward into a punishment."""
    statistics = Statistics(jnp.array(50.0), jnp.array(2.5), jnp.array(9.0))
    x = np.array(rewards, np.float32)
    # The smallest numbers are flushed to zero.
    x = np.where(np.abs(x) < 1e-30, np.float32(0), x)
    np.testing.assert_array_equal(np.sign(scaled(x, statistics, 10.0)), np.sign(x))


def test_standardized(x64):
    expected = (DATA - DATA.mean()) / (DATA.std() + 1e-8)
    data = jnp.asarray(DATA)
    np.testing.assert_allclose(standardized(data, differences_of=data), expected, rtol=1e-10)
    share = jax.shard_map(
        lambda x: standardized(x, differences_of=x, axis_name="data"), mesh=make_mesh(8),
        in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(share)(DATA), expected, rtol=1e-10)
    equal = jnp.full(3, 7.0)
    np.testing.assert_array_equal(standardized(equal, differences_of=equal), 0)


explained = jax.jit(explained_variance)


def explained_by_half(x):
    return explained_variance(0.5 * x, x, axis_name="data")


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-12, 1e-25, 1e25])
def test_explained_variance(scale, strict):
    returns = scale * jnp.asarray(DATA, jnp.float32)
    constant = jnp.full_like(returns, 2 * scale)
    np.testing.assert_allclose(explained(returns, returns), 1)
    np.testing.assert_allclose(explained(0.5 * returns, returns), 0.75, rtol=1e-5)
    np.testing.assert_allclose(explained(constant, returns), 0, atol=1e-5)
    np.testing.assert_allclose(explained(-returns, returns), -3, rtol=1e-5)
    shared = on_eight_devices(explained_by_half)(returns)
    np.testing.assert_allclose(shared, 0.75, rtol=1e-5)


def test_explained_variance_is_undefined():
    """Without variance in the returns, but for their rounding; NaN stays NaN."""
    for returns in (jnp.zeros(9), jnp.full(9, 0.1), jnp.nextafter(jnp.ones(9), 1 + DATA[:9, 0])):
        assert np.isnan(explained(jnp.arange(9.0), returns))
    nothing = jnp.arange(9.0)
    assert np.isnan(explained(nothing.at[0].set(jnp.nan), nothing))
    assert np.isnan(explained(nothing, nothing.at[0].set(jnp.nan)))
    found = standardized(nothing.at[0].set(jnp.nan), differences_of=nothing)
    assert np.isnan(found).all()


def test_rounding_is_not_standardized():
    """Differences of returns that are equal but for rounding are equal; larger ones are not."""
    returns = jnp.asarray(np.random.default_rng(0).normal(100.0, 1.0, 64), jnp.float32)
    noise = jnp.nextafter(returns, jnp.inf) - returns
    noise = noise.at[::2].set(0)
    np.testing.assert_array_equal(standardized(noise, differences_of=returns), 0)
    assert np.std(standardized(noise, differences_of=noise)) > 0.9
    for small in (1e3 * noise, 1e-4 * returns):
        found = standardized(small, differences_of=returns)
        np.testing.assert_allclose(found, standardized(small, differences_of=small))


# ---- sums since an episode began


def test_discounted_return_golden(x64):
    golden = GOLDEN["discounted_return"]
    zero = jnp.zeros(1)
    rewards = jnp.array(golden["rewards"], float)[:, None]
    after, every = accumulate_episode_stats(
        EpisodeStats(zero, jnp.zeros(1, jnp.int32), zero),
        rewards, jnp.zeros_like(rewards, bool), golden["discount"],
    )  # fmt: skip
    np.testing.assert_allclose(every.discounted_return[:, 0], golden["sums"], rtol=1e-12)
    np.testing.assert_allclose(after.discounted_return, golden["sums"][-1:], rtol=1e-12)


def test_sums_begin_anew_after_an_end():
    """The step that ends an episode counts to it; the next one starts at its own reward."""
    rewards = jnp.array([[1.0, 1], [2, 2], [4, 4]])
    ended = jnp.array([[False, False], [True, False], [False, True]])
    start = EpisodeStats(jnp.array([8.0, 0]), jnp.array([2, 0]), jnp.array([16.0, 0]))
    after, every = accumulate_episode_stats(start, rewards, ended, 0.5)
    np.testing.assert_array_equal(every.episode_return, [[9, 1], [11, 3], [4, 7]])
    np.testing.assert_array_equal(every.episode_length, [[3, 1], [4, 2], [1, 3]])
    np.testing.assert_array_equal(every.discounted_return, [[9, 1], [6.5, 2.5], [4, 5.25]])
    check_close(after, ([4, 0], [1, 0], [4, 0]))


# ---- in an iteration

CONFIG = ppo.Config(
    env="probe:final_observation", num_envs=4, num_steps=5, total_steps=3 * 20, hidden=(4,),
    num_minibatches=2, num_epochs=1, discount=0.5, normalize_observations=True,
    normalize_rewards=True,
)  # fmt: skip
# An episode of that probe, of five steps whatever the policy does; observation is reward.
EPISODE = np.array([1.0, -1, 1, -1, 1])
DISCOUNTED = np.array([1, -0.5, 0.75, -0.625, 0.6875])


def test_statistics_of_training():
    """Of all that was seen, one number a feature, not an environment."""
    agent = PPO(CONFIG)
    state, history = jax.jit(agent.train)(KEY)
    assert state.observations.mean.shape == state.observations.variance.shape == (1,)
    assert state.returns.mean.shape == state.returns.variance.shape == ()
    for statistics, x in ((state.observations, EPISODE), (state.returns, DISCOUNTED)):
        check_close(statistics, (x.mean(), x.var(), 60), rtol=1e-4)
    # What is reported is not scaled.
    np.testing.assert_array_equal(history["episode/return"], 1)
    np.testing.assert_array_equal(history["episode/length"], 5)


def seen_by_gae(monkeypatch, config, state):
    """What an iteration from `state` takes advantages of."""
    found = {}

    def spy(rewards, values, next_values, terminated, truncated, **numbers):
        found.update(rewards=rewards, values=values, next_values=next_values)
        return gae(rewards, values, next_values, terminated, truncated, **numbers)

    gae = on_policy.gae
    monkeypatch.setattr(on_policy, "gae", spy)

    def update(state):
        after, _ = PPO(config).update(state)
        return found | {"returns": after.returns}

    return jax.jit(update)(state)


@pytest.fixture(scope="module")
def state():
    """Before an iteration, with statistics from elsewhere."""
    state = jax.jit(PPO(CONFIG).init)(KEY)
    one = jnp.ones([])
    return state._replace(
        observations=Statistics(0.5 * jnp.ones(1), 4 * jnp.ones(1), 100 * one),
        returns=Statistics(3 * one, 9 * one, 100 * one),
    )


def test_final_observations_are_normalised_with_the_same_statistics(state, monkeypatch):
    """Those of the start of the iteration; the step before a limit leads to -1, not to +1."""
    found = seen_by_gae(monkeypatch, CONFIG, state)

    def expected(observations):
        x = (observations[:, None] - 0.5) / 2
        value, _ = PPO(CONFIG).critic.apply(state.params["critic"], jnp.asarray(x, jnp.float32))
        return np.broadcast_to(value[:, None], (5, 4))

    np.testing.assert_allclose(found["values"], expected(EPISODE), atol=1e-5)
    np.testing.assert_allclose(found["next_values"], expected(-EPISODE), atol=1e-5)
    assert np.ptp(found["values"]) > 0.1


@pytest.mark.parametrize("clip", [10.0, 0.25])
def test_rewards_are_scaled_by_returns(clip, state, monkeypatch):
    """With those of the iteration among them; no mean is subtracted."""
    config = dataclasses.replace(CONFIG, clip_rewards=clip)
    found = seen_by_gae(monkeypatch, config, state)
    scale = np.sqrt(found["returns"].variance)
    assert 0.3 < 1 / scale < 0.4
    expected = np.clip(EPISODE / scale, -clip, clip)
    np.testing.assert_allclose(
        found["rewards"], np.broadcast_to(expected[:, None], (5, 4)), rtol=1e-5
    )
