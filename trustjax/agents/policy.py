"""A trained policy without what trained it: it acts, is evaluated, and is saved to one file."""

import dataclasses
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from trustjax.agents.rollout import flat, for_environment
from trustjax.agents.statistics import Statistics, normalized
from trustjax.envs import Environment, make_once
from trustjax.models.actor_critic import Actor, Carry, initial_carry

_FORMAT = "trustjax policy 1"
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
@dataclasses.dataclass(frozen=True)
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
            raise ValueError(f"observation must be [..., *{shape}], got {observation.shape}")
        features = flat(observation.reshape(math.prod(batch_shape), *shape))
        features = features.reshape(*batch_shape, -1)
        if carry is None:
            carry = self.initial_carry(batch_shape)
        features = normalized(features, self.statistics, self.clip_observations)
        distribution, carry = self.actor.apply(self.variables, features, carry)
        action = distribution.mode() if deterministic else distribution.sample(key)
        return for_environment(env, action, squashed=self.actor.squashed), carry

    def evaluate(
        self,
        key: jax.Array,
        num_episodes: int,
        *,
        deterministic: bool = True,
        env_params: Any = None,
    ) -> Evaluation:
        """Plays `num_episodes` episodes side by side, one each, to their ends."""
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to one .npz file without pickles, whole or not at all.

        Raises ValueError if the environment was not given by name.
        """
        if isinstance(self.env, Environment):
            raise ValueError(f"env must be a name to be saved, got {self.env!r}")
        path = Path(path)
        network = {
            field.name: getattr(self.actor, field.name)
            for field in dataclasses.fields(self.actor)
            if field.name not in ("parent", "name")
        }
        network["dtype"] = network["dtype"] and str(jnp.dtype(network["dtype"]))
        about = {"format": _FORMAT, "env": self.env, "actor": network}
        arrays = {
            f"variables/{'/'.join(str(part.key) for part in place)}": np.asarray(leaf)
            for place, leaf in jax.tree_util.tree_leaves_with_path(self.variables)
        }
        if self.statistics is not None:
            named = self.statistics._asdict().items()
            arrays |= {f"statistics/{name}": np.asarray(value) for name, value in named}
        arrays["clip_observations"] = np.asarray(self.clip_observations)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Reads what `Policy.save` wrote.

    Raises ValueError, which names the file, if it holds no policy.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != _FORMAT:
            raise ValueError(f"its format is {about['format']!r}, not {_FORMAT!r}")
    except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be a policy saved by trustjax: {error}") from error
    variables: dict[str, Any] = {}
    for name in [name for name in arrays if name.startswith("variables/")]:
        *folders, leaf = name.split("/")[1:]
        node = variables
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(arrays[name])
    statistics = None
    if "statistics/mean" in arrays:
        fields = (arrays[f"statistics/{name}"] for name in Statistics._fields)
        statistics = Statistics(*map(jnp.asarray, fields))
    network: dict[str, Any] = {  # JSON has no tuples, and a network is hashable
        name: tuple(value) if isinstance(value, list) else value
        for name, value in about["actor"].items()
    }
    return Policy(
        variables, statistics, jnp.asarray(arrays["clip_observations"]), Actor(**network),
        about["env"],
    )  # fmt: skip


class _Play(NamedTuple):
    """Episodes under way; those that are `done` go on, unseen."""

    observation: jax.Array
    env_state: Any
    carry: Carry
    found: Evaluation
    done: jax.Array
    step: jax.Array
