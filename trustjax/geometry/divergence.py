r"""Divergences between predictive distributions: one value per example.

Notation: p and q are the softmax of two arrays of logits, and :math:`t_k = \log(p_k / q_k)`. The
sum :math:`\sum_k p_k t_k` cancels where p is close to q: float32 returns rounding noise of either
sign for the small divergences that trust regions are made of. Here
:math:`\sum_k (q_k - p_k) = 0` is added, so that every term is >= 0, with value and derivative 0 at
p = q, and t comes from the differences of the logits. A NaN in p or q makes the divergence NaN,
except in the classes or examples that `where` leaves out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import check_number
from trustjax._dtypes import reduction_dtype
from trustjax.geometry._gaps import exponential_gap
from trustjax.geometry.norm import non_negative, vector_norm


def kl_divergence(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""The Kullback-Leibler divergence of p from q, both given as logits.

    .. math:: KL(p \| q) = \sum_k p_k \log(p_k / q_k)

    Args:
      logits_p: [..., classes] float, the logits of p. Any constant may be added along `axis`.
      logits_q: The logits of q, of the same shape.
      axis: The axis of the classes.
      where: bool, broadcastable to the logits, the classes to include. Both distributions are
        normalised over these.

    Returns:
      [...] in nats, float32 at least, >= 0. Where p and q agree it is 0 with gradient 0.

    Raises:
      ValueError: The shapes differ.
    """
    pair = _compare(logits_p, logits_q, axis, where)
    return _tsallis(pair, 1.0, axis)


