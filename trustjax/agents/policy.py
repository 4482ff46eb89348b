"""A trained policy, which acts, can be evaluated, and is saved to one file."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from trustjax._checks import FieldError, check_number
from trustjax.agents._policy_file import Contents, read, write
from trustjax.agents.rollout import flatten_observations, to_env_action
from trustjax.agents.running_statistics import Statistics, normalized
from trustjax.envs import Environment, as_environment
from trustjax.models.actor_critic import Actor, Carry, default_float, initial_carry

_STATIC = {"static": True}


class Evaluation(NamedTuple):
    """The results of whole episodes.

    Attributes:
      returns: Undiscounted sums of the rewards, float [episode].
      lengths: Numbers of steps, int32 [episode].
    """

    returns: jax.Array
    lengths: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """A policy of an environment; a pytree whose leaves are its parameters and statistics.

    Attributes:
      variables: Variables of the network.
      statistics: Statistics that normalise the observations; None if they are not normalised.
      clip_observations: Largest absolute value of a normalised observation, > 0.
      actor: The network; static.
      env: The environment, or its name; static.
    """

    variables: Any
    statistics: Statistics | None
    clip_observations: ArrayLike
    actor: Actor = dataclasses.field(metadata=_STATIC)
    env: str | Environment = dataclasses.field(metadata=_STATIC)

    @property
    def environment(self) -> Environment:
        """The environment itself."""
        return as_environment(self.env)

    def initial_carry(self, batch_shape: Sequence[int] = ()) -> Carry:
        """The carry at the start of an episode; () for a policy without a GRU."""
        return initial_carry(self.actor, batch_shape)

    def act(
        self,
        observation: jax.Array,
        key: jax.Array,
        carry: Carry | None = None,
        *,
        deterministic: bool = False,
    ) -> tuple[jax.Array, Carry]:
        """Actions for observations as the environment returns them.

        Args:
          observation: Observations [..., *observation_shape] with any batch axes.
          key: Random key for the sample.
          carry: Carry that the last call returned; None at the start of an episode.
          deterministic: Whether to take the mode of the distribution in place of a sample.

        Returns:
          The actions, int32 [...] or float [..., d] within the bounds, and the next carry.

        Raises:
          ValueError: The observation does not have the shape of the environment.
        """
        env = self.environment
        shape = env.observation_shape
        batch_shape = observation.shape[: observation.ndim - len(shape)]
        if observation.shape != (*batch_shape, *shape):
            raise FieldError("observation", f"be [..., *{shape}]", observation.shape)
        features = flatten_observations(observation.reshape(math.prod(batch_shape), *shape))
        features = features.reshape(*batch_shape, math.prod(shape))
        if carry is None:
            carry = self.initial_carry(batch_shape)
        features = normalized(features, self.statistics, self.clip_observations)
        distribution, carry = self.actor.apply(self.variables, features, carry)
        action = distribution.mode() if deterministic else distribution.sample(key)
        return to_env_action(env, action, squashed=self.actor.squashed), carry

    def evaluate(
        self,
        key: jax.Array,
        num_episodes: int,
        *,
        deterministic: bool = True,
        env_params: Any = None,
    ) -> Evaluation:
        """Plays `num_episodes` episodes to their ends, each in an environment of its own.

        Raises ValueError if `num_episodes` < 1.
        """
        check_number("num_episodes", num_episodes, at_least=1)
        env = self.environment
        key_reset, key_play = jax.random.split(key)
        observation, env_state = jax.vmap(env.reset, (0, None))(
            jax.random.split(key_reset, num_episodes), env_params
        )
        zeros = jnp.zeros(num_episodes)
        start = _Play(
            observation, env_state, self.initial_carry((num_episodes,)),
            Evaluation(zeros, jnp.zeros(num_episodes, jnp.int32)),
            jnp.zeros(num_episodes, bool), jnp.zeros([], jnp.int32),
        )  # fmt: skip

        def step(play: _Play) -> _Play:
            key_act, key_step = jax.random.split(jax.random.fold_in(key_play, play.step))
            action, carry = self.act(
                play.observation, key_act, play.carry, deterministic=deterministic
            )
            observation, env_state, reward, terminated, truncated, _ = jax.vmap(
                env.step, (0, 0, 0, None)
            )(jax.random.split(key_step, num_episodes), play.env_state, action, env_params)
            returns, lengths = play.found
            # The step that ends an episode still counts: `play.done` is from before it.
            found = Evaluation(
                returns + jnp.where(play.done, 0, reward).astype(returns.dtype),
                lengths + (~play.done).astype(lengths.dtype),
            )
            done = play.done | terminated | truncated
            return _Play(observation, env_state, carry, found, done, play.step + 1)

        return jax.lax.while_loop(lambda play: ~jnp.all(play.done), step, start).found

    def __repr__(self) -> str:
        """A summary in one line, without the weights."""
        number = sum(jnp.size(leaf) for leaf in jax.tree.leaves(self.variables))
        observations = "as they are" if self.statistics is None else "normalised"
        return (
            f"Policy(env={self.env!r}, hidden={self.actor.hidden}, "
            f"gru_size={self.actor.gru_size}, {number} parameters, observations {observations})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to one .npz file without pickles, completely or not at all.

        Raises ValueError if the environment was not given by name, or if `load_policy` would refuse
        the file, as for weights that are not finite or for a batch of policies.
        """
        if isinstance(self.env, Environment):
            raise FieldError("env", "be a name to be saved", repr(self.env))
        contents = Contents(
            self.env, self.actor, self.variables, self.statistics,
            jnp.asarray(self.clip_observations, default_float()),
        )  # fmt: skip
        write(Path(path), contents)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads a file that `Policy.save` wrote; an untrusted file is safe, as no code in it is run.

    The names, shapes and dtypes in the file must be those of its network in its environment, and
    the weights must be finite. A file that fails these checks is refused before any memory that its
    headers ask for is allocated.

    Raises:
      ValueError: The file holds no such policy; the message names the file and the field in one
        line.
      OSError: The file does not exist or cannot be read.
      ModuleNotFoundError: The package of the environment is not installed.
    """
    env, actor, variables, statistics, clip = read(path)
    return Policy(variables, statistics, clip, actor, env)


class _Play(NamedTuple):
    """The episodes in progress; those that are `done` go on without being counted."""

    observation: jax.Array
    env_state: Any
    carry: Carry
    found: Evaluation
    done: jax.Array
    step: jax.Array
