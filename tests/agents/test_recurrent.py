"""Policies and values with a memory, whose episodes are longer than a rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.agents import MDPO, PPO, TRPO, mdpo, ppo, trpo

KEY = jax.random.key(0)
SEEDS = 3
AGENTS = {"ppo": (PPO, ppo.Config), "trpo": (TRPO, trpo.Config), "mdpo": (MDPO, mdpo.Config)}


# ---- a task that needs it: the sign of the first step is asked for at the fourth


@functools.cache
def returns_of(gru_size):
    """Of the best actions after training, [seed, episode]; rollouts cut episodes in two."""
    agent = PPO(
        ppo.Config(
            env="probe:memory", num_envs=32, num_steps=6, total_steps=60 * 192, hidden=(16,),
            gru_size=gru_size, learning_rate=0.02, num_minibatches=2, num_epochs=4,
        )
    )  # fmt: skip

    def returns(key):
        state, _ = agent.train(key)
        return agent.evaluate(state, KEY, 64).returns

    return jax.jit(jax.vmap(returns))(jax.random.split(KEY, SEEDS))


def test_memory_solves_what_needs_it():
    """Seen to fail where the carry is zeroed in every step of `unroll`, or of the rollout."""
    np.testing.assert_array_equal(returns_of(8), np.ones((SEEDS, 64)))


def test_without_memory_it_is_a_guess():
    assert np.all(np.abs(np.mean(returns_of(None), 1)) < 0.5)


# ---- the rollout and learning see the same memory


class Looking:
    """An algorithm that learns nothing and tells what it would learn from."""

    def learn(self, state, batch, key):
        del key
        new = self.distributions(state.params["actor"], batch)
        found = {
            "log_prob": new.log_prob(batch.action) - batch.log_prob,
            "kl": new.kl_divergence(batch.old),
            "value_gap": self.values(state.params["critic"], batch) - batch.value,
            "value": batch.value,
            "returns": batch.returns,
            "starts": batch.starts,
        }
        return state.params, state.learner, found


class LookingPPO(Looking, PPO):
    pass


def looked(**options):
    config = {
        "env": "probe:memory", "num_envs": 4, "num_steps": 3, "total_steps": 5 * 12,
        "hidden": (4,), "num_minibatches": 2, "normalize_observations": True,
    }  # fmt: skip
    agent = LookingPPO(ppo.Config(**config | options))
    return jax.jit(agent.train)(KEY)[1]


@pytest.mark.parametrize("gru_size", [4, None])
@pytest.mark.parametrize("env", ["probe:memory", "probe:continuous"])
def test_learning_recomputes_the_rollout(env, gru_size):
    """At the old parameters the ratio is 1 and the values are the old ones, over five rollouts."""
    found = looked(env=env, gru_size=gru_size)
    for name in ("log_prob", "kl", "value_gap"):
        assert found[name].shape == (5, 3, 4)
        np.testing.assert_allclose(found[name], 0, atol=1e-5)
    assert np.std(found["value"]) > 0.01


@pytest.mark.parametrize("gru_size", [4, None])
def test_next_value_is_that_of_the_next_step(gru_size):
    """Of the memory after the step: with lambda 0, R_t = gamma V(s_{t+1}) where nothing is paid."""
    found = looked(gru_size=gru_size, lambda_=0.0, discount=0.9, normalize_observations=False)
    goes_on = ~np.array(found["starts"])[:, 1:]
    assert np.any(goes_on)
    assert not np.all(goes_on)
    expected = 0.9 * np.array(found["value"])[:, 1:]
    np.testing.assert_allclose(np.array(found["returns"])[:, :-1][goes_on], expected[goes_on], 1e-4)


def test_memory_goes_on_over_rollouts():
    """Two rollouts of three steps are one of six."""

    def observed(num_steps, total):
        config = ppo.Config(
            env="probe:memory", num_envs=4, num_steps=num_steps, total_steps=total, hidden=(4,),
            gru_size=4, num_minibatches=2,
        )  # fmt: skip
        agent = LookingPPO(config)
        state, history = jax.jit(agent.train)(KEY)
        return agent, state, history

    agent, state, _ = observed(3, 24)
    assert np.any(np.abs(state.runner.actor_carry) > 0.01)
    # Environments are in their third step: none has started anew, so the carry counts.
    assert not np.any(state.runner.starts)
    without = state._replace(
        runner=state.runner._replace(
            actor_carry=jnp.zeros_like(state.runner.actor_carry),
            critic_carry=jnp.zeros_like(state.runner.critic_carry),
        )
    )
    update = jax.jit(agent.update)
    (_, with_memory), (_, blank) = update(state), update(without)
    assert np.max(np.abs(with_memory["value"][0] - blank["value"][0])) > 1e-3


@pytest.mark.parametrize("algorithm", ["trpo", "mdpo"])
def test_other_algorithms_train_with_a_memory(algorithm):
    make, config = AGENTS[algorithm]
    agent = make(
        config(
            env="probe:memory", num_envs=4, num_steps=6, total_steps=2 * 24, hidden=(4,),
            gru_size=4, num_minibatches=2, num_epochs=1,
        )
    )  # fmt: skip
    state, history = jax.jit(agent.train)(KEY)
    assert np.all(history["ratio/distance"] > 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, history)))
    if algorithm == "trpo":
        assert np.all(history["kl/old_new"] <= 0.01 * (1 + 1e-4))
