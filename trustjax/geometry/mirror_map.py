r"""Mirror maps: the geometries in which mirror descent measures its steps.

A convex potential psi gives dual coordinates z = grad psi(x) and the Bregman divergence

    B(x, y) = psi(x) - psi(y) - <grad psi(y), x - y> >= 0.

One step of mirror descent with gradient g and rate t, the step s = t g, is z <- z - s; then back.
Each map writes the divergence, and where it can the move x_new - x, in a form that neither
overflows nor cancels. A NaN stays one: where the entries of an array share a norm or a normaliser,
in all of them.

Sources: Nemirovski, Yudin, 1983; Beck, Teboulle, Oper. Res. Lett. 31, 2003 (simplex); Gentile,
Machine Learning 53, 2003 (p-norm); Azizan, Lale, Hassibi, arXiv:1906.03830 (separable p); Ghai,
Hazan, Singer, arXiv:1902.01903 (hypentropy).
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
    power_gap,
    power_of_size,
    relative_entropy,
    spectral_gap,
)
from trustjax.geometry.norm import non_negative

PyTree = Any
Array = jax.Array


class MirrorMap(NamedTuple):
    """A mirror map on one array of floats; sums run over all of its entries.

    Attributes:
      name: of the map.
      potential: x -> psi(x), float [].
      to_dual: x -> grad psi(x), the shape of x.
      to_primal: its inverse.
      divergence: (x, y) -> B(x, y), float [], >= 0.
      move: (x, s) -> x_new - x for the step s = rate times gradient, the shape of x.
      bound: (x, s) -> float [], half the squared dual norm of the step: an upper bound of
        B(x_new, x) where the map is strongly convex in a norm, else its value for small steps.
      domain: what every array must fulfil, for the error text.
      contains: x, a NumPy array -> whether it fulfils that.
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
      mirror_map: such as `hypentropy(1.0)`.
      x, y: trees of floats of one structure; other leaves and empty ones are skipped.

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


def euclidean() -> MirrorMap:
    r"""Gradient descent.

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
    r"""Exponentiated gradient without normalisation, for numbers >= 0; zeros stay zero.

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
    r"""Exponentiated gradient on probability vectors along `axis`; zeros stay zero.

    .. math:: \psi(x) = \sum_i x_i \log x_i, \qquad
              x_i \leftarrow \frac{x_i e^{-s_i}}{\sum_j x_j e^{-s_j}}, \qquad B(x, y) = KL(x \| y)

    Normalised in log-space at every step, so sums stay 1. An update is added to x in the precision
    of x: a component that is to shrink below a rounding error of itself in one step, s > 16 in
    float32, becomes 0 for good.

    Args:
      axis: of the probabilities; the others count vectors.
    """

    def move(x: Array, s: Array) -> Array:
        return _softmax_where(_log(x) - s, ~(x <= 0), axis) - x

    def bound(x: Array, s: Array) -> Array:
        # The step may be shifted by any constant: half its range is its dual norm.
        reach = 0.5 * (jnp.max(s, axis=axis) - jnp.min(s, axis=axis))
        return 0.5 * jnp.sum(jnp.square(reach))

    def contains(x: np.ndarray) -> bool:
        sums = np.sum(x, axis=axis, dtype=np.float64)
        slack = 1e-4 if x.dtype.itemsize >= 4 else 0.05  # bfloat16 has three digits
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


def p_norm(p: jax.typing.ArrayLike) -> MirrorMap:
    r"""The p-norm algorithm: half the squared p-norm of all entries of an array.

    .. math:: \psi(x) = \tfrac12 \|x\|_p^2, \qquad
              z_i = \mathrm{sign}(x_i) |x_i|^{p-1} \|x\|_p^{2-p}

    The inverse is the same with q = p / (p - 1). p = 2 is gradient descent; p = 1 + 1 / log n goes
    with sparse targets. The bound holds for p <= 2.

    Args:
      p: > 1; may be traced.

    Raises:
      ValueError: p <= 1.
    """
    check_number("p", p, above=1.0)

    def dual(x: Array, power: Array) -> Array:
        # Homogeneous of degree 1: powers are taken of x over its largest entry.
        largest, share = _share(x)
        norm = _root_of_sum(share, power)
        scale = largest * norm ** (2 - power)
        return jnp.where(largest == 0, 0.0, scale * _signed_power(share, power - 1))

    def norm_of(x: Array, power: Array) -> Array:
        largest, share = _share(x)
        return largest * _root_of_sum(share, power)

    def exponents(x: Array) -> tuple[Array, Array]:
        power = jnp.asarray(p, x.dtype)
        return power, power / (power - 1)

    def to_dual(x: Array) -> Array:
        return dual(x, exponents(x)[0])

    def to_primal(z: Array) -> Array:
        return dual(z, exponents(z)[1])

    def divergence(x: Array, y: Array) -> Array:
        largest, _ = _share(jax.lax.stop_gradient(jnp.stack([x, y])))
        safe = jnp.where(largest == 0, 1.0, largest)
        # Homogeneous of degree 2. Differences are taken before the division rounds.
        x, y, move = x / safe, y / safe, (x - y) / safe
        power, _ = exponents(x)
        first, second = (0.5 * jnp.square(norm_of(a, power)) for a in (x, y))
        plain = non_negative(first + second - jnp.sum(x * to_dual(y)))
        # With S the sum of |y|^p, T that of the gaps of |x|^p, and 1 + u the quotient of the sums,
        # B is |y|^2 times T / (p S) plus half the gap of (1 + u)^(2 / p): nothing cancels.
        total = jnp.sum(power_of_size(y, power))
        total = jnp.where(total == 0, 1.0, total)
        gaps = jnp.sum(power_gap(y, move, power)) / total
        u = gaps + power * jnp.sum(_signed_power(y, power - 1) * move) / total
        near = jnp.abs(u) < 0.5
        turn = power_gap(jnp.ones_like(u), jnp.where(near, u, 0.0), 2 / power)
        exact = total ** (2 / power) * (jnp.where(near, gaps, 0.0) / power + 0.5 * turn)
        return jnp.square(largest) * jnp.where(near, non_negative(exact), plain)

    def bound(x: Array, s: Array) -> Array:
        power, conjugate = exponents(s)
        return 0.5 * jnp.square(norm_of(s, conjugate)) / jnp.minimum(power - 1, 1)

    return MirrorMap(
        name="p_norm",
        potential=lambda x: 0.5 * jnp.square(norm_of(x, exponents(x)[0])),
        to_dual=to_dual,
        to_primal=to_primal,
        divergence=divergence,
        move=lambda x, s: to_primal(to_dual(x) - s) - x,
        bound=bound,
    )


