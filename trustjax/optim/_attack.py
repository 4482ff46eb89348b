r"""The parts that all attacks share: an ascent step of a given radius, and the gradient after it.

A step of SAM and of its relatives is built from them in this order, with w the parameters, g the
first gradient and T a scaling of the weights:

    attacked_gradient   g on the leaves that `mask` selects
    scaling             T, the number 1 or |w| + eta
    ascent              eps = r T^2 g / ||T g||, of length r in the scaled norm
    second_gradient     g' = grad L(w + eps), on which the base optimizer descends
    next_scalars        the radius, the distance and the counts for the state
"""

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
    """Raised where `update` was called without arguments that the transform needs.

    Attributes:
      names: Names of the missing arguments.
    """

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


def check_whole_tree(name: str, params: PyTree, advice: str | None = None) -> None:
    """Raises ValueError if leaves of `params` are hidden, as in optax.masked or optax.partition.

    The error ends with `advice`; None stands for the advice for attacks.
    """
    if advice is None:
        advice = (
            f"Put it in front, optax.chain({name}(..., mask=...), optax.partition(...)): mask= "
            "selects the leaves that are attacked"
        )
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            f"{name} evaluates the whole model, so it cannot stand inside optax.masked or "
            f"optax.partition, where the other leaves are hidden. {advice}"
        )


def check_params(
    name: str, params: PyTree, *, mask: Mask | None = None, adaptive: bool | Mask = False
) -> None:
    """Raises ValueError, at `init`, if transform `name` cannot attack `params` with these masks."""
    check_whole_tree(name, params)
    if mask is not None:
        _leaves.check_selection("mask", mask, params)
    if not isinstance(adaptive, bool):
        _leaves.check_selection("adaptive", adaptive, params)
    attacked = _selected(mask, params)
    _leaves.check_real(name, params, chosen=attacked, advice=", or exclude it by mask=")


def _selected(mask: Mask | None, params: PyTree) -> PyTree:
    """Tree of bools like `params`: the leaves that `mask` selects, all of them if it is None."""
    return _leaves.selection("mask", True if mask is None else mask, params)


def second_pass_arguments(
    name: str,
    params: PyTree | None,
    grad_fn: GradFn | None,
    axis_name: AxisName | None,
    *,
    attack_only: bool,
    in_two_calls: bool = True,
) -> tuple[PyTree, GradFn]:
    """Returns `params` and `grad_fn`, after checking that a second pass is possible.

    Args:
      name: Name of the transform, for the errors.
      params: `params` of `update`.
      grad_fn: `grad_fn` of `update`.
      axis_name: Axes over which the transform averages its second gradient.
      attack_only: Whether `alternating` calls, which asks for the attack alone.
      in_two_calls: Whether the transform can stand in `alternating`.

    Raises:
      ValueError: `params` or `grad_fn` is None, or leaves of `params` are hidden; `alternating`
        calls and the transform joins two gradients or attacks per shard. The message shows the
        call to write.
    """
    if attack_only and not in_two_calls:
        raise ValueError(
            f"{name} joins the two gradients of a step, so it cannot stand in alternating, which "
            f"spreads them over two calls: use optax.chain({name}(...), base) and pass grad_fn"
        )
    if attack_only and axis_name is not None:
        raise ValueError(
            f"{name} got axis_name={axis_name!r}, with which every shard attacks on its own and "
            "the gradients at the attacked weights are averaged; in alternating all shards take "
            "their second gradient at the trainer's weights, which they share. For one attack of "
            "the whole batch leave axis_name out and average the gradients before update; for an "
            f"attack per shard use optax.chain({name}(..., axis_name=...), base) and pass grad_fn"
        )
    if params is None or grad_fn is None:
        missing = "params" if params is None else "grad_fn"
        advice = (
            ". A trainer that can only call tx.update(grads, state, params) takes "
            f"trustjax.optim.alternating({name}(...), base)"
        )
        raise MissingArgumentError(
            f"{name} needs {missing}: call tx.update(grads, state, params, "
            "grad_fn=lambda p: jax.grad(loss)(p, batch)) with the batch and the random key of the "
            "first gradient. Flax's TrainState.apply_gradients and optax.MultiSteps in a chain do "
            "not pass it on: docs/methods/sam.md has what to write instead"
            f"{advice if in_two_calls else ''}",
            (missing,),
        )
    check_whole_tree(name, params)
    return params, grad_fn


