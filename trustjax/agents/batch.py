"""The transitions of one iteration, and the draw of minibatches from them."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from trustjax._sharding import AxisName
from trustjax.distributions import Distribution
from trustjax.models.actor_critic import Carry


class Batch(NamedTuple):
    """The transitions of one iteration, [time, environment, ...], and the carries before them.

    Attributes:
      observation: Normalised observations, float [..., features], or in parts; see `Runner`.
      is_first: Whether an observation is the first of an episode, bool [...].
      old: Distributions of the old policy pi_k; constants for gradients.
      action: Actions drawn from `old`.
      log_prob: log pi_k of the actions in nats, float [...].
      advantage: Advantages of pi_k, float [...], normalised over the batch unless the algorithm
        normalises them per minibatch or not at all.
      value: Values V_k of the observations by the old critic, float [...].
      returns: Targets of the value, float [...]: V_k plus the advantage before normalisation.
      actor_carry: Carry of the policy before the first step, [environment, ...].
      critic_carry: Carry of the critic before the first step, [environment, ...].
    """

    observation: Any
    is_first: jax.Array
    old: Distribution
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    value: jax.Array
    returns: jax.Array
    actor_carry: Carry
    critic_carry: Carry

    def select(self, environments: jax.Array) -> Self:
        """The batch of the environments with these indices, [segment, environment].

        Time is split into segments of equal length, each with environments of its own. With carries
        there must be a single segment.
        """

        def take(x: jax.Array) -> jax.Array:
            segments = x.reshape(len(environments), -1, *x.shape[1:])
            part = jax.vmap(lambda x, indices: jnp.take(x, indices, 1, mode="clip"))(
                segments, environments
            )
            return part.reshape(len(x), *part.shape[2:])

        carries = jax.tree.map(
            lambda x: jnp.take(x, environments[0], 0, mode="clip"),
            (self.actor_carry, self.critic_carry),
        )
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(take, rest)
        return part._replace(actor_carry=carries[0], critic_carry=carries[1])

    def as_transitions(self) -> Self:
        """The batch with every transition as an environment of its own, [1, transition, ...]."""
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), rest)
        return part


def draw_environments(
    num_segments: int,
    num_envs: int,
    num_minibatches: int,
    key: jax.Array,
    *,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Indices of environments in minibatches, [minibatch, segment, num_envs // num_minibatches].

    Environment n belongs to the group n // M, with M = `num_minibatches`. In every segment of time
    t, minibatch m has the following member of every group g:

        (m + shift[t, g]) mod M,   shift uniform in 0, ..., M - 1

    Each member is thus equally likely, without a sort, and a minibatch consists of the same
    environments however many devices hold the groups. `num_envs` counts those of this device.
    """
    groups = jnp.arange(num_envs // num_minibatches)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(groups)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + groups)
    shape = (num_segments,)
    shift = jax.vmap(lambda key: jax.random.randint(key, shape, 0, num_minibatches))(keys)
    member = (jnp.arange(num_minibatches)[:, None, None] + shift.T) % num_minibatches
    return member + num_minibatches * groups


def draw_transitions(num_transitions: int, num_minibatches: int, key: jax.Array) -> jax.Array:
    """Indices of transitions in shuffled minibatches, [minibatch, 1, transition]."""
    return jax.random.permutation(key, num_transitions).reshape(num_minibatches, 1, -1)
