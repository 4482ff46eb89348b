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
      starts: bool, whether it is the first of an episode.
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
    starts: jax.Array
    old: Distribution
    action: jax.Array
    log_prob: jax.Array
    advantage: jax.Array
    value: jax.Array
    returns: jax.Array
    actor_carry: Carry
    critic_carry: Carry

    def of(self, environments: jax.Array) -> Self:
        """The part of some environments, given by their places."""

        def take(x: jax.Array, axis: int) -> jax.Array:
            return jnp.take(x, environments, axis, mode="clip")

        carries = (self.actor_carry, self.critic_carry)
        actor_carry, critic_carry = jax.tree.map(lambda x: take(x, 0), carries)
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(lambda x: take(x, 1), rest)
        return part._replace(actor_carry=actor_carry, critic_carry=critic_carry)

    def as_transitions(self) -> Self:
        """Every transition as an environment of its own, with a time of one step."""
        rest = self._replace(actor_carry=(), critic_carry=())
        part: Self = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), rest)
        return part


def draw_environments(
    num_envs: int, num_minibatches: int, key: jax.Array, *, axis_name: AxisName | None = None
) -> jax.Array:
    """Places of environments in shuffled minibatches, [minibatch, num_envs // num_minibatches].

    Environment n belongs to the group n // num_minibatches, and each minibatch has one of every
    group: it is made of the same environments however many devices hold the groups. `num_envs` are
    those of this device.
    """
    groups = jnp.arange(num_envs // num_minibatches)
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(groups)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + groups)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_minibatches))(keys)
    return jnp.transpose(order + num_minibatches * groups[:, None])


def draw_transitions(num_transitions: int, num_minibatches: int, key: jax.Array) -> jax.Array:
    """Places of transitions in shuffled minibatches, [minibatch, transition]."""
    return jax.random.permutation(key, num_transitions).reshape(num_minibatches, -1)
