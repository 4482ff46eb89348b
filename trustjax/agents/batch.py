"""An iteration's transitions, and how they are split into minibatches."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from trustjax._sharding import AxisName
from trustjax.distributions import Distribution
from trustjax.models.actor_critic import Carry


class Batch(NamedTuple):
    """An iteration's transitions, [time, environment, ...], and the carries before them.

    Attributes:
      observation: float [..., features], normalised.
      is_first: bool, whether it is the first of an episode.
      old: distribution of pi_k, constants.
      action: drawn from it.
      log_prob: float, log pi_k of the action.
      advantage: float, of pi_k, normalised unless that is left to the minibatch.
      value: float, V_k of the observation.
      returns: float, what the value is to learn: advantage before normalisation + V_k.
      actor_carry: [environment, ...], memory of the policy before the first step.
      critic_carry: of the value.
    """

    observation: jax.Array
    is_first: jax.Array
    old: Distribution
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    value: jax.Array
    returns: jax.Array
    actor_carry: Carry
    critic_carry: Carry

    def of(self, environments: jax.Array) -> Self:
        """The part of some environments, given by their indices [stretch, environment].

        The stretches of time are equally long; with carries there is one.
        """

        def take(x: jax.Array) -> jax.Array:
            stretches = x.reshape(len(environments), -1, *x.shape[1:])
            part = jax.vmap(lambda x, indices: jnp.take(x, indices, 1, mode="clip"))(
                stretches, environments
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
        """Every transition as an environment of its own, with a time of one step."""
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), rest)
        return part


def draw_environments(
    num_stretches: int,
    num_envs: int,
    num_minibatches: int,
    key: jax.Array,
    *,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """Places in shuffled minibatches, [minibatch, stretch, num_envs // num_minibatches].

    Environment n belongs to the group n // M, with M = `num_minibatches`. Minibatch m has of every
    group g, in every stretch of time t, the member

        (m + shift[t, g]) mod M,   shift uniform in 0, ..., M - 1

    and so each as likely as any other, without a sort. It is made of the same environments however
    many devices hold the groups. `num_envs` are those of this device.
    """
    groups = jnp.arange(num_envs // num_minibatches)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(groups)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + groups)
    shape = (num_stretches,)
    shift = jax.vmap(lambda key: jax.random.randint(key, shape, 0, num_minibatches))(keys)
    member = (jnp.arange(num_minibatches)[:, None, None] + shift.T) % num_minibatches
    return member + num_minibatches * groups


def draw_transitions(num_transitions: int, num_minibatches: int, key: jax.Array) -> jax.Array:
    """Places of transitions in shuffled minibatches, [minibatch, 1, transition]."""
    return jax.random.permutation(key, num_transitions).reshape(num_minibatches, 1, -1)
