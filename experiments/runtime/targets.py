"""Nodes with `_target_`: which factories a config may name, and whether their arguments fit."""

import collections.abc
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

# Modules whose public functions and classes a config may name; * stands for any one name.
ROOMS = (
    "trustjax.optim",
    "trustjax.geometry",
    "trustjax.losses",
    "trustjax.models",
    "trustjax.data",
    "trustjax.parallel",
    "trustjax.agents.*",
    "trustjax.agents.multi.*",
    "experiments.tasks.*",
    "experiments.optimizers",
    "experiments.matrices",
    "experiments.penalties",
    "experiments.preferences",
    "experiments.trackers",
    "experiments.trackers.*",
    "optax",
    "optax.contrib",
    "optax.losses",
    "optax.schedules",
    "flax.linen",
)
# Modules whose functions and classes read or write a file by its path: a config may name none.
_CLOSED = (
    "trustjax.agents.policy",
    "trustjax.models.checkpoint",
    "trustjax.models.gguf",
    "trustjax.models.text_checkpoint",
    "experiments.trackers.csv",
    "experiments.trackers.services",
)
_HYDRA_KEYS = ("_target_", "_args_", "_partial_")
_DEEPEST = 32


class ConfigError(ValueError):
    """A configuration that cannot run. Its text is the one line that the user sees.

    Attributes:
      key: Full key of the value that is wrong; empty if it is not about one value.
    """

    def __init__(self, text: str, key: str = "") -> None:
        super().__init__(text)
        self.key = key

    @classmethod
    def at(cls, key: str, problem: str) -> "ConfigError":
        """The error "KEY: PROBLEM"."""
        return cls(f"{key}: {problem}", key)


