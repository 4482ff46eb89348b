r"""Products with the Fisher matrix without the matrix itself, and a solver that needs only these.

The Fisher matrix F is the Hessian of a divergence D(old, new) at new = old, for KL in either
direction (arXiv:1502.05477, Appendix C).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trustjax._checks import check_number
from trustjax._loops import while_loop
from trustjax._sharding import AxisName, as_local_as, averaged
from trustjax.geometry.norm import global_norm

PyTree = Any
Linear = Callable[[PyTree], PyTree]


class Solution(NamedTuple):
    """The result of `conjugate_gradient`.

    Attributes:
      x: The solution, a tree like the right-hand side b.
      residual: b - A x, a tree like b.
      num_steps: int32 [], the number of products.
    """

    x: PyTree
    residual: PyTree
    num_steps: jax.Array


def fisher_vector_product(
    divergence_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    vector: PyTree,
    *,
    damping: jax.typing.ArrayLike = 0.0,
    axis_name: AxisName | None = None,
) -> PyTree:
    r"""The product of the damped Fisher matrix with a vector.

    .. math:: (F + \lambda I) v, \qquad F = \nabla^2 D(\theta)

    Args:
      divergence_fn: `params -> float []`, the mean divergence of the distributions at its argument
        from those at `params`, which are constants in it. Its minimum is at `params`.
      params: A tree of floats.
      vector: A tree like `params`.
      damping: lambda, >= 0.
      axis_name: The axis of the devices over which the product is averaged, each of which has its
        part of the batch.

    Returns:
      A tree like `params`.
    """
    return fisher_product(divergence_fn, params, damping=damping, axis_name=axis_name)(vector)


def fisher_product(
    divergence_fn: Callable[[PyTree], jax.Array],
    params: PyTree,
    *,
    damping: jax.typing.ArrayLike = 0.0,
    axis_name: AxisName | None = None,
) -> Linear:
    """`fisher_vector_product` as a function of the vector, for many products at one point.

    The gradient of the divergence is linearised once. A product is then one linear pass, without
    another forward pass.
    """
    check_number("damping", damping, at_least=0.0)
    local = params if axis_name is None else as_local_as(divergence_fn(params), params)
    _, linear = jax.linearize(jax.grad(divergence_fn), local)

    def product(vector: PyTree) -> PyTree:
        found = averaged(linear(as_local_as(local, vector)), axis_name)
        return jax.tree.map(lambda f, v: f + jnp.asarray(damping, f.dtype) * v, found, vector)

    return product


def conjugate_gradient(
    product: Linear,
    b: PyTree,
    *,
    steps: int = 10,
    tolerance: jax.typing.ArrayLike = 1e-10,
) -> Solution:
    r"""Solves A x = b for a positive definite A of which only products are known.

    The solver starts at x = 0. It stops after `steps` products or when :math:`\|r\|^2 \le`
    `tolerance` :math:`\|b\|^2`, so that nothing is divided by zero after convergence; b = 0 gives
    x = 0. It also stops before a step in a direction in which A is not positive. Unlike
    `jax.scipy.sparse.linalg.cg` it makes no product at the start, and it returns the residual, with
    which x' A x = x' (b - r) costs no product either.

    Args:
      product: `v -> A v`.
      b: A tree of floats.
      steps: The largest number of products, >= 0.
      tolerance: The squared norm of the residual at which to stop, as a share of that of b; >= 0.

    Returns:
      `Solution`.

    Source: arXiv:1502.05477, Appendix C. OpenAI's baselines stop at 1e-10 whatever the size of b,
    and so make no step at all with small gradients.
    """
    check_number("steps", steps, at_least=0)
    check_number("tolerance", tolerance, at_least=0.0)

    class State(NamedTuple):
        x: PyTree
        residual: PyTree
        direction: PyTree
        norm: jax.Array
        num_steps: jax.Array
        positive: jax.Array

    def is_unfinished(state: State) -> jax.Array:
        far = state.norm > jnp.asarray(tolerance, state.norm.dtype) * whole
        return far & (state.num_steps < steps) & state.positive

    def step(state: State) -> State:
        image = product(state.direction)
        curvature = dot(state.direction, image)
        # A direction of no curvature, or a negative one, has no minimum: the step has length 0.
        positive = curvature > 0
        length = jnp.where(positive, state.norm / jnp.where(positive, curvature, 1), 0)
        x = _add(state.x, length, state.direction)
        residual = _add(state.residual, -length, image)
        norm = dot(residual, residual)
        # The next direction is conjugate to the ones before: d' A d_old = 0.
        direction = _add(residual, norm / state.norm, state.direction)
        return State(x, residual, direction, norm, state.num_steps + 1, positive)

    # Solved for a b of length 1, since squares of tiny and of huge numbers under- and overflow.
    size = global_norm(b)
    unit = jnp.where(size == 0, jnp.ones_like(size), size)
    b = jax.tree.map(lambda x: x / unit.astype(x.dtype), b)
    zero = jax.tree.map(jnp.zeros_like, b)
    whole = dot(b, b)
    start = State(zero, b, b, whole, jnp.zeros([], jnp.int32), jnp.array(True))
    end = while_loop(is_unfinished, step, start)
    x, residual = jax.tree.map(lambda x: x * unit.astype(x.dtype), (end.x, end.residual))
    return Solution(x, residual, end.num_steps)


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """The inner product of two trees of floats, summed leaf by leaf; 0 for empty trees."""
    terms = [jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    return sum(terms[1:], start=terms[0]) if terms else jnp.zeros([])


def _add(a: PyTree, scale: jax.Array, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x + scale.astype(x.dtype) * y, a, b)
