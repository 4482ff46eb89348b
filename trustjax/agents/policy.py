"""A trained policy without what trained it: it acts, is evaluated, and is saved to one file."""

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
from trustjax.agents.rollout import flat, to_env_action
from trustjax.agents.running_statistics import Statistics, normalized
from trustjax.envs import Environment, make_once
from trustjax.models.actor_critic import Actor, Carry, default_float, initial_carry

_STATIC = {"static": True}


class Evaluation(NamedTuple):
    """Whole episodes.

    Attributes:
      returns: float [episode], sums of rewards.
      lengths: int32 [episode], steps.
    """

    returns: jax.Array
    lengths: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """A policy of an environment; a pytree whose leaves are its parameters and statistics.

    Attributes:
      variables: of the network.
      statistics: with which observations are normalised, or None.
      clip_observations: bound of normalised observations.
      actor: the network.
      env: the environment, or its name.
    """

    variables: Any
    statistics: Statistics | None
    clip_observations: ArrayLike
    actor: Actor = dataclasses.field(metadata=_STATIC)
    env: str | Environment = dataclasses.field(metadata=_STATIC)

    @property
    def environment(self) -> Environment:
        """The environment itself."""
        return self.env if isinstance(self.env, Environment) else make_once(self.env)

    def initial_carry(self, batch_shape: Sequence[int] = ()) -> Carry:
        """The memory at the start of an episode; () for a policy without one."""
        return initial_carry(self.actor, batch_shape)

    def act(
        self,
        observation: jax.Array,
        key: jax.Array,
        carry: Carry | None = None,
        *,
        deterministic: bool = False,
    ) -> tuple[jax.Array, Carry]:
        """Actions for observations as the environment gives them.

        Args:
          observation: [..., *observation_shape], any batch axes.
          key: of the draw.
          carry: what the last call returned; None at the start of an episode.
          deterministic: the mode of the distribution in place of a draw.

        Returns:
          The action, [...] int32 or [..., d] float within the bounds, and the carry.

        Raises:
          ValueError: the observation is not of the environment's shape.
        """
        env = self.environment
        shape = env.observation_shape
        batch_shape = observation.shape[: observation.ndim - len(shape)]
        if observation.shape != (*batch_shape, *shape):
            raise FieldError("observation", f"be [..., *{shape}]", observation.shape)
        features = flat(observation.reshape(math.prod(batch_shape), *shape))
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
        """Plays `num_episodes` episodes side by side, one each, to their ends.

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
            found = Evaluation(
                returns + jnp.where(play.done, 0, reward).astype(returns.dtype),
                lengths + (~play.done).astype(lengths.dtype),
            )
            done = play.done | terminated | truncated
            return _Play(observation, env_state, carry, found, done, play.step + 1)

        return jax.lax.while_loop(lambda play: ~jnp.all(play.done), step, start).found

    def __repr__(self) -> str:
        """What it is, in one line: not its weights."""
        number = sum(jnp.size(leaf) for leaf in jax.tree.leaves(self.variables))
        observations = "as they are" if self.statistics is None else "normalised"
        return (
            f"Policy(env={self.env!r}, hidden={self.actor.hidden}, "
            f"gru_size={self.actor.gru_size}, {number} parameters, observations {observations})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to one .npz file without pickles, whole or not at all.

        Raises ValueError if the environment was not given by name, or `load_policy` would refuse
        the file: weights that are not finite, or those of several policies side by side.
        """
        if isinstance(self.env, Environment):
            raise FieldError("env", "be a name to be saved", repr(self.env))
        contents = Contents(
            self.env, self.actor, self.variables, self.statistics,
            jnp.asarray(self.clip_observations, default_float()),
        )  # fmt: skip
        write(Path(path), contents)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads what `Policy.save` wrote; the file may come from anyone, as no code in it is run.

    Names, shapes and dtypes are those of the network in its environment, or the file is refused
    before anything of what its headers say is allocated; weights are finite.

    Raises:
      ValueError: it holds no such policy; one line names the file and the field.
      OSError: there is no such file, or it cannot be read.
      ModuleNotFoundError: the package of the environment is not installed.
    """
    env, actor, variables, statistics, clip = read(path)
    return Policy(variables, statistics, clip, actor, env)


class _Play(NamedTuple):
    """Episodes under way; those that are `done` go on, unseen."""

    observation: jax.Array
    env_state: Any
    carry: Carry
    found: Evaluation
    done: jax.Array
    step: jax.Array
