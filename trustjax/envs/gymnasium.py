"""Environments of gymnasium, https://gymnasium.farama.org, stepped on the host.

They are slow: every step leaves the compiled program for Python, one environment after the other.
An environment that is written in JAX is tens of times as fast; see docs/adapters.md.
"""

import collections
import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from trustjax._checks import FieldError, check_count
from trustjax.envs.environment import Environment, EnvParams, EnvState, Observation, Step
from trustjax.envs.third_party import building, import_extra

MOST_OPEN = 1024  # environments on the host; the one that was not used for the longest is closed


class GymnasiumState(NamedTuple):
    """What the compiled program knows of an environment on the host.

    Attributes:
      number: Number of the environment on the host, int32 [].
      time: Steps since it was made, int32 [], which orders the calls.
    """

    number: jax.Array
    time: jax.Array


def names() -> tuple[str, ...]:
    """Names of gymnasium's environments; raises ModuleNotFoundError if it is not installed."""
    # Those that begin with "GymV" make an environment of gym, from any module that is named.
    return tuple(name for name in _package().registry if not name.startswith("GymV"))


class Gymnasium(Environment):
    """An environment of gymnasium, or of one's own with gymnasium's interface.

    Each `reset` makes an environment on the host, seeded with the key, and a state refers to it. A
    state can be stepped once, and only in the process that made it: such a training cannot be
    resumed from a checkpoint. Seeds under `jax.vmap` train together, but are evaluated one by one.
    At the end of an episode the environment is reset without a seed. The time limit is gymnasium's,
    so that there are no parameters.

    Observations are boxes, discrete ones, which become one-hot, or dicts of these; floating ones
    are cast to JAX's default float. Actions are discrete, multi-discrete, or boxes [d].

    Args:
      name: Name in gymnasium, such as "CartPole-v1", or any name together with `make`.
      make: Function that makes an environment, such as its class; None for `gymnasium.make`.
      **kwargs: Arguments of the function; `max_steps_in_episode` of `gymnasium.make` is the time
        limit.

    Raises:
      ValueError: A space is of another kind, or an argument is unknown; the message names it.
      ModuleNotFoundError: Gymnasium is not installed.
    """

    on_host = True

    def __init__(
        self, name: str, /, *, make: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        package = _package()
        self.name = f"gymnasium:{name}"
        if make is None:
            limit = kwargs.pop("max_steps_in_episode", None)
            check_count("max_steps_in_episode", limit, at_least=1)
            make, kwargs = package.make, {"max_episode_steps": limit} | kwargs | {"id": name}
        self._host = _Host(make, kwargs)
        try:
            with building():
                env = make(**kwargs)
        except TypeError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self._observation_space = env.observation_space
        self._results = _described("env.observation_space", env.observation_space)
        self.observation_shape = jax.tree.map(lambda x: tuple(x.shape), self._results)
        spaces, actions = package.spaces, env.action_space
        self._first_action = getattr(actions, "start", 0)
        if isinstance(actions, spaces.Discrete):
            self.num_actions = int(actions.n)
        elif isinstance(actions, spaces.MultiDiscrete) and actions.nvec.ndim == 1:
            self.num_actions = tuple(map(int, actions.nvec))
        elif isinstance(actions, spaces.Box) and len(actions.shape) == 1:
            self.action_low, self.action_high = (
                np.asarray(bound, np.float32) for bound in (actions.low, actions.high)
            )
        else:
            raise FieldError("env.action_space", "be Discrete, MultiDiscrete or a Box [d]", actions)
        env.close()

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """See `Environment`."""
        del params

        def call(seed: Any) -> tuple[Any, Any]:
            number, observation = self._host.reset(int(seed))
            return np.int32(number), self._converted(observation)

        shapes = jax.ShapeDtypeStruct((), jnp.int32), self._results
        number, observation = io_callback(call, shapes, jax.random.bits(key))
        return observation, GymnasiumState(number, jnp.zeros([], jnp.int32))

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`."""
        del key, params

        def call(number: Any, time: Any, action: Any) -> tuple[Any, ...]:
            action = np.asarray(action) + self._first_action
            observation, final, reward, *flags = self._host.step(int(number), int(time), action)
            seen, final = self._converted(observation), self._converted(final)
            return np.int32(time + 1), seen, final, np.float32(reward), *map(np.bool_, flags)

        integer, real, flag = (
            jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool_)
        )
        results = integer, self._results, self._results, real, flag, flag
        time, observation, final, reward, terminated, truncated = io_callback(
            call, results, *state, action
        )
        info = {"final_observation": final}
        after = GymnasiumState(state.number, time)
        return observation, after, reward, terminated, truncated & ~terminated, info

    def _converted(self, observation: Any) -> Any:
        return _converted(self._observation_space, self._results, observation)


class _Host:
    """The environments on the host, by number, and the steps that each has made."""

    def __init__(self, make: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.make, self.kwargs = make, kwargs
        self.envs: collections.OrderedDict[int, tuple[Any, int]] = collections.OrderedDict()
        self.numbers = itertools.count()
        self.lock = threading.Lock()

    def reset(self, seed: int) -> tuple[int, Any]:
        """The number and the first observation of a new environment."""
        with self.lock:
            env, number = self.make(**self.kwargs), next(self.numbers)
            observation, _ = env.reset(seed=seed)
            self.envs[number] = env, 0
            if len(self.envs) > MOST_OPEN:
                self.envs.popitem(last=False)[1][0].close()
        return number, observation

    def step(self, number: int, time: int, action: Any) -> tuple[Any, ...]:
        """The observations after and before a reset, the reward, and the two flags."""
        with self.lock:
            env, steps = self.envs.get(number, (None, -1))
            if env is None or steps != time:
                raise RuntimeError(
                    f"environment {number} is not at step {time}: a state of gymnasium can be "
                    f"stepped once, by the process that made it, while it is among the last "
                    f"{MOST_OPEN} of them"
                )
            final, reward, terminated, truncated, _ = env.step(action)
            final = copy.deepcopy(final)  # the environment may write the next one into its arrays
            observation = env.reset()[0] if terminated or truncated else final
            self.envs[number] = env, time + 1
            self.envs.move_to_end(number)
        return observation, final, reward, terminated, truncated


def _described(name: str, space: Any) -> Any:
    """The shapes and dtypes of the observations of a space."""
    spaces = _package().spaces
    if isinstance(space, spaces.Dict):
        return {key: _described(f"{name}[{key!r}]", part) for key, part in space.items()}
    if isinstance(space, spaces.Discrete):
        return jax.ShapeDtypeStruct((int(space.n),), jnp.result_type(float))
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        dtype = jnp.result_type(float) if np.issubdtype(space.dtype, np.floating) else space.dtype
        return jax.ShapeDtypeStruct(space.shape, jax.dtypes.canonicalize_dtype(dtype))
    raise FieldError(name, "be a Box, Discrete, MultiBinary or a Dict of them", space)


def _converted(space: Any, result: Any, observation: Any) -> Any:
    """An observation of a space, with the dtypes of `result`."""
    if isinstance(result, dict):
        return {key: _converted(space[key], part, observation[key]) for key, part in result.items()}
    if space.shape != result.shape:  # a discrete one
        return np.eye(int(space.n), dtype=result.dtype)[int(observation) - int(space.start)]
    return np.asarray(observation, result.dtype)


def _package() -> Any:
    return import_extra("gymnasium", install="'trustjax[gymnasium]'")
