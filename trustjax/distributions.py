r"""The distributions of policies: categorical, several of them, Gaussian, and tanh-squashed.

Each distribution is a NamedTuple of arrays with leading batch axes, so that it passes through
`jax.jit`, `jax.vmap` and `jax.lax.scan`, and `jax.tree.map` can stop gradients or select a row.
Results are in nats and in float32 at least. All distributions offer the same methods to an
algorithm: `sample`, `mode`, `log_prob`, `entropy` and `kl_divergence`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import FieldError
from trustjax._dtypes import widened
from trustjax.geometry.divergence import kl_divergence as categorical_kl
from trustjax.geometry.gaussian import gaussian_kl, in_units

# Smallest distance of an action to +-1 in `TanhGaussian.log_prob`: float32 tanh rounds to +-1.
_EDGE = 1e-6

# Logit of an excluded action: its probability is 0 exactly, and all that is made of its logarithm
# is finite. With -inf, sums of losses of both signs and a mask that excludes all would be NaN.
EXCLUDED = -1e9


class Categorical(NamedTuple):
    r"""A categorical distribution over A discrete actions.

    Attributes:
      logits: Log-probabilities up to a constant, float [..., A]; -inf for an impossible action.
    """

    logits: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Samples of the actions, int32 [...]."""
        return jax.random.categorical(key, widened(self.logits)).astype(jnp.int32)

    def mode(self) -> jax.Array:
        """The most likely action, int32 [...]."""
        return jnp.argmax(self.logits, -1).astype(jnp.int32)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-probability [...] of `action`, an integer [...] in 0 ... A - 1.

        It is NaN for an integer out of range and -inf for an impossible action. Raises ValueError
        for another shape or a dtype that is not an integer.
        """
        _check_shape("action", action.shape, self.logits.shape[:-1])
        return batched_index(self.log_probs(), action)

    def log_probs(self) -> jax.Array:
        """Log-probabilities of all actions, [..., A]."""
        return jax.nn.log_softmax(widened(self.logits))

    def entropy(self) -> jax.Array:
        r"""The entropy :math:`-\sum_a p_a \log p_a`, [...]; an impossible action adds 0."""
        log_probs = self.log_probs()
        # Both `where` are needed: 0 (-inf) is NaN in the value, and in the gradient of either side.
        possible = log_probs != -jnp.inf
        safe = jnp.where(possible, log_probs, jnp.zeros_like(log_probs))
        return -jnp.sum(jnp.where(possible, jnp.exp(safe) * safe, jnp.zeros_like(safe)), -1)

    def kl_divergence(self, other: "Categorical") -> jax.Array:
        """KL(self || other), [...]."""
        return categorical_kl(self.logits, other.logits)


class MultiCategorical(NamedTuple):
    r"""Independent categorical distributions of n actions that are taken together.

    Attributes:
      logits: Log-probabilities up to constants, float [..., n, A], with A the largest number of
        choices of any action; those that an action does not have are excluded by their logits.
    """

    logits: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Samples of the actions, int32 [..., n]."""
        return Categorical(self.logits).sample(key)

    def mode(self) -> jax.Array:
        """The most likely actions, int32 [..., n]."""
        return Categorical(self.logits).mode()

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-probability [...] of `action`, integers [..., n], summed over the n actions.

        See `Categorical.log_prob` for integers out of range and for what it raises.
        """
        return jnp.sum(Categorical(self.logits).log_prob(action), -1)

    def entropy(self) -> jax.Array:
        """The entropy, which is the sum of the n entropies, [...]."""
        return jnp.sum(Categorical(self.logits).entropy(), -1)

    def kl_divergence(self, other: "MultiCategorical") -> jax.Array:
        """KL(self || other), which is the sum of the n divergences, [...]."""
        return jnp.sum(Categorical(self.logits).kl_divergence(Categorical(other.logits)), -1)


class DiagonalGaussian(NamedTuple):
    r"""A normal distribution of d independent dimensions.

    Attributes:
      mean: Means, float [..., d].
      log_std: Natural logarithms of the standard deviations, broadcastable to `mean`.
    """

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Samples of the actions, [..., d], reparameterised: gradients flow through them."""
        mean, log_std = _wide(self)
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)

    def mode(self) -> jax.Array:
        """The mean, [..., d]."""
        return widened(self.mean)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-density [...] of `action` [..., d], summed over its dimensions."""
        return jnp.sum(self.log_prob_each(action), -1)

    def log_prob_each(self, action: jax.Array) -> jax.Array:
        """Log-density of each dimension, [..., d]."""
        _check_shape("action", action.shape, self.mean.shape)
        mean, log_std = _wide(self)
        scaled = in_units(widened(action) - mean, log_std)
        return -0.5 * (jnp.square(scaled) + math.log(2 * math.pi)) - log_std

    def entropy(self) -> jax.Array:
        r"""The entropy :math:`\sum_i \log \sigma_i + \tfrac12 \log 2 \pi e`, [...]."""
        _, log_std = _wide(self)
        return jnp.sum(log_std + 0.5 * math.log(2 * math.pi * math.e), -1)

    def kl_divergence(self, other: "DiagonalGaussian") -> jax.Array:
        """KL(self || other), [...]."""
        return gaussian_kl(*_wide(self), *_wide(other))


class TanhGaussian(NamedTuple):
    r"""A diagonal Gaussian of u, squashed into (-1, 1): the action is a = tanh(u).

    Attributes:
      mean: Means of u, float [..., d].
      log_std: Natural logarithms of the standard deviations of u, broadcastable to `mean`.
    """

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Samples of the actions, [..., d] in (-1, 1), reparameterised."""
        return jnp.tanh(DiagonalGaussian(*self).sample(key))

    def sample_with_log_prob(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Samples of the actions, [..., d], and the log-density of each dimension, [..., d].

        The densities are exact near the bounds too, unlike `log_prob` of a rounded action.
        """
        u = DiagonalGaussian(*self).sample(key)
        return jnp.tanh(u), self.log_prob_before_tanh(u)

    def mode(self) -> jax.Array:
        """tanh of the mean, [..., d]: the median of each dimension, in place of the mode."""
        return jnp.tanh(widened(self.mean))

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-density [...] of `action` [..., d], summed over its dimensions."""
        return jnp.sum(self.log_prob_each(action), -1)

    def log_prob_each(self, action: jax.Array) -> jax.Array:
        r"""Log-density of each dimension, [..., d].

        .. math:: \log N(u; \mu, \sigma) - \log(1 - a^2), \qquad u = \mathrm{artanh}(a)

        Actions are clipped to [-1 + 1e-6, 1 - 1e-6] first.
        """
        _check_shape("action", action.shape, self.mean.shape)
        return self.log_prob_before_tanh(
            jnp.arctanh(jnp.clip(widened(action), -1 + _EDGE, 1 - _EDGE))
        )

    def log_prob_before_tanh(self, u: jax.Array, *, epsilon: float = 0.0) -> jax.Array:
        r"""Log-density of each dimension of the action tanh(u), [..., d], from u [..., d].

        .. math:: \log N(u; \mu, \sigma) - \log(1 - \tanh^2 u + \epsilon)

        With epsilon = 0 it is exact, and its second term grows without bound, like 2 |u|. Where
        the density itself is needed, epsilon = 1e-6 keeps it finite, as in most codes of SAC.
        """
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)) has no cancellation for large u.
        log_slope = 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
        if epsilon:
            log_slope = jnp.logaddexp(log_slope, math.log(epsilon))
        return DiagonalGaussian(*self).log_prob_each(u) - log_slope

    def entropy(self, key: jax.Array) -> jax.Array:
        """An estimate of the entropy from one sample, [...]; it has no closed form."""
        return -jnp.sum(self.sample_with_log_prob(key)[1], -1)

    def kl_divergence(self, other: "TanhGaussian") -> jax.Array:
        """KL(self || other), [...]; it is the one of the Gaussians, as tanh is one to one."""
        return DiagonalGaussian(*self).kl_divergence(DiagonalGaussian(*other))


