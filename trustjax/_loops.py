"""Loops over functions that are new at every call."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Carry = TypeVar("Carry")


def while_loop(
    going_on: Callable[[Carry], jax.Array], step: Callable[[Carry], Carry], start: Carry
) -> Carry:
    """`jax.lax.while_loop`, but a loop of Python over numbers that are known.

    Outside of `jax.jit` JAX compiles the loop again at every call, as it cannot know that
    `going_on` and `step` are those of the call before.
    """
    state = start
    while is_known(condition := going_on(state)):
        if not condition:
            return state
        state = step(state)
    found: Any = jax.lax.while_loop(going_on, step, state)
    return found  # type: ignore[no-any-return]


def is_known(value: Any) -> bool:
    """Whether `value` is a number and not traced."""
    return not isinstance(value, jax.core.Tracer)
