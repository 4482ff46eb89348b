r"""Log-probabilities and losses of tokens that never hold an array [batch, time, vocab].

A language model ends in a product of its last hidden states with a head, one column per token of
the vocabulary. The logits of a batch are often the largest array of a training step: 4096 tokens
and 50,000 entries of the vocabulary are 0.8 GB in float32, twice that with their gradient.

    token_log_probs       log p of the targets, in blocks of the vocabulary
    token_statistics      the same with the entropy and the k likeliest tokens, in one pass
    fused_cross_entropy   the mean of -log p, in chunks of tokens; its gradient is formed on the way

The first two compute the logits twice, once for the value and once for the gradient: 8 products
instead of 6 (in units of batch x time x features x vocab). The last one is a number, whose gradient
is known up to a factor when the logits are at hand, and needs them once.

`hidden` is float [..., features], `head` [features, vocab] (`embedding.T` where they are tied).
Products are accumulated, and softmaxes computed, in float32 at least. For log-probabilities at a
sampling temperature, divide `hidden` by it.

Under `jax.shard_map` the columns of the head may be split over a mesh axis, `vocab_axis_name`:
every device reads the part that it holds, and a few numbers per token are exchanged.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError, check_count
from trustjax._dtypes import reduction_dtype
from trustjax._sharding import AxisName, as_local_as, gathered, summed
from trustjax.losses._shapes import check_shape, zero_masked
from trustjax.losses._vocabulary import logits, online_statistics


def token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int = 4096,
    where: jax.Array | None = None,
    vocab_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Log-probabilities of target tokens, without the array of all logits.

    .. math:: \log p_i = z_{i, y_i} - \log\sum_v e^{z_{iv}}, \qquad z = h W

    Args:
      hidden: Last hidden states h, float [..., features].
      head: Weights W of the head, float [features, vocab].
      targets: Target tokens y, int [...].
      chunk: How many entries of the vocabulary are computed at a time, > 0. The largest temporary
        array is [..., chunk].
      where: Tokens to include, bool [...]. The others have 0, without a gradient, whatever stands
        in `hidden` and `targets`.
      vocab_axis_name: Mesh axes over which the columns of `head` are split inside `jax.shard_map`,
        in order; `targets` count through all of them. None if `head` is whole.

    Returns:
      Log-probabilities [...] in float32 at least. A target outside the vocabulary gives NaN.

    Raises:
      ValueError: The shapes do not fit, `targets` are not integers, or `chunk` is not > 0.

    Source: blocks with online normalisation as in Wijmans et al., arXiv:2411.09009 (Cut
    Cross-Entropy), without its filter of small gradients.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.eye(2), jnp.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    >>> print(token_log_probs(hidden, head, jnp.array([2, 0]), chunk=2).round(4))
    [-0.4076 -1.0986]
    """
    rows = _rows(hidden, head, targets, where, chunk)
    relative = _statistics(rows, head, chunk, vocab_axis_name, entropy=False, top=0)
    log_probs = zero_masked(relative.target - relative.log_sum, rows.included)
    return log_probs.reshape(jnp.shape(targets))


class TokenStatistics(NamedTuple):
    """What `token_statistics` finds.

    Attributes:
      log_probs: Log-probabilities of the targets, [...].
      entropy: Entropy of the distribution over the vocabulary in nats, [...].
      top_log_probs: Log-probabilities of the likeliest tokens, in descending order, [..., top]; a
        constant for gradients.
      top_tokens: These tokens, int32 [..., top].
    """

    log_probs: jax.Array
    entropy: jax.Array
    top_log_probs: jax.Array
    top_tokens: jax.Array


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int = 4096,
    top: int = 0,
    where: jax.Array | None = None,
    vocab_axis_name: AxisName | None = None,
) -> TokenStatistics:
    r"""Log-probabilities of target tokens, the entropy, and the likeliest tokens, in one pass.

    .. math:: H_i = \log\sum_v e^{z_{iv}} - \sum_v p_{iv} z_{iv}, \qquad z = h W

    Args:
      hidden, head, targets, chunk, where, vocab_axis_name: As in `token_log_probs`.
      top: How many of the likeliest tokens to return, from 0 to the size of the vocabulary that a
        device holds.

    Returns:
      `TokenStatistics` in float32 at least, 0 for tokens that are left out. Gradients flow through
      the log-probabilities of the targets and the entropy.

    Raises:
      ValueError: As `token_log_probs`, or `top` is out of range.

    Source: as `token_log_probs`.

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.eye(2), jnp.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    >>> found = token_statistics(hidden, head, jnp.array([2, 0]), chunk=2, top=2)
    >>> print(found.entropy[1].round(4), found.top_tokens[0])
    1.0986 [2 1]
    """
    rows = _rows(hidden, head, targets, where, chunk)
    check_count("top", top, at_least=0)
    if top > head.shape[1]:
        raise FieldError("top", f"be <= {head.shape[1]}, the columns of head", top)
    found = _statistics(rows, head, chunk, vocab_axis_name, entropy=True, top=top)
    shape = jnp.shape(targets)
    included = rows.included
    return TokenStatistics(
        zero_masked(found.target - found.log_sum, included).reshape(shape),
        zero_masked(found.log_sum - found.mean, included).reshape(shape),
        zero_masked(found.top - found.log_sum[:, None], included[:, None]).reshape(*shape, top),
        zero_masked(found.top_tokens, included[:, None]).reshape(*shape, top),
    )


