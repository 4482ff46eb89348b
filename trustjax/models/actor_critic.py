"""Policy and value networks: dense layers, an optional GRU, and an output layer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice
from trustjax._dtypes import widened
from trustjax.distributions import DiagonalGaussian, Distribution, TanhGaussian, categorical
from trustjax.models.gru import gru_sequence
from trustjax.models.mlp import ACTIVATIONS
from trustjax.models.observations import Key, action_mask, seen_parts

Carry = Any  # float [..., gru_size], or () without a GRU


class Torso(nn.Module):
    """The features, the hidden layers and the GRU that actors and critics have in common.

    Attributes:
      hidden: Widths of the dense layers, each >= 1.
      activation: Activation after each dense layer, a name in `trustjax.models.mlp.ACTIVATIONS`.
      gru_size: Units of a GRU after the dense layers, >= 1; None for no GRU.
      orthogonal: Whether weights are initialised orthogonal and scaled by sqrt(2); otherwise they
        are initialised by LeCun's rule.
      dtype: Dtype of the computation; None for the dtype of the parameters, JAX's default float.
      network: Module in front of the dense layers, which maps observations [batch, *shape] to
        features [batch, width]; None if observations are features themselves, an array.
      obs_key: Name of the part of the observation that the network sees, or names of several parts;
        None for all but the mask of actions.
    """

    hidden: Sequence[int] = (64, 64)
    activation: str = "tanh"
    gru_size: int | None = None
    orthogonal: bool = True
    dtype: DTypeLike | None = None
    network: nn.Module | None = None
    obs_key: Key = None

    @nn.compact
    def __call__(
        self, x: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """The last layer [..., width] of observations [..., features], and the next carry.

        With a GRU, `is_first`, bool [time, ...], says that the leading axis is time, and where
        episodes start, before which the carry becomes zero. Then there is a carry after every step.
        """
        if self.gru_size is None or is_first is None:
            return self.layers(self.features(x), carry)
        # Only the memory waits for the step before; all other layers see one matrix of all steps.
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[is_first.ndim :]), x)
        features = self.dense_layers(self.features(rows))
        return self.remember(features.reshape(*is_first.shape, -1), carry, is_first)

    def features(self, observation: Any) -> Any:
        """The input of the dense layers, [..., width]."""
        seen = seen_parts(observation, self.obs_key)
        return seen if self.network is None else self.network(seen)

    def layers(self, x: jax.Array, carry: Carry = ()) -> tuple[jax.Array, Carry]:
        """The dense layers and the GRU on features [..., width], and the next carry."""
        return self.remember(self.dense_layers(x), carry)

    def dense_layers(self, x: jax.Array) -> jax.Array:
        """The dense layers on features [..., width]."""
        activation = ACTIVATIONS[self.activation]
        for index, width in enumerate(self.hidden):
            x = activation(self.dense(width, math.sqrt(2), f"dense_{index}")(x))
        return x

    def remember(
        self, x: jax.Array, carry: Carry, is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """The GRU, if there is one, on the last dense layer of one step or of a sequence."""
        if self.gru_size is None:
            return x, carry
        if is_first is not None:
            x = gru_sequence(self.get_variable("params", "gru"), x, carry, is_first, self.dtype)
            return x, x
        cell = nn.GRUCell(
            self.gru_size,
            dtype=self.dtype,
            param_dtype=default_float(),
            recurrent_kernel_init=orthogonal(1.0),
            name="gru",
        )
        carry, x = cell(carry, x)
        return x, carry

    def dense(self, width: int, scale: float, name: str) -> nn.Dense:
        """A dense layer with the torso's dtype; `scale` multiplies orthogonal weights only."""
        return nn.Dense(
            width,
            dtype=self.dtype,
            param_dtype=default_float(),
            kernel_init=orthogonal(scale) if self.orthogonal else nn.initializers.lecun_normal(),
            dot_general=column_dot_general if width < 4 else jax.lax.dot_general,
            name=name,
        )


