"""What all attacks share: an ascent step of a given radius, and the gradient it leads to."""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from trustjax._dtypes import dtype_of, is_floating, reduction_dtype, widened
from trustjax._sharding import AxisName, as_local_as, averaged
from trustjax.geometry.norm import global_norm
from trustjax.optim import _leaves
from trustjax.optim._leaves import Mask as Mask
from trustjax.optim._leaves import PyTree as PyTree

GradFn = Callable[[PyTree], PyTree]
OnNonfinite = Literal["clean", "propagate"]
ON_NONFINITE = ("clean", "propagate")


class MissingArgumentError(ValueError):
    """`update` was called without arguments that the transform needs."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


def check_whole_tree(name: str, params: PyTree, way_out: str | None = None) -> None:
    """Raises ValueError if a part of `params` is hidden, as inside optax.masked or partition.

    `way_out` says what to write instead; None stands for what an attack does.
    """
    if way_out is None:
        way_out = (
            f"Put it in front, optax.chain({name}(..., mask=...), optax.partition(...)): mask= "
            "chooses the leaves that are attacked"
        )
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{name} evaluates the whole model, so it cannot stand inside optax.masked or "
            f"optax.partition, where the other leaves are hidden. {way_out}"
        )


def check_params(
    name: str, params: PyTree, *, mask: Mask | None = None, adaptive: bool | Mask = False
) -> None:
    """Raises ValueError, at `init`, for parameters that `name` cannot attack with these masks."""
    check_whole_tree(name, params)
    if mask is not None:
        _leaves.check_selection("mask", mask, params)
    if not isinstance(adaptive, bool):
        _leaves.check_selection("adaptive", adaptive, params)
    attacked = _leaves.selection("mask", True if mask is None else mask, params)
    _leaves.check_real(name, params, chosen=attacked, way_out=", or leave it out by mask=")


def second_pass_arguments(
    name: str,
    params: PyTree | None,
    grad_fn: GradFn | None,
    axis_name: AxisName | None,
    *,
    attack_only: bool,
    in_two_calls: bool = True,
) -> tuple[PyTree, GradFn]:
    """`params` and `grad_fn` as given; raises ValueError, with the call to write, if one is None.

    `attack_only` is how `alternating` asks for the attack, which not every attack can answer.
    """
    if attack_only and not in_two_calls:
        raise ValueError(
            f"{name} joins the two gradients of a step, so it cannot stand in alternating, which "
            f"spreads them over two calls: use optax.chain({name}(...), base) and pass grad_fn"
        )
    if attack_only and axis_name is not None:
        raise ValueError(
            f"{name} got axis_name={axis_name!r}, with which every shard attacks on its own and "
            "the gradients there are averaged; in alternating all shards take their second "
            "gradient at the trainer's weights, which are one for all. Leave axis_name out and "
            "average the gradients before update, for one attack of the whole batch; for an attack "
            f"per shard use optax.chain({name}(..., axis_name=...), base) and pass grad_fn"
        )
    if params is None or grad_fn is None:
        missing = "params" if params is None else "grad_fn"
        way_out = (
            ". A trainer that can only call tx.update(grads, state, params) takes "
            f"trustjax.optim.alternating({name}(...), base)"
        )
        raise MissingArgumentError(
            f"{name} needs {missing}: call tx.update(grads, state, params, "
            "grad_fn=lambda p: jax.grad(loss)(p, batch)) with the batch and the random key of the "
            "first gradient. Flax's TrainState.apply_gradients and optax.MultiSteps in a chain do "
            "not pass it on: docs/methods/sam.md has what to write instead"
            f"{way_out if in_two_calls else ''}",
            (missing,),
        )
    check_whole_tree(name, params)
    return params, grad_fn


def require(name: str, **arguments: Any) -> None:
    """Raises ValueError, with the call to write, if one of the extra arguments is None."""
    missing = [argument for argument, value in arguments.items() if value is None]
    if missing:
        call = ", ".join(f"{argument}=..." for argument in ("grad_fn", *arguments))
        raise MissingArgumentError(
            f"{name} needs {' and '.join(missing)}: call "
            f"tx.update(grads, state, params, {call}); trustjax.optim.two_pass_step does",
            tuple(missing),
        )


def attacked_gradient(updates: PyTree, params: PyTree, mask: Mask | None) -> PyTree:
    """The gradient of the attacked leaves, in float32 at least; None stands for the other leaves.

    Attacked are the floating leaves with entries that `mask`, a tree of bools or its callable,
    selects.
    """
    _leaves.check_gradient(params, updates)
    return jax.tree.map(
        lambda p, c, g: widened(g) if c and _leaves.is_trained(p) and is_floating(p) else None,
        params,
        _leaves.selection("mask", True if mask is None else mask, params),
        updates,
    )


def scaling(params: PyTree, adaptive: bool | Mask, eta: jax.typing.ArrayLike) -> PyTree:
    """The operator T of ASAM, leaf by leaf: |w| + eta where `adaptive`, else the number 1."""
    chosen = _leaves.selection("adaptive", adaptive, params)

    def leaf_scaling(param: jax.Array, is_scaled: bool) -> jax.Array | float:
        if not (is_scaled and is_floating(param)):
            return 1.0
        param = widened(param)
        return jnp.abs(param) + jnp.asarray(eta, param.dtype)

    return jax.tree.map(leaf_scaling, params, chosen)


def ascent(
    gradient: PyTree, scale: PyTree, radius: jax.typing.ArrayLike
) -> tuple[PyTree, jax.Array]:
    r"""The step of length `radius` in the scaled ball along `gradient`, and its length.

    .. math:: \epsilon = r \, T^2 g / \|T g\|_2, \qquad \|\epsilon / T\|_2 = r

    A zero gradient gives a zero step of length 0. Steps are float32 at least.
    """
    direction, norm = normalized(map_attack(lambda g, t: g * t, gradient, scale))
    length = jnp.asarray(radius, norm.dtype) * ratio(norm, norm)  # radius, 0, or NaN
    return map_attack(lambda d, t: d * t * length.astype(d.dtype), direction, scale), length


def normalized(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """A tree whose floating leaves are divided by their norm, or zero as they are; the norm."""
    norm = global_norm(tree)

    def divided(x: jax.Array) -> jax.Array:
        return ratio(widened(x), norm.astype(widened(x).dtype)) if is_floating(x) else x

    return jax.tree.map(divided, tree), norm


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient by a scalar, a norm; 0 where that is 0, and NaN where one of them is NaN."""
    zero = denominator == 0
    quotient = numerator / jnp.where(zero, jnp.ones_like(denominator), denominator)
    # Not a bare 0, which would lose a NaN of the numerator.
    return jnp.where(zero, 0 * quotient, quotient)


