"""Statistics of logits over a vocabulary, block by block, and their gradients likewise."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._dtypes import reduction_dtype
from trustjax._sharding import as_local_as
from trustjax.losses._shapes import zero_masked


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """The product of hidden states and head, accumulated in float32 at least."""
    return jnp.matmul(hidden, head, preferred_element_type=reduction_dtype(head))


_Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


class _Blocks(NamedTuple):
    """How the columns of a head are taken in blocks of equal width.

    The last block begins early where the width does not divide the columns. What it has in common
    with the block before is stale, and counts only once.
    """

    width: int
    number: int
    columns: int

    def first(self, block: jax.Array) -> jax.Array:
        """The first column of a block, int32 []."""
        return jnp.minimum(block * self.width, self.columns - self.width).astype(jnp.int32)

    def of(self, head: jax.Array, block: jax.Array) -> jax.Array:
        """The columns of a block, [features, width]."""
        return jax.lax.dynamic_slice_in_dim(head, self.first(block), self.width, 1)

    def fresh(self, block: jax.Array) -> jax.Array:
        """Which columns of a block were not in the one before, bool [width]."""
        return self.first(block) + jnp.arange(self.width) >= block * self.width


def _blocks(columns: int, chunk: int) -> _Blocks:
    width = min(chunk, columns)
    return _Blocks(width, -(-columns // width), columns)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def online_statistics(
    hidden: jax.Array, head: jax.Array, index: jax.Array, chunk: int, entropy: bool, top: int
) -> tuple[jax.Array, ...]:
    """What is to be known of every token's logits z, of which only a block exists at a time.

    Args:
      hidden: Hidden states [tokens, features].
      head: Head [features, columns].
      index: Column of each token's target, int32 [tokens]; any other number for no target.
      chunk: Columns of a block.
      entropy: Whether the mean is needed.
      top: How many of the largest logits to find.

    Returns:
      max z; log sum exp(z - max z); the mean of z - max z under softmax(z), or 0 without
      `entropy`; z - max z of the target, all [tokens]; and the candidates for the largest
      z - max z with their columns, both [tokens, at least top]. The largest logit and the
      candidates are constants for gradients.
    """
    blocks = _blocks(head.shape[1], chunk)
    dtype = reduction_dtype(head)
    lowest = jnp.asarray(float(np.finfo(dtype).min) / 2, dtype)
    zeros = as_local_as((hidden, head), jnp.zeros(hidden.shape[0], dtype))

    def step(carry: _Carry, number: jax.Array) -> tuple[_Carry, tuple[jax.Array, jax.Array]]:
        largest, total, moment, target = carry
        z = logits(hidden, blocks.of(head, number))
        place = index - blocks.first(number)
        picked = jnp.take_along_axis(z, jnp.clip(place, 0, blocks.width - 1)[:, None], -1)[:, 0]
        inside = (place >= 0) & (place < blocks.width)
        target = jnp.where(inside, picked, target)
        # Sums are relative to the largest logit so far, and rescaled when a larger one comes.
        z = jnp.where(blocks.fresh(number), z, lowest)
        new_largest = jnp.maximum(largest, jnp.max(z, -1))
        z, shift = z - new_largest[:, None], largest - new_largest
        weights, scale = jnp.exp(z), jnp.exp(shift)
        if entropy:
            moment = (moment + shift * total) * scale + jnp.sum(weights * z, -1)
        total = total * scale + jnp.sum(weights, -1)
        best, places = jax.lax.top_k(z, min(top, blocks.width))
        best = best + new_largest[:, None]
        return (new_largest, total, moment, target), (best, places + blocks.first(number))

    start = (zeros + lowest, zeros, zeros, zeros)
    carry, (best, tokens) = jax.lax.scan(step, start, jnp.arange(blocks.number))
    largest, total, moment, target = carry
    best, tokens = (jnp.swapaxes(x, 0, 1).reshape(hidden.shape[0], -1) for x in (best, tokens))
    relative = (jnp.log(total), moment / total, target - largest, best - largest[:, None])
    return largest, *relative, tokens


def _forward(
    hidden: jax.Array, head: jax.Array, index: jax.Array, chunk: int, entropy: bool, top: int
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    found = online_statistics(hidden, head, index, chunk, entropy, top)
    largest, log_sum, mean, *_ = found
    return found, (hidden, head, index, largest, log_sum, mean)


def _backward(
    chunk: int, entropy: bool, top: int, saved: tuple[jax.Array, ...], slopes: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, None]:
    """The gradients, from the logits computed once more, block by block."""
    hidden, head, index, largest, log_sum, mean = saved
    _, of_log_sum, of_mean, of_target, *_ = (slope[..., None] for slope in slopes)
    blocks = _blocks(head.shape[1], chunk)

    def step(
        carry: tuple[jax.Array, jax.Array], number: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        hidden_slope, head_slope = carry
        columns = blocks.of(head, number)
        z = logits(hidden, columns) - largest[:, None]
        probs = jnp.exp(z - log_sum[:, None])
        # d log_sum / dz = p, d mean / dz = p (1 + z - mean), with z relative to the largest.
        slope = of_log_sum * probs
        if entropy:
            slope = slope + of_mean * probs * (1 + z - mean[:, None])
        place = (index - blocks.first(number))[:, None]
        slope = slope + jnp.where(place == jnp.arange(blocks.width), of_target, 0)
        slope = slope.astype(hidden.dtype)
        # A stale column has the same gradient as before, so that writing it again does no harm.
        new = logits(hidden.T, slope).astype(head.dtype)
        head_slope = jax.lax.dynamic_update_slice_in_dim(head_slope, new, blocks.first(number), 1)
        fresh = zero_masked(columns, blocks.fresh(number)).astype(hidden.dtype)
        return (hidden_slope + logits(slope, fresh.T), head_slope), None

    dtype = reduction_dtype(head)
    start = as_local_as((hidden, head), (jnp.zeros(hidden.shape, dtype), jnp.zeros_like(head)))
    (hidden_slope, head_slope), _ = jax.lax.scan(step, start, jnp.arange(blocks.number))
    return hidden_slope.astype(hidden.dtype), head_slope, None


online_statistics.defvjp(_forward, _backward)
