"""Gaps between a convex function and its tangent, without cancellation where the two touch.

The Bregman divergences of mirror maps and the terms of divergences between distributions are such
gaps.
"""

import jax
import jax.numpy as jnp

from trustjax.geometry.norm import non_negative


def exponential_gap(t: jax.Array) -> jax.Array:
    r""":math:`e^t - 1 - t`, >= 0, elementwise, with all digits."""
    # Near 0, where expm1(t) - t cancels, a series: t^2 / 2 (1 + t / 3 (1 + t / 4 (...))).
    near = jnp.abs(t) < 0.5
    small = jnp.where(near, t, jnp.zeros_like(t))
    last = 15 if t.dtype == jnp.float64 else 9  # the terms after it round away
    series = jnp.ones_like(t)
    for k in range(last, 2, -1):
        series = 1 + small / k * series
    far = jnp.where(near, jnp.ones_like(t), t)
    return jnp.where(near, 0.5 * small * small * series, jnp.expm1(far) - far)


def relative_entropy(x: jax.Array, y: jax.Array) -> jax.Array:
    r""":math:`x \log(x / y) - x + y`, >= 0, elementwise, for numbers >= 0.

    x = 0 gives y. y = 0 < x gives infinity.
    """
    x_is_zero, y_is_zero = x <= 0, y <= 0
    edge = x_is_zero | y_is_zero
    x_safe, y_safe = (jnp.where(edge, jnp.ones_like(z), z) for z in (x, y))
    # t = log(x / y): the difference of two logarithms cancels where x is close to y.
    close = jnp.abs(x_safe - y_safe) < 0.5 * y_safe
    ratio = jnp.where(close, x_safe - y_safe, jnp.zeros_like(x)) / y_safe
    t = jnp.where(close, jnp.log1p(ratio), jnp.log(x_safe) - jnp.log(y_safe))
    # x t - x + y = x (e^-t - 1 + t), a gap of the exponential, which does not cancel near t = 0.
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
    # For x / y in this range, with r = log(x / y) and phi the exponential gap, the power gap is
    # |y|^c (phi(c r) - c phi(r)), which does not cancel; outside of it the definition does not.
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
    """|x|^power, with value and derivative 0 at x = 0."""
    zero = x == 0
    size = jnp.where(zero, jnp.ones_like(x), jnp.abs(x))
    return jnp.where(zero, jnp.zeros_like(x), size**power)


def hyperbolic_gap(x: jax.Array, y: jax.Array, beta: jax.Array) -> jax.Array:
    """The Bregman divergence of x from y under hypentropy, elementwise."""
    root_x, root_y = jnp.hypot(x, beta), jnp.hypot(y, beta)
    # turn = asinh(x / beta) - asinh(y / beta). For numbers of one sign it comes from the addition
    # theorem, whose numerator is x - y and does not cancel.
    same = x * jnp.sign(y) > 0
    size_x, size_y = (jnp.where(same, jnp.abs(z), 1.0) for z in (x, y))
    root = (size_x * root_y + size_y * root_x) / (size_x + size_y)
    apart = jnp.arcsinh(x / beta) - jnp.arcsinh(y / beta)
    turn = jnp.where(same, jnp.arcsinh(jnp.where(same, x - y, 0.0) / root), apart)
    # Near y, the sum of the relative entropies of u and v of EG+-, whose gaps do not cancel.
    near = jnp.abs(turn) < 0.5
    large, small = halves(x, beta)
    inwards = jnp.where(x < 0, -1.0, 1.0).astype(x.dtype) * jnp.where(near, turn, 0.0)
    gap = large * exponential_gap(-inwards) + small * exponential_gap(inwards)
    far = x * turn - (x - y) * ((x + y) / (root_x + root_y))
    return jnp.where(near, gap, non_negative(far))


def spectral_gap(x: jax.Array, y: jax.Array, beta: jax.Array) -> jax.Array:
    r"""The Bregman divergence of x from y under spectral hypentropy, summed over the matrices.

    The symmetric matrix [[0, X], [X', 0]] has the eigenvalues sigma, -sigma and zeros. Between
    symmetric matrices the divergence is a sum over pairs of eigenvectors, :math:`\sum_{kl} \langle
    v_k, w_l \rangle^2 B(\lambda_k, \mu_l)`, with no negative term.
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
    # The part of a singular vector outside the span of those of the other matrix is paired with
    # the eigenvalue 0.
    for a, b, overlap in (
        (left_x, left_y, left),
        (jnp.matrix_transpose(right_x), jnp.matrix_transpose(right_y), right),
    ):
        outside_y = jnp.sum(jnp.square(b - a @ overlap), -2)
        outside_x = jnp.sum(jnp.square(a - b @ jnp.matrix_transpose(overlap)), -2)
        total += 0.5 * jnp.sum(outside_y * of_y + outside_x * of_x)
    return total


def halves(x: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u and v of EG+- with |x| = u - v and u v = beta^2 / 4, the larger one first."""
    large = 0.5 * (jnp.hypot(x, beta) + jnp.abs(x))
    return large, beta * (beta / (4 * large))
