r"""AuON's update of a matrix, in the steps of the paper's algorithm (arXiv:2509.24320v1).

    momentum         M <- beta M + (1 - beta) G              `new_average`
                     H = beta M + (1 - beta) G               `momentum`
    norm             X = H / (||H|| + epsilon)               `on_sphere`
    Newton-Schulz    X1 = a X + (b A + c A^2) X, A = X X'    `orthogonalized`
    brake            U = X / r                               `inverse_brake`
    shape            U sqrt(max(1, fan_out / fan_in))        `aspect`

`matrix_update` composes them. A leaf may hold several matrices, counted by the axes that belong to
no matrix; each has its own norm and brake.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from trustjax._checks import FieldError, check_choice, check_scalar
from trustjax.geometry.matrix import as_matrices, newton_schulz, size_along
from trustjax.geometry.norm import vector_norm
from trustjax.optim._auon_brake import (
    brake_excess,
    excess_of_spread,
    known_excess,
    log_brake,
    two_moments_suffice,
)


@dataclasses.dataclass(frozen=True)
class MatrixRule:
    """The hyperparameters of the update of a matrix, which `scale_by_auon` explains.

    The public functions list them again, because `optax.inject_hyperparams` reads signatures.

    Raises:
      ValueError: A hyperparameter is out of range, or `ns_steps` is traced.
    """

    beta: jax.typing.ArrayLike
    nesterov: bool
    gamma: jax.typing.ArrayLike
    ns_steps: int
    normalize: bool
    brake: Literal["entries", "rms"]
    shape_factor: bool
    mu_dtype: jax.typing.DTypeLike | None
    epsilon: jax.typing.ArrayLike = 1e-7
    brake_epsilon: jax.typing.ArrayLike = 1e-8

    def __post_init__(self) -> None:
        check_scalar("beta", self.beta, at_least=0.0, at_most=1.0, below=1.0)
        for name in ("gamma", "epsilon", "brake_epsilon"):
            check_scalar(name, getattr(self, name), at_least=0.0)
        steps: Any = self.ns_steps
        if isinstance(steps, jax.core.Tracer):
            raise FieldError(
                "ns_steps",
                "be known before compilation",
                "a traced number",
                advice="with optax.inject_hyperparams pass static_args='ns_steps'",
            )
        check_scalar("ns_steps", self.ns_steps, at_least=0)
        check_choice("brake", self.brake, ("entries", "rms"))
        added = self.brake_epsilon
        if self.brake == "rms" and (isinstance(added, jax.core.Tracer) or added != 1e-8):
            raise FieldError("brake_epsilon", 'be left out with brake="rms", which has none', added)
        if self.mu_dtype is not None and not jnp.issubdtype(self.mu_dtype, jnp.floating):
            raise FieldError("mu_dtype", "be a floating dtype or None", self.mu_dtype)


class MatrixAxes(NamedTuple):
    """The axes of a leaf that make up its matrix; the others count matrices.

    Attributes:
      fan_in: The axes over which the matrix sums its inputs.
      fan_out: The axes of its outputs.
    """

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]

    @property
    def both(self) -> tuple[int, ...]:
        return (*self.fan_in, *self.fan_out)


def matrix_axes(ndim: int, numbers: MuonDimensionNumbers | None) -> MatrixAxes:
    """The axes that `numbers` names in a leaf of `ndim` axes; None stands for the last two.

    Raises:
      ValueError: `numbers` names an axis twice.
    """
    if numbers is None:
        return MatrixAxes((ndim - 2,), (ndim - 1,))
    fan_in, fan_out = (
        tuple(a % ndim for a in ((axis,) if isinstance(axis, int) else axis))
        for axis in (numbers.reduction_axis, numbers.output_axis)
    )
    if set(fan_in) & set(fan_out):
        raise FieldError("dimension_numbers", "name different axes", numbers)
    return MatrixAxes(fan_in, fan_out)


class Matrix(NamedTuple):
    """The matrices of a leaf, which are computed anew at each use instead of written to memory.

    Attributes:
      times: `factor -> factor * matrix`. The factor is a scalar, or has axes of size 1 in place of
        those of the matrix.
      norm: Float, the Frobenius norm of each matrix, with axes of size 1 in place of its own.
      spread: Float, (sum of x^2)^2 / (sum of x^4) over the entries x of each matrix, with such
        axes. None if it was not computed.
    """

    times: Callable[[jax.Array], jax.Array]
    norm: jax.Array
    spread: jax.Array | None = None


def matrix_update(
    rule: MatrixRule, average: jax.Array, gradient: jax.Array, axes: MatrixAxes
) -> tuple[jax.Array, jax.Array]:
    """The update of one leaf, and the norms of its matrices.

    Args:
      rule: The hyperparameters.
      average: M, float, the average of the gradients with the present one in it.
      gradient: G, of the same shape and dtype.
      axes: The axes of the matrix.

    Returns:
      The update U, with the sign of a gradient, and the Frobenius norm of each matrix in it before
      the shape factor, with axes of size 1 in place of those of the matrix.
    """
    size = size_along(average, axes.both)
    known, with_spread = brake_shortcut(rule, size, average.dtype)
    # H = beta M + (1 - beta) G, and X = H / (||H|| + epsilon).
    h = momentum(rule, average, gradient)
    unit, plain = on_sphere(rule, h, axes.both, with_spread=with_spread)
    if rule.ns_steps:
        # Hybrid-AuON: Newton-Schulz steps from X.
        applied, measured = orthogonalized(rule, unit, axes)
    else:
        # The paper applies X, the repository H. Both measure the brake on X.
        applied, measured = (unit if rule.normalize else plain), unit
    # U = X / r, times the shape factor.
    shrink = inverse_brake(rule, measured, axes.both, size, known)
    factor = shrink * aspect(average, axes) if rule.shape_factor else shrink
    return applied.times(factor), applied.norm * shrink


# ---- momentum


def new_average(rule: MatrixRule, average: jax.Array, gradient: jax.Array) -> jax.Array:
    """M <- beta M + (1 - beta) G."""
    beta = jnp.asarray(rule.beta, gradient.dtype)
    return beta * average + (1 - beta) * gradient


class Momentum(NamedTuple):
    """The momentum H = beta M + (1 - beta) G of Nesterov, as a sum that is not carried out.

    Every use computes it anew from M and G: XLA on CPU then reads these inside its reductions, and
    does not write H to memory for the sake of several uses. Without Nesterov, H = M.

    Attributes:
      share: Float [], 1 - beta, or 1 without Nesterov.
      ratio: Float [], beta divided by `share`.
      average: M.
      gradient: G, or None without Nesterov.
    """

    share: jax.Array
    ratio: jax.Array
    average: jax.Array
    gradient: jax.Array | None

    def times(self, factor: jax.Array) -> jax.Array:
        """`factor * H / share`, with two products and a sum per entry."""
        if self.gradient is None:
            return factor * self.average
        return (factor * self.ratio) * self.average + factor * self.gradient


def momentum(rule: MatrixRule, average: jax.Array, gradient: jax.Array) -> Momentum:
    """H, with or without Nesterov as `rule` says."""
    beta, one = jnp.asarray(rule.beta, average.dtype), jnp.ones([], average.dtype)
    share = 1 - beta if rule.nesterov else one
    return Momentum(share, beta / share, average, gradient if rule.nesterov else None)


# ---- norm


def on_sphere(
    rule: MatrixRule, h: Momentum, axes: tuple[int, ...], *, with_spread: bool
) -> tuple[Matrix, Matrix]:
    """X = H / (||H|| + epsilon), and H itself."""
    scale, norm, spread = scaled_norm(h, axes=axes, with_spread=with_spread)
    epsilon = jnp.asarray(rule.epsilon, norm.dtype)
    # ||H|| + epsilon, times scale / share, which cancels below.
    length = nonzero_divisor(norm + epsilon * scale / h.share)
    to_unit = scale / length
    unit = Matrix(
        lambda factor: h.times(factor * to_unit), norm / length, spread if with_spread else None
    )
    return unit, Matrix(lambda factor: h.times(h.share * factor), norm * h.share / scale)


# Compiled, because outside of jit both branches would be compiled anew in every update.
@functools.partial(jax.jit, static_argnames=("axes", "with_spread"))
def scaled_norm(
    h: Momentum, *, axes: tuple[int, ...], with_spread: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A scale, the norm over `axes` of `scale * H / share`, and the spread of its entries.

    The scale is 1, unless powers of the entries under- or overflow: then it is one over the
    largest entry. The spread is that of `Matrix`, or 1 without `with_spread`.
    """

    def power_sums(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        square = jnp.square(h.times(scale))
        total = jnp.sum(square, axes, keepdims=True)
        fourth = jnp.sum(jnp.square(square), axes, keepdims=True) if with_spread else total
        return total, fourth

    one = jnp.ones([], h.average.dtype)
    total, fourth = power_sums(one)
    info, size = np.finfo(h.average.dtype), size_along(h.average, axes)
    # Above this all powers that underflow are together less than a rounding error of their sum.
    lowest = size * float(info.tiny / info.eps)

    def unscaled() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.ones_like(total), total, fourth

    def scaled() -> tuple[jax.Array, jax.Array, jax.Array]:
        top = jnp.max(jnp.abs(h.times(one)), axes, keepdims=True)
        # One over this is still a normal number: XLA on CPU rounds subnormal ones to 0.
        largest = float(info.max) ** 0.75
        scale = 1 / jnp.clip(top, 1 / largest, largest)
        return scale, *power_sums(scale)

    usable = jnp.all((jnp.minimum(total, fourth) > lowest) & (jnp.maximum(total, fourth) < jnp.inf))
    scale, total, fourth = jax.lax.cond(usable, unscaled, scaled)
    spread = jnp.square(total) / nonzero_divisor(fourth) if with_spread else jnp.ones_like(total)
    return scale, jnp.sqrt(total), nonzero_divisor(spread)


def nonzero_divisor(x: jax.Array) -> jax.Array:
    """`x` with 1 in place of 0, so that a zero matrix over its norm is zero; a NaN stays NaN."""
    return jnp.where(x == 0, jnp.ones_like(x), x)


# ---- Newton-Schulz


def orthogonalized(rule: MatrixRule, unit: Matrix, axes: MatrixAxes) -> tuple[Matrix, Matrix]:
    """The last Newton-Schulz iterate Z, and the matrix on which its brake is measured.

    That is Z itself in the paper, Z / (||Z|| + epsilon) in the repository and for the brake "rms".
    """
    x = unit.times(jnp.ones([], unit.norm.dtype))
    steps = functools.partial(newton_schulz, steps=rule.ns_steps)
    z = as_matrices(steps, x, axes.fan_in, axes.fan_out)
    norm = vector_norm(z, axes.both, keepdims=True)
    applied = Matrix(lambda factor: factor * z, norm)
    if rule.normalize and rule.brake == "entries":
        return applied, applied
    length = norm + jnp.asarray(rule.epsilon, norm.dtype)
    z_unit = z / length
    return applied, Matrix(lambda factor: factor * z_unit, norm / length)


# ---- brake and shape


def brake_shortcut(rule: MatrixRule, size: int, dtype: jnp.dtype) -> tuple[float | None, bool]:
    """Whether the brake needs a second pass over H, after that for the norm.

    Returns:
      r - 1 if the size of the matrix alone gives it to a rounding error, otherwise None; and
      whether the spread, which is computed in the pass for the norm, gives it instead. If neither
      does, r comes from the entries of X.
    """
    if rule.ns_steps or rule.brake == "rms":
        return None, False
    known = known_excess(rule.gamma, size, dtype)
    return known, known is None and two_moments_suffice(rule.gamma, size, dtype)


def inverse_brake(
    rule: MatrixRule, measured: Matrix, axes: tuple[int, ...], size: int, known: float | None
) -> jax.Array:
    """1 / (r + brake_epsilon) of each matrix; for the brake "rms", 1 / r."""
    dtype = measured.norm.dtype
    gamma = jnp.asarray(rule.gamma, dtype)
    if rule.brake == "rms":
        # Here entries are so large that cosh may overflow.
        entries = measured.times(jnp.ones([], dtype))
        return jnp.exp(-log_brake(entries * (gamma * math.sqrt(size)), axes))
    if known is not None:
        excess = jnp.full_like(measured.norm, known)
    elif measured.spread is not None:
        excess = excess_of_spread(gamma * measured.norm, measured.spread, size)
    else:
        excess = brake_excess(measured.times(gamma), axis=axes)
    return 1 / (1 + (excess + jnp.asarray(rule.brake_epsilon, dtype)))


def aspect(leaf: jax.Array, axes: MatrixAxes) -> float:
    """sqrt(max(1, fan_out / fan_in)), the shape factor of the code of October 2025."""
    return math.sqrt(max(1.0, size_along(leaf, axes.fan_out) / size_along(leaf, axes.fan_in)))
