r"""How the losses of tokens become one number: the reductions that papers differ in.

With the loss l_it of token t in sequence i, the mask m_it and the B sequences that have a token:

    token_mean      sum_it m l / sum_it m                 every token weighs the same
    sequence_mean   1/B sum_i (sum_t m l / sum_t m)       every sequence weighs the same
    sequence_sum    1/B sum_i sum_t m l                   a token weighs as much in a long sequence
    constant        sum_it m l / normalizer               as above, whatever the batch holds
    none            m l                                   the losses themselves

Sums and counts are taken over all devices before the one division, so that the result does not
depend on how the sequences are shared out. Means over the micro-batches of a step are not that:
pass the number of tokens of the step as `normalizer` and add the losses up.
"""

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax._dtypes import widened
from trustjax._sharding import AxisName, summed
from trustjax.losses._shapes import check_shape, zero_masked

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant", "none")


def reduce_tokens(
    losses: jax.Array,
    mask: jax.Array,
    *,
    reduction: str,
    normalizer: jax.typing.ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""The losses of tokens as one number, by the name of the reduction.

    .. math:: \frac{\sum_{it} m_{it} w_{it} l_{it}}{N} \quad \text{as in the table of this module}

    Args:
      losses: Losses of tokens, float [batch, time]. What stands in masked places is not read.
      mask: True or nonzero on the tokens that count, [batch, time].
      reduction: "token_mean", "sequence_mean", "sequence_sum", "constant" or "none".
      normalizer: Denominator of "constant", > 0, such as the number of sequences times the maximum
        length; it counts what all devices hold. None means batch * time of the arrays. Other
        reductions take none.
      axis_name: Mesh axes over which the batch is split inside `jax.shard_map`; None if it is not.

    Returns:
      Float [] in float32 at least, or [batch, time] for "none". Where nothing counts it is 0.

    Raises:
      ValueError: The shapes differ or are not [batch, time], `reduction` is unknown, or
        `normalizer` is not > 0 or has no use.

    Source: the losses of `trustjax.losses.group` name the paper of each.

    >>> import jax.numpy as jnp
    >>> losses, mask = jnp.array([[1.0, 3.0], [5.0, 0.0]]), jnp.array([[1, 1], [1, 0]])
    >>> for name in ("token_mean", "sequence_mean", "sequence_sum", "constant"):
    ...     print(name, reduce_tokens(losses, mask, reduction=name))
    token_mean 3.0
    sequence_mean 3.5
    sequence_sum 4.5
    constant 2.25
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_scalar("normalizer", normalizer, above=0.0)
    if normalizer is not None and reduction != "constant":
        raise FieldError("normalizer", f'be None for reduction="{reduction}"', normalizer)
    losses, mask = widened(losses), token_mask(losses, mask)
    masked = zero_masked(losses, mask)
    if reduction == "none":
        return masked
    counts = jnp.sum(mask, -1, dtype=losses.dtype)
    sums = jnp.sum(masked, -1)
    if reduction == "sequence_mean":
        sums = sums / jnp.maximum(counts, 1)
    if reduction == "constant":
        size = summed(jnp.asarray(losses.size, losses.dtype), axis_name)
        count = size if normalizer is None else jnp.asarray(normalizer, losses.dtype)
    else:
        units = counts if reduction == "token_mean" else (counts > 0).astype(losses.dtype)
        count = jnp.maximum(summed(jnp.sum(units), axis_name), 1)
    return summed(jnp.sum(sums), axis_name) / count


def masked_mean(
    values: jax.Array, mask: jax.Array, *, axis_name: AxisName | None = None, sequence: bool = False
) -> jax.Array:
    r"""Mean over the tokens that count, of the whole batch or of each sequence.

    .. math:: \sum m x / \max(\sum m, 1)

    Args:
      values: Float [batch, time]; what stands in masked places is not read.
      mask: True or nonzero on the tokens that count, [batch, time].
      axis_name: As in `reduce_tokens`.
      sequence: Whether to take the mean of each sequence, which stays on its device.

    Returns:
      Means in float32 at least: [] or, for `sequence`, [batch]. Where nothing counts it is 0.

    Raises:
      ValueError: The shapes differ or are not [batch, time].
    """
    values, mask = widened(values), token_mask(values, mask)
    masked = zero_masked(values, mask)
    if sequence:
        return jnp.sum(masked, -1) / jnp.maximum(jnp.sum(mask, -1, dtype=values.dtype), 1)
    count = summed(jnp.sum(mask, dtype=values.dtype), axis_name)
    return summed(jnp.sum(masked), axis_name) / jnp.maximum(count, 1)


def token_mask(first: jax.Array, mask: jax.Array) -> jax.Array:
    """`mask` as bool; raises ValueError unless both arrays are [batch, time] of the same shape."""
    if jnp.ndim(first) != 2:
        raise FieldError("log_probs", "be an array [batch, time]", f"shape {jnp.shape(first)}")
    check_shape("mask", mask, first)
    return jnp.asarray(mask).astype(bool)
