"""A trained policy, which acts, can be evaluated, and is saved to one file."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_number
from trustjax.agents._policy_file import Contents, read, write
from trustjax.agents._policy_network import Own
from trustjax.agents.rollout import prepared_for, reset_envs, to_env_action
from trustjax.agents.running_statistics import normalized_observations
from trustjax.envs import Environment, as_environment
from trustjax.models.actor_critic import Actor, Carry, default_float, initial_carry

_STATIC = {"static": True}


MOST_STEPS = 10_000  # of an evaluation in an environment without a known time limit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of episodes, which can be unpacked: `returns, lengths = agent.evaluate(...)`.

    Attributes:
      returns: Undiscounted sums of the rewards, float [episode].
      lengths: Numbers of steps, int32 [episode].
      finished: Whether the episode came to its end, bool [episode]. Where it did not, `max_steps`
        cut it off, and its return and length are those until then.
    """

    returns: jax.Array
    lengths: jax.Array
    finished: jax.Array

    def __iter__(self) -> Iterator[jax.Array]:
        """The returns and the lengths."""
        return iter((self.returns, self.lengths))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """A policy of an environment; a pytree whose leaves are its parameters and statistics.

    Attributes:
      variables: Variables of the network.
      statistics: Statistics that normalise the observations, a dict for each part of a dict; None
        where they are not normalised.
      clip_observations: Largest absolute value of a normalised observation, > 0.
      actor: The network; static.
      env: The environment, or its name; static.
      env_params: Parameters of the environment; None for its defaults.
    """

    variables: Any
    statistics: Any
    clip_observations: ArrayLike
    actor: Actor = dataclasses.field(metadata=_STATIC)
    env: str | Environment = dataclasses.field(metadata=_STATIC)
    env_params: Any = None

    @property
    def environment(self) -> Environment:
        """The environment itself."""
        return as_environment(self.env)

    def initial_carry(self, batch_shape: Sequence[int] = ()) -> Carry:
        """The carry at the start of an episode; () for a policy without a GRU."""
        return initial_carry(self.actor, batch_shape)

    def act(
        self,
        observation: Any,
        key: jax.Array,
        carry: Carry | None = None,
        *,
        deterministic: bool = False,
    ) -> tuple[jax.Array, Carry]:
        """Actions for observations as the environment returns them.

        Args:
          observation: Observations [..., *observation_shape] with any batch axes, the same for all
            parts.
          key: Random key for the sample.
          carry: Carry that the last call returned; None at the start of an episode.
          deterministic: Whether to take the mode of the distribution in place of a sample.

        Returns:
          The actions, int32 [...] or float [..., d] within the bounds, and the next carry.

        Raises:
          ValueError: The observation does not have the shape of the environment.
        """
        env = self.environment
        batch_shape = _batch_shape(observation, env.observation_shape)
        if carry is None:
            carry = self.initial_carry(batch_shape)
        # Networks of one's own see one batch axis, as in training.
        rows, carry = jax.tree.map(
            lambda x: x.reshape(math.prod(batch_shape), *x.shape[len(batch_shape) :]),
            (observation, carry),
        )
        rows = prepared_for(self.actor)(rows)
        rows = normalized_observations(rows, self.statistics, self.clip_observations)
        distribution, carry = jax.tree.map(
            lambda x: x.reshape(*batch_shape, *x.shape[1:]),
            self.actor.apply(self.variables, rows, carry),
        )
        action = distribution.mode() if deterministic else distribution.sample(key)
        squashed = getattr(self.actor, "squashed", False)
        return to_env_action(env, action, squashed=squashed), carry

    def evaluate(
        self,
        key: jax.Array,
        num_episodes: int,
        *,
        deterministic: bool = True,
        env_params: Any = None,
        max_steps: ArrayLike | None = None,
    ) -> Evaluation:
        """Plays `num_episodes` episodes to their ends, each in an environment of its own.

        Args:
          key: Random key of the episodes.
          num_episodes: Number of episodes, >= 1.
          deterministic: Whether to take the mode of the distribution in place of a sample.
          env_params: Parameters of the environment; None for those of the policy.
          max_steps: Steps after which an episode that has not ended is cut off, >= 1. None for the
            time limit of the environment, `max_steps_in_episode` of its parameters, or for 10,000
            if there is none or it is infinite.

        Raises:
          ValueError: `num_episodes` or `max_steps` is below 1.
        """
        check_number("num_episodes", num_episodes, at_least=1)
        check_number("max_steps", max_steps, at_least=1)
        env = self.environment
        env_params = self.env_params if env_params is None else env_params
        if max_steps is None:
            max_steps = _time_limit(env.default_params if env_params is None else env_params)
        key_reset, key_play = jax.random.split(key)
        observation, env_state = reset_envs(
            env, env_params, jax.random.split(key_reset, num_episodes)
        )
        done = jnp.zeros(num_episodes, bool)
        found = Evaluation(jnp.zeros(num_episodes), jnp.zeros(num_episodes, jnp.int32), done)
        start = _Play(
            observation, env_state, self.initial_carry((num_episodes,)), found,
            jnp.zeros([], jnp.int32),
        )  # fmt: skip

        def step(play: _Play) -> _Play:
            key_act, key_step = jax.random.split(jax.random.fold_in(key_play, play.step))
            action, carry = self.act(
                play.observation, key_act, play.carry, deterministic=deterministic
            )
            observation, env_state, reward, terminated, truncated, _ = jax.vmap(
                env.step, (0, 0, 0, None)
            )(jax.random.split(key_step, num_episodes), play.env_state, action, env_params)
            reward = jnp.mean(reward.reshape(num_episodes, -1), 1)  # of several agents the mean
            before, done = play.found, play.found.finished
            found = Evaluation(
                before.returns + jnp.where(done, 0, reward).astype(before.returns.dtype),
                before.lengths + (~done).astype(before.lengths.dtype),
                done | terminated | truncated,
            )
            return _Play(observation, env_state, carry, found, play.step + 1)

        def goes_on(play: _Play) -> jax.Array:
            return (play.step < max_steps) & ~jnp.all(play.found.finished)

        return jax.lax.while_loop(goes_on, step, start).found

    def __repr__(self) -> str:
        """A summary in one line, without the weights."""
        number = sum(jnp.size(leaf) for leaf in jax.tree.leaves(self.variables))
        layers = ""
        if isinstance(self.actor, Actor):
            layers = f"hidden={self.actor.hidden}, gru_size={self.actor.gru_size}, "
        observations = "as they are" if self.statistics is None else "normalised"
        return f"Policy(env={self.env!r}, {layers}{number} parameters, observations {observations})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to one .npz file without pickles, completely or not at all.

        Of an environment object, a network or an actor of one's own it holds the name of the class
        alone; `load_policy` takes the object. Raises ValueError if `env_params` are not built like
        the environment's default parameters, or if `load_policy` would refuse the file, as for
        weights that are not finite or for a batch of policies.
        """
        contents = Contents(
            self.env, self.actor, self.variables, self.statistics,
            jnp.asarray(self.clip_observations, default_float()), self.env_params,
        )  # fmt: skip
        write(Path(path), contents)


def load_policy(
    path: str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    env: str | Environment | None = None,
    actor: Any = None,
) -> Policy:
    """Reads a file that `Policy.save` wrote; an untrusted file is safe, as no code in it is run.

    The names, shapes and dtypes in the file must be those of its network in its environment, and
    the weights must be finite. A file that fails these checks is refused before any memory that its
    headers ask for is allocated.

    Args:
      path: The file.
      network: The `network` of the Config; needed if, and only if, there was one.
      env: Environment in place of the one that the file names, or the object that it cannot hold.
      actor: The actor of an algorithm of one's own that has another one than `Actor`.

    Raises:
      ValueError: The file holds no such policy; the message names the file and the field in one
        line. Or an object is missing that the file cannot hold; the message names the argument.
      OSError: The file does not exist or cannot be read.
      ModuleNotFoundError: The package of the environment is not installed.
    """
    contents = read(path, Own(env, network, actor))
    return Policy(
        contents.variables, contents.statistics, contents.clip_observations, contents.actor,
        contents.env, contents.env_params,
    )  # fmt: skip


def _batch_shape(observation: Any, shape: Any) -> tuple[int, ...]:
    """The batch axes of an observation; raises ValueError unless its parts have these shapes."""
    wanted = jax.tree_util.tree_leaves_with_path(shape, is_leaf=lambda x: isinstance(x, tuple))
    found = jax.tree_util.tree_leaves_with_path(observation)
    if [path for path, _ in wanted] != [path for path, _ in found]:
        got = jax.tree.map(jnp.shape, observation)
        raise FieldError("observation", f"have the parts of {shape}", got)
    batch_shapes: set[tuple[int, ...]] = set()
    for (path, leaf), (_, own) in zip(found, wanted, strict=True):
        batch = leaf.shape[: leaf.ndim - len(own)]
        batch_shapes.add(batch)
        if leaf.shape != (*batch, *own) or len(batch_shapes) > 1:
            name = "observation" + jax.tree_util.keystr(path)
            raise FieldError(name, f"be [..., *{own}]", leaf.shape)
    return batch_shapes.pop()


class _Play(NamedTuple):
    """The episodes in progress; those that are finished go on without being counted."""

    observation: Any
    env_state: Any
    carry: Carry
    found: Evaluation
    step: jax.Array


def _time_limit(env_params: Any) -> ArrayLike:
    """The time limit in the parameters of an environment, which may be a dict or an object."""
    name = "max_steps_in_episode"
    limit: ArrayLike | None = (
        env_params.get(name) if isinstance(env_params, Mapping) else getattr(env_params, name, None)
    )
    if limit is None:
        return MOST_STEPS
    return jnp.where(jnp.isinf(limit), MOST_STEPS, limit)  # infinity means no limit
