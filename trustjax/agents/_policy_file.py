"""The file of a policy, an .npz without pickles, which may come from an untrusted source.

    about                      JSON: format, env, actor (the fields of the network), normalized
    variables/params/...       the variables of the network
    statistics/mean, ...       the statistics that normalise observations; none of them or all; for
                               observations in parts statistics/PART/mean, ...
    clip_observations          the largest absolute value of a normalised observation
    env_params/...             the parameters of the environment; none of them for its defaults

Of an environment, a network or an actor of one's own it holds the name of the class and no code:
the object itself is an argument of the reader.

No header is trusted beyond the bytes that are there, and all arrays are compared with the network
that `about` describes, in the environment that it names, before the policy is built.
"""

import functools
import json
import math
import os
import secrets
import stat
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError
from trustjax.agents._policy_network import Own, actor_of, fields_of, has_own_network, missing
from trustjax.agents._untrusted import (
    TEXT_OR_FLOAT,
    Arrays,
    check_names,
    parsed,
    read_arrays,
    short,
    short_error,
)
from trustjax.agents.rollout import prepared_for
from trustjax.agents.running_statistics import initial_observation_statistics
from trustjax.envs import Environment, as_environment
from trustjax.models.actor_critic import Actor, initial_carry

_FORMAT = "trustjax policy 1"
_DTYPES = ("float32", "float64")
_PARAMS = "env_params"


class Contents(NamedTuple):
    """The contents of a file.

    Attributes:
      env: The environment, or its name.
      actor: The network.
      variables: Variables of the network.
      statistics: Statistics of the observations or of their parts; None without them.
      clip_observations: Largest absolute value of a normalised observation, float [].
      env_params: Parameters of the environment; None for its defaults.
    """

    env: str | Environment
    actor: Any
    variables: Any
    statistics: Any
    clip_observations: jax.Array
    env_params: Any


def write(path: Path, contents: Contents) -> None:
    """Writes the file completely or not at all; raises ValueError if `read` would refuse it."""
    env, actor, variables, statistics, clip, env_params = contents
    about = {
        "format": _FORMAT, "env": env, "actor": fields_of(actor),
        "normalized": statistics is not None,
    }  # fmt: skip
    if isinstance(env, Environment):
        about["env"] = {"own": env.name, "observation_shape": env.observation_shape}
    leaves = _named("variables", variables) | _named("statistics", statistics)
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    arrays["clip_observations"] = np.asarray(clip)
    text = json.dumps(about)
    own = Own(
        env if isinstance(env, Environment) else None,
        actor.network if has_own_network(actor) else None,
        actor if type(actor) is not Actor else None,
    )
    try:
        if env_params is not None:
            arrays |= _params_arrays(env_params, as_environment(env).default_params)
        _check(text, arrays, own)
    except ValueError as error:
        raise ValueError(f"this policy cannot be saved: {error}") from error
    # Opened like any other file, so that its mode follows the umask, and renamed when it is whole.
    beside = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with beside.open("xb") as file:
            np.savez(file, allow_pickle=False, about=np.array(text), **arrays)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str], own: Own) -> Contents:
    """Reads the file; raises ValueError with one line that names the file and the field.

    One that names the argument is raised if an object in `own` is missing or not needed.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            arrays = read_arrays(file, os.fstat(file.fileno()).st_size, kinds=_kinds)
        about = arrays.pop("about", None)
        if about is None or about.dtype.kind != "U" or about.shape:
            raise ValueError("about must be a text")
        env, actor, statistics = _check(str(about), arrays, own)
    except ValueError as error:
        if isinstance(error, FieldError) and error.field in Own._fields:
            raise  # the argument is at fault, not the file
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} must be a policy saved by trustjax: {problem}") from error
    env_params = _params(arrays, as_environment(env).default_params)
    leaves = {
        name: jnp.asarray(array)
        for name, array in arrays.items()
        if not name.startswith(f"{_PARAMS}/")
    }
    clip = leaves.pop("clip_observations")
    found = [leaves.pop(name) for name in _named("statistics", statistics)]
    nested = flax.traverse_util.unflatten_dict(leaves, sep="/")
    statistics = jax.tree.unflatten(jax.tree.structure(statistics), found)
    return Contents(env, actor, nested["variables"], statistics, clip, env_params)


def _kinds(name: str) -> str:
    return "biuf" if name.startswith(f"{_PARAMS}/") else TEXT_OR_FLOAT


def _check(text: str, arrays: Arrays, own: Own) -> tuple[Any, Any, Any]:
    """The environment or its name, the network, and shapes of the statistics or None.

    Raises ValueError unless the arrays are theirs.
    """
    about = parsed(text)
    if about.get("format") != _FORMAT:
        raise ValueError(f"its format is {short(about.get('format'))}, not {_FORMAT!r}")
    normalized = about.pop("normalized", None)  # older files lack it
    check_names("about", about, ("format", "env", "actor"))
    if normalized is not None and not isinstance(normalized, bool):
        raise FieldError("about.normalized", "be true or false", short(normalized))
    given, env = _environment(about["env"], own)
    actor = actor_of(about["actor"], arrays, own)
    if type(actor) is Actor:
        _check_actions(actor, env, given)
    variables, statistics = _shapes(actor, env)
    if normalized is None:
        normalized = any(name.startswith("statistics/") for name in arrays)
    statistics = statistics if normalized else None
    leaves = _named("variables", variables) | _named("statistics", statistics)
    shapes = {name: leaf.shape for name, leaf in leaves.items()} | {"clip_observations": ()}
    has_params = any(name.startswith(f"{_PARAMS}/") for name in arrays)
    defaults = _named(_PARAMS, env.default_params) if has_params else {}
    check_names("it", arrays, [*shapes, *defaults])
    for name, default in defaults.items():
        _check_param(name, arrays[name], np.asarray(default))
    for name, shape in shapes.items():
        _check_array(name, arrays[name], shape)
    dtypes = {arrays[name].dtype for name in shapes if name.startswith("variables/")}
    if len(dtypes) > 1 and own == Own():
        raise FieldError("variables", "have one dtype", sorted(map(str, dtypes)))
    return given, actor, statistics


def _environment(saved: Any, own: Own) -> tuple[str | Environment, Environment]:
    """The environment as it is given, by name or as an object, and the object."""
    is_own = isinstance(saved, dict) and isinstance(saved.get("own"), str)
    if not isinstance(saved, str) and not is_own:
        raise FieldError("about.env", "be a name", short(saved))
    if is_own and own.env is None:
        raise missing("env", saved["own"])
    given = saved if own.env is None else own.env
    try:
        env = as_environment(given)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # options may be anything that a literal can be
        if own.env is not None:
            raise
        raise ValueError(f"about.env: {short_error(error)}") from error
    if is_own and saved.get("observation_shape") != parsed(
        json.dumps({"shape": env.observation_shape})
    ).get("shape"):
        raise FieldError(
            "env",
            f"have observations of shape {short(saved.get('observation_shape'))}",
            short(env.observation_shape),
        )
    return given, env


def _check_actions(actor: Actor, env: Environment, given: str | Environment) -> None:
    number: Any = env.num_actions
    number = tuple(number) if np.ndim(number or 0) else number
    actions = number, None if env.action_low is None else len(env.action_low)
    for field, expected in zip(("num_actions", "action_size"), actions, strict=True):
        if getattr(actor, field) != expected:
            raise FieldError(
                f"about.actor.{field}",
                f"be {expected}, as in {short(given)}",
                getattr(actor, field),
            )


@functools.lru_cache(maxsize=64)
def _shapes(actor: Any, env: Environment) -> tuple[Any, Any]:
    """Shapes of the network's variables, and of the statistics of its observations."""

    def first(key: jax.Array) -> tuple[Any, Any]:
        if getattr(actor, "network", None) is None:  # to trace a reset of brax takes a second
            observation = jnp.zeros((1, math.prod(env.observation_shape)))
        else:
            observation = prepared_for(actor)(jax.vmap(env.reset)(key[None])[0])
        one = jax.tree.map(lambda x: x[0], observation)
        return (
            actor.init(key, observation, initial_carry(actor, (1,))),
            initial_observation_statistics(one),
        )

    shapes: tuple[Any, Any] = jax.eval_shape(first, jax.random.key(0))
    return shapes


