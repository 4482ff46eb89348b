"""Environments of brax, and of packages with brax's interface.

The wrappers of brax itself lose the last observation of an episode and do not accept typed keys.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError, check_choice, check_number
from trustjax.envs.arguments import check_arguments, coerce_like
from trustjax.envs.environment import Environment, EnvParams, EnvState, Observation, Step
from trustjax.envs.third_party import building, default_promotion, import_extra, strip_weak_types

OWN_ARGUMENTS = ("max_steps_in_episode", "action_repeat", "fresh_resets")
_BACKENDS = ("generalized", "positional", "spring", "mjx")


def names() -> tuple[str, ...]:
    """Names of brax's environments, including those that were registered with it."""
    return tuple(_package()._envs)


# What the wrappers with these words in the names of their classes do, in brax and other packages.
_REFUSED_WRAPPERS = {
    "AutoReset": "loses the final observations of episodes",
    "EpisodeWrapper": "ends episodes at its time limit as if they had terminated",
    "VmapWrapper": "steps many environments at once",
    "GymnaxToBrax": "loses the final observations of episodes",
}


class BraxParams(NamedTuple):
    """The parameters of an environment that may differ between calls.

    Attributes:
      max_steps_in_episode: Time limit of an episode, in steps of the agent, >= 1.
    """

    max_steps_in_episode: jax.typing.ArrayLike = 1000


class BraxState(NamedTuple):
    """The state of an environment.

    Attributes:
      now: Current state of brax.
      first: Parts of the start state to which a new episode returns; {} if each episode draws its
        own.
      time: Steps of the agent since the start of the episode, int32 [].
    """

    now: Any
    first: dict[str, Any]
    time: jax.Array


