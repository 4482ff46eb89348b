"""Every algorithm on every probe: the value it finds is the one that is known, for every seed.

Seen to fail when broken:

- constant, observation: the value learns from its own output in place of the target (by hand, all
  three algorithms).
- time_limit: `truncated` counted as `terminated` (`test_truncation_is_not_an_end`, PPO).
- final_observation: the next value from the observation after the reset
  (`test_next_value_is_that_before_the_reset`, PPO).
- delayed, time_limit, final_observation: 1 in place of the discount in `gae` (PPO).
- action, both, continuous: the sign of the advantage flipped (all three algorithms).
- every probe: `terminated` and `truncated` swapped (PPO).

The off-policy algorithms, by the last two tests and by hand:

- time_limit: `truncated` counted as `terminated` (`test_replay_keeps_both_ends_apart`, SAC).
- final_observation: what comes after a reset in its place (the same test).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agent_table import AGENTS, ON_POLICY

from trustjax.agents import action_samples, on_policy, rollout, select_seed
from trustjax.envs import Environment
from trustjax.envs.probe import Probe

SEEDS = 5
DISCOUNT = 0.9

# Observations of each probe at which there is something to do, and what is right there, if any.
PROBES = {
    "constant": ([[1.0]], None),
    "observation": ([[1.0], [-1.0]], None),
    "delayed": ([[0.0], [1.0]], None),
    "action": ([[1.0]], [1]),
    "both": ([[1.0], [-1.0]], [1, 0]),
    "time_limit": ([[1.0]], None),
    "final_observation": ([[1.0], [-1.0]], None),
}
CONTINUOUS = ([[1.0]], [[0.5]])


class OneOf(Environment):
    """The probe whose index the parameters are, so that all of them are compiled once."""

    def __init__(self, *names):
        self.name = "one of the probes"
        self.probes = [Probe(name) for name in names]
        self.default_params = jnp.zeros([], jnp.int32)
        self.observation_shape, self.num_actions = (1,), 2

    def reset(self, key, params=None):
        return jax.lax.switch(params, [probe.reset for probe in self.probes], key)

    def step(self, key, state, action, params=None):
        return jax.lax.switch(params, [probe.step for probe in self.probes], key, state, action)


SHARED = {
    "num_envs": 8, "num_steps": 10, "total_steps": 50 * 80, "discount": DISCOUNT, "hidden": (16,),
    "learning_rate": 0.02, "anneal_learning_rate": True, "num_epochs": 4, "num_minibatches": 2,
    "normalize_observations": False, "normalize_rewards": False,
}  # fmt: skip
REPLAY = {
    "num_envs": 8, "num_steps": 10, "total_steps": 6000, "discount": DISCOUNT, "hidden": (16,),
    "activation": "tanh", "learning_rate": 0.01, "gradient_steps": 2, "batch_size": 64,
    "learning_starts": 400, "target_rate": 0.1, "temperature": 0.001, "learn_temperature": False,
}  # fmt: skip
OWN = {
    "trpo": {"radius": 0.1, "damping": 0.01},
    "off_policy_mdpo": {"policy_steps": 20, "step_size": 10.0},
}


def quick(chosen):
    """One agent learns in every run of the tests, all of them in the slow ones."""
    return pytest.mark.parametrize(
        "algorithm",
        [pytest.param(name, marks=[pytest.mark.slow] * (name != chosen)) for name in AGENTS],
    )


def agent_of(algorithm, **options):
    shared = SHARED if algorithm in ON_POLICY else REPLAY
    return AGENTS[algorithm](**shared | OWN.get(algorithm, {}) | options).agent()


def trained(algorithm, **options):
    """An agent, and its states after training, [seed]."""
    agent = agent_of(algorithm, **options)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    return agent, jax.jit(jax.vmap(lambda key: agent.train(key)[0]))(keys)


def trained_on(algorithm, *names):
    """An agent, and its states after training on each probe, by name."""
    env = OneOf(*names)

    def train(index, key):
        return agent_of(algorithm, env=env, env_params=index).train(key)[0]

    keys = jax.random.split(jax.random.key(0), SEEDS)
    train = jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))
    states = train(jnp.arange(len(names)), keys)
    agent = agent_of(algorithm, env=env)
    return agent, {name: select_seed(states, index) for index, name in enumerate(names)}


@functools.cache
def trained_on_all(algorithm):
    return trained_on(algorithm, *PROBES)


def values(agent, params, observations):
    """V, or what the policy expects of Q."""
    if "critic" in params:
        return agent.critic.apply(params["critic"], observations)[0]
    policy = agent.distribution(params["actor"], observations)
    drawn = action_samples.sample_actions(policy, jax.random.split(jax.random.key(2), 1))
    return action_samples.expectation(drawn, agent.q_values(params["critics"], observations, drawn))


def value_errors(agent, states, name):
    """How far off the worst value is, [seed]."""
    observations = jnp.array((PROBES | {"continuous": CONTINUOUS})[name][0])
    found = jax.vmap(lambda params: values(agent, params, observations))(states.params)
    return np.abs(found - Probe(name).value(observations, DISCOUNT)).max(-1)


def check_actions(agent, states, observations, right):
    for seed in range(SEEDS):
        action, _ = agent.act(
            select_seed(states, seed), jnp.array(observations), jax.random.key(1),
            deterministic=True,
        )  # fmt: skip
        np.testing.assert_allclose(action, right, atol=0.1)


@quick("ppo")
@pytest.mark.parametrize("name", PROBES)
def test_values(name, algorithm):
    agent, states = trained_on_all(algorithm)
    assert np.all(value_errors(agent, states[name], name) < 0.05)


@quick("ppo")
@pytest.mark.parametrize("name", ["action", "both"])
def test_actions(name, algorithm):
    agent, states = trained_on_all(algorithm)
    check_actions(agent, states[name], *PROBES[name])


@quick("mdpo")
def test_continuous(algorithm):
    first = {"initial_log_std": -2.0} if algorithm in ON_POLICY else {}
    agent, states = trained(algorithm, env="probe:continuous", **first)
    assert np.all(value_errors(agent, states, "continuous") < 0.05)
    check_actions(agent, states, *CONTINUOUS)


@pytest.mark.slow
def test_truncation_is_not_an_end(monkeypatch):
    """An agent that takes a time limit for an end does not pass, and fails no other probe."""
    gae = on_policy.gae

    def blind(rewards, values, next_values, terminated, truncated, **numbers):
        ended = terminated | truncated
        return gae(rewards, values, next_values, ended, truncated, **numbers)

    monkeypatch.setattr(on_policy, "gae", blind)
    agent, states = trained_on("ppo", "time_limit", "delayed")
    assert np.all(value_errors(agent, states["time_limit"], "time_limit") > 1)
    assert np.all(value_errors(agent, states["delayed"], "delayed") < 0.05)


@pytest.mark.slow
def test_next_value_is_that_before_the_reset(monkeypatch):
    """An agent that looks at the observation after the reset passes "time_limit" alone."""
    collect = rollout.collect

    def blind(*args):
        runner, found = collect(*args)
        after = jnp.concatenate([found.observation[1:], runner.observation[None]])
        return runner, found._replace(final_observation=after)

    monkeypatch.setattr(rollout, "collect", blind)
    agent, states = trained_on("ppo", "time_limit", "final_observation")
    assert np.all(value_errors(agent, states["time_limit"], "time_limit") < 0.05)
    assert np.all(value_errors(agent, states["final_observation"], "final_observation") > 0.1)


@pytest.mark.slow
def test_replay_keeps_both_ends_apart(monkeypatch):
    """Without the difference, or without the last observation, SAC fails the probe for it alone."""
    step_envs = rollout.step_envs

    def no_limit(*args, **options):
        runner, found = step_envs(*args, **options)
        return runner, found._replace(terminated=found.terminated | found.truncated)

    def no_last(*args, **options):
        runner, found = step_envs(*args, **options)
        return runner, found._replace(final_observation=runner.observation)

    monkeypatch.setattr(rollout, "step_envs", no_limit)
    agent, states = trained_on("sac", "time_limit", "delayed")
    assert np.all(value_errors(agent, states["time_limit"], "time_limit") > 1)
    assert np.all(value_errors(agent, states["delayed"], "delayed") < 0.05)

    monkeypatch.setattr(rollout, "step_envs", no_last)
    agent, states = trained_on("sac", "time_limit", "final_observation")
    assert np.all(value_errors(agent, states["time_limit"], "time_limit") < 0.05)
    assert np.all(value_errors(agent, states["final_observation"], "final_observation") > 0.1)