def reverse_kl(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""The Kullback-Leibler divergence with its arguments exchanged, :math:`KL(q \| p)`.

    Arguments, result and errors are those of `kl_divergence`.
    """
    logits_p, logits_q = same_shape(logits_p, logits_q)
    return kl_divergence(logits_q, logits_p, axis=axis, where=where)


def symmetric_kl(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""The Jeffreys divergence, the sum (not the mean) of KL in both directions.

    .. math:: KL(p \| q) + KL(q \| p)

    Arguments, result and errors are those of `kl_divergence`.
    """
    pair = _compare(logits_p, logits_q, axis, where)
    return _tsallis(pair, 1.0, axis) + _tsallis(pair.reversed(), 1.0, axis)


def jensen_shannon(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""The Jensen-Shannon divergence, which is at most log 2.

    .. math:: \tfrac12 KL(p \| m) + \tfrac12 KL(q \| m), \qquad m = \tfrac12 (p + q)

    Arguments, result and errors are those of `kl_divergence`.
    """
    pair = _compare(logits_p, logits_q, axis, where)
    middle = 0.5 * (jnp.exp(pair.log_p) + jnp.exp(pair.log_q))

    def to_middle(log_p: jax.Array, t: jax.Array) -> jax.Array:
        # log(p / m) = log 2 - log(1 + e^-t), which cancels near t = 0.
        near = jnp.abs(t) < 1
        small, far = jnp.where(near, t, jnp.zeros_like(t)), jnp.where(near, jnp.zeros_like(t), t)
        log_ratio = jnp.where(
            near, -jnp.log1p(0.5 * jnp.expm1(-small)), math.log(2) - jax.nn.softplus(-far)
        )
        return _tsallis(_Pair(log_p, jnp.log(middle), log_ratio, middle), 1.0, axis)

    return 0.5 * (to_middle(pair.log_p, pair.t) + to_middle(pair.log_q, -pair.t))


def tsallis_divergence(
    logits_p: jax.Array,
    logits_q: jax.Array,
    *,
    order: jax.typing.ArrayLike,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The Tsallis relative entropy; order 1 is KL.

    .. math:: D_a(p \| q) = \frac{\sum_k p_k^a q_k^{1-a} - 1}{a - 1}

    Args:
      logits_p: [..., classes] float.
      logits_q: Of the same shape.
      order: a > 0. It may be traced.
      axis: The axis of the classes.
      where: The classes to include, as in `kl_divergence`.

    Returns:
      [...] float32 at least, >= 0.

    Raises:
      ValueError: The shapes differ, or `order` is not > 0.
    """
    check_number("order", order, above=0.0)
    return _tsallis(_compare(logits_p, logits_q, axis, where), order, axis)


def renyi_divergence(
    logits_p: jax.Array,
    logits_q: jax.Array,
    *,
    order: jax.typing.ArrayLike,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The Rényi divergence; order 1 is KL.

    .. math:: R_a(p \| q) = \frac{\log \sum_k p_k^a q_k^{1-a}}{a - 1}
              = \frac{\log(1 + (a - 1) D_a(p \| q))}{a - 1}

    :math:`D_a` is the Tsallis divergence. Arguments, result and errors are those of
    `tsallis_divergence`.
    """
    check_number("order", order, above=0.0)
    pair = _compare(logits_p, logits_q, axis, where)
    d, is_kl, d_safe = _excess_order(order, pair.t.dtype)
    # For high orders the power sum overflows long before its logarithm is large. So the logarithm
    # comes from logsumexp, and small values, which cancel there, from the Tsallis divergence.
    excluded = pair.t == jnp.inf  # p > 0 = q
    infinite = jnp.where(d_safe > 0, jnp.inf, -jnp.inf).astype(d.dtype)
    exponent = pair.log_p + d_safe * jnp.where(excluded, jnp.zeros_like(pair.t), pair.t)
    exponent = jnp.where(excluded, infinite, exponent)
    exponent = jnp.where(pair.log_p == -jnp.inf, jnp.full_like(exponent, -jnp.inf), exponent)
    log_sum = jax.nn.logsumexp(exponent, axis)
    small = is_kl | (jnp.abs(d * _tsallis(pair, order, axis)) < 0.5)
    # Elsewhere an overflow in the branch that is not selected would make the gradient NaN.
    keep = jnp.expand_dims(small, axis)
    kept = _Pair(*(jnp.where(keep, x, jnp.zeros_like(x)) for x in pair))
    tsallis = _tsallis(kept, order, axis)
    from_tsallis = jnp.where(is_kl, tsallis, jnp.log1p(d * tsallis) / d_safe)
    return jnp.where(small, from_tsallis, log_sum / d_safe)


def l2_distance(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""The Euclidean distance between the logits themselves (not the probabilities).

    .. math:: \| z_p - z_q \|_2

    Arguments and errors are those of `kl_divergence`, but a constant added to one of the logits
    changes the value. The gradient at distance 0 is 0.
    """
    logits_p, logits_q = same_shape(logits_p, logits_q)
    difference = logits_p - logits_q
    if where is not None:
        difference = jnp.where(where, difference, jnp.zeros_like(difference))
    return vector_norm(difference, axis)


def mmd(
    logits_p: jax.Array,
    logits_q: jax.Array,
    *,
    bandwidths: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The maximum mean discrepancy of two batches of logits, with an inverse multiquadric kernel.

    .. math:: \mathrm{mean}_{ij} \left[ k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j) \right],
              \qquad k(x, y) = \sum_b (b^2 + \|x - y\|^2)^{-1/2}

    This is the biased V-statistic, with the diagonal. It compares the two batches as sets, so it is
    one number for the batch, unlike the other divergences. Squared distances are sums of squared
    differences, examples^2 times classes operations, because a matrix product loses small ones.

    Args:
      logits_p: [..., classes] float. The leading axes together are the batch.
      logits_q: Of the same shape.
      bandwidths: The values of b in the kernel.
      where: [...] bool, the examples (not classes) to include.

    Returns:
      [] float32 at least, >= 0; 0 for an empty mask.

    Raises:
      ValueError: The shapes differ.

    Source: kernel "imq2" of the code released with TRAM (arXiv:2310.03646), which in addition
    divides by the batch size.
    """
    logits_p, logits_q = same_shape(logits_p, logits_q)
    classes = logits_p.shape[-1]
    weights = jnp.ones(logits_p.shape[:-1], logits_p.dtype)
    if where is not None:
        weights = jnp.broadcast_to(where, weights.shape).astype(weights.dtype)
        # Zero times NaN is NaN: examples that do not count are zero.
        counted = weights[..., None] > 0
        logits_p, logits_q = (
            jnp.where(counted, z, jnp.zeros_like(z)) for z in (logits_p, logits_q)
        )
    weights = weights.reshape(-1) / jnp.maximum(jnp.sum(weights), jnp.ones([], weights.dtype))
    points = (z.reshape(-1, classes) for z in (logits_p, logits_q))
    found: jax.Array = _mmd(*points, weights, jnp.asarray(bandwidths, weights.dtype))
    return found


@jax.jit
def _mmd(x: jax.Array, y: jax.Array, weights: jax.Array, bandwidths: jax.Array) -> jax.Array:
    """The discrepancy of x and y [examples, classes], from differences of points and of kernels.

    Squared distances from a Gram matrix would have the rounding errors of squared norms, and the
    kernels of two close batches would cancel but for their last digits.
    """
    moves = y - x

    def kernel_gap(low: jax.Array, high: jax.Array, excess: jax.Array) -> jax.Array:
        """k(low) - k(high), both squared distances, with excess = high - low."""
        low, high = (jnp.sqrt(jnp.square(bandwidths)[None] + z[:, None]) for z in (low, high))
        return jnp.sum(excess[:, None] / (low * high * (low + high)), -1)

    def row(each: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        (point, move), weight = (z[None] for z in each[:2]), each[2]
        apart = point - x
        crossed = apart - moves  # x_i - y_j
        cross = jnp.sum(jnp.square(crossed), -1)
        xx, yy = jnp.sum(jnp.square(apart), -1), jnp.sum(jnp.square(crossed + move), -1)
        excess_xx = jnp.sum(moves * (moves - 2 * apart), -1)
        excess_yy = -jnp.sum(move * (2 * crossed + move), -1)
        gaps = kernel_gap(xx, cross, excess_xx) + kernel_gap(yy, cross, excess_yy)
        return weight * jnp.sum(weights * gaps)

    # One row of pairs at a time, and again for the gradient, so that the memory is of the size of
    # the logits.
    return non_negative(jnp.sum(jax.lax.map(jax.checkpoint(row), (x, moves, weights))))


class _Pair(NamedTuple):
    """Two distributions, each array of the shape of the logits.

    Attributes:
      log_p: The logarithms of the probabilities p.
      log_q: The logarithms of the probabilities q.
      t: log(p / q); 0 in classes that both exclude, infinite in those that one of them excludes.
      q: The probabilities q.
    """

    log_p: jax.Array
    log_q: jax.Array
    t: jax.Array
    q: jax.Array

    def reversed(self) -> "_Pair":
        return _Pair(self.log_q, self.log_p, -self.t, jnp.exp(self.log_p))


def _compare(logits_p: jax.Array, logits_q: jax.Array, axis: int, where: jax.Array | None) -> _Pair:
    """Both softmaxes, float32 at least; masked classes have probability 0 in both."""
    logits_p, logits_q = same_shape(logits_p, logits_q)
    if where is None:
        log_p, log_q = (jax.nn.log_softmax(z, axis) for z in (logits_p, logits_q))
    else:
        where = jnp.broadcast_to(where, logits_p.shape)
        # Half of the lowest number, from which the normaliser is subtracted without an overflow.
        lowest = jnp.full_like(logits_p, float(np.finfo(logits_p.dtype).min) / 2)
        impossible = jnp.full_like(logits_p, -jnp.inf)
        logits_p, logits_q = (jnp.where(where, z, lowest) for z in (logits_p, logits_q))
        log_p, log_q = (
            jnp.where(where, jax.nn.log_softmax(z, axis), impossible) for z in (logits_p, logits_q)
        )
    zeros = jnp.zeros_like(log_p)
    neither = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    t = jnp.where(neither, zeros, log_p) - jnp.where(neither, zeros, log_q)

    # The difference of two logarithms has the rounding errors of both. Where all t are small they
    # come from the differences of the logits instead, with the same derivatives.
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    moves = jax.lax.stop_gradient(jnp.where(neither, zeros, logits_p - logits_q))
    moves = moves - jnp.sum(jnp.where(jnp.isfinite(moves), p * moves, zeros), axis, keepdims=True)
    moves = jnp.where(neither, zeros, moves)
    near = jnp.max(jnp.abs(moves), axis, keepdims=True) < 0.5
    growth = jnp.sum(jnp.where(near, q * jnp.expm1(moves), zeros), axis, keepdims=True)
    exact = jnp.where(neither, zeros, moves - jnp.log1p(growth))
    t = t + jax.lax.stop_gradient(jnp.where(near, exact - t, zeros))
    return _Pair(log_p, log_q, t, q)


def _tsallis(pair: _Pair, order: jax.typing.ArrayLike, axis: int) -> jax.Array:
    r"""The Tsallis divergence, as a sum of terms >= 0.

    With d = order - 1 a term is :math:`p [ (e^{d t} - 1) / d + e^{-t} - 1 ]`, for d = 0
    :math:`p [ t + e^{-t} - 1 ]`. A class that p excludes contributes q.
    """
    log_p, _, t, q = pair
    d, is_kl, d_safe = _excess_order(order, log_p.dtype)
    zeros = jnp.zeros_like(t)
    # Logits of -inf make t infinite, and a gradient through an infinite t is NaN even if it is
    # multiplied by 0. So each branch computes on zeros where it is not selected. p may underflow
    # where p e^{d t} does not, so a class is excluded by a logarithm of -inf, not by p = 0.
    outside, excluded = log_p == -jnp.inf, t == jnp.inf
    log_p = jnp.where(outside, zeros, log_p)
    t = jnp.where(outside | excluded, zeros, t)
    p = jnp.exp(log_p)

    # For small t: e^x - 1 is x plus a gap of the exponential. The terms in t itself cancel exactly
    # and are left out, so that the digits of the gaps remain.
    near = (jnp.abs(t) < 0.5) & (jnp.abs(d * t) < 0.5)
    small, t = jnp.where(near, t, zeros), jnp.where(near, zeros, t)
    from_gaps = p * (exponential_gap(d * small) / d_safe + exponential_gap(-small))

    # For other t, (e^{d t} - 1) / d: expm1 keeps the digits of small d t, which orders close to 1
    # also have far from p = q; elsewhere e^{d t} may overflow where p e^{d t} does not.
    slow = jnp.abs(d * t) < 1
    gain_slow = p * jnp.expm1(jnp.where(slow, d * t, zeros)) / d_safe
    power = jnp.exp(log_p + jnp.where(slow, zeros, d * t))
    gain = jnp.where(is_kl, p * t, jnp.where(slow, gain_slow, (power - p) / d_safe))

    term = jnp.where(near, from_gaps, gain + (q - p))
    at_zero_q = jnp.where(d >= 0, jnp.full_like(p, jnp.inf), -p * (1 + d) / d_safe)
    term = jnp.where(excluded, at_zero_q, term)
    return non_negative(jnp.sum(jnp.where(outside, q, term), axis))


def _excess_order(
    order: jax.typing.ArrayLike, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d = order - 1, whether it is 0, and d with 1 in place of 0, as a divisor."""
    d = jnp.asarray(order, dtype) - 1
    is_kl = d == 0
    return d, is_kl, jnp.where(is_kl, jnp.ones_like(d), d)


def same_shape(logits_p: jax.Array, logits_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one dtype, float32 at least. Raises ValueError if their shapes differ."""
    logits_p, logits_q = jnp.asarray(logits_p), jnp.asarray(logits_q)
    if logits_p.shape != logits_q.shape:
        raise ValueError(
            "logits_p and logits_q must have the same shape, got "
            f"{logits_p.shape} and {logits_q.shape}"
        )
    dtype = reduction_dtype((logits_p, logits_q))
    return logits_p.astype(dtype), logits_q.astype(dtype)