def require(name: str, **arguments: Any) -> None:
    """Raises ValueError, whose message shows the call to write, if an extra argument is None."""
    missing = [argument for argument, value in arguments.items() if value is None]
    if missing:
        call = ", ".join(f"{argument}=..." for argument in ("grad_fn", *arguments))
        raise MissingArgumentError(
            f"{name} needs {' and '.join(missing)}: call "
            f"tx.update(grads, state, params, {call}); trustjax.optim.two_pass_step does",
            tuple(missing),
        )


def attacked_gradient(updates: PyTree, params: PyTree, mask: Mask | None) -> PyTree:
    """The gradient of the attacked leaves, in float32 at least, and None for every other leaf.

    Attacked are the floating leaves with entries that `mask` selects, a tree of bools or a function
    that makes one.
    """
    _leaves.check_gradient(params, updates)
    return jax.tree.map(
        lambda p, c, g: widened(g) if c and _leaves.is_trained(p) and is_floating(p) else None,
        params,
        _selected(mask, params),
        updates,
    )


def scaling(params: PyTree, adaptive: bool | Mask, eta: jax.typing.ArrayLike) -> PyTree:
    """The scaling T of ASAM, leaf by leaf: |w| + eta where `adaptive`, else the number 1.

    Source: arXiv:2102.11600.
    """
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
    r"""The attack: the step of length `radius` in the scaled ball along `gradient`, and its length.

    .. math:: \epsilon = r \, T^2 g / \|T g\|_2, \qquad \|\epsilon / T\|_2 = r

    A zero gradient gives a zero step of length 0. Steps are float32 at least.

    Source: T = 1 is SAM, arXiv:2010.01412, Eq. 2; T = |w| + eta is ASAM, arXiv:2102.11600.
    """
    direction, norm = normalized(scaled(gradient, scale))  # T g / ||T g||
    length = attack_length(radius, norm)
    return map_attack(lambda d, t: d * t * length.astype(d.dtype), direction, scale), length


def scaled(gradient: PyTree, scale: PyTree) -> PyTree:
    """The product T g, leaf by leaf."""
    return map_attack(lambda g, t: g * t, gradient, scale)


def attack_length(radius: jax.typing.ArrayLike, norm: jax.Array) -> jax.Array:
    """`radius`, or 0 if there is no direction, whose `norm` is 0 then; NaN if the norm is NaN."""
    return jnp.asarray(radius, norm.dtype) * ratio(norm, norm)


def normalized(tree: PyTree) -> tuple[PyTree, jax.Array]:
    """`tree` with its floating leaves divided by their global norm, and that norm.

    If the norm is 0, the leaves stay zero.
    """
    norm = global_norm(tree)

    def divided(x: jax.Array) -> jax.Array:
        return ratio(widened(x), norm.astype(widened(x).dtype)) if is_floating(x) else x

    return jax.tree.map(divided, tree), norm


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """The quotient by a scalar norm: 0 where the norm is 0, NaN where either of them is NaN."""
    zero = denominator == 0
    # The denominator is 1 where the norm is 0, since 0 / 0 would be NaN.
    quotient = numerator / jnp.where(zero, jnp.ones_like(denominator), denominator)
    # A bare 0 would lose a NaN of the numerator.
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
    """The gradient to descend on, and whether the second pass broke.

    The gradient is `join` of the one at `params + attack` and the one at `params`, which is
    `updates`; it is averaged over `axis_name` and has the dtypes of `updates`. The attack is a
    constant: its second-order terms are dropped, as in the papers (SAM, arXiv:2010.01412, Eq. 3).

    The second pass broke if its gradient is not finite although the first gradient and the attack
    are. The result is then `updates` for "clean", and what came out for "propagate". All shards
    agree on whether it broke.
    """
    attack = jax.lax.stop_gradient(attack)
    # Under shard_map the attack differs between devices, so the attacked weights must be local too:
    # their gradient would otherwise be summed over the devices.
    gradient = grad_fn(as_local_as(attack, _attacked_params(params, attack)))
    gradient = join(_in_structure_of(updates, gradient), updates)

    sound = _on_all_shards(_is_finite((updates, attack)), axis_name)
    # Checked in the dtypes of the result, whose range may be smaller.
    broke = sound & ~_on_all_shards(_is_finite(cast_like(gradient, updates)), axis_name)
    if on_nonfinite == "clean":
        gradient = jax.tree.map(
            lambda g, u: jnp.where(broke, u.astype(g.dtype), g) if is_floating(g) else g,
            gradient,
            updates,
        )
    return cast_like(averaged(gradient, axis_name), updates), broke


def _attacked_params(params: PyTree, attack: PyTree) -> PyTree:
    """w + eps, in the dtypes of `params`, added in float32 at least."""
    return jax.tree.map(
        lambda e, p: p if e is None else (widened(p) + e).astype(dtype_of(p)),
        attack,
        params,
        is_leaf=lambda e: e is None,
    )


