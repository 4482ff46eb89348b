"""What the losses of sequences share: arguments, and the way from token losses to a number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_number, check_scalar
from trustjax._dtypes import widened
from trustjax._sharding import AxisName
from trustjax.losses._ratio import bounded_log_ratio, clip_log_ratio, log_ratio
from trustjax.losses._shapes import check_shape, zero_masked
from trustjax.losses.kl_estimator import kl_estimate
from trustjax.losses.reduction import masked_mean, reduce_tokens, token_mask


class Tokens(NamedTuple):
    """The arguments of a loss, of one shape, with 0 in masked places.

    Attributes:
      log_probs: log pi, float [batch, time].
      log_ratio: log pi - log pi_old, same shape.
      advantages: Advantages, same shape, constants for gradients.
      mask: Bool, same shape.
    """

    log_probs: jax.Array
    log_ratio: jax.Array
    advantages: jax.Array
    mask: jax.Array


class Options(NamedTuple):
    """What every loss takes after its own numbers.

    Attributes:
      reference_log_probs: log pi_ref [batch, time], or None for no KL term.
      beta: Weight of the KL term, a number or [batch, time].
      kl: Name of the estimate.
      weights: Factors of the policy's term, [batch] or [batch, time], or None.
      reduction: Name of the reduction.
      normalizer: Denominator of the reduction "constant", or None.
      axis_name: Mesh axes over which the batch is split, or None.
    """

    reference_log_probs: jax.Array | None
    beta: jax.typing.ArrayLike
    kl: str
    weights: jax.Array | None
    reduction: str
    normalizer: jax.typing.ArrayLike | None
    axis_name: AxisName | None


def tokens_of(
    log_probs: jax.Array, old_log_probs: jax.Array, advantages: jax.Array, mask: jax.Array
) -> Tokens:
    """The arguments of a loss with one shape and dtype; raises ValueError if they do not fit."""
    mask = token_mask(log_probs, mask)
    check_shape("old_log_probs", old_log_probs, log_probs)
    log_probs = zero_masked(widened(log_probs), mask)
    old_log_probs = zero_masked(widened(jax.lax.stop_gradient(old_log_probs)), mask)
    advantages = per_token("advantages", advantages, mask)
    return Tokens(log_probs, log_ratio(log_probs, old_log_probs), advantages, mask)


def per_token(name: str, values: jax.Array, mask: jax.Array) -> jax.Array:
    """`values`, [batch] or [batch, time], as constants [batch, time] with 0 in masked places."""
    values = widened(jax.lax.stop_gradient(jnp.asarray(values)))
    batch = mask.shape[0]
    if values.shape == (batch,):
        values = values[:, None]
    if values.shape not in ((batch, 1), mask.shape):
        raise FieldError(name, f"have the shape ({batch},) or {mask.shape}", jnp.shape(values))
    return zero_masked(jnp.broadcast_to(values, mask.shape), mask)


def finished(losses: jax.Array, tokens: Tokens, options: Options) -> jax.Array:
    """The policy's token losses, weighted, with the KL term, reduced to one number."""
    check_number("beta", options.beta, at_least=0.0)
    if jnp.ndim(options.beta) != 0:  # [batch] would broadcast along time
        check_shape("beta", jnp.asarray(options.beta), tokens.mask)
    if options.weights is not None:
        losses = losses * per_token("weights", options.weights, tokens.mask).astype(losses.dtype)
    if options.reference_log_probs is not None:
        reference = jax.lax.stop_gradient(options.reference_log_probs)
        check_shape("reference_log_probs", reference, tokens.mask)
        reference = zero_masked(widened(reference), tokens.mask).astype(losses.dtype)
        beta = zero_masked(jnp.asarray(options.beta, losses.dtype), tokens.mask)
        losses = losses + beta * kl_estimate(tokens.log_probs, reference, options.kl)
    elif isinstance(options.beta, jax.Array) or options.beta != 0:
        raise FieldError(
            "reference_log_probs", "be given where beta is not 0", None, advice="or leave beta at 0"
        )
    return reduce_tokens(
        losses,
        tokens.mask,
        reduction=options.reduction,
        normalizer=options.normalizer,
        axis_name=options.axis_name,
    )


def surrogate(
    log_r: jax.Array,
    advantages: jax.Array,
    clip: jax.typing.ArrayLike,
    clip_high: jax.typing.ArrayLike | None,
    dual_clip: jax.typing.ArrayLike | None,
) -> jax.Array:
    """-min(r A, clip(r) A), for A < 0 at most -c A."""
    check_scalar("clip", clip, at_least=0.0)
    check_scalar("clip_high", clip_high, at_least=0.0)
    check_scalar("dual_clip", dual_clip, above=1.0)
    log_r = clip_log_ratio(log_r, advantages, clip, clip_high)
    if dual_clip is not None:
        highest = jnp.log(jnp.asarray(dual_clip, log_r.dtype))
        log_r = jnp.where((advantages < 0) & (log_r > highest), highest, log_r)
    return -jnp.exp(bounded_log_ratio(log_r)) * advantages


def sequence_log_ratio(log_r: jax.Array, mask: jax.Array) -> jax.Array:
    """log s_i, the mean of log r over the tokens of each answer, [batch, time]."""
    return jnp.broadcast_to(masked_mean(log_r, mask, sequence=True)[:, None], mask.shape)
