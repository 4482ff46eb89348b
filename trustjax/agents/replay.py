"""A replay of transitions in a Flashbax buffer, with the observation of each step before any reset.

A row of the buffer belongs to one environment. A minibatch takes equally many transitions from
every group of neighbouring environments, so that it is the same however the environments are split
over devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from trustjax._sharding import AxisName
from trustjax.agents.rollout import Transition
from trustjax.envs.third_party import default_promotion, import_extra

Replay = Any  # flashbax.buffers.trajectory_buffer.TrajectoryBufferState


class Replayed(NamedTuple):
    """Transitions in the replay, with any batch axes.

    Attributes:
      observation: Observations before the step, float [..., features], or in parts; see `Runner`.
      action: Actions of the policy.
      reward: Rewards of the step, float [...].
      terminated: Whether the episode terminated, bool [...]; False where a time limit truncated it,
        where targets bootstrap from `final_observation`.
      final_observation: Observations after the step and before any reset, like `observation`.
    """

    observation: Any
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    final_observation: Any


def init(example: Transition, num_envs: int, length: int) -> Replay:
    """An empty replay for `length` transitions per environment.

    `example` is a single unbatched transition.
    """
    with default_promotion():
        return _buffer(num_envs, length).init(_kept(example))


def add(replay: Replay, transitions: Transition) -> Replay:
    """The replay with `transitions` [time, environment, ...] added; the oldest ones make room."""
    kept = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), _kept(transitions))
    num_envs, length = replay.experience.reward.shape
    with default_promotion():
        return _buffer(num_envs, length).add(replay, kept)


def sample(replay: Replay, keys: jax.Array, size: int) -> Replayed:
    """Transitions [group, size, ...] sampled from the replay with replacement.

    Group g takes its transitions from the g-th part of the environments, with the g-th of the
    `keys` [group].
    """
    num_envs, length = replay.experience.reward.shape
    num_rows = num_envs // len(keys)
    groups = replay.replace(
        experience=jax.tree.map(
            lambda x: x.reshape(len(keys), num_rows, *x.shape[1:]), replay.experience
        )
    )
    axes = groups.replace(experience=0, current_index=None, is_full=None)
    with default_promotion():
        buffer = _buffer(num_rows, length, size)
        found: Replayed = jax.vmap(buffer.sample, (axes, 0))(groups, keys).experience
    single: Replayed = jax.tree.map(lambda x: x[:, :, 0], found)
    return single


def group_keys(key: jax.Array, num_groups: int, *, axis_name: AxisName | None = None) -> jax.Array:
    """Three random keys for each group of this device's environments, [group, 3].

    `num_groups` counts the groups of all devices. A group has the same keys whichever device holds
    it.
    """
    first: jax.typing.ArrayLike = 0
    if axis_name is not None:
        num_groups //= jax.lax.axis_size(axis_name)
        first = jax.lax.axis_index(axis_name) * num_groups
    return jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index), 3))(
        first + jnp.arange(num_groups)
    )


def replay_specs(split: PartitionSpec) -> Replay:
    """Partition specs of a replay: its rows are split over devices as the environments are."""
    buffers = import_extra("flashbax.buffers.trajectory_buffer", install='"trustjax[rl]"')
    return buffers.TrajectoryBufferState(
        experience=split, current_index=PartitionSpec(), is_full=PartitionSpec()
    )


def _kept(transition: Transition) -> Replayed:
    return Replayed(**{name: getattr(transition, name) for name in Replayed._fields})


def _buffer(num_rows: int, length: int, size: int = 1) -> Any:
    flashbax = import_extra("flashbax", install='"trustjax[rl]"')
    return flashbax.make_trajectory_buffer(
        add_batch_size=num_rows, sample_batch_size=size, sample_sequence_length=1, period=1,
        min_length_time_axis=1, max_length_time_axis=length,
    )  # fmt: skip
