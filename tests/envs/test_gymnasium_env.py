"""Environments of gymnasium, stepped on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trustjax.agents import ppo
from trustjax.envs import make
from trustjax.envs.gymnasium import Gymnasium

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")
spaces = gymnasium.spaces


def test_the_same_as_gymnasium():
    """Two environments, for 40 steps to the right: three or four episodes of each."""
    env = make("gymnasium:CartPole-v1", max_steps_in_episode=9)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def play(keys):
        def step(state, _):
            seen, state, *rest = jax.vmap(env.step)(keys, state, jnp.ones(2, jnp.int32))
            return state, (seen, *rest)

        first, state = jax.vmap(env.reset)(keys)
        return first, jax.lax.scan(step, state, length=40)[1]

    first, steps = play(keys)
    ends = []
    for index, key in enumerate(keys):
        own = gymnasium.make("CartPole-v1", max_episode_steps=9)
        np.testing.assert_array_equal(first[index], own.reset(seed=int(jax.random.bits(key)))[0])
        for time in range(40):
            final, reward, terminated, truncated, _ = own.step(1)
            seen = own.reset()[0] if terminated or truncated else final
            found = [x[time, index] for x in steps[:4]]
            for a, b in zip(
                found, (seen, reward, terminated, truncated and not terminated), strict=True
            ):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(steps[4]["final_observation"][time, index], final)
            ends.append((terminated, truncated))
    assert (True, False) in ends
    assert (False, True) in ends


class Mixed(gymnasium.Env):
    """Pixels and a choice out of three, which is numbered from 1."""

    observation_space = spaces.Dict(
        {"pixels": spaces.Box(0, 255, (2, 2, 1), np.uint8), "choice": spaces.Discrete(3, start=1)}
    )
    action_space = spaces.MultiDiscrete([2, 3], start=[0, 5])

    def see(self, choice):
        return {"pixels": np.full((2, 2, 1), choice, np.uint8), "choice": np.int64(choice)}

    def reset(self, *, seed=None, options=None):
        return self.see(2), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.int64))
        return self.see(int(action[1]) - 4), float(action[0]), False, True, {}


def test_spaces():
    env = Gymnasium("mixed", make=Mixed)
    assert env.observation_shape == {"pixels": (2, 2, 1), "choice": (3,)}
    assert env.num_actions == (2, 3)
    seen, state = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(seen["choice"], [0, 1, 0])
    assert seen["pixels"].dtype == jnp.uint8
    _, _, reward, _, truncated, info = env.step(jax.random.key(0), state, jnp.array([1, 2]))
    np.testing.assert_array_equal(info["final_observation"]["choice"], [0, 0, 1])
    np.testing.assert_array_equal(info["final_observation"]["pixels"].ravel(), [3] * 4)
    assert (float(reward), bool(truncated)) == (1.0, True)
    ppo.Config(env=env, num_envs=2, num_steps=2, total_steps=4, num_minibatches=1).agent()


def test_a_state_is_stepped_once(monkeypatch):
    env = Gymnasium("mixed", make=Mixed)
    _, state = env.reset(jax.random.key(0))
    step = lambda: env.step(jax.random.key(0), state, jnp.zeros(2, jnp.int32))
    step()
    with pytest.raises(Exception, match=r"environment 0 is not at step 0: a state of gymnasium"):
        jax.block_until_ready(step())
    monkeypatch.setattr("trustjax.envs.gymnasium.MOST_OPEN", 1)
    _, state = env.reset(jax.random.key(0))
    env.reset(jax.random.key(0))  # closes the one before
    with pytest.raises(Exception, match=r"environment 1 is not at step 0.* the last 1 of them"):
        jax.block_until_ready(step())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"action_space": spaces.Tuple([spaces.Discrete(2)])},
            r"env\.action_space must be Discrete, MultiDiscrete or a Box \[d\], got Tuple",
        ),
        (
            {"action_space": spaces.Box(-1, 1, (2, 2))},
            r"env\.action_space must be .* got Box",
        ),
        (
            {"observation_space": spaces.Dict({"words": spaces.Text(3)})},
            r"env\.observation_space\['words'\] must be a Box, .* got Text",
        ),
    ],
)
def test_other_spaces(change, message):
    with pytest.raises(ValueError, match=message):
        Gymnasium("other", make=type("Other", (Mixed,), change))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"gymnasium:CartPole-v1: .*unexpected.*'gravityy'"):
        make("gymnasium:CartPole-v1?gravityy=3")
    with pytest.raises(ValueError, match="max_steps_in_episode must be >= 1, got 0"):
        make("gymnasium:CartPole-v1?max_steps_in_episode=0")
    with pytest.raises(ValueError, match="make must not be given with a name"):
        make("gymnasium:CartPole-v1?make=print")
    with pytest.raises(ValueError, match="unknown environment of gymnasium"):
        make("gymnasium:GymV26Environment-v0?env_id=os:x")


class Counter(gymnasium.Env):
    """Counts to 3 in the one array that it returns at every step, as some simulators do."""

    observation_space = spaces.Box(0, 9, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.count = np.zeros(1, np.float32)

    def reset(self, *, seed=None, options=None):
        self.count[:] = 0
        return self.count, {}

    def step(self, action):
        self.count += 1
        return self.count, 1.0, False, bool(self.count[0] >= 3), {}


def test_the_last_observation_is_not_that_of_the_next_episode():
    env = Gymnasium("counter", make=Counter)
    seen, state = env.reset(jax.random.key(0))
    for final, after in ((1, 1), (2, 2), (3, 0)):
        seen, state, *_, info = env.step(jax.random.key(1), state, jnp.int32(0))
        assert (info["final_observation"][0], seen[0]) == (final, after)
