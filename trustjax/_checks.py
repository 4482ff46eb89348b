"""Checks of arguments on the host, before anything is compiled, and the errors they raise."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import numpy as np


class InputError(ValueError):
    """A value from the user that cannot be used.

    Attributes:
      field: The argument, or the field of a configuration, that holds the value, such as
        "grid.sgd". The text begins with it. None if no field is to blame, as for the content of a
        file.
    """

    def __init__(self, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


class MissingPackageError(ModuleNotFoundError):
    """An optional package that is not installed; the text says how to install it."""


class FieldError(InputError):
    """An argument or field that does not meet a requirement.

    Its text is "FIELD must REQUIREMENT, got GOT", with "; ADVICE" behind it if there is any.

    Attributes:
      requirement: What the value must be or do, such as "be >= 0".
      got: The value, or a text that describes it.
      advice: What to do instead; empty if there is nothing to say.
    """

    def __init__(self, field: str, requirement: str, got: object, *, advice: str = "") -> None:
        super().__init__(
            f"{field} must {requirement}, got {got}" + (f"; {advice}" if advice else ""), field
        )
        self.requirement, self.got, self.advice = requirement, got, advice

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are unpickled from their text alone, which is not what this one is made of.
        make = functools.partial(FieldError, advice=self.advice)
        return make, (self.field, self.requirement, self.got)


def is_concrete_number(value: Any) -> bool:
    """Whether `value` is a number, or an array of them, that is not traced."""
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
    """Raises FieldError unless `value`, a number or an array of numbers, is within the bounds.

    Traced values pass, so that radii and rates can be swept by `jax.vmap`; so do schedules and
    None. NaN never passes, and no bool, text or list does: False is not "off".
    """
    if isinstance(value, bool | np.bool_ | str | list | tuple | dict):
        raise FieldError(name, "be a number", repr(value))
    if not is_concrete_number(value):
        return
    if at_least is not None and not np.all(np.asarray(value) >= at_least):
        raise FieldError(name, f"be >= {at_least:g}", value)
    if at_most is not None and not np.all(np.asarray(value) <= at_most):
        raise FieldError(name, f"be <= {at_most:g}", value)
    if above is not None and not np.all(np.asarray(value) > above):
        raise FieldError(name, f"be > {above:g}", value)
    if below is not None and not np.all(np.asarray(value) < below):
        raise FieldError(name, f"be < {below:g}", value)


def check_scalar(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises FieldError unless `value` is one number within the bounds, traced, a schedule or None.

    An array of numbers would broadcast, along an axis that happens to fit or to a matrix.
    """
    if value is not None and np.ndim(value) != 0:
        raise FieldError(name, "be one number", f"shape {np.shape(value)}")
    check_number(name, value, at_least=at_least, at_most=at_most, above=above, below=below)


def check_count(name: str, value: Any, *, at_least: int | None = None) -> None:
    """Raises FieldError unless `value` is None or an int (no bool, no 2.0), `at_least` or more."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise FieldError(name, "be an int", repr(value))
    check_number(name, value, at_least=at_least)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Raises FieldError unless `value` is one of the names in `allowed`."""
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise FieldError(name, f"be one of {names}", repr(value))