def fused_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    chunk: int = 256,
    where: jax.Array | None = None,
    axis_name: AxisName | None = None,
    vocab_axis_name: AxisName | None = None,
) -> jax.Array:
    r"""The mean cross-entropy of target tokens, whose gradient is formed in the forward pass.

    .. math:: L = -\frac{1}{N} \sum_i \log p_i, \qquad
              \frac{\partial L}{\partial z_{iv}} = \frac{p_{iv} - [v = y_i]}{N}

    The logits of a chunk of tokens are computed once, turned into their gradient, multiplied with
    head and hidden states, and dropped. It takes as long as the plain head in a fraction of the
    memory; without `jax.grad` around it, only the value is computed.

    Args:
      hidden, head, targets, where, vocab_axis_name: As in `token_log_probs`.
      chunk: How many tokens are computed at a time, > 0. The largest temporary array is
        [chunk, vocab]; the gradient of `head` passes through memory once per chunk, so a chunk
        should not be small.
      axis_name: Mesh axes over which the tokens are split inside `jax.shard_map`: the mean is the
        one over the tokens of all devices.

    Returns:
      The mean [] in float32 at least; 0 without a token. A target outside the vocabulary gives NaN.

    Raises:
      ValueError: As `token_log_probs`.

    Source: gradients in the forward pass as in Hsu et al., arXiv:2410.10989 (Liger kernels).

    >>> import jax.numpy as jnp
    >>> hidden, head = jnp.eye(2), jnp.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    >>> print(fused_cross_entropy(hidden, head, jnp.array([2, 0])).round(4))
    0.7531
    """
    rows = _rows(hidden, head, targets, where, chunk)
    count = summed(jnp.sum(rows.included, dtype=reduction_dtype(head)), axis_name)
    total = _total_nll(*_local(rows, head, vocab_axis_name), chunk, vocab_axis_name)
    return summed(total, axis_name) / jnp.maximum(count, 1)


class _Rows(NamedTuple):
    """The arguments of a loss with one axis of tokens.

    Attributes:
      hidden: Hidden states [tokens, features], 0 for tokens that are left out.
      targets: Targets, int32 [tokens].
      included: Tokens to include, bool [tokens].
    """

    hidden: jax.Array
    targets: jax.Array
    included: jax.Array


def _rows(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, where: jax.Array | None, chunk: int
) -> _Rows:
    """Checks the arguments and flattens their leading axes."""
    shape = jnp.shape(targets)
    if jnp.ndim(head) != 2:
        raise FieldError("head", "be an array [features, vocab]", f"shape {jnp.shape(head)}")
    if jnp.shape(hidden) != (*shape, head.shape[0]):
        raise FieldError(
            "hidden", f"have the shape of targets and of features, {(*shape, head.shape[0])}",
            f"shape {jnp.shape(hidden)}",
        )  # fmt: skip
    if not jnp.issubdtype(jnp.result_type(targets), jnp.integer):
        raise FieldError("targets", "be integers", jnp.result_type(targets))
    where = jnp.ones(shape, bool) if where is None else where
    check_shape("where", where, targets)
    check_count("chunk", chunk, at_least=1)
    included = jnp.ravel(where).astype(bool)
    hidden = zero_masked(jnp.reshape(hidden, (included.size, head.shape[0])), included[:, None])
    return _Rows(hidden, jnp.ravel(targets).astype(jnp.int32), included)


class _Relative(NamedTuple):
    """Numbers of every token relative to its largest logit, which keeps the digits of log p.

    Attributes:
      log_sum: log sum exp(z - max z), [tokens].
      mean: Mean of z - max z under the distribution, [tokens].
      target: z - max z of the target, [tokens]; NaN without one.
      top: The largest z - max z, [tokens, top].
      top_tokens: Where they are, int32 [tokens, top].
    """

    log_sum: jax.Array
    mean: jax.Array
    target: jax.Array
    top: jax.Array
    top_tokens: jax.Array