def unknown_key(key: str, names: Iterable[str]) -> ConfigError:
    """The error for `key`, whose last part is not among `names`."""
    names = list(names)
    if not names:
        return ConfigError.at(key, "unknown key, nothing is allowed here")
    folder, _, last = key.rpartition(".")
    nearest = ".".join(filter(None, (folder, nearest_name(last, names))))
    return ConfigError.at(
        key, f"unknown key, the nearest is {nearest} (allowed: {', '.join(names)})"
    )


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The one of `names` most like `name`."""
    return max(names, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())


def locate(name: Any, key: str) -> Any:
    """The factory called `name`, such as `optax.sgd`; `key` is the key that holds the name.

    A factory is a public function or class of a module in `ROOMS`. It is defined in that module or
    below it, returns something, and neither reads nor writes a file of its own. No name leads
    through a class, or through a module outside `ROOMS`, and no other module is imported. Raises
    ConfigError if there is no such factory.
    """
    allowed = f"allowed: factories of {', '.join(ROOMS)}"
    if not (isinstance(name, str) and re.fullmatch(r"[a-z]\w*(\.[A-Za-z]\w*)+", name, re.ASCII)):
        raise ConfigError.at(key, f"got {name!r}, {allowed}")
    room, _, last = name.rpartition(".")
    if room not in ROOMS and f"{room.rpartition('.')[0]}.*" not in ROOMS:
        raise ConfigError.at(key, f"got {name!r}, {allowed}")
    try:
        module = importlib.import_module(room)
    except ImportError as error:
        if getattr(error, "name", None) == room:
            raise ConfigError.at(key, f"got {name!r}, but there is no module {room}") from error
        raise ConfigError.at(key, f"{name!r} cannot be imported: {error}") from error
    found = vars(module).get(last)
    if not _is_factory(found, room):
        names = [each for each, value in vars(module).items() if _is_factory(value, room)]
        nearest = f", the nearest is {nearest_name(last, names)}" if names else ""
        what = f"but there is no {last!r}" if found is None else f"which is no factory of {room}"
        raise ConfigError.at(key, f"got {name!r}, {what}{nearest}")
    return found


def _is_factory(found: Any, room: str) -> bool:
    """Whether `found`, from the module `room`, is a factory that a config may name."""
    function = found.func if isinstance(found, functools.partial) else found
    if not (inspect.isfunction(function) or inspect.isclass(function)):
        return False
    home, name = function.__module__, function.__qualname__
    above = "optax" if room.startswith("optax") else room  # Optax defines much in _src
    if not f"{home}.".startswith(f"{above}.") or home in _CLOSED or not name.isidentifier():
        return False
    if inspect.isclass(function) and (
        issubclass(function, BaseException) or getattr(function, "_is_protocol", False)
    ):
        return False
    if room == "flax.linen":  # its functions change settings of the process
        return inspect.isclass(found) and "flax.linen.module.Module" in _ancestors(found)
    return not name.startswith("_") and made_by(found) not in (None, types.NoneType)


def _ancestors(found: type) -> list[str]:
    return [f"{each.__module__}.{each.__qualname__}" for each in found.__mro__]


def made_by(target: Any) -> Any:
    """The type that a call of `target` returns; Any if it is not known."""
    if isinstance(target, functools.partial):
        return made_by(target.func)
    if inspect.isclass(target):
        return target
    made = _annotations(target).get("return", Any)
    return Any if isinstance(made, str | typing.TypeVar) else made


def check_nodes(value: Any, key: str, *, depth: int = 0) -> None:
    """Checks every node with `_target_` in `value` (plain data, interpolations resolved).

    Raises ConfigError for a target that is no factory, and for an argument that is unknown, missing
    or does not fit its annotation, whether it is plain data or made by another target. Also for
    Hydra's own names without a `_target_`, names that are not text, integers beyond 64 bits, and
    deep nesting. Nothing is called.
    """
    if depth > _DEEPEST:
        raise ConfigError.at(f"{key[:60]}...", f"nested more than {_DEEPEST} levels deep")
    if isinstance(value, str) and ("${" in value or value == "???"):  # resolved only once
        raise ConfigError.at(key, f"got {value!r}, allowed: text without ${{, and not ???")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError.at(key, f"got {shown(value)}, allowed: integers of 64 bits")
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_nodes(item, f"{key}[{index}]", depth=depth + 1)
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError.at(key, f"got the name {name!r}, allowed: names that are text")
            if "_target_" not in value and re.fullmatch(r"_\w+_", name):  # means something to Hydra
                raise ConfigError.at(f"{key}.{name}", f"unknown key, as {key} has no _target_")
            if name != "_target_":
                check_nodes(item, f"{key}.{name}", depth=depth + 1)
        if "_target_" in value:
            _check_call(value, key)


def _check_call(node: Mapping[str, Any], key: str) -> None:
    target = locate(node["_target_"], f"{key}._target_")
    partial, positional = node.get("_partial_", False), node.get("_args_", [])
    if not isinstance(partial, bool):
        raise wrong_value(f"{key}._partial_", partial, bool)
    if not isinstance(positional, list):
        raise wrong_value(f"{key}._args_", positional, list[Any])
    arguments = {name: value for name, value in node.items() if name not in _HYDRA_KEYS}
    signature = inspect.signature(target)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    any_name = inspect.Parameter.VAR_KEYWORD in kinds.values()
    names = [n for n, kind in kinds.items() if kind not in _VARIADIC]
    for name in arguments:
        if name not in names and (not any_name or name.startswith("_")):
            raise unknown_key(f"{key}.{name}", names)
    try:
        bound = (signature.bind_partial if partial else signature.bind)(*positional, **arguments)
    except TypeError as error:
        raise ConfigError.at(key, f"{error} ({node['_target_']})") from error
    annotations = _annotations(target)
    for name, value in bound.arguments.items():
        full_key = f"{key}.{name}" if name in arguments else f"{key}._args_"
        if name in annotations and kinds[name] is inspect.Parameter.VAR_POSITIONAL:
            check_fits(list(value), list[annotations[name]], full_key)  # type: ignore[valid-type]
        elif name in annotations and kinds[name] is inspect.Parameter.VAR_KEYWORD:
            for each, item in value.items():
                check_fits(item, annotations[name], f"{key}.{each}")
        elif name in annotations:
            check_fits(value, annotations[name], full_key)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _annotations(target: Callable[..., Any]) -> dict[str, Any]:
    function = target
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        function = target.__init__
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names known to type checkers alone
        found = getattr(function, "__annotations__", {})
        return {name: each for name, each in found.items() if not isinstance(each, str)}


def check_fits(value: Any, annotation: Any, key: str) -> None:
    """Raises ConfigError, which names `key`, unless the value fits its annotation."""
    if not fits(value, annotation):
        raise wrong_value(key, value, annotation)


def wrong_value(key: str, value: Any, annotation: Any) -> ConfigError:
    """The error for a `value` that does not fit the `annotation` of `key`."""
    if is_node(value):
        made = made_by(locate(value["_target_"], f"{key}._target_"))
        name = getattr(made, "__name__", str(made))
        how = "a partial call that makes" if value.get("_partial_") else "which makes"
        return ConfigError.at(
            key, f"got {value['_target_']}, {how} {name}, allowed: {describe(annotation)}"
        )
    return ConfigError.at(key, f"got {shown(value)}, allowed: {describe(annotation)}")


def shown(value: Any) -> str:
    """The repr of a value for an error message; if it is long, without its middle."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:150]}...{text[-30:]}"


