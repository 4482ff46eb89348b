r"""The natural gradient with a trust region and a line search: the step of TRPO.

Schulman, Levine, Moritz, Jordan, Abbeel, arXiv:1502.05477, Section 6 and Appendix C.

    x solves (F + damping I) x = -g                    by conjugate gradients
    full step = x sqrt(2 delta / x' (F + damping I) x)
    w <- w + f * full step, the first f = 1, b, b^2, ... with D <= delta and a loss that fell
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trustjax._checks import check_scalar
from trustjax._dtypes import dtype_of, reduction_dtype, widened
from trustjax._sharding import AxisName, averaged
from trustjax.geometry.fisher import conjugate_gradient, dot, fisher_product
from trustjax.optim import _attack, _leaves
from trustjax.optim._leaves import PyTree
from trustjax.optim._line_search import Evaluate, SearchResult, backtracking

Scalar = Callable[[PyTree], jax.Array]
OfLeaves = Callable[[list[jax.Array]], jax.Array]


class NaturalState(NamedTuple):
    """State of `natural_gradient`.

    Attributes:
      count: Int32 [], the number of steps so far.
      radius: Float [], the divergence that the last step was allowed.
      distance: Float [], the divergence that it made; 0 if no step was accepted.
      accepted: Bool [], whether the line search found a step.
      step_fraction: Float [], the share of the full step that was taken; 0 if none was accepted.
      num_products: Int32 [], the number of Fisher-vector products that the last step took.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name, as in Optax
    radius: jax.Array
    distance: jax.Array
    accepted: jax.Array
    step_fraction: jax.Array
    num_products: jax.Array


