"""The description of a network in the file of a policy: the fields of its `Actor`.

Of a network or an actor of one's own it holds the name of the class and no code: the object itself
is an argument of the reader, in `Own`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from trustjax._checks import FieldError
from trustjax.agents._untrusted import Arrays, check_names, short
from trustjax.agents.own_networks import hashable
from trustjax.envs import Environment
from trustjax.models.actor_critic import Actor
from trustjax.models.mlp import ACTIVATIONS
from trustjax.models.observations import Flat


class Own(NamedTuple):
    """The objects that a file names and does not hold; None for those that it does not need.

    Attributes:
      env: Environment, or its name.
      network: Module in front of the hidden layers.
      actor: Module in place of the whole `Actor`.
    """

    env: str | Environment | None = None
    network: nn.Module | None = None
    actor: Any = None


def missing(argument: str, name: str) -> FieldError:
    """The error of a reader that was not given the object of this name."""
    return FieldError(
        argument,
        f"be given, because the file holds no more of it than its name, {short(name)}",
        None,
        advice=f"write load_policy(path, {argument}=...)",
    )


def has_own_network(actor: Any) -> bool:
    """Whether there is a module of one's own in front of the hidden layers."""
    return not isinstance(getattr(actor, "network", None), Flat | None)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1  # a bool is an int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e6 < value < 1e6


def _is_size_or_none(value: Any) -> bool:
    return value is None or _is_size(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_Kind = tuple[Callable[[Any], bool], str]
_SIZE_OR_NONE: _Kind = (_is_size_or_none, "a whole number >= 1 or null")
_NETWORK_DTYPES = ("float32", "float64", "bfloat16", "float16")
# A check and its description for each field of `Actor`; JSON has lists in place of tuples.
_KINDS: dict[str, _Kind] = {
    "hidden": (
        lambda x: isinstance(x, list | tuple) and all(map(_is_size, x)),
        "a list of whole numbers >= 1",
    ),
    "activation": (
        lambda x: isinstance(x, str) and x in ACTIVATIONS,
        f"one of {', '.join(ACTIVATIONS)}",
    ),
    "gru_size": _SIZE_OR_NONE,
    "orthogonal": (_is_flag, "true or false"),
    "dtype": (
        lambda x: x is None or (isinstance(x, str) and x in _NETWORK_DTYPES),
        f"null or one of {', '.join(_NETWORK_DTYPES)}",
    ),
    "num_actions": (
        lambda x: _is_size_or_none(x) or (isinstance(x, list | tuple) and all(map(_is_size, x))),
        "a whole number >= 1, a list of them, or null",
    ),
    "action_size": _SIZE_OR_NONE,
    "initial_log_std": (_is_number, "a number between -1e6 and 1e6"),
    "squashed": (_is_flag, "true or false"),
    "log_std_range": (
        lambda x: (
            isinstance(x, list | tuple) and len(x) == 2 and all(map(_is_number, x)) and x[0] < x[1]
        ),
        "two numbers between -1e6 and 1e6, the lower one first",
    ),
}
# Fields that files had not from the start, and that are written where they are not None.
_LATER: dict[str, _Kind] = {
    "network": (lambda x: x is None or isinstance(x, str), "the name of a class or null"),
    "obs_key": (
        lambda x: (
            x is None or isinstance(x, str)
            or (isinstance(x, list | tuple) and all(isinstance(name, str) for name in x))
        ),
        "a name, a list of names, or null",
    ),
}  # fmt: skip
assert {*_KINDS, *_LATER} == {f.name for f in dataclasses.fields(Actor)} - {"parent", "name"}


def fields_of(actor: Any) -> dict[str, Any]:
    """The fields of the network as they are saved, or the name of an actor of one's own."""
    if type(actor) is not Actor:
        return {"own": type(actor).__name__}
    fields = {name: getattr(actor, name) for name in _KINDS}
    fields["dtype"] = fields["dtype"] and str(jnp.dtype(fields["dtype"]))
    if actor.network is not None:
        fields["network"] = type(actor.network).__name__
    if actor.obs_key is not None:
        fields["obs_key"] = actor.obs_key
    return fields


def actor_of(fields: Any, arrays: Arrays, own: Own) -> Any:
    """The network; raises ValueError for invalid fields, and for sizes that exceed the arrays."""
    if not isinstance(fields, dict):
        raise FieldError("about.actor", "be an object", short(fields))
    if isinstance(fields.get("own"), str):
        if own.actor is None:
            raise missing("actor", fields["own"])
        return own.actor
    if own.actor is not None:
        raise FieldError("actor", "not be given for a policy without one of its own", own.actor)
    fields = dict.fromkeys(_LATER) | fields
    kinds = _KINDS | _LATER
    check_names("about.actor", fields, kinds)
    for name, (is_good, kind) in kinds.items():
        if not is_good(fields[name]):
            raise FieldError(f"about.actor.{name}", f"be {kind}", short(fields[name]))
    # Every unit has a bias, so that no size can exceed the number of entries of all arrays.
    most = sum(array.size for array in arrays.values())
    if len(fields["hidden"]) > len(arrays):
        raise ValueError(f"about.actor.hidden: there are no {len(fields['hidden'])} layers")
    for name in ("hidden", "gru_size", "num_actions", "action_size"):
        sizes = fields[name] if isinstance(fields[name], list | tuple) else [fields[name] or 1]
        if max(sizes, default=1) > most or len(sizes) > most:
            raise ValueError(
                f"about.actor.{name}: there are {most} numbers, too few for {short(fields[name])}"
            )
    network = _network(fields.pop("network"), own)
    tuples: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Actor(**tuples, network=network)


def _network(name: str | None, own: Own) -> nn.Module | None:
    """The module in front of the hidden layers: none, the default one, or one's own."""
    is_own = name not in (None, Flat.__name__)
    if is_own and own.network is None:
        raise missing("network", str(name))
    if not is_own and own.network is not None:
        raise FieldError("network", "not be given for a policy without one of its own", own.network)
    if is_own:
        module: nn.Module = hashable(own.network)
        return module
    return None if name is None else Flat()
