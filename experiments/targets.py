"""Nodes with `_target_`: which objects a config may name, and whether their arguments fit."""

import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

# Of flax only what makes models: flax.io and flax.training can write and delete files.
ALLOWED = ("trustjax", "experiments", "optax", "flax.linen", "flax.nnx")
_HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_")


class ConfigError(ValueError):
    """A configuration that cannot run. Its text is the one line that the user sees."""


def unknown_key(key: str, names: Iterable[str]) -> ConfigError:
    """The error for `key`, whose last part is not among `names`."""
    names = list(names)
    if not names:
        return ConfigError(f"{key}: unknown key, nothing is allowed here")
    folder, _, last = key.rpartition(".")
    nearest = ".".join(filter(None, (folder, nearest_name(last, names))))
    return ConfigError(
        f"{key}: unknown key, the nearest is {nearest} (allowed: {', '.join(names)})"
    )


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The one of `names` most like `name`."""
    return max(names, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())


def locate(name: Any, key: str) -> Any:
    """The object called `name`, such as `optax.sgd`; `key` is its place in the config.

    Raises ConfigError unless it exists, is callable, and both its name and the module that defines
    it belong to an allowed package. No other module is walked through or imported.
    """
    if not (isinstance(name, str) and _is_allowed(name)) or re.search(r"(^|\.)(_|\.|$)", name):
        raise ConfigError(f"{key}: got {name!r}, allowed: public names in {', '.join(ALLOWED)}")
    first, *parts = name.split(".")
    found: Any = importlib.import_module(first)
    for part in parts:
        found = _child(found, part, key, name)
    if not callable(found) or not _is_allowed(getattr(found, "__module__", None)):
        raise ConfigError(
            f"{key}: got {name!r}, allowed: functions and classes made in {', '.join(ALLOWED)}"
        )
    return found


def _child(parent: Any, part: str, key: str, name: str) -> Any:
    if not hasattr(parent, part) and isinstance(parent, types.ModuleType):
        module = f"{parent.__name__}.{part}"
        try:
            importlib.import_module(module)
        except ImportError as error:
            if getattr(error, "name", None) != module:  # it is there, but cannot be imported
                raise ConfigError(f"{key}: {name!r} cannot be imported: {error}") from error
    if not hasattr(parent, part):
        names = [other for other in dir(parent) if not other.startswith("_")]
        nearest = f", the nearest is {nearest_name(part, names)}" if names else ""
        raise ConfigError(f"{key}: got {name!r}, but there is no {part!r}{nearest}")
    child = getattr(parent, part)
    packages = {package.partition(".")[0] for package in ALLOWED}
    if isinstance(child, types.ModuleType) and child.__name__.partition(".")[0] not in packages:
        raise ConfigError(f"{key}: got {name!r}, which leads through the module {child.__name__}")
    return child


def _is_allowed(name: Any) -> bool:
    return isinstance(name, str) and any(name == a or name.startswith(f"{a}.") for a in ALLOWED)


def check_nodes(value: Any, key: str) -> None:
    """Checks every node in `value` (plain data, interpolations resolved) that has a `_target_`.

    Raises ConfigError for a target outside the allowed packages, for an argument that its signature
    does not have, lacks, or that does not fit its annotation. Nothing is called.
    """
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key}: got {value!r}, allowed: text without ${{")  # resolved only once
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_nodes(item, f"{key}[{index}]")
    if isinstance(value, dict):
        if "_target_" in value:
            _check_call(value, key)
        for name, item in value.items():
            check_nodes(item, f"{key}.{name}")


def _check_call(node: Mapping[str, Any], key: str) -> None:
    target = locate(node["_target_"], f"{key}._target_")
    arguments = {name: value for name, value in node.items() if name not in _HYDRA_KEYS}
    signature = inspect.signature(target)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if inspect.Parameter.VAR_KEYWORD not in kinds.values():
        names = [n for n, kind in kinds.items() if kind is not inspect.Parameter.VAR_POSITIONAL]
        for name in arguments:
            if name not in names:
                raise unknown_key(f"{key}.{name}", names)
    annotations = _annotations(target)
    for name, value in arguments.items():
        if name in annotations and not fits(value, annotations[name]):
            raise wrong_value(f"{key}.{name}", value, annotations[name])
    bind = signature.bind_partial if node.get("_partial_") else signature.bind
    try:
        bind(*node.get("_args_", ()), **arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {error} ({node['_target_']})") from error


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    function = target
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        function = target.__init__
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names known to type checkers alone
        return {}


def wrong_value(key: str, value: Any, annotation: Any) -> ConfigError:
    """The error for a `value` that does not fit the `annotation` of `key`."""
    return ConfigError(f"{key}: got {value!r}, allowed: {describe(annotation)}")


_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def fits(value: Any, annotation: Any) -> bool:
    """Whether plain data may be given where `annotation` stands; True where that is not known.

    A node with `_target_` fits everywhere: what it makes is known only after the call.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, Mapping) and "_target_" in value:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in arguments)
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if origin is typing.Literal:
        return value in arguments
    if annotation in (None, types.NoneType):
        return value is None
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation in (int, float):
        kinds = (int, float) if annotation is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return value in annotation.__members__
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return fits(value, list[arguments[0]])  # type: ignore[valid-type]
        return (
            isinstance(value, list)
            and len(value) == len(arguments)
            and all(map(fits, value, arguments))
        )
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if origin is collections.abc.Callable:
        return False
    if origin is None and inspect.isclass(annotation) and annotation is not object:
        try:
            return isinstance(value, annotation)
        except TypeError:  # a protocol
            return True
    return True


def describe(annotation: Any) -> str:
    """An annotation in words, for error messages."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation in (None, types.NoneType):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in arguments))
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return " or ".join(annotation.__members__)
    if annotation is Any:
        return "anything"
    if origin in (list, tuple, collections.abc.Sequence):
        return f"a list of ({', '.join(describe(item) for item in arguments if item is not ...)})"
    if origin in (dict, collections.abc.Mapping):
        return f"keys, each with {describe(arguments[1])}"
    return "a node with _target_"


def build(node: Mapping[str, Any], key: str) -> Any:
    """Calls the targets in `node`, innermost first, after `check_nodes`.

    Raises ConfigError with the node's key where a target raises ValueError or TypeError. A message
    of the form "NAME must be ..." is joined to the key of the node, which gives the full key.
    """
    check_nodes(node, key)
    try:
        return instantiate({key: node}, _convert_="all")[key]
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | TypeError):
            raise
        place = re.search(r"full_key: (\S+)", str(error))
        raise argument_error(place.group(1) if place else key, error.__cause__) from error


def argument_error(key: str, error: Exception) -> ConfigError:
    """What the node at `key` raised about an argument, with the full key in front."""
    message = " ".join(str(error).split())
    separator = "." if re.match(r"[a-z][\w.]* must ", message) else ": "
    return ConfigError(f"{key}{separator}{message}")
