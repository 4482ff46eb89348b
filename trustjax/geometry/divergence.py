r"""Divergences between predictive distributions: one value per example.

Notation: p and q are the softmax of two logit arrays, :math:`t_k = \log(p_k / q_k)`. Summing
:math:`\sum_k p_k t_k` as it stands cancels where p is close to q: float32 returns rounding noise
of either sign for the small divergences that trust regions are made of. Here
:math:`\sum_k (q_k - p_k) = 0` is added: every term is >= 0, with value and slope 0 at p = q.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import check_number
from trustjax.geometry.norm import non_negative, reduction_dtype


def kl_divergence(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""Kullback-Leibler divergence of p from q, both given as logits.

    .. math:: KL(p \| q) = \sum_k p_k \log(p_k / q_k)

    Args:
      logits_p: [..., classes] float, logits of p; any constant may be added along `axis`.
      logits_q: same shape, logits of q.
      axis: the axis of the classes.
      where: classes to include, bool, broadcastable to the logits; both distributions are
        normalised over these.

    Returns:
      [...] in nats, float32 at least, >= 0. Where p and q agree it is 0 with gradient 0.

    Raises:
      ValueError: the shapes differ.
    """
    log_p, log_q = _log_probs(logits_p, logits_q, axis, where)
    return _tsallis(log_p, log_q, 1.0, axis)


