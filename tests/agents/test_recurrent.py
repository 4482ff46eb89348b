"""Policies and values with a memory, whose episodes are longer than a rollout."""

import functools

import jax
import numpy as np
import pytest

from trustjax.agents import PPO, TRPO, ppo, trpo

KEY = jax.random.key(0)
SEEDS = 5


# ---- a task that needs it: the sign of the first step is asked for at the fourth


@functools.cache
def returns_of(gru_size):
    """Of the best actions after training, [seed, episode]; rollouts cut episodes in two."""
    agent = PPO(
        ppo.Config(
            env="probe:memory", num_envs=32, num_steps=6, total_steps=60 * 192, hidden=(16,),
            gru_size=gru_size, learning_rate=0.02, num_minibatches=2, num_epochs=4,
            normalize_observations=False, normalize_rewards=False,
        )
    )  # fmt: skip

    def returns(key):
        state, _ = agent.train(key)
        return agent.evaluate(state, KEY, 64).returns

    return jax.jit(jax.vmap(returns))(jax.random.split(KEY, SEEDS))


@pytest.mark.slow
def test_memory_solves_what_needs_it():
    """Seen to fail where the carry is zeroed in every step of `unroll`, or of the rollout.

    One seed in a hundred stays at a guess; which one is a matter of rounding. Hence the median.
    """
    assert np.median(np.mean(returns_of(8), 1)) == 1


@pytest.mark.slow
def test_without_memory_it_is_a_guess():
    assert np.all(np.abs(np.mean(returns_of(None), 1)) < 0.5)


# ---- the rollout and learning see the same memory


class Looking(PPO):
    """Learns nothing and tells what it would learn from."""

    def learn(self, state, batch, key):
        del key
        new = self.distributions(state.params["actor"], batch)
        found = {
            "log_ratio": new.log_prob(batch.action) - batch.log_prob,
            "kl": new.kl_divergence(batch.old),
            "value_gap": self.values(state.params["critic"], batch) - batch.value,
            "old": batch.old[0],
            "value": batch.value,
            "returns": batch.returns,
            "is_first": batch.is_first,
        }
        return state.params, state.learner, found


def looked(**options):
    """What five rollouts of three steps hold."""
    config = {
        "env": "probe:memory", "num_envs": 4, "num_steps": 3, "total_steps": 60, "hidden": (4,),
        "gru_size": 4, "num_minibatches": 2, "lambda_": 0.0, "discount": 0.9,
        "normalize_observations": False, "normalize_rewards": False,
    }  # fmt: skip
    found = jax.jit(Looking(ppo.Config(**config | options)).train)(KEY)[1]
    return {name: np.array(x) for name, x in found.items()}


@functools.cache
def normalized():
    return looked(normalize_observations=True)


@pytest.mark.parametrize("memory", [True, False])
def test_learning_recomputes_the_rollout(memory):
    """At the old parameters the ratio is 1 and the values are the old ones."""
    options = {"env": "probe:continuous", "gru_size": None, "normalize_observations": True}
    found = normalized() if memory else looked(**options)
    for name in ("log_ratio", "kl", "value_gap"):
        assert found[name].shape == (5, 3, 4)
        np.testing.assert_allclose(found[name], 0, atol=1e-5)
    assert np.std(found["value"]) > 0.01


def test_next_value_is_that_of_the_next_step():
    """Of the memory after the step: with lambda 0, R_t = gamma V(s_{t+1}) where nothing is paid."""
    found = normalized()
    goes_on = ~found["is_first"][:, 1:]
    assert 0 < np.mean(goes_on) < 1
    expected = 0.9 * found["value"][:, 1:]
    np.testing.assert_allclose(found["returns"][:, :-1][goes_on], expected[goes_on], rtol=1e-4)


@pytest.mark.slow
def test_memory_goes_on_over_rollouts():
    """The fourth step is the first of the second rollout, or one within a longer first."""
    short, long = looked(total_steps=2 * 12), looked(num_steps=4, total_steps=16)
    for name in ("old", "value"):
        assert np.ptp(long[name][0, 3], 0).max() > 1e-4  # environments differ in what they saw
        np.testing.assert_allclose(short[name][1, 0], long[name][0, 3], atol=1e-6)


@pytest.mark.slow
def test_trpo_differentiates_through_memory():
    config = trpo.Config(
        env="probe:memory", num_envs=4, num_steps=6, total_steps=24, hidden=(4,), gru_size=4,
        num_minibatches=2, num_epochs=1,
    )  # fmt: skip
    _, history = jax.jit(TRPO(config).train)(KEY)
    assert 0.005 < history["kl/old_new"][0] <= 0.01 * (1 + 1e-4)