def categorical(
    logits: jax.Array, num_actions: int | tuple[int, ...], mask: jax.Array | None = None
) -> Categorical | MultiCategorical:
    """The distribution of one discrete action, or of several that are taken together.

    Args:
      logits: Logits of all choices, float [..., A]; those of several actions one after the other.
      num_actions: Number A of choices, or a tuple with the number for each action, of sum A.
      mask: Whether a choice is legal, bool with A entries for each distribution, such as [..., A]
        or, for n actions with equally many choices, [..., n, A / n]. Excluded choices have
        probability 0 and log-probability -1e9. Where no choice of an action is legal, all are.
        None for no mask.
    """
    if mask is not None:
        logits = jnp.where(mask.reshape(logits.shape), logits, jnp.asarray(EXCLUDED, logits.dtype))
    if not isinstance(num_actions, tuple):
        return Categorical(logits)
    parts = jnp.split(logits, np.cumsum(num_actions)[:-1], -1)
    # Below `EXCLUDED`, so that choices that do not exist stay excluded if all others are.
    rows = [
        jnp.pad(
            part, [(0, 0)] * (part.ndim - 1) + [(0, max(num_actions) - part.shape[-1])],
            constant_values=2 * EXCLUDED,
        )
        for part in parts
    ]  # fmt: skip
    return MultiCategorical(jnp.stack(rows, -2))


def batched_index(values: jax.Array, action: jax.Array) -> jax.Array:
    """The entries [...] of `values` [..., A] at `action`, an integer [...] in 0 ... A - 1.

    The result is NaN for an integer out of range; negative ones do not count from the end. Raises
    ValueError for a dtype that is not an integer.
    """
    action = jnp.asarray(action)
    if not jnp.issubdtype(action.dtype, jnp.integer):
        raise FieldError("action", "have an integer dtype", action.dtype)
    size = values.shape[-1]
    # A masked sum is several times as fast on CPU as gathering.
    mask = jax.nn.one_hot(action, size, dtype=bool)
    found = jnp.sum(jnp.where(mask, values, jnp.zeros_like(values)), -1)
    known = (action >= 0) & (action < size)
    return jnp.where(known, found, jnp.full_like(found, jnp.nan))


Distribution = Categorical | MultiCategorical | DiagonalGaussian | TanhGaussian


def _wide(gaussian: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    mean = widened(gaussian[0])
    return mean, jnp.broadcast_to(widened(gaussian[1]), mean.shape)


def _check_shape(name: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise FieldError(name, f"have shape {wanted}", given)
