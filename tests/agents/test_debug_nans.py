"""Agents whole under `jax_debug_nans`, before an episode has ended, and where returns are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agent_table import AGENTS, ON_POLICY, small_config

from trustjax.agents.algorithm import mask_missing_episodes
from trustjax.trust import trust_metrics

# Iterations of four steps: an episode of a probe, of five, does not end in the first one.
SHORT_ON_POLICY = {
    "num_envs": 4, "num_steps": 4, "total_steps": 4 * 16, "num_epochs": 1, "hidden": (4,),
    "normalize_observations": True, "learning_rate": 3e-4,
}  # fmt: skip
SHORT_OFF_POLICY = {
    "num_envs": 2, "num_steps": 2, "total_steps": 6 * 4, "learning_starts": 4, "batch_size": 4,
    "buffer_size": 24, "gradient_steps": 1, "hidden": (4,), "learning_rate": 3e-4,
}  # fmt: skip
OWN = {"ppo": {"normalize_rewards": True}}


def short(name, env):
    options = SHORT_ON_POLICY if name in ON_POLICY else SHORT_OFF_POLICY
    return small_config(name, env=env, **options, **OWN.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_no_episode_yet(name):
    """The MDPOs on continuous actions, with episodes that are longer than the training."""
    env = "gymnax:Pendulum-v1" if "mdpo" in name else "probe:final_observation"
    with jax.debug_nans(True):
        state, history = jax.jit(short(name, env).agent().train)(jax.random.key(0))
    assert history["episode/length"][0] == 0
    found = mask_missing_episodes(history)
    assert np.isnan(found["episode/return"][0])
    assert np.isnan(found["episode/length"][0])
    if "Pendulum" in env:
        assert np.isnan(found["episode/return"]).all()
        assert np.isnan(mask_missing_episodes(state.episodes)["episode/return"])
    else:
        np.testing.assert_array_equal(found["episode/return"][2:], 1)
        np.testing.assert_array_equal(found["episode/length"][2:], 5)
    others = {n: x for n, x in found.items() if not n.startswith("episode/")}
    assert all(np.isfinite(x).all() for x in others.values())


@pytest.mark.slow
def test_equal_returns_explain_nothing():
    config = small_config("ppo", env="probe:constant", **SHORT_ON_POLICY)
    _, history = jax.jit(config.agent().train)(jax.random.key(0))
    assert np.isnan(history["value/explained"]).all()


def test_trust():
    found = trust_metrics(jnp.array([0.0, 2.0, jnp.nan]), jnp.array([1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(found["trust/used"], [0, 0.5, np.nan])


def test_ratios_far_away():
    """Of clipped transitions, they are nothing to stop for: every metric stays finite."""
    options = SHORT_ON_POLICY | {"learning_rate": 1e4, "max_grad_norm": None}
    agent = small_config("ppo", env="probe:both", **options).agent()
    state = jax.jit(agent.init)(jax.random.key(0))
    batches = []

    def learn(state, batch, key):
        batches.append(batch)
        return state.params, state.learner, {}

    agent.learn = learn

    @jax.jit
    def batch_of(state):
        agent.update(state)
        return batches.pop()

    batch, measure = batch_of(state), jax.jit(agent.policy_update_metrics)
    far = np.where(np.arange(4) % 2, np.float32(1e3), np.float32(-1e3))
    for advantage in (batch.advantage, jnp.zeros_like(batch.advantage)):
        moved = measure(
            state.params["actor"],
            batch._replace(log_prob=batch.log_prob + far, advantage=advantage),
        )
        finite = {name: np.isfinite(x) for name, x in moved.items() if name != "value/explained"}
        assert all(finite.values()), finite
        assert moved["ratio/distance"] > 1e20
