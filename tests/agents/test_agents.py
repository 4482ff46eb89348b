"""Properties of every agent in the table."""

import dataclasses

import jax
import pytest
from agent_table import AGENTS, ON_POLICY, small_config

KEY = jax.random.key(0)
# Hyperparameters that are None by default, and options under which more of them are used.
GIVEN_ON_POLICY = {
    "value_clip": 0.2, "normalize_observations": True, "normalize_rewards": True,
}  # fmt: skip
GIVEN_OFF_POLICY = {
    "max_grad_norm": 0.5, "target_entropy": -1.0, "learn_temperature": True,
    "normalize_observations": True, "critic_learning_rate": 1e-3, "temperature_learning_rate": 1e-3,
}  # fmt: skip
OWN = {
    "ppo": {
        "surrogate": "adaptive_kl", "target_kl": 0.02, "desired_kl": 0.01,
        "anneal_learning_rate": False,
    },
    "mdpo": {"value_learning_rate": 1e-3},
}  # fmt: skip


@pytest.mark.table
@pytest.mark.parametrize("name", AGENTS)
def test_every_hyperparameter_traces(name):
    given = GIVEN_ON_POLICY if name in ON_POLICY else GIVEN_OFF_POLICY
    config = small_config(name, **given, **OWN.get(name, {}))
    hyperparameters = {
        field.name
        for field in dataclasses.fields(config)
        if not field.metadata.get("static") and field.name != "env_params"
    }
    assert len(jax.tree.leaves(config)) == len(hyperparameters)
    assert len(hyperparameters) >= (8 if name in ON_POLICY else 7)
    jax.eval_shape(lambda config: config.agent().train(KEY), config)


@pytest.mark.table
@pytest.mark.parametrize("name", AGENTS)
def test_an_update_keeps_shapes_and_dtypes(name):
    """Or a loop over updates would be refused."""
    agent = small_config(name, normalize_observations=True).agent()
    state = jax.eval_shape(agent.init, KEY)
    after, metrics = jax.eval_shape(agent.update, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert all(x.shape == () for x in metrics.values())
