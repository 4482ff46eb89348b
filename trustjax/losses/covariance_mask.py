r"""Tokens whose advantage and log-probability rise together, which drive the entropy down.

With c = (A - mean A)(log pi - mean log pi), whose mean is the change of the entropy to first order:

    clip_cov_mask   leaves out a few random tokens with large c, for `weights=` of the losses
    kl_cov_mask     the tokens with the largest c, for a KL penalty on them alone

Both are constants for gradients.
"""

import math

import jax
import jax.numpy as jnp

from trustjax._checks import check_scalar
from trustjax._sharding import AxisName, gathered, summed
from trustjax.losses._ratio import bounded_log_ratio, clipped_sides
from trustjax.losses._tokens import tokens_of
from trustjax.losses.reduction import masked_mean


def clip_cov_mask(
    key: jax.Array,
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    share: float = 2e-4,
    lowest: jax.typing.ArrayLike = 1.0,
    highest: jax.typing.ArrayLike = 5.0,
    clip: jax.typing.ArrayLike = 0.2,
    clip_high: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Clip-Cov: leaves out a few random tokens whose covariance drives the entropy down.

    .. math:: c = (A - \bar A)(\log\pi - \overline{\log\pi}), \qquad
              M = 0 \text{ on a random share of the tokens with } lowest < c < highest

    Tokens that the clip of the loss stops anyway are no candidates.

    Args:
      key: Random key, the same on all devices.
      log_probs, old_log_probs, advantages, mask, clip, clip_high: As in the loss that takes the
        mask.
      share: Share of all tokens that is left out, at least one of them, in (0, 1].
      lowest, highest: Bounds of the covariance c of candidates.
      axis_name: As in `reduce_tokens`; means and the share are those of the whole batch.

    Returns:
      Bool [batch, time], True where the token is kept; False in masked places.

    Raises:
      ValueError: The shapes do not fit, or a number is out of range.

    Source: Cui et al., arXiv:2505.22617; verl's `clip_cov`.
    """
    check_scalar("share", share, above=0.0, at_most=1.0)
    tokens = tokens_of(log_probs, old_log_probs, advantages, mask)
    covariance = _covariance(tokens.log_probs, tokens.advantages, tokens.mask, axis_name)
    dtype = covariance.dtype
    ratio = jnp.exp(bounded_log_ratio(jax.lax.stop_gradient(tokens.log_ratio)))
    clipped_low, clipped_high = clipped_sides(ratio, tokens.advantages, clip, clip_high)
    inside = (covariance > jnp.asarray(lowest, dtype)) & (covariance < jnp.asarray(highest, dtype))
    candidates = gathered(tokens.mask & inside & ~(clipped_low | clipped_high), axis_name)
    draws = jax.random.uniform(key, candidates.shape, dtype)
    draws = jnp.where(candidates, draws, jnp.full_like(draws, -1))
    count = _count(tokens.mask, share, axis_name)
    chosen = _largest(draws, count, share) & candidates
    return tokens.mask & ~_own(chosen, tokens.mask, axis_name)


def kl_cov_mask(
    log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    share: float = 2e-4,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""KL-Cov: the tokens with the largest covariance, which get a KL penalty.

    .. math:: c = (A - \bar A)(\log\pi - \overline{\log\pi}), \qquad M = 1 \text{ on the largest c}

    The loss of the paper is not clipped and penalises abs(log pi - log pi_old) on these tokens:

        grpo_loss(..., clip=jnp.inf, reference_log_probs=old_log_probs, kl="abs",
                  beta=1.0 * kl_cov_mask(...), reduction="token_mean")

    Args:
      log_probs, advantages, mask: As in `grpo_loss`.
      share: Share of all tokens that is chosen, at least one of them, in (0, 1].
      axis_name: As in `reduce_tokens`; means and the share are those of the whole batch.

    Returns:
      Bool [batch, time], True where the token is chosen; False in masked places.

    Raises:
      ValueError: The shapes do not fit, or `share` is out of range.

    Source: Cui et al., arXiv:2505.22617; verl's `kl_cov`.
    """
    check_scalar("share", share, above=0.0, at_most=1.0)
    tokens = tokens_of(log_probs, log_probs, advantages, mask)
    covariance = _covariance(tokens.log_probs, tokens.advantages, tokens.mask, axis_name)
    ranked = jnp.where(tokens.mask, covariance, jnp.full_like(covariance, -jnp.inf))
    count = _count(tokens.mask, share, axis_name)
    chosen = _largest(gathered(ranked, axis_name), count, share)
    return tokens.mask & _own(chosen, tokens.mask, axis_name)


def _covariance(
    log_probs: jax.Array, advantages: jax.Array, mask: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    log_probs = jax.lax.stop_gradient(log_probs)
    centred = advantages - masked_mean(advantages, mask, axis_name=axis_name)
    return centred * (log_probs - masked_mean(log_probs, mask, axis_name=axis_name))


def _count(mask: jax.Array, share: float, axis_name: AxisName | None) -> jax.Array:
    """How many of all tokens a share of them is, at least one."""
    tokens = summed(jnp.sum(mask, dtype=jnp.float32), axis_name)
    return jnp.maximum(jnp.floor(tokens * share), 1)


def _largest(values: jax.Array, count: jax.Array, share: float) -> jax.Array:
    """True on the `count` largest of all values, a share at most; of equal ones, on the first."""
    # The bound is known when this is compiled, and a few entries are found without sorting all.
    most = min(math.floor(share * values.size) + 1, values.size)
    _, order = jax.lax.top_k(values.ravel(), most)
    chosen = jnp.arange(most) < count
    return jnp.zeros(values.size, bool).at[order].set(chosen).reshape(values.shape)


def _own(values: jax.Array, local: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The rows of this device among those of all."""
    if axis_name is None:
        return values
    rows = local.shape[0]
    return jax.lax.dynamic_slice_in_dim(values, jax.lax.axis_index(axis_name) * rows, rows)
