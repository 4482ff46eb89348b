"""Probes: their values by hand and by playing them; what tells the faults of an agent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rolling import check_interface, rollout

from trustjax.envs import make, names
from trustjax.envs.probe import Probe

# Observations and their values at discount 1/2, by hand.
VALUES = {
    "constant": ([[1]], [1]),
    "observation": ([[1], [-1]], [1, -1]),
    "delayed": ([[0], [1]], [1 / 2, 1]),
    "action": ([[1]], [1]),
    "both": ([[1], [-1]], [1, 1]),
    "continuous": ([[1]], [1]),
    "time_limit": ([[1]], [2]),
    "final_observation": ([[1], [-1]], [2 / 3, -2 / 3]),
    "memory": ([[1, 0], [-1, 0], [0, 1], [0, 2], [0, 3]], [1 / 8, 1 / 8, 1 / 4, 1 / 2, 1]),
}
MATTERS = ("action", "both", "continuous", "memory")  # what one does


def best(name):
    if name == "continuous":
        return lambda t, state: jnp.array([0.5])
    if name in ("both", "memory"):
        return lambda t, state: (state.sign > 0).astype(jnp.int32)
    return lambda t, state: jnp.int32(1)


def worse(name):
    if name == "continuous":
        return lambda t, state: jnp.array([-0.5])
    return lambda t, state: 1 - best(name)(t, state)


def returns(found, discount):
    """Discounted rewards to the end of the episode or of the rollout."""
    result = np.zeros(len(found.reward))
    after = 0.0
    for t in reversed(range(len(result))):
        after = found.reward[t] + discount * after * ~found.terminated[t]
        result[t] = after
    return result


def test_the_table_is_complete():
    assert set(VALUES) == set(names("probe"))


@pytest.mark.parametrize("name", VALUES)
def test_values_by_hand(name):
    observations, values = VALUES[name]
    env = make(f"probe:{name}")
    np.testing.assert_allclose(env.value(jnp.array(observations), 0.5), values, rtol=1e-6)
    # Any leading axes.
    assert env.value(jnp.zeros((2, 3, *env.observation_shape)), 0.5).shape == (2, 3)


@pytest.mark.table
@pytest.mark.parametrize("name", VALUES)
def test_values_by_playing(name):
    """The limit is far away: nothing is cut, and what comes after the rollout is worth 0.7^40."""
    env = make(f"probe:{name}?max_steps_in_episode=1000")
    found = rollout(env, best(name), 60)
    assert not found.truncated.any()
    played = returns(found, 0.7)[:20]
    np.testing.assert_allclose(played, env.value(found.before, 0.7)[:20], atol=1e-5)
    ends = name not in ("time_limit", "final_observation")
    assert found.terminated.any() == ends
    if name in MATTERS:
        other = returns(rollout(env, worse(name), 60), 0.7)[:20]
        assert (other < played - 0.01).all()


@pytest.mark.parametrize("name", ["time_limit", "final_observation"])
@pytest.mark.parametrize("limit", [1, 5])
def test_what_a_time_limit_cuts(name, limit):
    env = make(f"probe:{name}", max_steps_in_episode=limit)
    found = rollout(env, best(name), 12)
    np.testing.assert_array_equal(found.truncated, np.arange(1, 13) % limit == 0)
    values = env.value(found.before, 0.9)
    # V(x) = r + discount V(final observation), at every step.
    np.testing.assert_allclose(found.reward + 0.9 * env.value(found.final, 0.9), values, rtol=1e-5)
    wrong = found.reward + 0.9 * env.value(found.after, 0.9)
    cut = found.truncated
    if name == "final_observation":
        assert (np.abs(wrong - values)[cut] > 0.9).all()
    assert (np.abs(found.reward - values)[cut] > 0.4).all()  # as if the episode had ended


def test_the_end_of_an_episode_wins_over_the_time_limit():
    found = rollout(make("probe:delayed?max_steps_in_episode=2"), best("delayed"), 4)
    np.testing.assert_array_equal(found.terminated, [0, 1, 0, 1])
    assert not found.truncated.any()
    np.testing.assert_array_equal(found.final, [[1], [2], [1], [2]])
    np.testing.assert_array_equal(found.after, [[1], [0], [1], [0]])


def test_limits_under_vmap():
    env = make("probe:time_limit")

    def cut(limit):
        params = env.default_params._replace(max_steps_in_episode=limit)
        return rollout_flags(env, params)

    def rollout_flags(env, params):
        def one(state, key):
            _, state, _, _, truncated, _ = env.step(key, state, jnp.int32(0), params)
            return state, truncated

        keys = jax.random.split(jax.random.key(0), 4)
        return jax.lax.scan(one, env.reset(keys[0], params)[1], keys)[1]

    np.testing.assert_array_equal(
        jax.vmap(cut)(jnp.array([1, 2, 3])), [[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]]
    )


@pytest.mark.parametrize("name", ["both", "memory"])
def test_both_signs_are_drawn(name):
    env = make(f"probe:{name}")
    seen, _ = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), 100))
    np.testing.assert_array_equal(np.unique(seen[:, 0]), [-1, 1])
    assert 30 < (seen[:, 0] > 0).sum() < 70
    found = rollout(env, best(name), 80)  # and anew in every episode
    starts = found.after[found.terminated, 0]
    np.testing.assert_array_equal(np.unique(starts), [-1, 1])


@pytest.mark.parametrize("name", ["delayed", "continuous", "memory"])
def test_interface(name, strict):
    check_interface(make(f"probe:{name}"))


def test_double_precision(x64):
    env = make("probe:final_observation")
    observation, state = env.reset(jax.random.PRNGKey(0))
    assert observation.dtype == jnp.float64
    observation, _, reward, *_ = env.step(jax.random.key(0), state, jnp.int32(0))
    assert observation.dtype == reward.dtype == jnp.float64
    np.testing.assert_allclose(env.value(jnp.ones(1), 0.9), 1 / 1.9, rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="name must be one of"):
        Probe("nothing")
    env = make("probe:memory")
    with pytest.raises(ValueError, match="discount must be <= 1"):
        env.value(jnp.zeros(2), 1.5)
    with pytest.raises(ValueError, match=r"observation must be \[..., 2\], got \(3,\)"):
        env.value(jnp.zeros(3), 0.5)