def _in_structure_of(updates: PyTree, gradient: PyTree) -> PyTree:
    """The leaves of `gradient` in the containers of `updates`.

    These may differ: nnx.grad returns Variables, and nnx.Optimizer passes on their arrays. Leaves
    are matched by their names where both trees have the same, as a dict and an OrderedDict of
    another order do, and by their order otherwise. Raises ValueError if the shapes differ.
    """
    leaves, structure = jax.tree.leaves(gradient), jax.tree.structure(updates)
    names, wanted = _names(gradient), _names(updates)
    if names != wanted and sorted(names) == sorted(wanted):
        named = dict(zip(names, leaves, strict=True))
        leaves = [named[name] for name in wanted]
    if [jnp.shape(g) for g in leaves] != [jnp.shape(u) for u in jax.tree.leaves(updates)]:
        raise ValueError(
            "grad_fn must return the gradients alone, in the structure of the first gradient "
            f"{structure}; it returned {jax.tree.structure(gradient)}"
        )
    return jax.tree.unflatten(structure, leaves)


def _names(tree: PyTree) -> list[str]:
    """The names of the leaves: keys, attributes and places on their paths."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def _is_finite(tree: PyTree) -> jax.Array:
    """Whether all numbers of the floating leaves are finite, bool []."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def _on_all_shards(condition: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Whether `condition` holds on every shard, bool []."""
    share: jax.Array = averaged(condition.astype(jnp.float32), axis_name)
    return share == 1


def cast_like(tree: PyTree, other: PyTree) -> PyTree:
    """`tree` with its leaves cast to the dtypes of the floating leaves of `other`."""
    return jax.tree.map(
        lambda leaf, target: leaf.astype(dtype_of(target)) if is_floating(target) else leaf,
        tree,
        other,
    )


def map_attack(function: Callable[..., Any], attack: PyTree, *trees: PyTree) -> PyTree:
    """`jax.tree.map` over the leaves of an attack; None, for a leaf left alone, stays None."""
    return jax.tree.map(
        lambda e, *leaves: None if e is None else function(e, *leaves),
        attack,
        *trees,
        is_leaf=lambda x: x is None,
    )


@runtime_checkable
class AttackState(Protocol):
    """The scalars that the state of every attack has; a state with all four belongs to an attack.

    `two_pass_step` recognises by them an attack that stands last in a chain, and
    `trustjax.trust.trust_metrics_of` reads the radius and the distance.
    """

    @property
    def count(self) -> Any:
        """Steps so far, int32 []."""

    @property
    def radius(self) -> jax.Array:
        """Length that the last attack was allowed, in its own norm, float []."""

    @property
    def distance(self) -> jax.Array:
        """Length of the last attack in that norm, float []."""

    @property
    def nonfinite_count(self) -> jax.Array:
        """Steps whose second pass broke (see `second_gradient`), int32 []."""


def initial_scalars(params: PyTree) -> dict[str, jax.Array]:
    """The fields of `AttackState` before the first step: zeros in the dtype of reductions."""
    dtype = reduction_dtype(params)
    return {
        "count": jnp.zeros([], jnp.int32),
        "radius": jnp.zeros([], dtype),
        "distance": jnp.zeros([], dtype),
        "nonfinite_count": jnp.zeros([], jnp.int32),
    }


def next_scalars(
    state: AttackState,
    radius: jax.typing.ArrayLike,
    distance: jax.Array,
    broke: jax.Array,
    axis_name: AxisName | None,
) -> dict[str, jax.Array]:
    """The fields of `AttackState` after a step; the distance is averaged over `axis_name`."""
    return {
        "count": optax.safe_increment(state.count),
        "radius": jnp.asarray(radius).astype(state.radius.dtype),
        "distance": averaged(distance.astype(state.distance.dtype), axis_name),
        "nonfinite_count": jnp.where(
            broke, optax.safe_increment(state.nonfinite_count), state.nonfinite_count
        ),
    }


def example_mean(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """The mean of `values` over the examples that `where` includes; 0 if it includes none."""
    if where is None:
        return jnp.mean(values)
    where = jnp.broadcast_to(where, values.shape)
    total = jnp.sum(jnp.where(where, values, jnp.zeros_like(values)))
    return total / jnp.maximum(jnp.sum(where.astype(values.dtype)), jnp.ones([], values.dtype))


def value_at(schedule: optax.ScalarOrSchedule, count: jax.Array) -> jax.typing.ArrayLike:
    """The value of a schedule at `count`; a number stands for itself."""
    value: jax.typing.ArrayLike = schedule(count) if callable(schedule) else schedule
    return value