def _statistics(
    rows: _Rows, head: jax.Array, chunk: int, axis_name: AxisName | None, *, entropy: bool, top: int
) -> _Relative:
    """The statistics of the whole vocabulary, from those of the part that each device holds."""
    hidden, head, index, _ = _local(rows, head, axis_name)
    largest, log_sum, mean, target, best, tokens = online_statistics(
        hidden, head, index, chunk, entropy, top
    )
    largest, best = jax.lax.stop_gradient((largest, best))
    found = ((index >= 0) & (index < head.shape[1])).astype(log_sum.dtype)
    target = zero_masked(target, found > 0)
    if axis_name is not None:
        # Every part knows its numbers relative to its own largest logit.
        shift = largest - jax.lax.pmax(largest, axis_name)
        weight = jnp.exp(log_sum + shift)
        total = summed(weight, axis_name)
        log_sum = jnp.log(total)
        mean = summed(weight * (mean + shift), axis_name) / total
        target = summed(found * (target + shift), axis_name)
        found = summed(found, axis_name)
        tokens = gathered((tokens + _offset(head, axis_name)).T, axis_name).T
        best = gathered((best + shift[:, None]).T, axis_name).T
    target = jnp.where(found > 0, target, jnp.full_like(target, jnp.nan))
    best, places = jax.lax.top_k(best, top)
    tokens = jnp.take_along_axis(tokens, places, -1)
    if axis_name is not None:
        # All devices have the same; the maximum tells `jax.shard_map` so.
        best, tokens = jax.lax.pmax((best, tokens), axis_name)
    return _Relative(log_sum, mean, target, best, tokens)


def _local(
    rows: _Rows, head: jax.Array, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, head, the index of each target in this part of the head, and weights.

    All vary over the same mesh axes, so that JAX sums their gradients over the devices.
    """
    weights = rows.included.astype(reduction_dtype(head))
    index = rows.targets - _offset(head, axis_name)
    hidden = as_local_as((head, weights), rows.hidden)
    return hidden, as_local_as(hidden, head), index, weights


def _offset(head: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The token of the first column of this device's part of the head, int32 []."""
    if axis_name is None:
        return jnp.zeros([], jnp.int32)
    return jax.lax.axis_index(axis_name).astype(jnp.int32) * head.shape[1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _total_nll(
    hidden: jax.Array,
    head: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    chunk: int,
    axis_name: AxisName | None,
) -> jax.Array:
    """sum_i w_i (-log p_i), []; `index` counts from the first column of this device's head."""
    return _total_nll_forward(hidden, head, index, weights, chunk, axis_name, slopes=False)[0]


def _total_nll_forward(
    hidden: jax.Array,
    head: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    chunk: int,
    axis_name: AxisName | None,
    *,
    slopes: bool = True,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum and, for `slopes`, its gradients, in chunks of tokens."""
    dtype = reduction_dtype(head)
    chunk = min(chunk, max(hidden.shape[0], 1))
    chunks = -(-hidden.shape[0] // chunk)
    missing = chunks * chunk - hidden.shape[0]

    def in_chunks(rows: jax.Array) -> jax.Array:
        # The tokens that fill up the last chunk have weight 0.
        rows = jnp.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)))
        return rows.reshape(chunks, chunk, *rows.shape[1:])

    def step(
        head_slope: jax.Array, rows: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, hidden_columns, index, weights = rows
        z = logits(hidden, head)
        largest = jnp.max(z, -1)
        if axis_name is not None:
            largest = jax.lax.pmax(largest, axis_name)
        found = (index >= 0) & (index < head.shape[1])
        place = jnp.clip(index, 0, head.shape[1] - 1)[:, None]
        target = jnp.take_along_axis(z, place, -1)[:, 0] - largest
        exponential = jnp.exp(z - largest[:, None])
        total = summed(jnp.sum(exponential, -1), axis_name)
        target = summed(zero_masked(target, found), axis_name)
        known = summed(found.astype(dtype), axis_name) > 0
        losses = jnp.where(known, jnp.log(total) - target, jnp.full_like(target, jnp.nan))
        # 0 in place of a product with the weight, as NaN may stand in what is left out.
        losses = zero_masked(losses, weights > 0)
        if not slopes:
            return head_slope, (losses, jnp.zeros_like(losses))
        slope = exponential * (weights / total)[:, None]
        of_target = jnp.where(index[:, None] == jnp.arange(head.shape[1]), weights[:, None], 0)
        slope = (slope - of_target).astype(hidden.dtype)
        head_slope = head_slope + logits(hidden_columns, slope)
        return head_slope, (losses, logits(slope, head.T.astype(slope.dtype)).astype(hidden.dtype))

    start = as_local_as((hidden, head), jnp.zeros(head.shape if slopes else (), dtype))
    # Transposed here, as the product with a transposed array takes twice as long on a CPU.
    hidden_rows = in_chunks(hidden)
    rows = (hidden_rows, hidden_rows.swapaxes(1, 2), in_chunks(index), in_chunks(weights))
    head_slope, (losses, hidden_slope) = jax.lax.scan(step, start, rows)
    if not slopes:
        return jnp.sum(losses), (hidden, head)
    hidden_slope = hidden_slope.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return jnp.sum(losses), (hidden_slope, head_slope.astype(head.dtype))


def _total_nll_backward(
    chunk: int, axis_name: AxisName | None, saved: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    hidden_slope, head_slope = ((x * slope).astype(x.dtype) for x in saved)
    return hidden_slope, head_slope, None, None


_total_nll.defvjp(_total_nll_forward, _total_nll_backward)
