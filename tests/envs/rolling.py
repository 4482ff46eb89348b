"""Rollouts, and an environment with brax's interface that counts; shared by these tests."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class Rollout(NamedTuple):
    """Of every step, [time, ...]."""

    before: Any  # observation
    after: Any
    reward: Any
    terminated: Any
    truncated: Any
    final: Any


def rollout(env, policy, length, key=None, params=None):
    """`length` steps with the actions policy(t, state), in one scan."""

    def roll_out(key, params):
        def one(carry, xs):
            observation, state = carry
            key, t = xs
            new, state, reward, terminated, truncated, info = env.step(
                key, state, policy(t, state), params
            )
            final = info["final_observation"]
            return (new, state), Rollout(observation, new, reward, terminated, truncated, final)

        keys = jax.random.split(jax.random.fold_in(key, 1), length)
        return jax.lax.scan(one, env.reset(key, params), (keys, jnp.arange(length)))[1]

    return jax.tree.map(
        np.asarray, jax.jit(roll_out)(jax.random.key(0) if key is None else key, params)
    )


def still(env):
    """An action of `env`."""
    if env.num_actions is None:
        return jnp.zeros(env.action_low.shape)
    return jnp.zeros([], jnp.int32)


def check_interface(env):
    """Shapes and dtypes of a step; a scan is traced once, its state has no weak type."""
    traces = []

    @jax.jit
    def three_steps(key, carry):
        def one(carry, key):
            traces.append(key)
            _, state = carry
            observation, state, *rest, info = env.step(key, state, still(env))
            return (observation, state), (*rest, info["final_observation"])

        return jax.lax.scan(one, carry, jax.random.split(key, 3))

    carry = jax.jit(env.reset)(jax.random.key(0))
    for _ in range(2):
        carry, (reward, terminated, truncated, final) = three_steps(jax.random.key(1), carry)
    assert len(traces) == 1
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(carry))
    assert carry[0].shape == env.observation_shape
    assert final.shape == (3, *env.observation_shape)
    assert reward.shape == terminated.shape == truncated.shape == (3,)
    assert carry[0].dtype == final.dtype == reward.dtype == jnp.float32
    assert terminated.dtype == truncated.dtype == bool


@flax.struct.dataclass
class CountingState:
    """Fields of the states of MuJoCo Playground; brax has pipeline_state in place of data."""

    data: Any
    obs: Any
    reward: Any
    done: Any
    metrics: Any
    info: Any


class Counting:
    """Sees (steps since the start, a number drawn at the start); rewards are the former.

    Terminates at the step `length`; with `recovers`, the step after that is fine again.
    """

    action_size = 1

    def __init__(self, length=100, *, recovers=False, keys=("state", "privileged")):
        self.length, self.recovers, self.keys = length, recovers, keys

    def _observe(self, data):
        seen = jnp.stack(list(data))
        return dict.fromkeys(self.keys, seen) if self.keys else seen

    def reset(self, rng):
        assert rng.dtype == jnp.uint32, "brax wants keys of the old style"
        data = (jnp.zeros([]), jax.random.uniform(rng))
        zero = 0.0 * jnp.ones([])
        info = {"rng": rng, "steps": jnp.zeros([])}
        return CountingState(data, self._observe(data), zero, zero, {"count": zero}, info)

    def step(self, state, action):
        assert action.shape == (1,)
        time, start = state.data[0] + 1, state.data[1]
        state.info["steps"] = state.info["steps"] + 1  # in place, as some environments do
        ended = time == self.length if self.recovers else time >= self.length
        return state.replace(
            data=(time, start),
            obs=self._observe((time, start)),
            reward=time,
            done=ended.astype(jnp.float32),
            metrics={"count": time},
        )