def second_gradient(
    grad_fn: GradFn,
    params: PyTree,
    attack: PyTree,
    updates: PyTree,
    axis_name: AxisName | None,
    on_nonfinite: OnNonfinite,
    join: Callable[[PyTree, PyTree], PyTree] = lambda attacked, clean: attacked,
) -> tuple[PyTree, jax.Array]:
    """The gradient to descend on, in the dtypes of `updates`, and whether the second pass broke.

    That is `join` of the gradient at `params + attack` and the one at `params`, which is
    `updates`, averaged over `axis_name`. No gradient flows through the attack: the second-order
    terms are dropped, as in the papers.

    The second pass broke where its gradient is not finite although the first gradient and the
    attack are. Then "clean" gives `updates`, and "propagate" what came out. All shards do the same.
    """
    attack = jax.lax.stop_gradient(attack)
    moved = map_attack(lambda e, p: (widened(p) + e).astype(dtype_of(p)), attack, params)
    attacked = jax.tree.map(
        lambda m, p: p if m is None else m, moved, params, is_leaf=lambda x: x is None
    )
    gradient = grad_fn(as_local_as(attack, attacked))
    leaves, structure = jax.tree.leaves(gradient), jax.tree.structure(updates)
    if [jnp.shape(g) for g in leaves] != [jnp.shape(u) for u in jax.tree.leaves(updates)]:
        raise ValueError(
            "grad_fn must return the gradients alone, in the structure of the first gradient "
            f"{structure}; it returned {jax.tree.structure(gradient)}"
        )
    # Containers may differ: nnx.grad returns Variables, nnx.Optimizer passes on their arrays.
    gradient = join(jax.tree.unflatten(structure, leaves), updates)
    sound = _on_all_shards(_is_finite((updates, attack)), axis_name)
    # In the dtypes of the result, whose range may be smaller.
    broke = sound & ~_on_all_shards(_is_finite(like(gradient, updates)), axis_name)
    if on_nonfinite == "clean":
        gradient = jax.tree.map(
            lambda g, u: jnp.where(broke, u.astype(g.dtype), g) if is_floating(g) else g,
            gradient,
            updates,
        )
    return like(averaged(gradient, axis_name), updates), broke


