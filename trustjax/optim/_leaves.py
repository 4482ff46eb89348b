"""The leaves of a parameter tree that a transform works on: their kinds, masks and labels.

Real floating leaves with at least one entry are trained. Integers, bools, keys, float0s and empty
leaves have no gradient, whatever the gradient tree holds in their place (a float0, zeros or None),
and stay as they are. None is an empty subtree. Complex leaves are refused: `jax.grad` returns the
conjugate of their direction of ascent, so that a step against it goes uphill in the imaginary part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trustjax._checks import FieldError
from trustjax._dtypes import is_complex, is_floating

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]

SCHEDULED = (
    "optax.inject_hyperparams calls a function as a schedule of the step count unless "
    "static_args={argument!r} names it"
)


def is_trained(leaf: Any) -> bool:
    """Whether `leaf` has a gradient, which means floating or complex entries, at least one."""
    return (is_floating(leaf) or is_complex(leaf)) and np.size(leaf) > 0


def is_leaf(tree: PyTree) -> bool:
    """Whether `tree` is one leaf, such as an array or a number, and not a container of leaves."""
    return bool(jax.tree_util.all_leaves([tree]))


def entries(params: PyTree, tree: PyTree) -> list[Any]:
    """The part of `tree` at every leaf of `params`, in order: a leaf, a subtree, or None."""
    structure: Any = jax.tree.structure(params)
    found: list[Any] = structure.flatten_up_to(tree)
    return found


def check_real(name: str, params: PyTree, *, chosen: PyTree = True, advice: str = "") -> None:
    """Raises ValueError, for transform `name`, if a leaf that `chosen` selects is complex.

    `chosen` is a tree of bools or a prefix of one. The error ends with `advice`.
    """
    paths = jax.tree.leaves_with_path(params)
    for (path, leaf), is_chosen in zip(
        paths, jax.tree.leaves(jax.tree.broadcast(chosen, params)), strict=True
    ):
        if is_chosen and is_complex(leaf) and np.size(leaf) > 0:
            raise ValueError(
                f"{name} takes real parameters, but params{jax.tree_util.keystr(path)} is "
                f"{jnp.result_type(leaf)}. Store its real and its imaginary part as two leaves of "
                f"the parameters{advice}"
            )


def check_gradient(params: PyTree, updates: PyTree) -> None:
    """Raises ValueError if `updates` lacks a gradient of the right shape for a trained leaf."""
    paths = jax.tree.leaves_with_path(params)
    for (path, leaf), gradient in zip(paths, entries(params, updates), strict=True):
        if not is_trained(leaf):
            continue
        has_gradient = is_floating(gradient) or is_complex(gradient)
        if not has_gradient or np.shape(gradient) != np.shape(leaf):
            found = f"shape {np.shape(gradient)}" if has_gradient else f"{gradient!r}"
            raise ValueError(
                f"the gradient of params{jax.tree_util.keystr(path)}, floats of shape "
                f"{np.shape(leaf)}, must be floats of that shape, got {found}"
            )


def resolved(tree: Mask, params: PyTree) -> PyTree:
    """`tree` itself or, if it is a function, the tree that it returns for `params`.

    As in `optax.masked`, it is a function if all of its leaves are callable: a tree of bools or
    labels may be an Equinox module, which is callable as well.
    """
    is_function = callable(tree) and all(map(callable, jax.tree.leaves(tree)))
    return tree(params) if is_function else tree


def broadcast(argument: str, tree: PyTree, params: PyTree, **options: Any) -> PyTree:
    """Expands `tree`, a prefix of `params`, to one entry for each leaf of `params`.

    Raises ValueError, which names `argument`, if it is no prefix.
    """
    try:
        return jax.tree.broadcast(tree, params, **options)
    except ValueError as error:
        raise FieldError(
            argument,
            "be a tree like the parameters, a prefix of it, or a function of them that makes one",
            f"{jax.tree.structure(tree)} for {jax.tree.structure(params)}",
        ) from error


def selection(argument: str, mask: Mask, params: PyTree) -> PyTree:
    """The tree of bools, one for each leaf of `params`, that `mask` stands for.

    `mask` is a bool, a prefix tree of bools, or a function that makes one of them from `params`.
    Raises ValueError, which names `argument`, for anything else.
    """
    found = resolved(mask, params)
    for entry in jax.tree.leaves(found):
        if isinstance(entry, jax.core.Tracer):
            raise FieldError(
                argument,
                "be known before compilation",
                f"a traced {entry.dtype}",
                advice=SCHEDULED.format(argument=argument),
            )
        is_bool = isinstance(entry, bool) or getattr(entry, "dtype", None) == np.bool_
        if not is_bool or np.shape(entry) != ():
            raise FieldError(
                argument,
                "be a tree of bools, or a function of the parameters that makes one",
                f"{entry!r} in it",
                advice=SCHEDULED.format(argument=argument),
            )
    return jax.tree.map(bool, broadcast(argument, found, params))


def check_selection(argument: str, mask: Mask, params: PyTree) -> None:
    """Raises ValueError if `mask` selects no trained leaf of `params`, or is a single bool.

    `optax.inject_hyperparams`, which calls a function as a schedule, makes a single bool of it.
    """
    trained = [is_trained(leaf) for leaf in jax.tree.leaves(params)]
    if not any(trained):
        return
    found = resolved(mask, params)
    if is_leaf(found) and not is_leaf(params):
        raise FieldError(
            argument,
            "be a tree of bools, or a function of the parameters that makes one",
            f"the single {found!r}",
            advice=SCHEDULED.format(argument=argument),
        )
    selected = jax.tree.leaves(selection(argument, mask, params))
    if not any(s and t for s, t in zip(selected, trained, strict=True)):
        raise ValueError(
            f"{argument} selects none of the {sum(trained)} floating leaves of the parameters, so "
            "it would do nothing; " + SCHEDULED.format(argument=argument)
        )


def on_trained(
    name: str, transform: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Applies `transform` to the trained leaves, which must be real.

    It sees `optax.MaskedNode` in place of every other leaf, whose update is zero, or None where the
    gradient has None.
    """
    inner = optax.with_extra_args_support(transform)

    def init_fn(params: PyTree) -> optax.OptState:
        check_real(name, params, advice=", or hide it by optax.partition")
        return inner.init(trained_part(params, params))

    def update_fn(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.OptState]:
        known = updates if params is None else params
        check_gradient(known, updates)
        moves, state = inner.update(
            trained_part(known, updates),
            state,
            None if params is None else trained_part(params, params),
            **extra_args,
        )
        return jax.tree.map(resting, known, updates, moves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def trained_part(params: PyTree, tree: PyTree) -> PyTree:
    """`tree` with `optax.MaskedNode` in place of the leaves of `params` that are not trained."""
    return jax.tree.map(lambda p, x: x if is_trained(p) else optax.MaskedNode(), params, tree)


def resting(param: Any, gradient: Any, move: Any) -> Any:
    """The update of one leaf: `move` if it is trained, else one that leaves `param` as it is.

    That is zero, or what stands in place of the gradient (None, a float0) if zero cannot be added.
    """
    if is_trained(param):
        return move
    dtype = getattr(param, "dtype", np.result_type(param) if isinstance(param, int) else None)
    is_number = dtype is not None and (dtype == np.bool_ or jnp.issubdtype(dtype, np.number))
    return jnp.zeros_like(param) if is_number and gradient is not None else gradient
