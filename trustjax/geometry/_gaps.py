"""Gaps between a convex function and its tangent, without cancellation where they touch.

The Bregman divergences of the mirror maps, and the terms of those between distributions.
"""

import jax
import jax.numpy as jnp

from trustjax.geometry.norm import non_negative


def exponential_gap(t: jax.Array) -> jax.Array:
    r""":math:`e^t - 1 - t`, >= 0, elementwise; near 0, where `expm1(t) - t` cancels, t^2 / 2."""
    near = jnp.abs(t) < 0.5
    small = jnp.where(near, t, jnp.zeros_like(t))
    last = 15 if t.dtype == jnp.float64 else 9  # so that what is left out rounds away
    series = jnp.ones_like(t)
    for k in range(last, 2, -1):
        series = 1 + small / k * series
    far = jnp.where(near, jnp.ones_like(t), t)
    return jnp.where(near, 0.5 * small * small * series, jnp.expm1(far) - far)


def relative_entropy(x: jax.Array, y: jax.Array) -> jax.Array:
    r""":math:`x \log(x / y) - x + y`, >= 0, elementwise, for numbers >= 0.

    x = 0 gives y, and y = 0 < x infinity.
    """
    x_is_zero, y_is_zero = x <= 0, y <= 0
    edge = x_is_zero | y_is_zero
    x_safe, y_safe = (jnp.where(edge, jnp.ones_like(z), z) for z in (x, y))
    # Logarithms of close numbers have too few digits for their difference.
    close = jnp.abs(x_safe - y_safe) < 0.5 * y_safe
    ratio = jnp.where(close, x_safe - y_safe, jnp.zeros_like(x)) / y_safe
    t = jnp.where(close, jnp.log1p(ratio), jnp.log(x_safe) - jnp.log(y_safe))
    near = jnp.abs(t) < 0.5
    gap = x_safe * exponential_gap(-jnp.where(near, t, jnp.zeros_like(t)))
    inside = jnp.where(near, gap, x_safe * t - (x_safe - y_safe))
    return jnp.where(x_is_zero, y, jnp.where(y_is_zero, jnp.full_like(x, jnp.inf), inside))


def power_gap(y: jax.Array, move: jax.Array, power: jax.Array) -> jax.Array:
    r""":math:`|x|^c - |y|^c - c \, \mathrm{sign}(y) |y|^{c-1} (x - y)` with x = y + `move`.

    Elementwise, c = `power`; >= 0 for c >= 1, <= 0 for c < 1.
    """
    x = y + move
    size_x, size_y = jnp.abs(x), jnp.abs(y)
    # Within this range of the quotient, with r = log(x / y) and phi the exponential gap, it is
    # |y|^c (phi(c r) - c phi(r)), which does not cancel; elsewhere nothing does.
    close = (x * jnp.sign(y) > 0) & (size_x < 8 * size_y) & (size_y < 8 * size_x)
    zero = jnp.zeros_like(x)
    base = jnp.where(close, y, jnp.ones_like(x))
    r = jnp.log1p(jnp.where(close, move, zero) / base)
    gap = exponential_gap(power * r) - power * exponential_gap(r)
    x, y, move = (jnp.where(close, zero, z) for z in (x, y, move))
    slope = power * jnp.sign(y) * power_of_size(y, power - 1)
    far = power_of_size(x, power) - power_of_size(y, power) - slope * move
    return jnp.where(close, jnp.abs(base) ** power * gap, far)


def power_of_size(x: jax.Array, power: jax.Array) -> jax.Array:
    """|x|^power, and 0 at 0, with slope 0 there."""
    zero = x == 0
    size = jnp.where(zero, jnp.ones_like(x), jnp.abs(x))
    return jnp.where(zero, jnp.zeros_like(x), size**power)


def hyperbolic_gap(x: jax.Array, y: jax.Array, beta: jax.Array) -> jax.Array:
    """The Bregman divergence of x from y under hypentropy, elementwise."""
    root_x, root_y = jnp.hypot(x, beta), jnp.hypot(y, beta)
    # asinh(x / beta) - asinh(y / beta): of one sign, by the addition theorem, which keeps x - y.
    same = x * jnp.sign(y) > 0
    size_x, size_y = (jnp.where(same, jnp.abs(z), 1.0) for z in (x, y))
    root = (size_x * root_y + size_y * root_x) / (size_x + size_y)
    apart = jnp.arcsinh(x / beta) - jnp.arcsinh(y / beta)
    turn = jnp.where(same, jnp.arcsinh(jnp.where(same, x - y, 0.0) / root), apart)
    # Relative entropy of both halves of EG+-, the gaps of which do not cancel.
    near = jnp.abs(turn) < 0.5
    large, small = halves(x, beta)
    inwards = jnp.where(x < 0, -1.0, 1.0).astype(x.dtype) * jnp.where(near, turn, 0.0)
    gap = large * exponential_gap(-inwards) + small * exponential_gap(inwards)
    far = x * turn - (x - y) * ((x + y) / (root_x + root_y))
    return jnp.where(near, gap, non_negative(far))


def spectral_gap(x: jax.Array, y: jax.Array, beta: jax.Array) -> jax.Array:
    r"""The Bregman divergence of x from y under spectral hypentropy, summed over the matrices.

    A matrix has the eigenvalues +-sigma, and zeros, in the symmetric [[0, X], [X', 0]]. Between
    symmetric matrices it is a sum over pairs of eigenvectors, :math:`\sum_{kl} \langle v_k, w_l
    \rangle^2 B(\lambda_k, \mu_l)`, with no negative term.
    """
    left_x, values_x, right_x = jnp.linalg.svd(x, full_matrices=False)
    left_y, values_y, right_y = jnp.linalg.svd(y, full_matrices=False)
    left = jnp.matrix_transpose(left_x) @ left_y
    right = right_x @ jnp.matrix_transpose(right_y)
    rows, columns = values_x[..., :, None], values_y[..., None, :]
    pairs = jnp.square(left + right) * hyperbolic_gap(rows, columns, beta)
    pairs += jnp.square(left - right) * hyperbolic_gap(rows, -columns, beta)
    total = 0.25 * jnp.sum(pairs)
    zeros = jnp.zeros_like(values_x)
    of_y, of_x = hyperbolic_gap(zeros, values_y, beta), hyperbolic_gap(values_x, zeros, beta)
    # What the vectors of one matrix have outside of the span of the other's belongs to zero.
    for a, b, overlap in (
        (left_x, left_y, left),
        (jnp.matrix_transpose(right_x), jnp.matrix_transpose(right_y), right),
    ):
        outside_y = jnp.sum(jnp.square(b - a @ overlap), -2)
        outside_x = jnp.sum(jnp.square(a - b @ jnp.matrix_transpose(overlap)), -2)
        total += 0.5 * jnp.sum(outside_y * of_y + outside_x * of_x)
    return total


def halves(x: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sqrt(x^2 + beta^2) + |x|) / 2 and beta^2 / 4 over it: u and v of EG+-, by size."""
    large = 0.5 * (jnp.hypot(x, beta) + jnp.abs(x))
    return large, beta * (beta / (4 * large))
