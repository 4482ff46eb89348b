"""Checks of environments that are given as objects, before anything is compiled.

The environment's functions are traced once, without computing anything, and their results are
compared with the interface of `Environment`. An error names the result that is at fault, such as
"env.step.reward" or "env.step.state['place']".
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError
from trustjax.envs.environment import Environment, EnvParams, example_action
from trustjax.envs.multi_agent import MultiAgentEnvironment

_RESET = ("observation", "state")
_STEP = ("observation", "state", "reward", "terminated", "truncated", "info")
_MULTI_AGENT_STEP = ("observations", "state", "rewards", "dones", "infos")
_ADVICE = (
    "trustjax.envs.EpisodicEnvironment makes all of them from a plain step, and "
    "trustjax.envs.brax.Brax wraps an environment with brax's interface"
)


def check_environment(env: Environment, params: EnvParams = None) -> None:
    """Checks that resets and steps return what `Environment` says.

    Args:
      env: Environment object.
      params: Parameters to call it with, whose numbers may be traced; None for its defaults.

    Raises:
      ValueError: A result is missing, or has another structure, shape or dtype than it must have;
        the result is named.
    """
    _check_actions(env)
    check_params(env, params)
    if params is None:
        params = getattr(env, "default_params", None)
    key = jax.random.key(0)

    def reset(key: jax.Array) -> Any:
        return unpacked("env.reset", env.reset(key, params), _RESET, advice=_ADVICE)

    def step(key: jax.Array, state: Any) -> tuple[Any, ...]:
        result = env.step(key, state, example_action(env), params)
        *values, info = unpacked("env.step", result, _STEP, advice=_ADVICE)
        if not isinstance(info, Mapping) or "final_observation" not in info:
            raise FieldError(
                "env.step.info",
                "be a dict with final_observation, the observation before any reset",
                sorted(info) if isinstance(info, Mapping) else type(info).__name__,
                advice="trustjax.envs.EpisodicEnvironment adds it",
            )
        return *values, info["final_observation"]

    before, state = _results("env.reset", reset, key)
    shape = jax.tree.map(lambda x: tuple(x.shape), before)
    if getattr(env, "observation_shape", None) != shape:
        raise FieldError(
            "env.observation_shape",
            f"be {shape}, as in env.reset",
            getattr(env, "observation_shape", "none"),
        )
    _check_parts(env, before)
    result = _results("env.step", step, key, state)
    observation, next_state, reward, terminated, truncated, final_observation = result
    check_same("env.step.observation", observation, before, "env.reset")
    check_same("env.step.info['final_observation']", final_observation, before, "env.reset")
    check_same("env.step.state", next_state, state, "env.reset")
    _check_strong("env.reset.state", state)
    _check_strong("env.step.state", next_state)
    check_reward("env.step.reward", reward)
    check_flag("env.step.terminated", terminated)
    check_flag("env.step.truncated", truncated)


def check_multi_agent_environment(env: MultiAgentEnvironment) -> None:
    """Checks that resets and steps return what `MultiAgentEnvironment` says.

    Args:
      env: Environment object.

    Raises:
      ValueError: A result is missing, or has another structure, shape or dtype than it must have;
        the result is named.
    """
    key = jax.random.key(0)
    names = list(env.agents)
    actions = {
        agent: jnp.zeros(space.shape, space.dtype) for agent, space in env.action_spaces.items()
    }
    _check_keys("env.action_spaces", actions, names)
    _check_keys("env.observation_spaces", env.observation_spaces, names)

    def reset(key: jax.Array) -> Any:
        return unpacked("env.reset", env.reset(key), ("observations", "state"))

    before, state = _results("env.reset", reset, key)
    _check_keys("env.reset.observations", before, [*names, "world_state"])
    for agent in names:
        found, expected = before[agent].shape, env.observation_space(agent).shape
        if found != expected:
            where = f"env.reset.observations[{agent!r}]"
            raise FieldError(where, f"have the shape of its space, {expected}", found)
    if before["world_state"].ndim != 1:
        found = _described(before["world_state"])
        raise FieldError("env.reset.observations['world_state']", "be float [d]", found)
    _check_strong("env.reset.state", state)
    for call, function in (("env.step_env", env.step_env), ("env.step", env.step)):

        def step(key: jax.Array, state: Any, call: str = call, function: Any = function) -> Any:
            return unpacked(call, function(key, state, actions), _MULTI_AGENT_STEP)

        observations, after, rewards, dones, infos = _results(call, step, key, state)
        check_same(f"{call}.observations", observations, before, "env.reset")
        check_same(f"{call}.state", after, state, "env.reset")
        _check_strong(f"{call}.state", after)
        _check_keys(f"{call}.rewards", rewards, names)
        _check_keys(f"{call}.dones", dones, [*names, "__all__"])
        for agent, reward in rewards.items():
            check_reward(f"{call}.rewards[{agent!r}]", reward)
        for agent, done in dones.items():
            check_flag(f"{call}.dones[{agent!r}]", done)
        _check_infos(call, infos, len(names))
    check_same(
        "env.step.infos['final_observation']", infos["final_observation"], before, "env.reset"
    )


def _check_keys(name: str, found: Any, expected: list[str]) -> None:
    """Raises ValueError unless `found` is a dict with the keys `expected`, in any order."""
    keys = sorted(found) if isinstance(found, Mapping) else type(found).__name__
    if keys != sorted(expected):
        raise FieldError(name, f"be a dict with the keys {sorted(expected)}", keys)


def _check_infos(call: str, infos: Any, num_agents: int) -> None:
    """Raises ValueError unless `infos` say which kind an end is, and have an entry per agent."""
    for name in ("terminated", "truncated"):
        found = infos.get(name) if isinstance(infos, Mapping) else None
        if found is None or found.dtype != jnp.bool_:
            got = "none" if found is None else _described(found)
            raise FieldError(f"{call}.infos[{name!r}]", f"be bool [{num_agents}]", got)
    for name, leaf in infos.items():
        if name != "final_observation" and jnp.shape(leaf) != (num_agents,):
            raise FieldError(
                f"{call}.infos[{name!r}]", f"have the shape ({num_agents},)", jnp.shape(leaf)
            )


def check_params(env: Environment, params: EnvParams) -> None:
    """Raises ValueError unless `params` is None or has the structure of the defaults of `env`."""
    default = getattr(env, "default_params", None)
    structure: Any = jax.tree.structure(params)
    if params is not None and structure != jax.tree.structure(default):
        raise FieldError("env_params", f"have the structure of {default!r}", repr(params))


def unpacked(call: str, result: Any, names: tuple[str, ...], *, advice: str = "") -> Any:
    """The results of a call; raises ValueError unless they are a tuple with one for each name."""
    if isinstance(result, tuple | list) and len(result) == len(names):
        return result
    is_tuple = isinstance(result, tuple | list)
    got = f"{len(result)} values" if is_tuple else type(result).__name__
    raise FieldError(call, f"return ({', '.join(names)})", got, advice=advice)


def check_same(name: str, found: Any, expected: Any, source: str) -> None:
    """Raises ValueError unless both have the same structure, shapes and dtypes.

    `source` says where the expected one comes from. A leaf that differs is named.
    """
    structure: Any = jax.tree.structure(expected)
    if structure != jax.tree.structure(found):
        raise FieldError(
            name,
            f"have the structure that it has in {source}, {_stars(expected)}",
            _stars(found),
        )
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, leaf), expected_leaf in zip(leaves, jax.tree.leaves(expected), strict=True):
        described, required = _described(leaf), _described(expected_leaf)
        if described != required:
            where = name + jax.tree_util.keystr(path)
            raise FieldError(where, f"be {required}, as in {source}", described)


def check_reward(name: str, reward: Any) -> None:
    """Raises ValueError unless the reward is one real number."""
    is_real = jnp.issubdtype(jnp.result_type(reward), jnp.integer) or jnp.issubdtype(
        jnp.result_type(reward), jnp.floating
    )
    if jnp.shape(reward) or not is_real:
        raise FieldError(name, "be one number, float []", _described(reward))


def check_flag(name: str, flag: Any) -> None:
    """Raises ValueError unless the flag is bool []."""
    if jnp.shape(flag) or jnp.result_type(flag) != jnp.bool_:
        raise FieldError(name, "be bool []", _described(flag), advice="write `done > 0` for 0 or 1")


def _results(call: str, function: Callable[..., Any], *args: Any) -> Any:
    """The shapes and dtypes that a call returns."""
    try:
        return jax.eval_shape(function, *args)
    except TypeError as error:
        if "not a valid JAX type" not in str(error):
            raise
        raise FieldError(call, "return pytrees of arrays alone", str(error)) from error


def _check_strong(name: str, state: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.weak_type:
            raise FieldError(
                name + jax.tree_util.keystr(path),
                "not be weakly typed, or loops are compiled twice",
                f"a weak {_described(leaf)}",
                advice=f"give the dtype: jnp.asarray(x, jnp.{leaf.dtype})",
            )


def _check_actions(env: Environment) -> None:
    bounds = [bound for bound in (env.action_low, env.action_high) if bound is not None]
    if (env.num_actions is not None) == bool(bounds) or len(bounds) == 1:
        raise FieldError(
            "env",
            "have either discrete or continuous actions, that is num_actions or both action_low "
            "and action_high",
            env,
        )
    if env.num_actions is not None:
        several = isinstance(env.num_actions, tuple | list)
        numbers: Any = env.num_actions if several else [env.num_actions]
        if not numbers or not all(isinstance(n, int | np.integer) and n >= 1 for n in numbers):
            raise FieldError(
                "env.num_actions", "be an int >= 1, or a tuple of them", repr(env.num_actions)
            )
        return
    shapes = {getattr(bound, "shape", None) for bound in bounds}
    if len(shapes) > 1 or len(shapes.pop() or ()) != 1:
        raise FieldError(
            "env.action_low and env.action_high",
            "be arrays, float [d]",
            " and ".join(repr(bound) for bound in bounds),
        )
    if not np.all(np.asarray(bounds[0]) < np.asarray(bounds[1])):
        raise FieldError("env.action_low", f"be below env.action_high, {bounds[1]}", bounds[0])


def _check_parts(env: Environment, observation: Any) -> None:
    """Raises ValueError unless observations are arrays or dicts of them, with a fitting mask."""
    if not _has_dicts_alone(observation):
        raise FieldError("env.reset.observation", "be an array or a dict of arrays", observation)
    for path, leaf in jax.tree_util.tree_leaves_with_path(observation):
        where = "env.reset.observation" + jax.tree_util.keystr(path)
        if not all(isinstance(entry, jax.tree_util.DictKey) for entry in path):
            raise FieldError(where, "be an array or a dict of arrays", _stars(observation))
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_):
            raise FieldError(where, "be numbers or flags", _described(leaf))
    mask = observation.get("action_mask") if isinstance(observation, Mapping) else None
    if mask is None:
        return
    if env.num_actions is None:
        raise FieldError(
            "env.num_actions", "be given with an action_mask, which is for discrete actions", None
        )
    number = int(np.sum(env.num_actions))
    if mask.dtype != jnp.bool_ or mask.size != number:
        raise FieldError(
            "env.reset.observation['action_mask']", f"be bool [{number}]", _described(mask)
        )


def _has_dicts_alone(observation: Any) -> bool:
    """Whether there is no other mapping, such as a `FrozenDict`, which JAX takes for one too."""
    if isinstance(observation, dict):
        return all(map(_has_dicts_alone, observation.values()))
    return not isinstance(observation, Mapping)


def _described(x: Any) -> str:
    """The dtype and the shape of an array, such as "float32 [3, 2]"."""
    return f"{jnp.result_type(x)} {list(jnp.shape(x))}"


def _stars(tree: Any) -> Any:
    """The tree with a star for each array, which shows its structure."""
    return jax.tree.map(lambda _: "*", tree)