def natural_gradient(
    radius: optax.ScalarOrSchedule,
    *,
    damping: jax.typing.ArrayLike = 0.1,
    cg_steps: int = 10,
    cg_tolerance: jax.typing.ArrayLike = 1e-10,
    max_backtracks: int = 50,
    backtrack: jax.typing.ArrayLike = 0.8,
    accept_ratio: jax.typing.ArrayLike = 0.0,
    slack: jax.typing.ArrayLike = 1.0,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A step along the natural gradient, as long as the trust region and the loss allow.

    .. math:: x = -(F + \lambda I)^{-1} g, \qquad
              \Delta = \beta^k x \sqrt{\frac{2 \delta}{x^\top (F + \lambda I) x}}

    F is the Hessian of the divergence. k is the first of 0, 1, ... that is accepted: the loss and
    the divergence are finite, the divergence is at most `slack` times delta (up to rounding, since
    without damping the full step aims at delta itself), and the loss fell, by at least
    `accept_ratio` times what its gradient promises. A loss that is the same number as before did
    not fall. If no step is accepted, the weights stay.

    This is a ready step, with no learning rate after it. `update` takes the gradient of the loss at
    `params`, `params` themselves, `loss_fn(params) -> []` and `divergence_fn(params) -> []`. The
    latter is the mean divergence between the distributions of the old parameters, which are
    constants, and those of its argument; it is zero at `params`.

    Args:
      radius: delta, >= 0: a number, which may be traced, or a schedule.
      damping: lambda, >= 0, in the products and in the length of the step.
      cg_steps: The largest number of products in the conjugate gradients, >= 1.
      cg_tolerance: The conjugate gradients end earlier when the squared norm of the residual is at
        most this share of that of the gradient; >= 0.
      max_backtracks: The largest number of steps to try, >= 1. The full step is as long as the
        radius allows, however near the minimum of the loss is: 50 tries go down to 2e-5 of it.
      backtrack: beta, in (0, 1].
      accept_ratio: The least fall of the loss, as a share of the promised one; >= 0.
      slack: The largest divergence of an accepted step, as a multiple of delta; >= 1.
      axis_name: The axis of the devices that share the batch, inside `jax.shard_map` or `jax.vmap`.
        Gradients must be averaged before. Products, losses and divergences are averaged here, with
        one reduction per product, so that all devices take the same step.

    Returns:
      A transform whose state is `NaturalState`.

    Raises:
      ValueError: A number is out of range, `update` was called without `params`, `loss_fn` or
        `divergence_fn`, or `optax.masked` or `optax.partition` hides parameters.

    Source: arXiv:1502.05477, Appendix C. docs/methods/natural.md says where codes differ.
    """
    check_scalar("radius", radius, at_least=0.0)
    check_scalar("damping", damping, at_least=0.0)
    check_scalar("cg_steps", cg_steps, at_least=1)
    check_scalar("cg_tolerance", cg_tolerance, at_least=0.0)
    check_scalar("max_backtracks", max_backtracks, at_least=1)
    check_scalar("backtrack", backtrack, above=0.0, at_most=1.0)
    check_scalar("accept_ratio", accept_ratio, at_least=0.0)
    check_scalar("slack", slack, at_least=1.0)

    solve = functools.partial(_full_step, cg_steps=cg_steps, cg_tolerance=cg_tolerance)
    search = functools.partial(
        backtracking,
        backtrack=backtrack,
        max_backtracks=max_backtracks,
        accept_ratio=accept_ratio,
        slack=slack,
    )

    def update_fn(
        updates: PyTree,
        state: NaturalState,
        params: PyTree | None = None,
        *,
        loss_fn: Scalar | None = None,
        divergence_fn: Scalar | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, NaturalState]:
        del extra_args
        params, loss_fn, divergence_fn = _checked(updates, params, loss_fn, divergence_fn)
        delta = jnp.asarray(_attack.value_at(radius, state.count), state.radius.dtype)
        space = _TrainedLeaves(params, delta.dtype)
        start, gradient = space.values(params), space.values(updates)
        loss, divergence = space.scalar(loss_fn, axis_name), space.scalar(divergence_fn, axis_name)

        # Appendix C: products with F + damping I, which are averaged after each product.
        local = space.scalar(divergence_fn, None)
        product = fisher_product(local, start, damping=damping, axis_name=axis_name)
        # The step to the border of the trust region, in the quadratic model of the divergence.
        full = solve(product, gradient, delta)
        # The longest part of it that the loss and the divergence themselves accept.
        found = search(
            full.along(start, loss, divergence),
            loss=loss(start),
            expected_decrease=full.expected_decrease,
            radius=delta,
            has_direction=full.has_direction,
        )
        zero = jnp.zeros_like(delta)
        return space.like(full.accepted_part(found), updates), NaturalState(
            count=optax.safe_increment(state.count),
            radius=delta,
            distance=jnp.where(found.accepted, found.divergence, zero),
            accepted=found.accepted,
            step_fraction=jnp.where(found.accepted, found.fraction, zero),
            num_products=full.num_products,
        )

    return optax.GradientTransformationExtraArgs(_initial_state, update_fn)


def _initial_state(params: PyTree) -> NaturalState:
    _check_whole_tree(params)
    _leaves.check_real("natural_gradient", params)
    dtype = reduction_dtype(params)
    return NaturalState(
        count=jnp.zeros([], jnp.int32),
        radius=jnp.zeros([], dtype),
        distance=jnp.zeros([], dtype),
        accepted=jnp.array(False),
        step_fraction=jnp.zeros([], dtype),
        num_products=jnp.zeros([], jnp.int32),
    )


def _checked(
    updates: PyTree,
    params: PyTree | None,
    loss_fn: Scalar | None,
    divergence_fn: Scalar | None,
) -> tuple[PyTree, Scalar, Scalar]:
    """The last three as given. Raises ValueError, with the call to write, if one is missing."""
    if params is None or loss_fn is None or divergence_fn is None:
        given = {"params": params, "loss_fn": loss_fn, "divergence_fn": divergence_fn}
        missing = tuple(name for name, value in given.items() if value is None)
        raise _attack.MissingArgumentError(
            f"natural_gradient needs {' and '.join(missing)}: call "
            "tx.update(grads, state, params, loss_fn=..., divergence_fn=...), both functions "
            "of the parameters alone, on the batch of the gradient; "
            "trustjax.optim.two_pass_step does",
            missing,
        )
    _check_whole_tree(params)
    _leaves.check_gradient(params, updates)
    return params, loss_fn, divergence_fn


def _check_whole_tree(params: PyTree) -> None:
    _attack.check_whole_tree(
        "natural_gradient",
        params,
        "Give it the trained leaves alone, and loss_fn and divergence_fn the others as constants",
    )


class _FullStep(NamedTuple):
    """The step to the border of the trust region, to second order.

    Attributes:
      step: One array per trained leaf.
      length: Float [], the factor of the solution x; 0 or not finite if there is no direction.
      expected_decrease: Float [], the fall of the loss, to first order.
      num_products: Int32 [], the number of Fisher-vector products that the step took.
    """

    step: list[jax.Array]
    length: jax.Array
    expected_decrease: jax.Array
    num_products: jax.Array

    @property
    def has_direction(self) -> jax.Array:
        return jnp.isfinite(self.length) & (self.length > 0)

    def along(self, start: list[jax.Array], loss: OfLeaves, divergence: OfLeaves) -> Evaluate:
        """Maps a fraction of the step from `start` to the loss and the divergence there."""

        def evaluate(fraction: jax.Array) -> tuple[jax.Array, jax.Array]:
            pairs = zip(start, self.step, strict=True)
            values = [w + fraction.astype(w.dtype) * step for w, step in pairs]
            return loss(values), divergence(values)

        return evaluate

    def accepted_part(self, found: SearchResult) -> list[jax.Array]:
        """The accepted fraction of the step, or zeros if none was accepted."""
        # `where` and not a product with 0: a step that was refused may be infinite.
        return [
            jnp.where(found.accepted, found.fraction.astype(s.dtype) * s, jnp.zeros_like(s))
            for s in self.step
        ]


def _full_step(
    product: Callable[[list[jax.Array]], list[jax.Array]],
    gradient: list[jax.Array],
    delta: jax.Array,
    *,
    cg_steps: int,
    cg_tolerance: jax.typing.ArrayLike,
) -> _FullStep:
    """x sqrt(2 delta / x' A x), where x solves A x = -g (arXiv:1502.05477, Appendix C)."""
    # The step does not depend on the size of the gradient, whose squares may leave float32.
    downhill, size = _attack.normalized([-g for g in gradient])
    # (F + damping I) x = -g / ||g||
    solved = conjugate_gradient(product, downhill, steps=cg_steps, tolerance=cg_tolerance)
    # x' A x without another product: A x = b - r, where r is the residual of the solver.
    applied = [b - r for b, r in zip(downhill, solved.residual, strict=True)]
    squared = dot(solved.x, applied)
    length = jnp.sqrt(_attack.ratio(2 * delta, squared.astype(delta.dtype)))
    step = [length.astype(x.dtype) * x for x in solved.x]
    # -g' step, in which the size of the gradient counts again.
    expected_decrease = (size * dot(downhill, step)).astype(delta.dtype)
    return _FullStep(step, length, expected_decrease, solved.num_steps)


class _TrainedLeaves:
    """The trained leaves of a tree as a list in float32 at least, and the way back.

    Losses and divergences of the list have the dtype `dtype`.
    """

    def __init__(self, params: PyTree, dtype: jnp.dtype) -> None:
        self._params, self._dtype = params, dtype

    def values(self, tree: PyTree) -> list[jax.Array]:
        return [widened(x) for x in jax.tree.leaves(_leaves.trained_part(self._params, tree))]

    def scalar(self, function: Scalar, axis_name: AxisName | None) -> OfLeaves:
        """`function` of the list, averaged over the devices if `axis_name` names some."""

        def of_values(values: list[jax.Array]) -> jax.Array:
            value = jnp.asarray(function(self.tree(values)), self._dtype)
            return jnp.asarray(averaged(value, axis_name))

        return of_values

    def tree(self, values: list[jax.Array]) -> PyTree:
        """The parameters with other values, in their own dtypes."""
        rest = iter(values)
        return jax.tree.map(
            lambda p: next(rest).astype(dtype_of(p)) if _leaves.is_trained(p) else p, self._params
        )

    def like(self, values: list[jax.Array], updates: PyTree) -> PyTree:
        """The updates with other values, in their own dtypes."""
        rest = iter(values)
        return jax.tree.map(
            lambda p, u: _leaves.resting(
                p, u, next(rest).astype(dtype_of(u)) if _leaves.is_trained(p) else None
            ),
            self._params,
            updates,
        )
