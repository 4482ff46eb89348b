"""Checks of arguments on the host, before anything is compiled."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np


def _is_concrete_number(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer | bool):
        return False
    return isinstance(value, int | float | np.ndarray | np.generic | jax.Array)


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises ValueError unless `value` (a number or an array of them) is within the bounds.

    Traced values pass, so that radii and rates can be swept by `jax.vmap`; so do schedules and
    None. NaN never passes.
    """
    if not _is_concrete_number(value):
        return
    if at_least is not None and not np.all(np.asarray(value) >= at_least):
        raise ValueError(f"{name} must be >= {at_least:g}, got {value}")
    if at_most is not None and not np.all(np.asarray(value) <= at_most):
        raise ValueError(f"{name} must be <= {at_most:g}, got {value}")
    if above is not None and not np.all(np.asarray(value) > above):
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if below is not None and not np.all(np.asarray(value) < below):
        raise ValueError(f"{name} must be < {below:g}, got {value}")


def check_count(name: str, value: Any, *, at_least: int | None = None) -> None:
    """Raises ValueError unless `value` is None or an int (no bool, no 2.0), `at_least` so large."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise ValueError(f"{name} must be an int, got {value!r}")
    check_number(name, value, at_least=at_least)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of the names in `allowed`."""
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
