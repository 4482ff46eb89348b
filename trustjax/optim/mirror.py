r"""Mirror descent: gradient descent in the dual coordinates of a mirror map.

    x <- argmin_y <g, y - x> + B(y, x) / t        which is        grad psi(x) <- grad psi(x) - t g

Nemirovski, Yudin, 1983; Beck, Teboulle, Oper. Res. Lett. 31, 2003. The maps are in
`trustjax.geometry.mirror_map` and `trustjax.geometry.power_map`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import FieldError, check_scalar
from trustjax._dtypes import dtype_of, reduction_dtype, widened
from trustjax.geometry.mirror_map import MirrorMap, bregman_divergence
from trustjax.optim import _leaves
from trustjax.optim._leaves import PyTree


class MirrorState(NamedTuple):
    """State of `mirror_descent`.

    Attributes:
      count: Int32 [], the number of steps so far.
      radius: Float [], half the squared dual norm of the last step. It bounds the distance for maps
        that are strongly convex in a norm.
      distance: Float [], the Bregman divergence of the new weights from the old ones.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple has a method of that name, as in Optax
    radius: jax.Array
    distance: jax.Array


def mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    mirror_map: MirrorMap,
    *,
    projection: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A step against the gradient in the dual coordinates of `mirror_map`.

    .. math:: x \leftarrow (\nabla\psi)^{-1}(\nabla\psi(x) - t g)

    The learning rate is part of the step: nothing follows in a chain. What comes before acts on the
    gradient, in dual coordinates: `optax.chain(optax.trace(0.9), mirror_descent(...))` has its
    momentum there. The map is applied to each leaf separately, in float32 at least. Leaves without
    a gradient stay as they are.

    Args:
      learning_rate: t, >= 0: a number, which may be traced, or a schedule.
      mirror_map: The map, such as `trustjax.geometry.hypentropy(1.0)`.
      projection: A function that maps the new parameters into a set, such as one of
        `optax.projections`. It sees leaves without a gradient as `optax.MaskedNode`. The
        projections of Optax are Euclidean, the right ones for `euclidean()`. In another geometry
        the constrained step is the Bregman projection, which `simplex()` has built in.

    Returns:
      A transform whose state is `MirrorState`.

    Raises:
      ValueError: The rate is negative or `projection` is not a function. At `init`: a leaf is
        complex or outside the domain of the map. At `update`: `params` is missing.

    Source: Beck and Teboulle 2003, Eq. 3.11.

    >>> import jax.numpy as jnp
    >>> from trustjax.geometry import simplex
    >>> x, g = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, -0.1, 0.4])
    >>> tx = mirror_descent(0.5, simplex())
    >>> updates, _ = tx.update(g, tx.init(x), x)
    >>> print(x + updates)
    [0.48566428 0.33855683 0.17577888]
    """
    check_scalar("learning_rate", learning_rate, at_least=0.0)
    if projection is not None and not callable(projection):
        raise FieldError(
            "projection",
            "be a function of the parameters",
            repr(projection),
            advice=_leaves.SCHEDULED.format(argument="projection"),
        )

    def init_fn(params: PyTree) -> MirrorState:
        for path, leaf in jax.tree.leaves_with_path(params):
            concrete = not isinstance(leaf, jax.core.Tracer)
            if concrete and not mirror_map.contains(np.asarray(leaf)):
                raise ValueError(
                    f"{mirror_map.name} takes {mirror_map.domain}; "
                    f"params{jax.tree_util.keystr(path)} holds other values"
                )
        zero = jnp.zeros([], reduction_dtype(params))
        return MirrorState(jnp.zeros([], jnp.int32), zero, jnp.copy(zero))

    def update_fn(
        updates: PyTree, state: MirrorState, params: PyTree | None = None, **extra_args: object
    ) -> tuple[PyTree, MirrorState]:
        del extra_args
        if params is None:
            raise ValueError(
                "mirror_descent needs params: call tx.update(grads, state, params); its step "
                "depends on where it starts"
            )
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(g: jax.Array) -> jax.Array:
            wide = widened(g)
            return jnp.asarray(rate, wide.dtype) * wide

        def move(g: jax.Array, x: jax.Array) -> jax.Array:
            return mirror_map.move(widened(x), step(g)).astype(dtype_of(x))

        def bound(g: jax.Array, x: jax.Array) -> jax.Array:
            return mirror_map.bound(widened(x), step(g)).astype(state.radius.dtype)

        # Beck and Teboulle 2003, Eq. 3.11, as x_new - x; then the projection, if there is one.
        moves = jax.tree.map(move, updates, params)
        new = optax.apply_updates(params, moves)
        if projection is not None:
            new = projection(new)
            moves = jax.tree.map(jnp.subtract, new, params)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
        bounds = [bound(g, x) for g, x in pairs]
        radius = sum(bounds[1:], start=bounds[0]) if bounds else jnp.zeros_like(state.radius)
        distance = bregman_divergence(mirror_map, new, params).astype(state.distance.dtype)
        return moves, MirrorState(optax.safe_increment(state.count), radius, distance)

    transform = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return _leaves.on_trained("mirror_descent", transform)
