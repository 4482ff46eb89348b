"""The leaves of a parameter tree that a transform works on: their kinds, masks and labels.

Real floating leaves with entries are trained. Integers, bools, keys, float0s and leaves without
entries have no gradient, whatever stands in its tree for them (a float0, zeros or None), and stay
as they are. None is an empty subtree. Complex leaves are refused: `jax.grad` gives the conjugate of
the direction of ascent there, so that a step against it goes up in the imaginary part.
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
    """Whether `leaf` has a gradient: floating or complex numbers, at least one."""
    return (is_floating(leaf) or is_complex(leaf)) and np.size(leaf) > 0


def is_leaf(tree: PyTree) -> bool:
    """Whether `tree` is a single leaf."""
    return bool(jax.tree_util.all_leaves([tree]))


def entries(params: PyTree, tree: PyTree) -> list[Any]:
    """What `tree` has, be it None, in the place of every leaf of `params`."""
    structure: Any = jax.tree.structure(params)
    found: list[Any] = structure.flatten_up_to(tree)
    return found


def check_real(name: str, params: PyTree, *, chosen: PyTree = True, way_out: str = "") -> None:
    """Raises ValueError if one of the leaves that `chosen`, a tree of bools, selects is complex."""
    paths = jax.tree.leaves_with_path(params)
    for (path, leaf), is_chosen in zip(
        paths, jax.tree.leaves(jax.tree.broadcast(chosen, params)), strict=True
    ):
        if is_chosen and is_complex(leaf) and np.size(leaf) > 0:
            raise ValueError(
                f"{name} takes real numbers; params{jax.tree_util.keystr(path)} is "
                f"{jnp.result_type(leaf)}. Make its real and its imaginary part two leaves of the "
                f"parameters{way_out}"
            )


def check_gradient(params: PyTree, updates: PyTree) -> None:
    """Raises ValueError if a trained leaf has no gradient of its shape."""
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
    """`tree` itself, or what it makes of `params` if it is a function.

    As in `optax.masked`, a function is what has callable leaves alone: a tree of bools or labels
    may be an Equinox module, which can be called too.
    """
    is_function = callable(tree) and all(map(callable, jax.tree.leaves(tree)))
    return tree(params) if is_function else tree


def broadcast(argument: str, tree: PyTree, params: PyTree, **options: Any) -> PyTree:
    """`tree`, a prefix of `params`, with an entry for each of its leaves."""
    try:
        return jax.tree.broadcast(tree, params, **options)
    except ValueError as error:
        raise FieldError(
            argument,
            "be a tree like the parameters, a prefix of one, or a function that makes one of them",
            f"{jax.tree.structure(tree)} for {jax.tree.structure(params)}",
        ) from error


def selection(argument: str, mask: Mask, params: PyTree) -> PyTree:
    """The tree of bools like `params` that `mask` gives; raises ValueError if it is none.

    It may be a bool, a prefix tree, or a function that makes one from `params`.
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
    """Raises ValueError if `mask` selects none of the trained leaves of `params`, or one bool all.

    The one bool is what `optax.inject_hyperparams` makes of a function.
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
    """`transform` on the trained leaves, which must be real; it sees the others as MaskedNode.

    The update of the others is zero, or None where the gradient has None.
    """
    inner = optax.with_extra_args_support(transform)

    def init_fn(params: PyTree) -> optax.OptState:
        check_real(name, params, way_out=", or hide it by optax.partition")
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
    """`tree` with `optax.MaskedNode` for the leaves that are not trained."""
    return jax.tree.map(lambda p, x: x if is_trained(p) else optax.MaskedNode(), params, tree)


def resting(param: Any, gradient: Any, move: Any) -> Any:
    """`move` for a trained leaf, for another one what leaves it where it is."""
    if is_trained(param):
        return move
    dtype = getattr(param, "dtype", np.result_type(param) if isinstance(param, int) else None)
    is_number = dtype is not None and (dtype == np.bool_ or jnp.issubdtype(dtype, np.number))
    return jnp.zeros_like(param) if is_number and gradient is not None else gradient
