"""Objects from nodes with `_target_`, and the key of an argument that a target refuses."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from experiments.runtime.targets import ConfigError, check_nodes, is_node, locate


def build(node: Mapping[str, Any], key: str) -> Any:
    """Checks the nodes with `check_nodes`, then calls their targets, the innermost first.

    Raises ConfigError, with the key of the node, if a target raises ValueError or TypeError. If
    that is an `InputError` that names an argument, it is the full key of the argument.
    """
    check_nodes(node, key)
    try:
        return instantiate({key: node}, _convert_="all")[key]
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValueError | TypeError):
            raise
        inner = re.search(r"full_key: (\S+)", str(error))  # Hydra tells it in the text alone
        raise argument_error(inner[1] if inner else key, error.__cause__) from error


def argument_error(key: str, error: Exception) -> ConfigError:
    """The error for what the target of the node at `key` raised, with the full key in front."""
    message = " ".join(str(error).split())
    field = _field(error)
    if field is None:
        return ConfigError.at(key, message)
    return ConfigError(f"{key}.{message}", f"{key}.{field}")


def _field(error: Exception) -> str | None:
    from trustjax._checks import InputError  # imports JAX, which what raised has done by now

    return error.field if isinstance(error, InputError) else None


def key_of_argument(error: Exception, node: Any, key: str) -> str:
    """The key of the first node below `key` whose target takes the argument that `error` names.

    It is `key` itself if there is no such node. The targets have passed `check_nodes`.
    """
    field = _field(error)
    found = field and _taker(field.partition(".")[0], node, key)
    return found or key


def _taker(argument: str, node: Any, key: str) -> str | None:
    if not isinstance(node, Mapping):
        return None
    if is_node(node) and argument in inspect.signature(locate(node["_target_"], key)).parameters:
        return key
    return next(filter(None, (_taker(argument, node[n], f"{key}.{n}") for n in node)), None)