def _is_finite(tree: PyTree) -> jax.Array:
    """bool [], whether all numbers of the floating leaves are finite."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def _on_all_shards(condition: jax.Array, axis_name: AxisName | None) -> jax.Array:
    share: jax.Array = averaged(condition.astype(jnp.float32), axis_name)
    return share == 1


def like(gradient: PyTree, updates: PyTree) -> PyTree:
    """`gradient` in the dtypes of `updates`."""
    return jax.tree.map(
        lambda g, u: g.astype(dtype_of(u)) if is_floating(u) else g, gradient, updates
    )


def map_attack(function: Callable[..., Any], attack: PyTree, *trees: PyTree) -> PyTree:
    """`jax.tree.map` over an attack, in which None marks the leaves left alone."""
    return jax.tree.map(
        lambda e, *leaves: None if e is None else function(e, *leaves),
        attack,
        *trees,
        is_leaf=lambda x: x is None,
    )


@runtime_checkable
class AttackState(Protocol):
    """What the states of all attacks hold."""

    @property
    def count(self) -> Any:
        """int32 [], steps so far."""

    @property
    def radius(self) -> jax.Array:
        """float [], how far the last attack was allowed to go."""

    @property
    def distance(self) -> jax.Array:
        """float [], how far it went."""

    @property
    def nonfinite_count(self) -> jax.Array:
        """int32 [], second passes that broke (see `second_gradient`)."""


def initial(params: PyTree) -> dict[str, jax.Array]:
    """The fields of `AttackState` before the first step, in the dtype of reductions."""
    dtype = reduction_dtype(params)
    return {
        "count": jnp.zeros([], jnp.int32),
        "radius": jnp.zeros([], dtype),
        "distance": jnp.zeros([], dtype),
        "nonfinite_count": jnp.zeros([], jnp.int32),
    }


def following(
    state: AttackState,
    radius: jax.typing.ArrayLike,
    distance: jax.Array,
    broke: jax.Array,
    axis_name: AxisName | None,
) -> dict[str, jax.Array]:
    """The fields of `AttackState` after a step; the distance is averaged over the shards."""
    return {
        "count": optax.safe_increment(state.count),
        "radius": jnp.asarray(radius).astype(state.radius.dtype),
        "distance": averaged(distance.astype(state.distance.dtype), axis_name),
        "nonfinite_count": jnp.where(
            broke, optax.safe_increment(state.nonfinite_count), state.nonfinite_count
        ),
    }


def example_mean(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """The mean of `values` over the examples that `where` includes; 0 if there are none."""
    if where is None:
        return jnp.mean(values)
    where = jnp.broadcast_to(where, values.shape)
    total = jnp.sum(jnp.where(where, values, jnp.zeros_like(values)))
    return total / jnp.maximum(jnp.sum(where.astype(values.dtype)), jnp.ones([], values.dtype))


def value_at(schedule: optax.ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    """The number itself, or the schedule's value at `count`."""
    value: jax.typing.ArrayLike = schedule(count) if callable(schedule) else schedule
    return value
