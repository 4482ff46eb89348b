"""Loops that do not compile again at every call outside of `jax.jit`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Carry = TypeVar("Carry")


def while_loop(
    condition_fn: Callable[[Carry], jax.Array], step: Callable[[Carry], Carry], start: Carry
) -> Carry:
    """`jax.lax.while_loop`, or a loop in Python if its condition is not traced.

    Outside of `jax.jit` JAX would compile the loop at every call, since `condition_fn` and `step`
    are new functions each time.
    """
    state = start
    while is_known(condition := condition_fn(state)):
        if not condition:
            return state
        state = step(state)
    result: Any = jax.lax.while_loop(condition_fn, step, state)
    return result  # type: ignore[no-any-return]


def is_known(value: Any) -> bool:
    """Whether `value` is known now, which means that it is not traced."""
    return not isinstance(value, jax.core.Tracer)
