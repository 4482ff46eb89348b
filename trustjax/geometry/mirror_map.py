r"""Mirror maps: the geometries in which mirror descent measures its steps.

A convex potential psi gives dual coordinates z = grad psi(x) and the Bregman divergence

    B(x, y) = psi(x) - psi(y) - <grad psi(y), x - y> >= 0.

Mirror descent with gradient g and rate t takes the step s = t g in these: z <- z - s, and maps z
back to x. Each map computes the divergence, and where possible the move x_new - x, in a form that
neither overflows nor cancels. A NaN stays a NaN: in its own entry, or in the whole array if its
entries share a norm or a normaliser. The maps made of powers are in `trustjax.geometry.power_map`.

Sources: Nemirovski, Yudin, 1983; Beck, Teboulle, Oper. Res. Lett. 31, 2003 (simplex); Ghai, Hazan,
Singer, arXiv:1902.01903 (hypentropy).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustjax._checks import check_number
from trustjax._dtypes import is_floating, widened
from trustjax.geometry._gaps import (
    halves,
    hyperbolic_gap,
    relative_entropy,
    spectral_gap,
)

PyTree = Any
Array = jax.Array


class MirrorMap(NamedTuple):
    """A mirror map on one array of floats; sums run over all of its entries.

    Attributes:
      name: The name of the map, for error messages.
      potential: `x -> psi(x)`, float [].
      to_dual: `x -> grad psi(x)`, of the shape of x.
      to_primal: The inverse of `to_dual`.
      divergence: `(x, y) -> B(x, y)`, float [], >= 0.
      move: `(x, s) -> x_new - x` for the step s = rate times gradient, of the shape of x.
      bound: `(x, s) -> half the squared dual norm of the step`, float []. This is an upper bound of
        B(x_new, x) if the map is strongly convex in a norm, otherwise its value for small steps.
      domain: What every array must be, for error messages.
      contains: Whether a NumPy array is in the domain.
    """

    name: str
    potential: Callable[[Array], Array]
    to_dual: Callable[[Array], Array]
    to_primal: Callable[[Array], Array]
    divergence: Callable[[Array, Array], Array]
    move: Callable[[Array, Array], Array]
    bound: Callable[[Array, Array], Array]
    domain: str = "real numbers"
    contains: Callable[[np.ndarray], bool] = lambda x: True


def bregman_divergence(mirror_map: MirrorMap, x: PyTree, y: PyTree) -> jax.Array:
    r"""Bregman divergence of x from y, summed over the leaves of two trees.

    .. math:: B(x, y) = \psi(x) - \psi(y) - \langle \nabla \psi(y), x - y \rangle

    Args:
      mirror_map: The map, such as `hypentropy(1.0)`.
      x, y: Trees of floats of the same structure. Other leaves and empty ones are skipped.

    Returns:
      [], float32 at least, >= 0.
    """
    both = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    found = [
        mirror_map.divergence(widened(a), widened(b))
        for a, b in both
        if is_floating(a) and np.size(a) > 0
    ]
    return sum(found[1:], start=found[0]) if found else jnp.zeros([])


def move_in_dual(
    to_dual: Callable[[Array], Array], to_primal: Callable[[Array], Array], x: Array, s: Array
) -> Array:
    """x_new - x by the two maps, in which rounding cancels: without a step it is exactly 0.

    The way there and back does not end at x itself. Its error, which has the same sign in every
    step, would shrink the weights, and delete those whose dual coordinate underflows.
    """
    z = to_dual(x)
    return to_primal(z - s) - to_primal(z)


def euclidean() -> MirrorMap:
    r"""The map of gradient descent: half the squared Euclidean norm.

    .. math:: \psi(x) = \tfrac12 \|x\|_2^2, \qquad x \leftarrow x - s
    """
    return MirrorMap(
        name="euclidean",
        potential=lambda x: 0.5 * jnp.sum(jnp.square(x)),
        to_dual=lambda x: x,
        to_primal=lambda z: z,
        divergence=lambda x, y: 0.5 * jnp.sum(jnp.square(x - y)),
        move=lambda x, s: -s,
        bound=lambda x, s: 0.5 * jnp.sum(jnp.square(s)),
    )


def negative_entropy() -> MirrorMap:
    r"""The map of exponentiated gradient without normalisation, for numbers >= 0; zeros stay zero.

    .. math:: \psi(x) = \sum_i x_i \log x_i - x_i, \qquad x_i \leftarrow x_i e^{-s_i}
    """
    return MirrorMap(
        name="negative_entropy",
        potential=lambda x: jnp.sum(_x_log_x(x) - x),
        to_dual=jnp.log,
        to_primal=jnp.exp,
        divergence=lambda x, y: jnp.sum(relative_entropy(x, y)),
        move=lambda x, s: x * jnp.expm1(-s),
        bound=lambda x, s: 0.5 * jnp.sum(x * jnp.square(s)),
        domain="numbers >= 0",
        contains=lambda x: bool(np.all(x >= 0)),
    )


def simplex(*, axis: int = -1) -> MirrorMap:
    r"""The map of exponentiated gradient on probability vectors along `axis`; zeros stay zero.

    .. math:: \psi(x) = \sum_i x_i \log x_i, \qquad
              x_i \leftarrow \frac{x_i e^{-s_i}}{\sum_j x_j e^{-s_j}}, \qquad B(x, y) = KL(x \| y)

    Every step is normalised in log-space, so the sums stay 1. An update is added to x in the
    precision of x: a component that one step shrinks below a rounding error of itself (s > 16 in
    float32) becomes 0 and remains 0.

    Args:
      axis: The axis of the probabilities. The other axes count vectors.
    """

    def move(x: Array, s: Array) -> Array:
        return _softmax_where(_log(x) - s, ~(x <= 0), axis) - x

    def bound(x: Array, s: Array) -> Array:
        # The step may be shifted by any constant, so its dual norm is half of its range.
        reach = 0.5 * (jnp.max(s, axis=axis) - jnp.min(s, axis=axis))
        return 0.5 * jnp.sum(jnp.square(reach))

    def contains(x: np.ndarray) -> bool:
        sums = np.sum(x, axis=axis, dtype=np.float64)
        slack = 1e-4 if x.dtype.itemsize >= 4 else 0.05  # bfloat16 has fewer than three digits
        return bool(np.all(x >= 0) and np.all(np.abs(sums - 1) <= slack))

    return MirrorMap(
        name="simplex",
        potential=lambda x: jnp.sum(_x_log_x(x)),
        to_dual=lambda x: 1 + jnp.log(x),
        to_primal=lambda z: jax.nn.softmax(z, axis=axis),
        divergence=lambda x, y: jnp.sum(relative_entropy(x, y)),
        move=move,
        bound=bound,
        domain=f"probabilities that sum to 1 along axis {axis}",
        contains=contains,
    )


def hypentropy(beta: jax.typing.ArrayLike = 1.0) -> MirrorMap:
    r"""The hyperbolic entropy, between gradient descent and EG+-, for numbers of both signs.

    .. math:: \psi(x) = \sum_i x_i \,\mathrm{asinh}(x_i / \beta) - \sqrt{x_i^2 + \beta^2}, \qquad
              z = \mathrm{asinh}(x / \beta)

    With a large beta a step is that of gradient descent with rate beta t. With a small beta it is
    that of EG+-, exponentiated gradient on both halves of x = u - v with u v = beta^2 / 4:
    u <- u exp(-s), v <- v exp(s).

    Args:
      beta: The scale below which the map is quadratic, > 0. It may be traced.

    Raises:
      ValueError: beta is not > 0.
    """
    check_number("beta", beta, above=0.0)

    def scale(x: Array) -> Array:
        return jnp.asarray(beta, x.dtype)

    def move(x: Array, s: Array) -> Array:
        # The moves of u and v, with the sign of x: neither cancels as the difference of sinh does.
        large, small = halves(x, scale(x))
        sign = jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)
        return sign * (large * jnp.expm1(-sign * s) - small * jnp.expm1(sign * s))

    def divergence(x: Array, y: Array) -> Array:
        return jnp.sum(hyperbolic_gap(x, y, scale(x)))

    return MirrorMap(
        name="hypentropy",
        potential=lambda x: jnp.sum(x * jnp.arcsinh(x / scale(x)) - jnp.hypot(x, scale(x))),
        to_dual=lambda x: jnp.arcsinh(x / scale(x)),
        to_primal=lambda z: scale(z) * jnp.sinh(z),
        divergence=divergence,
        move=move,
        bound=lambda x, s: 0.5 * jnp.sum(jnp.square(s) * jnp.hypot(x, scale(x))),
    )


def spectral_hypentropy(beta: jax.typing.ArrayLike = 1.0) -> MirrorMap:
    r"""`hypentropy` of the singular values of every trailing matrix, for matrices of low rank.

    .. math:: \psi(X) = \sum_k \psi_\beta(\sigma_k(X)), \qquad
              Z = U \, \mathrm{asinh}(\Sigma / \beta) \, V^\top

    A step takes three singular value decompositions. Derivatives of the step are not finite where
    singular values coincide.

    Args:
      beta: As in `hypentropy`.

    Raises:
      ValueError: beta is not > 0, or an array has fewer than two axes.
    """
    values = hypentropy(beta)

    def on_values(function: Callable[[Array], Array], matrix: Array) -> Array:
        if matrix.ndim < 2:
            raise ValueError(f"spectral_hypentropy takes matrices, got shape {matrix.shape}")
        left, sizes, right = jnp.linalg.svd(matrix, full_matrices=False)
        return (left * function(sizes)[..., None, :]) @ right

    def singular(matrix: Array) -> Array:
        return jnp.linalg.svd(matrix, compute_uv=False)

    def to_dual(x: Array) -> Array:
        return on_values(values.to_dual, x)

    def to_primal(z: Array) -> Array:
        return on_values(values.to_primal, z)

    def divergence(x: Array, y: Array) -> Array:
        gap = values.potential(singular(x)) - values.potential(singular(y))
        plain = gap - jnp.sum(to_dual(y) * (x - y))
        # The derivative of the plain form is good, but close matrices cancel in its value.
        exact = spectral_gap(x, y, jnp.asarray(beta, x.dtype))
        return plain + jax.lax.stop_gradient(exact - plain)

    def bound(x: Array, s: Array) -> Array:
        largest = jnp.hypot(jnp.max(singular(x), axis=-1), jnp.asarray(beta, x.dtype))
        return 0.5 * jnp.sum(largest[..., None, None] * jnp.square(s))

    return MirrorMap(
        name="spectral_hypentropy",
        potential=lambda x: values.potential(singular(x)),
        to_dual=to_dual,
        to_primal=to_primal,
        divergence=divergence,
        move=lambda x, s: move_in_dual(to_dual, to_primal, x, s),
        bound=bound,
        domain="matrices",
        contains=lambda x: x.ndim >= 2,
    )


# ---- pieces with finite values and derivatives at zero


def _log(x: Array) -> Array:
    """log x; 0 for x <= 0."""
    return jnp.log(jnp.where(x <= 0, 1.0, x))


def _x_log_x(x: Array) -> Array:
    return x * _log(x)


def _softmax_where(logits: Array, where: Array, axis: int) -> Array:
    """Softmax over the entries that `where` includes; 0 for the others."""
    found: Array = jax.nn.softmax(logits, axis=axis, where=where)
    return found