class Actor(Torso):
    """A policy network, which maps observations to distributions of actions.

    Discrete actions have a `Categorical`, or a `MultiCategorical` if there are several at once; the
    part "action_mask" of an observation excludes some of them. Continuous actions have a
    `DiagonalGaussian` whose standard deviation is a parameter and does not depend on the
    observation, or, if `squashed`, a `TanhGaussian` whose standard deviation is an output of the
    network.

    Attributes:
      num_actions: Number of discrete actions, or a tuple of numbers, one for each of several
        actions at once; None if actions are continuous.
      action_size: Number of dimensions of continuous actions; None if actions are discrete.
      initial_log_std: Initial natural logarithm of the standard deviation, before tanh.
      squashed: Whether continuous actions are squashed into (-1, 1) by tanh.
      log_std_range: Lowest and highest logarithm of the standard deviation of squashed actions,
        which are clipped to it.
    """

    num_actions: int | tuple[int, ...] | None = None
    action_size: int | None = None
    initial_log_std: float = 0.0
    squashed: bool = False
    log_std_range: tuple[float, float] = (-5.0, 2.0)

    @nn.compact
    def __call__(  # type: ignore[override]
        self, observation: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[Distribution, Carry]:
        """The distribution [...] for observations [..., features], and the next carry."""
        x, carry = super().__call__(observation, carry, is_first)
        size = int(np.sum(self.num_actions or self.action_size or 0))
        squashed = self.squashed and self.num_actions is None
        # Scaled by 0.01, the initial policy is nearly the same for all observations.
        output = widened(self.dense(2 * size if squashed else size, 0.01, "head")(x))
        if self.num_actions is not None:
            return categorical(output, self.num_actions, action_mask(observation)), carry
        if squashed:
            mean, log_std = jnp.split(output, 2, -1)
            start_at = jnp.asarray(self.initial_log_std, output.dtype)
            return TanhGaussian(mean, jnp.clip(log_std + start_at, *self.log_std_range)), carry
        start = nn.initializers.constant(self.initial_log_std)
        log_std = self.param("log_std", start, (self.action_size,), default_float())
        log_std = jnp.broadcast_to(log_std.astype(output.dtype), output.shape)
        return DiagonalGaussian(output, log_std), carry


class Critic(Torso):
    """A state-value network V(s), which maps observations to one number each.

    It has the hidden layers and the GRU of `Torso`, and an output layer of width 1. Its values are
    in the units of the (normalised) rewards, and in float32 at least.
    """

    @nn.compact
    def __call__(
        self, x: Any, carry: Carry = (), is_first: jax.Array | None = None
    ) -> tuple[jax.Array, Carry]:
        """The values [...] of observations [..., features], and the next carry."""
        x, carry = super().__call__(x, carry, is_first)
        return widened(self.dense(1, 1.0, "head")(x))[..., 0], carry


class ActionValue(Torso):
    """An action-value network Q(s, a).

    With continuous actions it maps an observation and an action, which is put behind the features,
    to one number; with discrete actions it maps an observation to one number per action.

    Attributes:
      num_actions: Number of discrete actions; None if actions are continuous.
    """

    num_actions: int | None = None

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x: Any, action: jax.Array | None = None
    ) -> jax.Array:
        """The values [...] of observations [..., features] and continuous actions [..., d].

        With discrete actions the values are [..., num_actions], and `action` must be None.
        """
        x = self.features(x)
        if self.num_actions is None:
            x = jnp.concatenate([x, jnp.asarray(action, x.dtype)], -1)
        x, _ = self.layers(x)
        output = widened(self.dense(self.num_actions or 1, 1.0, "head")(x))
        return output if self.num_actions is not None else output[..., 0]


def orthogonal(scale: float) -> nn.initializers.Initializer:
    """Flax's orthogonal initializer times `scale`, which `vmap` calls one matrix after the other.

    On CPU, a batched LAPACK factorisation occupies a thread of XLA while it waits for other threads
    of XLA. With ten seeds side by side, the two factorisations of policy and value could occupy all
    threads and wait for each other forever (jaxlib 0.10.2).
    """
    initializer = nn.initializers.orthogonal(scale)

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = None) -> jax.Array:
        one = jax.custom_batching.sequential_vmap(lambda key: initializer(key, shape, dtype))
        matrix: jax.Array = one(key)
        return matrix

    return init


def column_dot_general(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None
) -> jax.Array:
    """`x @ kernel` [..., outputs], one column at a time, in place of `jax.lax.dot_general`.

    It is meant for few outputs: on CPU, the gradient of a kernel [64, 2] takes five times as long
    as one product.
    """
    del dimension_numbers  # always those of a dense layer
    columns = jnp.unstack(kernel, axis=1)
    return jnp.stack([jnp.dot(x, column, precision=precision) for column in columns], -1)


def check_network(hidden: Sequence[int], activation: str, gru_size: int | None = None) -> None:
    """Raises ValueError for widths or GRU sizes below 1, and for an unknown activation."""
    check_choice("activation", activation, ACTIVATIONS)
    if not isinstance(hidden, Sequence) or any(width < 1 for width in hidden):
        raise FieldError("hidden", "be widths >= 1", hidden)
    if gru_size is not None and gru_size < 1:
        raise FieldError("gru_size", "be >= 1 or None", gru_size)


def initial_carry(network: Torso, batch_shape: Sequence[int]) -> Carry:
    """The carry at the start of an episode: zeros [*batch_shape, gru_size]; () without a GRU."""
    if network.gru_size is None:
        return ()
    return jnp.zeros((*batch_shape, network.gru_size), network.dtype or default_float())


def reset_carry(carry: Carry, is_first: jax.Array) -> Carry:
    """The carry, set to zero where `is_first` (bool [...]) says that an episode starts."""
    return jax.tree.map(lambda x: jnp.where(is_first[..., None], jnp.zeros_like(x), x), carry)


def unroll(
    network: Torso,
    variables: Any,
    observations: Any,
    is_first: jax.Array,
    carry: Carry,
) -> tuple[Any, Carry]:
    """Applies `network` along the leading axis, which is time.

    Args:
      network: An `Actor` or a `Critic`.
      variables: Variables of the network.
      observations: Observations, an array or a dict of arrays, [time, ..., *shape].
      is_first: Whether an observation is the first of an episode, where the carry becomes zero,
        bool [time, ...].
      carry: Carry before the first step, [..., gru_size]; () without a GRU.

    Returns:
      The outputs and the carries after every step, each with a leading axis of time. Without a GRU
      the carry is returned as it is.
    """
    apply: Callable[..., Any] = network.apply
    if network.gru_size is None:
        # Reshaped to one matrix: on CPU, products with a stack of matrices take twice as long.
        shape = is_first.shape
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) :]), observations)
        output, carry = apply(variables, rows)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), output), carry

    return apply(variables, observations, carry, is_first)  # type: ignore[no-any-return]


def default_float() -> DTypeLike:
    """JAX's default float: float32, or float64 if x64 is enabled."""
    return jnp.zeros([]).dtype