def separable_p(p: jax.typing.ArrayLike) -> MirrorMap:
    r"""The p-th powers of the entries, each for itself: stochastic mirror descent's q-norm.

    .. math:: \psi(x) = \tfrac1p \sum_i |x_i|^p, \qquad z_i = \mathrm{sign}(x_i) |x_i|^{p-1}

    Args:
      p: > 1; may be traced. 2 is gradient descent.

    Raises:
      ValueError: p <= 1.
    """
    check_number("p", p, above=1.0)

    def power_of(x: Array) -> Array:
        return jnp.asarray(p, x.dtype)

    def to_dual(x: Array) -> Array:
        return _signed_power(x, power_of(x) - 1)

    def to_primal(z: Array) -> Array:
        return _signed_power(z, 1 / (power_of(z) - 1))

    def divergence(x: Array, y: Array) -> Array:
        power = power_of(x)
        return jnp.sum(non_negative(power_gap(y, x - y, power))) / power

    def bound(x: Array, s: Array) -> Array:
        power = power_of(x)
        conjugate = power / (power - 1)
        # 1 / curvature, which is infinite at 0 for p > 2: there, and near it, uniform convexity.
        curved = 0.5 * jnp.square(s) * power_of_size(x, 2 - power) / (power - 1)
        uniform = 2 ** jnp.maximum((power - 2) * (conjugate - 1), 0) * power_of_size(s, conjugate)
        near = (x == 0) | (curved > uniform)
        return jnp.sum(jnp.where((power > 2) & near, uniform, curved))

    return MirrorMap(
        name="separable_p",
        potential=lambda x: jnp.sum(power_of_size(x, power_of(x))) / power_of(x),
        to_dual=to_dual,
        to_primal=to_primal,
        divergence=divergence,
        move=lambda x, s: to_primal(to_dual(x) - s) - x,
        bound=bound,
    )


def hypentropy(beta: jax.typing.ArrayLike = 1.0) -> MirrorMap:
    r"""Hyperbolic entropy: between gradient descent and EG+-, for numbers of both signs.

    .. math:: \psi(x) = \sum_i x_i \,\mathrm{asinh}(x_i / \beta) - \sqrt{x_i^2 + \beta^2}, \qquad
              z = \mathrm{asinh}(x / \beta)

    With beta large a step is gradient descent with rate beta t; with beta small it is the one of
    EG+-: x = u - v, u v = beta^2 / 4, u <- u exp(-s), v <- v exp(s).

    Args:
      beta: > 0; may be traced.

    Raises:
      ValueError: beta <= 0.
    """
    check_number("beta", beta, above=0.0)

    def scale(x: Array) -> Array:
        return jnp.asarray(beta, x.dtype)

    def move(x: Array, s: Array) -> Array:
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
    r"""`hypentropy` of the singular values of every trailing matrix: for low rank.

    .. math:: \psi(X) = \sum_k \psi_\beta(\sigma_k(X)), \qquad
              Z = U \, \mathrm{asinh}(\Sigma / \beta) \, V^\top

    Two singular value decompositions a step. A derivative through the step is not finite where
    singular values coincide.

    Args:
      beta: > 0; may be traced.

    Raises:
      ValueError: beta <= 0; arrays with fewer than two axes.
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
        move=lambda x, s: to_primal(to_dual(x) - s) - x,
        bound=bound,
        domain="matrices",
        contains=lambda x: x.ndim >= 2,
    )


# ---- pieces that are safe at zero, with finite slopes


def _log(x: Array) -> Array:
    """log x, with 0 for x <= 0."""
    return jnp.log(jnp.where(x <= 0, 1.0, x))


def _x_log_x(x: Array) -> Array:
    return x * _log(x)


def _softmax_where(logits: Array, where: Array, axis: int) -> Array:
    """Softmax over the entries that `where` includes; 0 for the others."""
    found: Array = jax.nn.softmax(logits, axis=axis, where=where)
    return found


def _signed_power(x: Array, power: Array) -> Array:
    return jnp.sign(x) * power_of_size(x, power)


def _share(x: Array) -> tuple[Array, Array]:
    """The size of the largest entry, and x over it."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    return largest, x / jnp.where(largest == 0, 1.0, largest)


def _root_of_sum(share: Array, power: Array) -> Array:
    """The p-norm of numbers of size 1 at most; 1 where all are 0."""
    total = jnp.sum(power_of_size(share, power))
    return jnp.where(total == 0, 1.0, total) ** (1 / power)
