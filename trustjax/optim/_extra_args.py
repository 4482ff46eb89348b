"""Passing extra arguments of `update` through wrappers to the transform that needs them."""

import inspect
import traceback
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trustjax._dtypes import dtype_of
from trustjax.optim._leaves import PyTree


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes `tx` accept any extra argument and pass on those that its `update` has keywords for.

    `optax.with_extra_args_support` looks at the type alone. It would drop the arguments of wrappers
    that do pass them on, such as `optax.MultiSteps`.
    """
    if isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx
    parameters = inspect.signature(tx.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and len(parameters) <= 3:
        return optax.with_extra_args_support(tx)

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.OptState]:
        taken = {n: value for n, value in extra_args.items() if takes_all or n in parameters}
        result: tuple[PyTree, optax.OptState] = tx.update(updates, state, params, **taken)
        return result

    return optax.GradientTransformationExtraArgs(tx.init, update)


def dropped_by(error: Exception) -> str | None:
    """The name of the wrapper to which Optax passed no extra arguments before `error`, or None."""
    names = [_qualified_name(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]
    dropped = [i for i, name in enumerate(names) if name.startswith("with_extra_args_support")]
    return names[dropped[-1] + 1].split(".")[0] if dropped else None


def check_same_parameters(params: PyTree, seen: PyTree) -> None:
    """Raises ValueError if a wrapper has changed the parameters for the transform inside of it.

    `seen` are the parameters that the transform gave to a function of them, such as `grad_fn`; they
    must have the structure and the shapes of `params`. The error names the wrapper.
    """
    form, seen_form = (
        [jax.tree.structure(tree), *map(jnp.shape, jax.tree.leaves(tree))]
        for tree in (params, seen)
    )
    if form == seen_form:
        return
    frames = (frame for frame, _ in traceback.walk_stack(None))
    names = [
        _qualified_name(frame).split(".")[0]
        for frame in frames
        if frame.f_globals.get("__name__", "").startswith("optax.")
    ]
    wrappers = [name for name in dict.fromkeys(names) if name not in ("chain", "named_chain")]
    raise ValueError(
        f"{' or '.join(wrappers) or 'a wrapper'} gives the transform inside of it {_forms(seen)} "
        f"in place of the parameters {_forms(params)}, which the loss takes: put it around the "
        "base optimizer alone, such as optax.chain(sam(...), optax.flatten(base))"
    )


def _qualified_name(frame: types.FrameType) -> str:
    return str(getattr(frame.f_code, "co_qualname", frame.f_code.co_name))


def _forms(tree: PyTree) -> str:
    """The dtypes and shapes of the first three leaves, such as float32[2, 3], for an error."""
    leaves = jax.tree.leaves(tree)
    first = ", ".join(f"{dtype_of(leaf).name}{list(jnp.shape(leaf))}" for leaf in leaves[:3])
    return f"{first} and {len(leaves) - 3} more" if len(leaves) > 3 else first