_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def fits(value: Any, annotation: Any) -> bool:
    """Whether plain data may be given for an argument of type `annotation`; True if in doubt.

    A node with `_target_` fits if the object that it makes fits: an instance of its class, or of
    the return annotation of its function; with `_partial_`, a function that returns it.
    """
    if annotation in (Any, object):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in arguments)
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if is_node(value):
        return _node_fits(value, annotation)
    if origin is typing.Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if annotation in (None, types.NoneType):
        return value is None
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation in (int, float):
        kinds = (int, float) if annotation is float else int
        return isinstance(value, kinds) and not isinstance(value, bool)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return isinstance(value, str) and value in annotation.__members__
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
    if typing.is_typeddict(annotation):
        return isinstance(value, dict)
    if origin is None and inspect.isclass(annotation):
        return not _members(annotation) and isinstance(value, annotation)
    return True


def is_node(value: Any) -> bool:
    """Whether `value` is a mapping with `_target_`."""
    return isinstance(value, Mapping) and "_target_" in value


def _node_fits(node: Mapping[str, Any], annotation: Any) -> bool:
    try:
        made = made_by(locate(node["_target_"], ""))
    except ConfigError:  # `check_nodes` tells
        return True
    if node.get("_partial_", False):
        made = Callable[..., made]
    return makes(made, annotation)


def makes(made: Any, annotation: Any) -> bool:
    """Whether an object of type `made` may be given for an argument of type `annotation`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return makes(made, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(makes(made, member) for member in arguments)
    if typing.get_origin(made) in (typing.Union, types.UnionType):
        return any(makes(member, annotation) for member in typing.get_args(made))
    if annotation in _PLAIN or annotation is types.NoneType:
        return False  # a number or a text is written down, not made
    known = inspect.isclass(annotation) or origin is not None
    if made is Any or annotation in (Any, object) or not known:
        return True
    members = {"__call__"} if origin is collections.abc.Callable else _members(annotation)
    if typing.get_origin(made) is collections.abc.Callable:
        returned = typing.get_args(made)[1]
        wanted = arguments[1] if origin is collections.abc.Callable else Any
        return members == {"__call__"} and makes(returned, wanted)
    made = typing.get_origin(made) or made
    if members and inspect.isclass(made):
        fields = getattr(made, "__dataclass_fields__", {})
        return all(any(each in vars(c) for c in made.__mro__) or each in fields for each in members)
    allowed = origin or annotation
    if not (inspect.isclass(made) and inspect.isclass(allowed)):
        return False
    return issubclass(made, allowed) or issubclass(allowed, made)


def _members(annotation: Any) -> set[str]:
    """The names of a protocol's members; none for any other type."""
    if not getattr(annotation, "_is_protocol", False):
        return set()
    names = {*vars(annotation), *getattr(annotation, "__annotations__", {})}
    return {name for name in names if name == "__call__" or not name.startswith("_")}


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
