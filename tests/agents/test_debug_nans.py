"""Agents whole under `jax_debug_nans`, before an episode has ended, and where returns are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.agents import mdpo, ppo, sac, trpo
from trustjax.agents.algorithm import known
from trustjax.trust import trust_metrics

ON_POLICY = {
    "num_envs": 4, "num_steps": 4, "total_steps": 4 * 16, "num_minibatches": 2, "num_epochs": 1,
    "hidden": (4,), "normalize_observations": True,
}  # fmt: skip
OFF_POLICY = {
    "num_envs": 2, "num_steps": 2, "total_steps": 6 * 4, "learning_starts": 4, "batch_size": 4,
    "hidden": (4,),
}  # fmt: skip
# Episodes of five steps: none ends in the first iteration.
AGENTS = {
    "ppo": ppo.Config(env="probe:final_observation", normalize_rewards=True, **ON_POLICY),
    "trpo": trpo.Config(env="probe:final_observation", **ON_POLICY),
    "mdpo": mdpo.Config(env="gymnax:Pendulum-v1", **ON_POLICY),
    "sac": sac.Config(env="probe:final_observation", **OFF_POLICY),
    "off_policy_mdpo": mdpo.OffPolicyConfig(env="gymnax:Pendulum-v1", **OFF_POLICY),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_no_episode_yet(name):
    with jax.debug_nans(True):
        state, history = jax.jit(AGENTS[name].agent().train)(jax.random.key(0))
    assert history["episode/length"][0] == 0
    found = known(history)
    assert np.isnan(found["episode/return"][0])
    assert np.isnan(found["episode/length"][0])
    if "Pendulum" in AGENTS[name].env:  # whose episodes are longer than the training
        assert np.isnan(found["episode/return"]).all()
        assert np.isnan(known(state.episodes)["episode/return"])
    else:
        np.testing.assert_array_equal(found["episode/return"][2:], 1)
        np.testing.assert_array_equal(found["episode/length"][2:], 5)
    others = {n: x for n, x in found.items() if not n.startswith("episode/")}
    assert all(np.isfinite(x).all() for x in others.values())


def test_equal_returns_explain_nothing():
    config = ppo.Config(env="probe:constant", **ON_POLICY)
    _, history = jax.jit(config.agent().train)(jax.random.key(0))
    assert np.isnan(history["value/explained"]).all()


def test_trust():
    found = trust_metrics(jnp.array([0.0, 2.0, jnp.nan]), jnp.array([1.0, 1.0, 1.0]))
    np.testing.assert_array_equal(found["trust/used"], [0, 0.5, np.nan])


def test_ratios_far_away():
    """Of clipped transitions, they are nothing to stop for: every metric stays finite."""
    config = ppo.Config(env="probe:both", learning_rate=1e4, max_grad_norm=None, **ON_POLICY)
    agent = config.agent()
    state = agent.init(jax.random.key(0))
    batches = []

    def learn(state, batch, key):
        batches.append(batch)
        return state.params, state.learner, {}

    agent.learn = learn
    agent.update(state)
    (batch,) = batches
    far = jnp.where(jnp.arange(4) % 2, 1e3, -1e3)
    for advantage in (batch.advantage, jnp.zeros_like(batch.advantage)):
        moved = agent.policy_update_metrics(
            state.params["actor"],
            batch._replace(log_prob=batch.log_prob + far, advantage=advantage),
        )
        finite = {name: np.isfinite(x) for name, x in moved.items() if name != "value/explained"}
        assert all(finite.values()), finite
        assert moved["ratio/distance"] > 1e20
