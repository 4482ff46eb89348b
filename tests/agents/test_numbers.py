"""Numbers of the configurations do what their fields say, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from agent_table import small_config

from trustjax.agents import rollout
from trustjax.agents.running_statistics import Statistics

KEY = jax.random.key(0)


def learned(algorithm, advantage=None, **options):
    """One update on a rollout: the agent, its first state, the batch, and what it returns."""
    agent = small_config(algorithm, **options).agent()

    @jax.jit
    def update():
        state = agent.init(KEY)
        _, steps = rollout.collect(
            agent.env, None, agent.actor, state.params["actor"], lambda x: x, state.runner, KEY, 4
        )
        batch = agent._batch(state, steps, None)[0]
        if advantage is not None:
            batch = batch._replace(advantage=jnp.full_like(batch.advantage, advantage))
        return state, batch, agent.learn(state, batch, KEY)

    return agent, *update()


def furthest(after, before):
    """The largest change of any parameter."""
    changes = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), after, before)
    return max(jax.tree.leaves(changes))


# ---- on-policy


@pytest.mark.slow
def test_the_value_of_mdpo_has_a_rate_of_its_own():
    """The policy learns as without it."""
    _, state, _, (params, *_) = learned("mdpo", value_learning_rate=1e-9)
    _, _, _, (expected, *_) = learned("mdpo")
    assert furthest(params["critic"], state.params["critic"]) < 1e-7
    assert furthest(expected["critic"], state.params["critic"]) > 1e-3
    assert furthest(params["actor"], expected["actor"]) < 1e-6


@pytest.mark.parametrize("algorithm", ["mdpo", pytest.param("trpo", marks=pytest.mark.slow)])
def test_without_advantages_the_entropy_alone_moves_the_policy(algorithm):
    """Up, and not at all without its coefficient; fails with the sign turned."""
    options = {"initial_log_std": 0.0, "env": "probe:continuous", "learning_rate": 0.01}
    for coefficient, moves in ((0.0, False), (0.5, True)):
        _, state, batch, (params, _, metrics) = learned(
            algorithm, advantage=0.0, entropy_coefficient=coefficient, **options
        )
        moved = metrics["entropy"] - jnp.mean(batch.old.entropy())
        assert (moved > 1e-3) == moves
        assert (furthest(params["actor"], state.params["actor"]) > 1e-6) == moves
        assert metrics["trust/distance"] <= metrics["trust/radius"] * (1 + 1e-3) + 1e-7


def test_a_step_of_mdpo_with_entropy():
    """A single step of gradient descent: the gradient of the surrogate plus c times the entropy's.

    The logarithm of the deviation has the slope 1 in the entropy of a normal distribution.
    """
    options = {"env": "probe:continuous", "optimizer": optax.sgd, "learning_rate": 0.1,
               "policy_steps": 1, "max_grad_norm": None, "anneal_learning_rate": False}  # fmt: skip
    _, _, _, (plain, *_) = learned("mdpo", **options)
    _, _, _, (found, *_) = learned("mdpo", entropy_coefficient=0.3, **options)
    difference = jax.tree.map(lambda f, p: np.asarray(f - p), found["actor"], plain["actor"])
    log_std = difference["params"].pop("log_std")
    np.testing.assert_allclose(log_std, 0.1 * 0.3, rtol=1e-5)
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0, atol=1e-7), difference)


# ---- off-policy


def small(algorithm="sac", **options):
    """Two environments of the cheapest probe, after eight random steps."""
    fields = {"env": "probe:continuous", "num_envs": 2, "num_steps": 2, "total_steps": 40,
              "learning_starts": 8, "batch_size": 8, "buffer_size": 40}  # fmt: skip
    return small_config(algorithm, **fields | options)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"critic_learning_rate": 0.02, "temperature_learning_rate": 0.3}, (0.003, 0.02, 0.3)),
        pytest.param({}, (0.003, 0.003, 0.003), marks=pytest.mark.slow),
    ],
    ids=["own", "shared"],
)
def test_rates_of_actor_critics_and_temperature(rates, expected):
    """The first step of Adam is the learning rate times the sign of the gradient."""
    agent = small(**rates).agent()
    state = jax.jit(agent.init)(KEY)
    after, _ = jax.jit(agent._gradient_step)(state, KEY)
    found = [
        furthest(after.params["actor"], state.params["actor"]),
        furthest(after.params["critics"], state.params["critics"]),
        furthest(after.learner.log_temperature, state.learner.log_temperature),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_rewards_are_scaled_for_the_critics_alone():
    """Also as a number of the configuration that differs between seeds trained side by side."""

    def sample(scale):
        agent = dataclasses.replace(small(), reward_scale=scale).agent()
        state = agent.init(KEY)
        return state.replay.experience.reward, agent._sample_batch(state, KEY)[0]

    stored, batch = jax.jit(jax.vmap(sample))(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(stored[0], stored[1])
    np.testing.assert_allclose(batch.reward[1], 3 * batch.reward[0], rtol=1e-6)
    np.testing.assert_array_equal(batch.observation[0], batch.observation[1])
    assert np.all(batch.reward[0] != 0)


@pytest.mark.slow
def test_observations_are_normalised_before_and_after_a_step():
    """By the statistics in the state, which those of the random steps begin."""
    options = {"env": "gymnax:Pendulum-v1", "clip_observations": 1.5}
    agent = small("off_policy_mdpo", normalize_observations=True, **options).agent()
    state = jax.jit(agent.init)(KEY)
    seen = np.asarray(state.replay.experience.observation)[:, :4].reshape(8, 3)  # random steps
    np.testing.assert_allclose(state.observations.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.observations.variance, seen.var(0), rtol=1e-4)
    assert state.observations.size == 8
    raw = small("off_policy_mdpo", **options).agent()._sample_batch(
        state._replace(observations=None), KEY
    )[0]  # fmt: skip
    batch, keys = agent._sample_batch(state, KEY)
    for name in ("observation", "final_observation"):
        expected = (getattr(raw, name) - seen.mean(0)) / seen.std(0)
        found = getattr(batch, name)
        np.testing.assert_allclose(found, np.clip(expected, -1.5, 1.5), rtol=1e-3, atol=1e-4)
    assert np.any(np.abs(batch.observation) == 1.5)
    # Other statistics move the new and the old policy alike: equal weights are equal policies.
    other = Statistics(jnp.full(3, 0.7), jnp.full(3, 4.0), jnp.asarray(9.0))
    moved = agent._sample_batch(state._replace(observations=other), KEY)[0]
    metrics = agent.policy_update_metrics(state, moved, keys[:, 0], state.params["actor"])
    assert metrics["trust/distance"] == 0
    assert np.max(np.abs(moved.observation - batch.observation)) > 0.1
