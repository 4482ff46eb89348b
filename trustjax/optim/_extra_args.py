"""Extra arguments of `update` on their way through wrappers to the transform that needs them."""

import inspect
import traceback
from typing import Any

import optax

from trustjax.optim._attack import PyTree


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, which then takes any extra argument and gets those that its `update` has room for.

    `optax.with_extra_args_support` goes by the type alone, and so drops the arguments of wrappers
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
    """The name of the wrapper that Optax gave no extra arguments before `error` was raised."""
    names = [
        getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    dropped = [i for i, name in enumerate(names) if name.startswith("with_extra_args_support")]
    return names[dropped[-1] + 1].split(".")[0] if dropped else None
