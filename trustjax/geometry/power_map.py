r"""Mirror maps made of powers: the p-norm of an array, and the p-th powers of its entries.

Each is a `trustjax.geometry.mirror_map.MirrorMap`.

Sources: Gentile, Machine Learning 53, 2003 (p-norm); Azizan, Lale, Hassibi, arXiv:1906.03830
(separable p).
"""

import jax
import jax.numpy as jnp

from trustjax._checks import check_number
from trustjax.geometry._gaps import power_gap, power_of_size
from trustjax.geometry.mirror_map import Array, MirrorMap, move_in_dual
from trustjax.geometry.norm import non_negative


def p_norm(p: jax.typing.ArrayLike) -> MirrorMap:
    r"""The map of the p-norm algorithm: half the squared p-norm of all entries of an array.

    .. math:: \psi(x) = \tfrac12 \|x\|_p^2, \qquad
              z_i = \mathrm{sign}(x_i) |x_i|^{p-1} \|x\|_p^{2-p}

    The inverse is the same with q = p / (p - 1) in place of p. p = 2 is gradient descent, and
    p = 1 + 1 / log n suits sparse solutions among n unknowns. The bound holds for p <= 2.

    Args:
      p: The exponent, > 1. It may be traced.

    Raises:
      ValueError: p is not > 1.
    """
    check_number("p", p, above=1.0)

    def dual(x: Array, power: Array) -> Array:
        # Homogeneous of degree 1, so powers of x over its largest entry do, which cannot overflow.
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
        # Homogeneous of degree 2: both are divided by the largest entry of either, and the
        # difference before the division rounds.
        x, y, move = x / safe, y / safe, (x - y) / safe
        power, _ = exponents(x)
        first, second = (0.5 * jnp.square(norm_of(a, power)) for a in (x, y))
        plain = non_negative(first + second - jnp.sum(x * to_dual(y)))
        # Let S be the sum of |y|^p, T the sum of the gaps of |x|^p, and 1 + u the sum of |x|^p over
        # S. Then B is |y|^2 times (T / (p S) + half the gap of (1 + u)^(2 / p)): nothing cancels.
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
        move=lambda x, s: move_in_dual(to_dual, to_primal, x, s),
        bound=bound,
    )


def separable_p(p: jax.typing.ArrayLike) -> MirrorMap:
    r"""The sum of the p-th powers of the entries, the q-norm map of stochastic mirror descent.

    .. math:: \psi(x) = \tfrac1p \sum_i |x_i|^p, \qquad z_i = \mathrm{sign}(x_i) |x_i|^{p-1}

    Args:
      p: The exponent, > 1; 2 is gradient descent. It may be traced.

    Raises:
      ValueError: p is not > 1.
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
        # Half the square of the step over the curvature of psi. For p > 2 this is infinite at 0:
        # there and near 0 the uniform convexity of psi bounds the divergence instead.
        curved = 0.5 * jnp.square(s) * power_of_size(x, 2 - power) / (power - 1)
        curved = jnp.where(s == 0, 0.0, curved)  # the power may be infinite
        uniform = 2 ** jnp.maximum((power - 2) * (conjugate - 1), 0) * power_of_size(s, conjugate)
        near = (x == 0) | (curved > uniform)
        return jnp.sum(jnp.where((power > 2) & near, uniform, curved))

    return MirrorMap(
        name="separable_p",
        potential=lambda x: jnp.sum(power_of_size(x, power_of(x))) / power_of(x),
        to_dual=to_dual,
        to_primal=to_primal,
        divergence=divergence,
        move=lambda x, s: move_in_dual(to_dual, to_primal, x, s),
        bound=bound,
    )


def _signed_power(x: Array, power: Array) -> Array:
    return jnp.sign(x) * power_of_size(x, power)


def _share(x: Array) -> tuple[Array, Array]:
    """The absolute value of the largest entry, and x divided by it."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    return largest, x / jnp.where(largest == 0, 1.0, largest)


def _root_of_sum(share: Array, power: Array) -> Array:
    """The p-norm of numbers between -1 and 1; 1 if all of them are 0."""
    total = jnp.sum(power_of_size(share, power))
    return jnp.where(total == 0, 1.0, total) ** (1 / power)
