"""What an agent says of an environment object that does not do what `Environment` promises."""

import dataclasses

import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from trustjax.agents import ppo
from trustjax.envs import Environment

SMALL = {"num_envs": 2, "num_steps": 2, "total_steps": 4, "num_minibatches": 1, "hidden": (2,)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class BraxState:
    obs: jax.Array
    reward: jax.Array
    done: jax.Array


class Walk(Environment):
    """Good; one part of its results may be changed."""

    default_params = {"max_steps_in_episode": 5}  # noqa: RUF012
    observation_shape = (1,)
    num_actions = 2

    def __init__(self, *, reset=lambda x: x, step=lambda x: x, **attributes):
        self.change_reset, self.change_step = reset, step
        for name, value in attributes.items():
            setattr(self, name, value)

    def reset(self, key, params=None):
        state = {"place": jnp.zeros([]), "time": jnp.zeros([], jnp.int32)}
        return self.change_reset((jnp.zeros(1), state))

    def step(self, key, state, action, params=None):
        params = self.default_params if params is None else params
        state = {"place": state["place"] + 2 * action - 1, "time": state["time"] + 1}
        seen, ended = state["place"][None], state["place"] > 3
        truncated = (state["time"] >= params["max_steps_in_episode"]) & ~ended
        info = {"final_observation": seen}
        return self.change_step((seen, state, jnp.zeros([]), ended, truncated, info))


def part(index, change):
    """A change of one of the results."""
    return lambda x: (*x[:index], change(x[index]), *x[index + 1 :])


WRONG = {
    "gymnax's five": (
        {"step": lambda x: (*x[:3], x[3] | x[4], x[5])},
        r"env\.step must return \(observation, state, reward, terminated, truncated, info\), "
        r"got 5 values; trustjax\.envs\.EpisodicEnvironment",
    ),
    "four": ({"step": lambda x: x[:4]}, r"env\.step must return .*, got 4 values; .*Episodic"),
    "brax's state": (
        {"reset": lambda x: BraxState(x[0], jnp.zeros([]), jnp.zeros([]))},
        r"env\.reset must return \(observation, state\), got BraxState; .*brax\.Brax",
    ),
    "brax's step": (
        {"step": lambda x: BraxState(x[0], x[2], x[3])},
        r"env\.step must return .*, got BraxState; .*brax\.Brax",
    ),
    "gymnasium's reset": (
        {"reset": lambda x: x[0]},
        r"env\.reset must return \(observation, state\), got ",
    ),
    "no final": (
        {"step": part(5, lambda x: {"other": 1})},
        r"env\.step\.info must be a dict with final_observation.*got \['other'\]; .*Episodic",
    ),
    "no info": ({"step": part(5, lambda x: None)}, r"env\.step\.info must .* got NoneType"),
    "float end": (
        {"step": part(3, lambda x: x.astype(float))},
        r"env\.step\.terminated must be bool \[\], got float32 \[\]",
    ),
    "float limit": (
        {"step": part(4, lambda x: x.astype(float))},
        r"env\.step\.truncated must be bool \[\], got float32 \[\]",
    ),
    "end's shape": (
        {"step": part(3, lambda x: x[None])},
        r"env\.step\.terminated must be bool \[\], got bool \[1\]",
    ),
    "reward's shape": (
        {"step": part(2, lambda x: x[None])},
        r"env\.step\.reward must be one number, float \[\], got float32 \[1\]",
    ),
    "reward's dtype": ({"step": part(2, lambda x: x > 0)}, r"env\.step\.reward must .* got bool"),
    "observation's shape": (
        {"step": part(0, lambda x: jnp.zeros(2))},
        r"env\.step\.observation must be float32 \[1\], as in env\.reset, got float32 \[2\]",
    ),
    "observation's dtype": (
        {"step": part(0, lambda x: x.astype(int))},
        r"env\.step\.observation must be float32 \[1\], as in env\.reset, got int32 \[1\]",
    ),
    "observation's structure": (
        {"step": part(0, lambda x: {"x": x})},
        r"env\.step\.observation must have the structure .* got {'x': '\*'}",
    ),
    "final's shape": (
        {"step": part(5, lambda x: {"final_observation": jnp.zeros([])})},
        r"env\.step\.info\['final_observation'\] must be float32 \[1\], .* got float32 \[\]",
    ),
    "state's dtype": (
        {"step": part(1, lambda x: x | {"place": jnp.int32(0)})},
        r"env\.step\.state\['place'\] must be float32 \[\], as in env\.reset, got int32 \[\]",
    ),
    "state's structure": (
        {"step": part(1, lambda x: x | {"more": jnp.zeros([])})},
        r"env\.step\.state must have the structure .*env\.reset.* got .*'more': '\*'",
    ),
    "weak state": (
        {"reset": part(1, lambda x: x | {"place": 0.0})},
        r"env\.reset\.state\['place'\] must not be weakly typed.* got a weak float32 \[\]; give",
    ),
    "weak state later": (
        {"step": part(1, lambda x: x | {"time": 3})},
        r"env\.step\.state\['time'\] must not be weakly typed",
    ),
    "text": (
        {"reset": part(1, lambda x: x | {"name": "walk"})},
        r"env\.reset must return pytrees of arrays alone, got .*str",
    ),
    "its shape": (
        {"observation_shape": (2,)},
        r"env\.observation_shape must be \(1,\), as in env\.reset, got \(2,\)",
    ),
    "no actions": ({"num_actions": None}, r"env must have either discrete or continuous actions"),
    "both actions": (
        {"action_low": -np.ones(1), "action_high": np.ones(1)},
        r"env must have either discrete or continuous actions",
    ),
    "one bound": (
        {"num_actions": None, "action_low": -np.ones(1)},
        r"env must have either discrete .* both action_low and action_high",
    ),
    "number as bound": (
        {"num_actions": None, "action_low": -1.0, "action_high": 1.0},
        r"env\.action_low and env\.action_high must be arrays, float \[d\], got -1\.0 and 1\.0",
    ),
    "lists as bounds": (
        {"num_actions": None, "action_low": [-1.0], "action_high": [1.0]},
        r"env\.action_low and env\.action_high must be arrays, float \[d\], got \[-1\.0\] and \[1",
    ),
    "bounds of two shapes": (
        {"num_actions": None, "action_low": np.zeros(1), "action_high": np.ones(2)},
        r"env\.action_low and env\.action_high must be arrays, float \[d\], got array",
    ),
    "swapped bounds": (
        {"num_actions": None, "action_low": np.ones(1), "action_high": -np.ones(1)},
        r"env\.action_low must be below env\.action_high, \[-1\.\], got \[1\.\]",
    ),
    "zero actions": ({"num_actions": 0}, r"env\.num_actions must be an int >= 1, .* got 0"),
    "no numbers": ({"num_actions": ()}, r"env\.num_actions must be an int >= 1, .* got \(\)"),
    "a float": ({"num_actions": 2.0}, r"env\.num_actions must be an int >= 1, .* got 2\.0"),
    "an array": (
        {"num_actions": np.array([2, 3])},
        r"env\.num_actions must be an int >= 1, or a tuple of them, got array\(\[2, 3\]\)",
    ),
    "a frozen dict": (
        {"reset": part(0, lambda x: FrozenDict(x=x)), "observation_shape": FrozenDict(x=(1,))},
        r"env\.reset\.observation must be an array or a dict of arrays, got FrozenDict",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results(name):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ppo.Config(env=Walk(**changes), **SMALL).agent()


def test_a_good_one_passes():
    config = ppo.Config(env=Walk(), **SMALL)
    config.agent()
    limits = jnp.array([3, 4])  # traced parameters pass
    seen = jax.vmap(
        lambda limit: (
            dataclasses.replace(config, env_params={"max_steps_in_episode": limit})
            .agent()
            .init(jax.random.key(0))
            .runner.observation
        )
    )(limits)
    assert seen.shape == (2, 2, 1)


def test_numbers_of_numpy():
    """As in gymnasium's spaces; the network has Python's, which are saved."""
    actor = ppo.Config(env=Walk(num_actions=np.int64(2)), **SMALL).agent().actor
    assert type(actor.num_actions) is int


def test_parameters():
    for env in (Walk(), "probe:both"):
        with pytest.raises(ValueError, match=r"env_params must have the structure of .* got {'l"):
            ppo.Config(env=env, env_params={"limit": 3}, **SMALL).agent()
    seen = []
    env = Walk()
    env.step = lambda key, state, action, params: (
        seen.append(params) or Walk.step(env, key, state, action, params)
    )
    ppo.Config(env=env, env_params={"max_steps_in_episode": 7}, **SMALL).agent()
    assert seen == [{"max_steps_in_episode": 7}]


class Brax:
    action_size = observation_size = 1


STRANGERS = {
    "gymnasium": (lambda: gymnasium.make("CartPole-v1"), r"got .*; write .*gymnasium\.Gymnasium\("),
    "class": (lambda: Walk, r"got .*Walk.*; give an object of the class"),
    "gymnax": (lambda: gymnax.make("CartPole-v1")[0], r'got .*CartPole.*; .*env="gymnax:'),
    "brax": (Brax, r"got .*Brax.*; write trustjax\.envs\.brax\.Brax"),
    "none": (lambda: None, "got .*NoneType.*; subclass"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_no_environment(name):
    make, message = STRANGERS[name]
    with pytest.raises(ValueError, match=f"env must be the name of an env.* {message}"):
        ppo.Config(env=make(), **SMALL).agent()
