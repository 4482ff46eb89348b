"""What the check says of multi-agent environments that do not do what they must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.spaces import Box, Discrete

from trustjax.agents import ppo
from trustjax.envs import MultiAgentEnvironment
from trustjax.envs.checking import check_multi_agent_environment


class Pair(MultiAgentEnvironment):
    """Two agents who see the time and earn their actions; one part of a step may be changed."""

    name = "pair"
    agents = ["left", "right"]  # noqa: RUF012
    observation_spaces = {"left": Box(0.0, 9.0, (1,)), "right": Box(0.0, 9.0, (2,))}  # noqa: RUF012
    action_spaces = {"left": Discrete(2), "right": Box(0.0, 1.0, ())}  # noqa: RUF012

    def __init__(self, change=lambda x: x):
        self.change = change

    def reset(self, key):
        time = jnp.zeros([], jnp.int32)
        return self.get_obs(time), time

    def get_obs(self, state):
        now = state.astype(jnp.float32)
        return {
            "left": now[None], "right": jnp.stack([now, -now]),
            "world_state": self.get_world_state(state),
        }  # fmt: skip

    def get_world_state(self, state):
        return state.astype(jnp.float32)[None]

    def step_env(self, key, state, actions):
        state = state + 1
        done = state >= 3
        rewards = {agent: jnp.asarray(actions[agent], jnp.float32) for agent in self.agents}
        ended = jnp.broadcast_to(done, 2)
        infos = {"truncated": ended, "terminated": ~ended & False, "energy": jnp.ones(2)}
        dones = dict.fromkeys([*self.agents, "__all__"], done)
        result = {
            "observations": self.get_obs(state), "state": state, "rewards": rewards,
            "dones": dones, "infos": infos,
        }  # fmt: skip
        return tuple(self.change(result).values())


def without(part, key):
    return lambda x: x | {part: {name: leaf for name, leaf in x[part].items() if name != key}}


def other(part, key, value):
    return lambda x: x | {part: x[part] | {key: value}}


def test_a_good_one():
    env = Pair()
    check_multi_agent_environment(env)
    assert env.num_agents == 2
    assert env.agent_classes == {"agents": ["left", "right"]}
    assert repr(env) == "Pair('pair')"
    assert env.adjacency(jnp.int32(0)).tolist() == [[True, True], [True, True]]
    assert {a: x.shape for a, x in env.get_avail_actions(0).items()} == {"left": (2,), "right": ()}


def test_new_episodes():
    """The last observation comes in infos, and a new episode may start in a given state."""
    env, actions = Pair(), {"left": jnp.int32(1), "right": jnp.float32(0.5)}
    step = jax.jit(env.step)
    seen, state, rewards, dones, infos = step(jax.random.key(0), jnp.int32(2), actions)
    assert state == seen["left"][0] == 0
    assert infos["final_observation"]["left"][0] == 3
    assert dones["__all__"]
    assert [float(reward) for reward in rewards.values()] == [1, 0.5]
    seen, state, *_ = step(jax.random.key(0), jnp.int32(2), actions, jnp.int32(1))
    np.testing.assert_array_equal(seen["right"], [1, -1])
    assert state == 1
    seen, state, *_ = step(jax.random.key(0), jnp.int32(0), actions, jnp.int32(2))
    assert state == seen["world_state"][0] == 1


WRONG = {
    "a missing agent": (without("rewards", "left"), r"step_env.rewards must be a dict with the k"),
    "no end of all": (without("dones", "__all__"), r"step_env.dones must be a dict with the keys"),
    "no world": (without("observations", "world_state"), "env.step_env.observations must have the"),
    "unknown ends": (without("infos", "truncated"), "truncated.* must be bool .*, got none"),
    "numbers": (other("infos", "terminated", jnp.zeros(2)), r"infos\['terminated'\] must be bool"),
    "a scalar": (other("infos", "energy", jnp.ones([])), r"energy.* must have the shape \(2,\)"),
    "a vector": (other("rewards", "left", jnp.ones(1)), r"rewards\['left'\] must be one number"),
    "a float": (other("dones", "right", jnp.ones([])), r"dones\['right'\] must be bool .*, got f"),
    "a dtype": (lambda x: x | {"state": jnp.float32(0)}, "env.step_env.state must be int32"),
    "a weak type": (lambda x: x | {"state": jnp.asarray(1)}, "step_env.state must not be weakly"),
    "four values": (
        lambda x: {key: x[key] for key in list(x)[:4]}, "env.step_env must return .*, got 4 values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        check_multi_agent_environment(Pair(change))


@pytest.mark.parametrize("env", [Pair(), "trustjax:MultiUAV"], ids=["object", "name"])
def test_algorithms_for_one_agent_refuse_it(env):
    with pytest.raises(ValueError, match=r"env must be the name .*; it has several agents"):
        ppo.Config(env=env).agent()