def reverse_kl(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""Kullback-Leibler divergence with the arguments exchanged: :math:`KL(q \| p)`.

    Arguments, result and errors as in `kl_divergence`.
    """
    log_p, log_q = _log_probs(logits_p, logits_q, axis, where)
    return _tsallis(log_q, log_p, 1.0, axis)


def symmetric_kl(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""Jeffreys divergence, the sum (not the mean) of both directions.

    .. math:: KL(p \| q) + KL(q \| p)

    Arguments, result and errors as in `kl_divergence`.
    """
    log_p, log_q = _log_probs(logits_p, logits_q, axis, where)
    return _tsallis(log_p, log_q, 1.0, axis) + _tsallis(log_q, log_p, 1.0, axis)


def jensen_shannon(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""Jensen-Shannon divergence, at most log 2.

    .. math:: \tfrac12 KL(p \| m) + \tfrac12 KL(q \| m), \qquad m = \tfrac12 (p + q)

    Arguments, result and errors as in `kl_divergence`.
    """
    log_p, log_q = _log_probs(logits_p, logits_q, axis, where)
    # A class impossible in both would give logaddexp a nan gradient: add on zeros there.
    possible = jnp.isfinite(log_p) | jnp.isfinite(log_q)
    added = jnp.logaddexp(jnp.where(possible, log_p, 0.0), jnp.where(possible, log_q, 0.0))
    log_m = jnp.where(possible, added, log_p) - jnp.log(2.0).astype(log_p.dtype)
    return 0.5 * (_tsallis(log_p, log_m, 1.0, axis) + _tsallis(log_q, log_m, 1.0, axis))


def tsallis_divergence(
    logits_p: jax.Array,
    logits_q: jax.Array,
    *,
    order: jax.typing.ArrayLike,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Tsallis relative entropy; order 1 is KL.

    .. math:: D_a(p \| q) = \frac{\sum_k p_k^a q_k^{1-a} - 1}{a - 1}

    Args:
      logits_p: [..., classes] float.
      logits_q: same shape.
      order: a > 0; may be traced.
      axis: the axis of the classes.
      where: classes to include, as in `kl_divergence`.

    Returns:
      [...] float32 at least, >= 0.

    Raises:
      ValueError: the shapes differ, or `order` is not > 0.
    """
    check_number("order", order, above=0.0)
    log_p, log_q = _log_probs(logits_p, logits_q, axis, where)
    return _tsallis(log_p, log_q, order, axis)


def renyi_divergence(
    logits_p: jax.Array,
    logits_q: jax.Array,
    *,
    order: jax.typing.ArrayLike,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Rényi divergence; order 1 is KL.

    .. math:: R_a(p \| q) = \frac{\log \sum_k p_k^a q_k^{1-a}}{a - 1}
              = \frac{\log(1 + (a - 1) D_a(p \| q))}{a - 1}

    with the Tsallis divergence :math:`D_a`. Arguments, result and errors as in
    `tsallis_divergence`.
    """
    check_number("order", order, above=0.0)
    log_p, log_q = _log_probs(logits_p, logits_q, axis, where)
    d, is_kl, d_safe = _excess_order(order, log_p.dtype)
    # The power sum overflows for high orders long before its logarithm is large: take that from
    # logsumexp, and the small values, which would cancel there, from the Tsallis divergence.
    possible = jnp.isfinite(log_p) & (jnp.isfinite(log_q) | (d > 0))
    exponent = jnp.where(possible, d * (jnp.where(possible, log_p, 0.0) - log_q) + log_p, -jnp.inf)
    log_sum = jax.nn.logsumexp(exponent, axis)
    small = is_kl | (jnp.abs(d * _tsallis(log_p, log_q, order, axis)) < 0.5)
    # Elsewhere an overflow in the branch that is not selected would make the gradient nan.
    keep = jnp.expand_dims(small, axis)
    log_p, log_q = (jnp.where(keep, x, jnp.zeros_like(x)) for x in (log_p, log_q))
    tsallis = _tsallis(log_p, log_q, order, axis)
    from_tsallis = jnp.where(is_kl, tsallis, jnp.log1p(d * tsallis) / d_safe)
    return jnp.where(small, from_tsallis, log_sum / d_safe)


def l2_distance(
    logits_p: jax.Array, logits_q: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
    r"""Euclidean distance of the logits themselves (not of the probabilities).

    .. math:: \| z_p - z_q \|_2

    Arguments and errors as in `kl_divergence`; adding a constant to one side changes the value.
    The gradient at distance 0 is 0.
    """
    logits_p, logits_q = _same_shape(logits_p, logits_q)
    difference = logits_p - logits_q
    if where is not None:
        difference = jnp.where(where, difference, jnp.zeros_like(difference))
    squared = jnp.sum(jnp.square(difference), axis)
    positive = squared > 0
    root = jnp.sqrt(jnp.where(positive, squared, jnp.ones_like(squared)))
    return jnp.where(positive, root, jnp.zeros_like(root))


def mmd(
    logits_p: jax.Array,
    logits_q: jax.Array,
    *,
    bandwidths: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Maximum mean discrepancy of two batches of logits, inverse multiquadric kernel.

    .. math:: \mathrm{mean}_{ij} \left[ k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j) \right],
              \qquad k(x, y) = \sum_b (b^2 + \|x - y\|^2)^{-1/2}

    The biased V-statistic, diagonal included. It compares the two batches as sets, so it is one
    number for the batch, unlike the other divergences.

    Args:
      logits_p: [..., classes] float; the leading axes together are the batch.
      logits_q: same shape.
      bandwidths: the b of the kernel.
      where: [...] bool, examples (not classes) to include.

    Returns:
      [] float32 at least, >= 0; 0 for an empty mask.

    Raises:
      ValueError: the shapes differ.

    Source: kernel "imq2" of the code released with TRAM (arXiv:2310.03646), which in addition
    divides by the batch size.
    """
    logits_p, logits_q = _same_shape(logits_p, logits_q)
    classes = logits_p.shape[-1]
    weights = jnp.ones(logits_p.shape[:-1], logits_p.dtype)
    if where is not None:
        weights = jnp.broadcast_to(where, weights.shape).astype(weights.dtype)
    weights = weights.reshape(-1) / jnp.maximum(jnp.sum(weights), jnp.ones([], weights.dtype))
    points = jnp.concatenate([logits_p.reshape(-1, classes), logits_q.reshape(-1, classes)])
    signed_weights = jnp.concatenate([weights, -weights])

    squares = jnp.sum(jnp.square(points), -1)
    gram = jnp.matmul(points, points.T, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.maximum(
        squares[:, None] + squares[None, :] - 2 * gram, jnp.zeros([], gram.dtype)
    )
    kernel = sum(jax.lax.rsqrt(b**2 + distances) for b in bandwidths)
    discrepancy = jnp.einsum("i,ij,j->", signed_weights, kernel, signed_weights)
    return non_negative(discrepancy)


def gaussian_kl(
    mean_p: jax.Array,
    log_std_p: jax.Array,
    mean_q: jax.Array,
    log_std_q: jax.Array,
    *,
    axis: int = -1,
) -> jax.Array:
    r"""Kullback-Leibler divergence of diagonal Gaussians, p from q.

    .. math:: \sum_i \log\frac{\sigma_{q,i}}{\sigma_{p,i}}
              + \frac{\sigma_{p,i}^2 + (\mu_{p,i} - \mu_{q,i})^2}{2 \sigma_{q,i}^2} - \frac12

    Args:
      mean_p: [..., dimensions] float.
      log_std_p: broadcastable to the means, natural logarithm of the standard deviation.
      mean_q: same shape as `mean_p`.
      log_std_q: as `log_std_p`.
      axis: the axis of the dimensions.

    Returns:
      [...] in nats, float32 at least, >= 0.

    Raises:
      ValueError: the shapes of the means differ.
    """
    mean_p, log_std_p, mean_q, log_std_q = _gaussians(mean_p, log_std_p, mean_q, log_std_q)
    log_ratio = 2 * (log_std_p - log_std_q)
    squared_shift = jnp.square((mean_p - mean_q) * jnp.exp(-log_std_q))
    return 0.5 * jnp.sum(jnp.expm1(log_ratio) - log_ratio + squared_shift, axis)


def gaussian_renyi(
    mean_p: jax.Array,
    log_std_p: jax.Array,
    mean_q: jax.Array,
    log_std_q: jax.Array,
    *,
    order: float,
    axis: int = -1,
) -> jax.Array:
    r"""Rényi divergence of diagonal Gaussians, p from q.

    .. math:: \sum_i \frac{a (\mu_{p,i} - \mu_{q,i})^2}{2 s_i^2}
              + \frac{1}{1 - a} \log\frac{s_i}{\sigma_{p,i}^{1-a} \sigma_{q,i}^{a}},
              \qquad s_i^2 = a \sigma_{q,i}^2 + (1 - a) \sigma_{p,i}^2

    Infinite where :math:`s_i^2 \le 0`, which happens only for orders above 1.

    Args:
      mean_p: [..., dimensions] float.
      log_std_p: broadcastable to the means, natural logarithm of the standard deviation.
      mean_q: same shape as `mean_p`.
      log_std_q: as `log_std_p`.
      order: a > 0, a Python number; 1 is KL.
      axis: the axis of the dimensions.

    Returns:
      [...] float32 at least, >= 0.

    Raises:
      ValueError: the shapes of the means differ, or `order` is not > 0.

    Source: Gil, Alajaji and Linder, Rényi divergence measures for commonly used univariate
    continuous distributions, Information Sciences 249 (2013), Table 2.
    """
    check_number("order", order, above=0.0)
    if order == 1:
        return gaussian_kl(mean_p, log_std_p, mean_q, log_std_q, axis=axis)
    mean_p, log_std_p, mean_q, log_std_q = _gaussians(mean_p, log_std_p, mean_q, log_std_q)
    # In units of sigma_q: s^2 / sigma_q^2 = 1 + (1 - a) (sigma_p^2 / sigma_q^2 - 1).
    log_ratio = 2 * (log_std_p - log_std_q)
    excess = (1 - order) * jnp.expm1(log_ratio)
    finite = excess > -1
    excess = jnp.where(finite, excess, jnp.zeros_like(excess))
    squared_shift = jnp.square((mean_p - mean_q) * jnp.exp(-log_std_q))
    term = order * squared_shift / (1 + excess)
    term = term + jnp.log1p(excess) / (1 - order) - log_ratio
    return 0.5 * jnp.sum(jnp.where(finite, term, jnp.full_like(term, jnp.inf)), axis)


def _log_probs(
    logits_p: jax.Array, logits_q: jax.Array, axis: int, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Both log-softmaxes, float32 at least; masked classes have probability 0 in both."""
    logits_p, logits_q = _same_shape(logits_p, logits_q)
    if where is not None:
        where = jnp.broadcast_to(where, logits_p.shape)
        # Half the lowest number, so that subtracting the normaliser cannot overflow.
        lowest = jnp.full_like(logits_p, float(np.finfo(logits_p.dtype).min) / 2)
        logits_p = jnp.where(where, logits_p, lowest)
        logits_q = jnp.where(where, logits_q, lowest)
    return jax.nn.log_softmax(logits_p, axis), jax.nn.log_softmax(logits_q, axis)


def _tsallis(
    log_p: jax.Array, log_q: jax.Array, order: jax.typing.ArrayLike, axis: int
) -> jax.Array:
    r"""Tsallis divergence from log-probabilities, each term >= 0.

    With d = order - 1 a term is :math:`p [ (e^{d t} - 1) / d + e^{-t} - 1 ]`, for d = 0
    :math:`p [ t + e^{-t} - 1 ]`; a class that p excludes counts q.
    """
    d, is_kl, d_safe = _excess_order(order, log_p.dtype)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    zeros = jnp.zeros_like(p)
    # Logits of -inf make t infinite or nan, and a gradient that meets them, even times 0, is nan:
    # each branch therefore computes on zeros where it is not the one selected.
    possible = p > 0
    log_p = jnp.where(possible, log_p, zeros)
    t = jnp.where(possible, log_p - log_q, zeros)

    # (e^{d t} - 1) / d: expm1 keeps the digits of small d t, for orders close to 1 also far from
    # p = q; but e^{d t} may overflow where p e^{d t} does not.
    slow = jnp.abs(d * jnp.where(is_kl, zeros, t)) < 1
    gain_kl = p * jnp.where(is_kl, t, zeros)
    gain_slow = p * jnp.expm1(d * jnp.where(slow & ~is_kl, t, zeros)) / d_safe
    power = jnp.exp(log_p + d * jnp.where(slow, zeros, t))
    gain = jnp.where(is_kl, gain_kl, jnp.where(slow, gain_slow, (power - p) / d_safe))

    # e^{-t} - 1: likewise, and p e^{-t} = q.
    near = jnp.abs(t) < 1
    balance = jnp.where(near, p * jnp.expm1(-jnp.where(near, t, zeros)), q - p)

    term = jnp.where(possible, gain + balance, q)
    return non_negative(jnp.sum(term, axis))


def _excess_order(
    order: jax.typing.ArrayLike, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """order - 1, whether that is 0, and a divisor that never is."""
    d = jnp.asarray(order, dtype) - 1
    is_kl = d == 0
    return d, is_kl, jnp.where(is_kl, jnp.ones_like(d), d)


def _same_shape(logits_p: jax.Array, logits_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as arrays of one dtype, float32 at least."""
    logits_p, logits_q = jnp.asarray(logits_p), jnp.asarray(logits_q)
    if logits_p.shape != logits_q.shape:
        raise ValueError(
            "logits_p and logits_q must have the same shape, got "
            f"{logits_p.shape} and {logits_q.shape}"
        )
    dtype = reduction_dtype((logits_p, logits_q))
    return logits_p.astype(dtype), logits_q.astype(dtype)


def _gaussians(
    mean_p: jax.Array, log_std_p: jax.Array, mean_q: jax.Array, log_std_q: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """All four as arrays of the means' shape and dtype, float32 at least."""
    if jnp.shape(mean_p) != jnp.shape(mean_q):
        raise ValueError(
            "mean_p and mean_q must have the same shape, got "
            f"{jnp.shape(mean_p)} and {jnp.shape(mean_q)}"
        )
    mean_p, mean_q = _same_shape(mean_p, mean_q)
    log_std_p, log_std_q = (
        jnp.broadcast_to(jnp.asarray(x).astype(mean_p.dtype), mean_p.shape)
        for x in (log_std_p, log_std_q)
    )
    return mean_p, log_std_p, mean_q, log_std_q