def _check_array(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise FieldError(name, f"have shape {shape}", short(array.shape))
    if array.dtype not in _DTYPES:
        raise FieldError(name, f"be {' or '.join(_DTYPES)}", short(array.dtype))
    with np.errstate(over="ignore"):
        array = np.asarray(jnp.asarray(array))
    if name == "clip_observations":
        if not array > 0:
            raise FieldError(name, "be > 0", array)
    elif not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    elif name.startswith("statistics/") and not name.endswith("/mean") and (array < 0).any():
        raise ValueError(f"{name} must be >= 0")


def _named(prefix: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names that they have in a file, such as "prefix/part/mean"."""
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _params_arrays(env_params: Any, defaults: Any) -> Arrays:
    """The parameters by name, in the dtypes of the defaults."""
    expected: Any = jax.tree.structure(defaults)
    found: Any = jax.tree.structure(env_params)
    if found != expected:
        raise FieldError("env_params", f"have the structure {short(expected)}", short(found))
    named, arrays = _named(_PARAMS, env_params), {}
    for name, default in _named(_PARAMS, defaults).items():
        try:
            arrays[name] = np.asarray(named[name]).astype(
                np.asarray(default).dtype, casting="same_kind"
            )
        except TypeError as error:
            raise ValueError(f"{name}: {short_error(error)}") from error
    return arrays


def _params(arrays: Arrays, defaults: Any) -> Any:
    """The parameters in `arrays`, with Python numbers where the defaults have some; or None."""
    named = _named(_PARAMS, defaults)
    if not named.keys() <= arrays.keys():
        return None
    leaves = [
        jnp.asarray(arrays[name], default.dtype)
        if isinstance(default, jax.Array | np.ndarray)
        else arrays[name].item()
        for name, default in named.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(defaults), leaves)


def _check_param(name: str, array: npt.NDArray[Any], default: npt.NDArray[Any]) -> None:
    if array.shape != default.shape:
        raise FieldError(name, f"have shape {default.shape}", short(array.shape))
    if array.dtype.kind != default.dtype.kind:
        raise FieldError(name, f"be of a kind with {default.dtype}", short(array.dtype))
