"""Names and arguments of environments, which are parsed and checked before anything is built."""

import ast
import difflib
import numbers
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trustjax._checks import FieldError

_WORDS = {"true": True, "false": False, "none": None}


def split_name(name: str) -> tuple[str, str, dict[str, Any]]:
    """Splits "source:own?a=1&b=spring" into ("source", "own", {"a": 1, "b": "spring"}).

    Values are Python literals or words. Raises ValueError if an option is not of the form key=value
    or is given twice.
    """
    source, _, rest = name.partition(":")
    own, mark, text = rest.partition("?")
    options: dict[str, Any] = {}
    for option in text.split("&") if mark else ():
        key, equals, value = option.partition("=")
        if not key or not equals or not value:
            raise ValueError(
                f"options of {name!r} must be key=value, joined by &; got {option!r}: "
                f'write "{source}:{own}?key=value&key=value"'
            )
        if key in options:
            raise ValueError(f"{key} is given twice in {name!r}: give it once")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = _WORDS.get(value.lower(), value)
    return source, own, options


def check_known(what: str, given: str, known: Collection[str]) -> None:
    """Raises ValueError, with the closest names or all of them, unless `given` is in `known`."""
    if given in known:
        return
    # Compared in lower case, because "cartpole" is far from "CartPole-v1" otherwise.
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(given.lower(), lower, n=3, cutoff=0.5)
    close = close or [name for name in lower if given.lower() in name][:3]
    hint = (
        f"did you mean {' or '.join(lower[name] for name in close)}?"
        if close
        else f"there are {', '.join(sorted(known)) or 'none'}"
    )
    raise ValueError(f"unknown {what} {given!r}; {hint}")


def check_arguments(environment: str, given: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for an argument that `environment` does not take."""
    for name in given:
        check_known(f"argument of {environment}", name, known)


def coerce_like(name: str, value: Any, default: Any) -> Any:
    """`value`, if it is of the kind of `default`: a flag, a whole number, a number or an array.

    JAX arrays, traced or not, are accepted as numbers, and a value for an array is converted to one
    of its dtype. Raises ValueError for another kind or shape.
    """
    if not isinstance(default, bool | int | float | jax.Array):
        return value
    if isinstance(default, jax.Array):
        try:
            array = jnp.asarray(value, default.dtype)
        except (TypeError, ValueError) as error:
            raise FieldError(name, "be an array of numbers", repr(value)) from error
        if array.shape != default.shape:
            raise FieldError(name, f"have shape {default.shape}", array.shape)
        return array
    if isinstance(value, jax.Array):
        return value
    flag = isinstance(value, bool)
    if isinstance(default, bool):
        good, kind = flag, "True or False"
    elif isinstance(default, int):
        good, kind = isinstance(value, numbers.Integral) and not flag, "a whole number"
    else:
        good, kind = isinstance(value, numbers.Real) and not flag, "a number"
    if not good:
        raise FieldError(name, f"be {kind}", repr(value))
    return value


def merged(name: str, options: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the name and the keyword arguments; raises ValueError for one in both."""
    for key in options.keys() & kwargs.keys():
        raise ValueError(
            f"{key} is given twice, in {name!r} and as {key}={kwargs[key]!r}: give it once"
        )
    return {**options, **kwargs}
