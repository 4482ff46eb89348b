"""The base class that makes an environment of plain steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rolling import check_interface, rollout

from trustjax.agents import ppo
from trustjax.envs import EpisodicEnvironment


class Walk(EpisodicEnvironment):
    """Starts at a random place, at most 1; a step to the left or right; ends at 3."""

    default_params = {"max_steps_in_episode": 4}  # noqa: RUF012
    num_actions = 2

    def reset_env(self, key, params):
        place = jax.random.randint(key, (), -1, 2).astype(float)
        return place[None], place

    def step_env(self, key, state, action, params):
        place = state + 2 * action - 1
        return place[None], place, jnp.where(place >= 3, 1.0, 0.0), place >= 3


def test_interface():
    check_interface(Walk())
    assert (Walk().name, Walk().observation_shape) == ("Walk", (1,))
    assert repr(Walk()) == "Walk('Walk')"


def test_ends():
    """Every step by hand: to the right it terminates, to the left the limit truncates it."""
    right = rollout(Walk(), lambda t, state: jnp.int32(1), 12)
    place, time = right.before[0, 0], 0
    for t in range(12):
        place, time = place + 1, time + 1
        assert right.final[t] == place
        assert right.terminated[t] == (place >= 3)
        assert right.truncated[t] == (time >= 4 and place < 3)
        assert right.reward[t] == (place >= 3)
        if right.terminated[t] or right.truncated[t]:
            place, time = right.after[t, 0], 0
            assert place in (-1, 0, 1)
        assert right.after[t] == place
    left = rollout(Walk(), lambda t, state: jnp.int32(0), 12)
    np.testing.assert_array_equal(left.truncated, [False, False, False, True] * 3)
    assert not left.terminated.any()


def test_every_episode_has_a_start_of_its_own():
    """As it would not have, if the key of the reset were the one of the first."""
    left = rollout(Walk(), lambda t, state: jnp.int32(0), 80)
    assert set(left.after[left.truncated][:, 0]) == {-1, 0, 1}


@pytest.mark.parametrize("limit", [2, 6, math.inf])
def test_limits(limit):
    params = {"max_steps_in_episode": limit}
    left = rollout(Walk(), lambda t, state: jnp.int32(0), 12, params=params)
    expected = [limit != math.inf and (t + 1) % limit == 0 for t in range(12)]
    np.testing.assert_array_equal(left.truncated, expected)


def test_default_limit():
    class Plain(Walk):
        default_params = EpisodicEnvironment.default_params

    assert Plain().default_params.max_steps_in_episode == 1000
    check_interface(Plain())


class Careless(Walk):
    """Python numbers, of which weak types would come."""

    def reset_env(self, key, params):
        return {"place": 0.0, "time": 0}, (0.0, 0)

    def step_env(self, key, state, action, params):
        place, time = state[0] + 2.0 * action - 1, state[1] + 1
        return {"place": place, "time": time}, (place, time), 1, False


def test_python_numbers():
    env = Careless()
    assert env.observation_shape == {"place": (), "time": ()}
    observation, state = jax.eval_shape(env.reset, jax.random.key(0))
    step = jax.eval_shape(env.step, jax.random.key(0), state, jnp.int32(0))
    leaves = jax.tree.leaves((observation, state, step))
    assert not any(leaf.weak_type for leaf in leaves)
    assert step[2].dtype == jnp.float32
    assert step[:2] == (observation, state)


WRONG = {
    "state": (
        lambda self, *_: (jnp.zeros(1), jnp.zeros(2), 0.0, False),
        r"env\.step_env\.state must be float32 \[\], as in env\.reset_env, got float32 \[2\]",
    ),
    "dtype": (
        lambda self, *_: (jnp.zeros(1), jnp.int32(0), 0.0, False),
        r"env\.step_env\.state must be float32 \[\], as in env\.reset_env, got int32 \[\]",
    ),
    "observation": (
        lambda self, *_: (jnp.zeros(3), jnp.zeros([]), 0.0, False),
        r"env\.step_env\.observation must be float32 \[1\], .* got float32 \[3\]",
    ),
    "flag": (
        lambda self, *_: (jnp.zeros(1), jnp.zeros([]), 0.0, 0.0),
        r"env\.step_env\.terminated must be bool \[\], got float32 \[\]; write `done > 0`",
    ),
    "reward": (
        lambda self, *_: (jnp.zeros(1), jnp.zeros([]), jnp.zeros(1), False),
        r"env\.step_env\.reward must be one number",
    ),
    "values": (
        lambda self, *_: (jnp.zeros(1), jnp.zeros([]), 0.0, False, {}),
        r"env\.step_env must return \(observation, state, reward, terminated\), got 5 values",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_steps(name):
    step_env, message = WRONG[name]
    wrong = type("Wrong", (Walk,), {"step_env": step_env})
    with pytest.raises(ValueError, match=message):
        ppo.Config(env=wrong()).agent()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gravity": 1.0}, r"env\.default_params must have max_steps_in_episode, got {'gravity'"),
        ({"max_steps_in_episode": 0}, r"max_steps_in_episode must be >= 1, got 0"),
    ],
)
def test_wrong_limits(params, message):
    wrong = type("Wrong", (Walk,), {"default_params": params})
    with pytest.raises(ValueError, match=message):
        ppo.Config(env=wrong()).agent()


def test_without_a_limit_an_evaluation_still_ends():
    """Infinity means no limit, of which 10,000 steps are played."""

    class Stay(EpisodicEnvironment):
        default_params = {"max_steps_in_episode": math.inf}  # noqa: RUF012
        num_actions = 2

        def reset_env(self, key, params):
            return jnp.zeros(1), jnp.zeros(())

        def step_env(self, key, state, action, params):
            return state[None], state, 1.0, state > 0

    agent = ppo.Config(env=Stay(), hidden=()).agent()
    found = agent.policy(agent.init(jax.random.key(0))).evaluate(jax.random.key(1), 1)
    assert (found.lengths[0], found.returns[0], found.finished[0]) == (10_000, 10_000, False)