class Brax(Environment):
    """An environment with brax's interface.

    Until an episode ends, the results are those of brax's EpisodeWrapper. There are three
    differences:

    - `max_steps_in_episode` counts steps of the agent, as everywhere in this package; brax's
      episode_length counts steps of the simulation, which are `action_repeat` times as many.
    - If an episode terminates during the repeats of an action, it ends there. Brax simulates the
      remaining repeats, adds their rewards, and forgets the end if the last state is a valid one.
    - Every episode has a start state of its own, unless `fresh_resets` is False: brax's wrappers
      return to the state in which an environment began, so that few environments are trained from
      few start states.

    Observations are float [n]; if an environment has several, the one named "state" is used.
    `info["metrics"]` holds the metrics of brax's state.

    Args:
      name: Name in brax, such as "hopper"; with `env`, the name to give to it.
      env: Environment with brax's interface that is used in place of the named one.
      max_steps_in_episode: Time limit in steps of the agent, >= 1.
      action_repeat: Steps of the simulation for one step of the agent, >= 1; their rewards are
        summed.
      fresh_resets: True: every episode starts from a completely new state, at the cost of a reset
        in every step. None: the same in `step` alone, while agents let `draw_start` draw a new
        start state every 32 steps, which costs little and gives every episode of at least 32 steps
        a start of its own. False, as in brax: every episode starts from the first state of its
        environment. With a drawn or first state the physics and the observation return to it, and
        the state's `info`, in which environments of MuJoCo Playground store a random key, stays as
        it is.
      **kwargs: Arguments of brax's environment, such as `backend`: "generalized", "positional",
        "spring" or "mjx".

    Raises:
      ValueError: A number is out of range, the environment does not take an argument, it has
        several observations without one named "state", or it is in a wrapper that restarts, limits
        or batches episodes, such as brax's AutoResetWrapper, EpisodeWrapper and VmapWrapper.
    """

    def __init__(
        self,
        name: str,
        /,
        *,
        env: Any = None,
        max_steps_in_episode: int = 1000,
        action_repeat: int = 1,
        fresh_resets: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Builds the environment."""
        if fresh_resets is not None:
            coerce_like("fresh_resets", fresh_resets, False)
        for key, value in (
            ("max_steps_in_episode", max_steps_in_episode),
            ("action_repeat", action_repeat),
        ):
            check_number(key, coerce_like(key, value, 1), at_least=1)
        self.name = name if env is not None else f"brax:{name}"
        if env is None:
            env = _build(name, kwargs)
        _check_wrappers(env)
        self.default_params = BraxParams(max_steps_in_episode)
        self.num_actions = None
        self.action_low = -np.ones(env.action_size, np.float32)
        self.action_high = np.ones(env.action_size, np.float32)
        self.unwrapped, self._repeats = env, action_repeat
        self.draws_starts, self._returns = fresh_resets is None, fresh_resets is False
        # Compiled, because some environments modify the dicts of the state that they are given.
        self._reset = jax.jit(lambda key: strip_weak_types(env.reset(key)))
        self._simulate = jax.jit(self._repeat)
        with default_promotion():
            state = jax.eval_shape(self._reset, jax.random.PRNGKey(0))
        if isinstance(state.obs, dict) and "state" not in state.obs:
            raise ValueError(
                f'{self.name} must have one observation, or one named "state"; '
                f"got {', '.join(sorted(state.obs))}"
            )
        self.observation_shape = tuple(_seen(state.obs).shape)
        self._returning = [
            part for part in ("pipeline_state", "data", "obs") if hasattr(state, part)
        ]

    def reset(self, key: jax.Array, params: EnvParams = None) -> tuple[Observation, EnvState]:
        """See `Environment`."""
        del params
        with default_promotion():
            now = self._reset(_old_style(key))
            first = self._start_of(now) if self._returns else {}
            return _float(_seen(now.obs)), BraxState(now, first, jnp.zeros([], jnp.int32))

    def draw_start(self, key: jax.Array, state: EnvState, params: EnvParams = None) -> EnvState:
        """See `Environment`."""
        del params
        with default_promotion():
            return state._replace(first=self._start_of(self._reset(_old_style(key))))

    def step(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams = None
    ) -> Step:
        """See `Environment`."""
        limit = (self.default_params if params is None else params).max_steps_in_episode
        with default_promotion():
            then, reward = self._simulate(state.now, action)
            time = state.time + 1
            terminated = then.done.astype(bool)
            truncated = (time >= limit) & ~terminated
            ended = terminated | truncated
            # `vmap` turns a conditional reset into a select, so that its cost arises in every step.
            if not state.first:
                now = _where(ended, self._reset(_old_style(key)), then)
            else:
                now = then.replace(
                    **{
                        part: _where(ended, first, getattr(then, part))
                        for part, first in state.first.items()
                    }
                )
            time = jnp.where(ended, jnp.zeros_like(time), time)
            info = {"final_observation": _float(_seen(then.obs)), "metrics": then.metrics}
            return (
                _float(_seen(now.obs)),
                BraxState(now, state.first, time),
                _float(reward),
                terminated,
                truncated,
                info,
            )

    def _start_of(self, now: Any) -> dict[str, Any]:
        """The parts of a state of brax to which later episodes return."""
        return {part: getattr(now, part) for part in self._returning}

    def _repeat(self, now: Any, action: jax.Array) -> tuple[Any, jax.Array]:
        """The state after all repeats of an action, or at the end of the episode before.

        Also returns the sum of the rewards until then, float [].
        """

        def repeat(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
            now, total = carry
            then = strip_weak_types(self.unwrapped.step(now, action))
            alive = now.done == 0
            total = total + jnp.where(alive, then.reward, jnp.zeros_like(then.reward))
            return (_where(alive, then, now), total), None

        # The last step of the previous episode must not stop the first one of the next.
        now = now.replace(done=jnp.zeros_like(now.done))
        if self._repeats == 1:
            now = strip_weak_types(self.unwrapped.step(now, action))
            return now, now.reward
        return jax.lax.scan(repeat, (now, jnp.zeros_like(now.reward)), length=self._repeats)[0]


def _check_wrappers(env: Any) -> None:
    """Raises ValueError for an environment in a wrapper that changes how its episodes end."""
    within = env
    while within is not None:
        for kind in type(within).__mro__:
            for word, what in _REFUSED_WRAPPERS.items():
                if word in kind.__name__:
                    raise FieldError(
                        "env",
                        f"not be wrapped in {kind.__name__}, which {what}",
                        repr(env),
                        advice="take that wrapper off: Brax(..., max_steps_in_episode=, "
                        "action_repeat=) and the agents do its work",
                    )
        # The wrappers of brax and of MuJoCo Playground keep what they wrap in `env`, those of
        # gymnax in `_env`. Through `getattr` each would show the attributes of the inner ones too.
        own = getattr(within, "__dict__", {})
        within = own.get("env", own.get("_env"))


def _build(name: str, kwargs: dict[str, Any]) -> Any:
    package = _package()
    kind = package._envs[name]
    # Constructors pass their keyword arguments on to those of their base classes.
    takes = {
        parameter.name
        for each in getattr(kind, "__mro__", (kind,))
        for parameter in inspect.signature(each).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    } - {"sys"}
    check_arguments(f"brax:{name}", kwargs, [*OWN_ARGUMENTS, *sorted(takes)])
    if "backend" in kwargs:
        check_choice("backend", kwargs["backend"], _BACKENDS)
    try:
        with building():
            return package.get_environment(name, **kwargs)
    except ValueError as error:
        raise ValueError(f"brax:{name} cannot be built with {kwargs}: {error}") from error


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _seen(observation: Any) -> Any:
    return observation["state"] if isinstance(observation, dict) else observation


def _float(array: jax.Array) -> jax.Array:
    return jnp.asarray(array, jnp.result_type(float))


def _old_style(key: jax.Array) -> jax.Array:
    """`key` as a uint32 array for JAX's default generator, which is the kind that brax splits."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    default = jax.random.key(0)
    if key.dtype == default.dtype:
        return jax.random.key_data(key)
    return jax.random.bits(key, jax.random.key_data(default).shape, jnp.uint32)


def _package() -> Any:
    return import_extra("brax.envs", install='"trustjax[rl]"')
