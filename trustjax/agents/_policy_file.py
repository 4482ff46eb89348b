"""The file of a policy, an .npz without pickles, which may come from an untrusted source.

    about                      JSON: format, env, actor (the fields of the network), normalized
    variables/params/...       the variables of the network
    statistics/mean, ...       the statistics that normalise observations; none of them or all
    clip_observations          the largest absolute value of a normalised observation
    env_params/...             the parameters of the environment; none of them for its defaults

No header is trusted beyond the bytes that are there, and all arrays are compared with the network
that `about` describes, in the environment that it names, before the policy is built.
"""

import dataclasses
import functools
import io
import json
import math
import os
import reprlib
import secrets
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError
from trustjax.agents.running_statistics import Statistics
from trustjax.envs import make_once
from trustjax.models.actor_critic import Actor, initial_carry
from trustjax.models.mlp import ACTIVATIONS

Arrays = dict[str, npt.NDArray[Any]]

_FORMAT = "trustjax policy 1"
_DTYPES = ("float32", "float64")
_REPR = reprlib.Repr()
_REPR.maxstring = 80
_TEXT_OR_FLOAT = "fU"  # kinds of NumPy's dtypes
_PARAMS = "env_params/"
_STATISTICS = tuple(f"statistics/{name}" for name in Statistics._fields)


class Contents(NamedTuple):
    """The contents of a file.

    Attributes:
      env: Name of the environment.
      actor: The network.
      variables: Variables of the network.
      statistics: Statistics of the observations; None if they are not normalised.
      clip_observations: Largest absolute value of a normalised observation, float [].
      env_params: Parameters of the environment; None for its defaults.
    """

    env: str
    actor: Actor
    variables: Any
    statistics: Statistics | None
    clip_observations: jax.Array
    env_params: Any


def write(path: Path, contents: Contents) -> None:
    """Writes the file completely or not at all; raises ValueError if `read` would refuse it."""
    env, actor, variables, statistics, clip, env_params = contents
    fields = {name: getattr(actor, name) for name in _KINDS}
    fields["dtype"] = fields["dtype"] and str(jnp.dtype(fields["dtype"]))
    about = {
        "format": _FORMAT, "env": env, "actor": fields, "normalized": statistics is not None,
    }  # fmt: skip
    flat = flax.traverse_util.flatten_dict({"variables": variables}, sep="/")
    arrays = {name: np.asarray(leaf) for name, leaf in flat.items()}
    if statistics is not None:
        arrays |= dict(zip(_STATISTICS, map(np.asarray, statistics), strict=True))
    arrays["clip_observations"] = np.asarray(clip)
    text = json.dumps(about)
    try:
        if env_params is not None:
            arrays |= _params_arrays(env_params, make_once(env).default_params)
        _check(text, arrays)
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


def read(path: str | os.PathLike[str]) -> Contents:
    """Reads the file; raises ValueError with one line that names the file and the field."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            arrays = _arrays(file, os.fstat(file.fileno()).st_size)
        about = arrays.pop("about", None)
        if about is None or about.dtype.kind != "U" or about.shape:
            raise ValueError("about must be a text")
        env, actor = _check(str(about), arrays)
    except ValueError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} must be a policy saved by trustjax: {problem}") from error
    env_params = _params(arrays, make_once(env).default_params)
    leaves = {
        name: jnp.asarray(array) for name, array in arrays.items() if not name.startswith(_PARAMS)
    }
    clip = leaves.pop("clip_observations")
    statistics = [leaves.pop(name) for name in _STATISTICS if name in leaves]
    nested = flax.traverse_util.unflatten_dict(leaves, sep="/")
    return Contents(
        env, actor, nested["variables"], Statistics(*statistics) if statistics else None, clip,
        env_params,
    )  # fmt: skip


def _arrays(file: Any, size: int) -> Arrays:
    """All arrays of an .npz file of `size` bytes; none is larger than its bytes in the file."""
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{_short(member.filename)} must not be compressed")
            if sum(member.file_size for member in members) > size:
                raise ValueError("it says that it holds more bytes than there are")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"{_short(name)} is there twice")
                try:
                    kinds = "biuf" if name.startswith(_PARAMS) else _TEXT_OR_FLOAT
                    arrays[name] = _array(archive.read(member), kinds)
                except Exception as error:  # see below
                    raise ValueError(f"{_short(name)}: {_short_error(error)}") from error
    # zipfile and NumPy's header parser do not document what they raise for damaged bytes.
    except Exception as error:
        raise ValueError(_short_error(error)) from error
    return arrays


def _array(content: bytes, kinds: str) -> npt.NDArray[Any]:
    """The array in the content of an .npy file, whose dtype is of one of these kinds of NumPy."""
    stream = io.BytesIO(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("its header must be of version 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in kinds:
        wanted = "floating" if kinds == _TEXT_OR_FLOAT else "of numbers"
        raise ValueError(f"it must be {wanted}, got {_short(dtype)}")
    data = content[stream.tell() :]
    if min(shape, default=0) < 0 or len(data) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"its header says shape {_short(shape)}, but it has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _check(text: str, arrays: Arrays) -> tuple[str, Actor]:
    """The environment's name and the network; raises ValueError unless the arrays are theirs."""
    about = _parsed(text)
    if about.get("format") != _FORMAT:
        raise ValueError(f"its format is {_short(about.get('format'))}, not {_FORMAT!r}")
    normalized = about.pop("normalized", None)  # older files lack it
    _check_names("about", about, ("format", "env", "actor"))
    name, fields = about["env"], about["actor"]
    if normalized is not None and not _is_flag(normalized):
        raise FieldError("about.normalized", "be true or false", _short(normalized))
    if not isinstance(name, str):
        raise FieldError("about.env", "be a name", _short(name))
    if not isinstance(fields, dict):
        raise FieldError("about.actor", "be an object", _short(fields))
    actor = _actor(fields, arrays)
    try:
        env = make_once(name)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # options may be anything that a literal can be
        raise ValueError(f"about.env: {_short_error(error)}") from error
    actions = env.num_actions, None if env.action_low is None else len(env.action_low)
    for field, expected in zip(("num_actions", "action_size"), actions, strict=True):
        if getattr(actor, field) != expected:
            raise FieldError(
                f"about.actor.{field}",
                f"be {expected}, as in {_short(name)}",
                getattr(actor, field),
            )
    features = math.prod(env.observation_shape)
    shapes = dict(_shapes(actor, features)) | {"clip_observations": ()}
    if normalized or (normalized is None and any(name in arrays for name in _STATISTICS)):
        shapes |= dict(zip(_STATISTICS, ((features,), (features,), ()), strict=True))
    defaults = _named(env.default_params) if any(x.startswith(_PARAMS) for x in arrays) else {}
    _check_names("it", arrays, [*shapes, *defaults])
    for name, default in defaults.items():
        _check_param(name, arrays[name], np.asarray(default))
    for name, shape in shapes.items():
        _check_array(name, arrays[name], shape)
    dtypes = {arrays[name].dtype for name in shapes if name.startswith("variables/")}
    if len(dtypes) > 1:
        raise FieldError("variables", "have one dtype", sorted(map(str, dtypes)))
    return about["env"], actor


def _parsed(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        about = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"about must be JSON: {_short_error(error)}") from error
    if not isinstance(about, dict):
        raise FieldError("about", "be an object", _short(about))
    return about


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
    "num_actions": _SIZE_OR_NONE,
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
assert {*_KINDS} == {f.name for f in dataclasses.fields(Actor)} - {"parent", "name"}


def _actor(fields: dict[str, Any], arrays: Arrays) -> Actor:
    """The network; raises ValueError for invalid fields, and for sizes that exceed the arrays."""
    _check_names("about.actor", fields, _KINDS)
    for name, (is_good, kind) in _KINDS.items():
        if not is_good(fields[name]):
            raise FieldError(f"about.actor.{name}", f"be {kind}", _short(fields[name]))
    # Every unit has a bias, so that no size can exceed the number of entries of all arrays.
    most = sum(array.size for array in arrays.values())
    if len(fields["hidden"]) > len(arrays):
        raise ValueError(f"about.actor.hidden: there are no {len(fields['hidden'])} layers")
    for name in ("hidden", "gru_size", "num_actions", "action_size"):
        sizes = fields[name] if name == "hidden" else [fields[name] or 1]
        if max(sizes, default=1) > most:
            raise ValueError(
                f"about.actor.{name}: there are {most} numbers, too few for {_short(fields[name])}"
            )
    hashable: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Actor(**hashable)


@functools.lru_cache(maxsize=64)
def _shapes(actor: Actor, features: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of the network's variables."""
    variables = jax.eval_shape(
        actor.init, jax.random.key(0), jnp.zeros((1, features)), initial_carry(actor, (1,))
    )
    flat = flax.traverse_util.flatten_dict({"variables": variables}, sep="/")
    return tuple((name, leaf.shape) for name, leaf in flat.items())


def _check_names(what: str, found: Mapping[str, Any], expected: Any) -> None:
    for name in expected:
        if name not in found:
            raise ValueError(f"{what} must have {name}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{what} must not have {_short(name)}")


def _check_array(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise FieldError(name, f"have shape {shape}", _short(array.shape))
    if array.dtype not in _DTYPES:
        raise FieldError(name, f"be {' or '.join(_DTYPES)}", _short(array.dtype))
    with np.errstate(over="ignore"):
        array = np.asarray(jnp.asarray(array))
    if name == "clip_observations":
        if not array > 0:
            raise FieldError(name, "be > 0", array)
    elif not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite")
    elif name in _STATISTICS[1:] and (array < 0).any():
        raise ValueError(f"{name} must be >= 0")


def _named(env_params: Any) -> dict[str, Any]:
    """The leaves of an environment's parameters by the names that they have in a file."""
    leaves = jax.tree.leaves_with_path(env_params)
    return {
        _PARAMS + jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def _params_arrays(env_params: Any, defaults: Any) -> Arrays:
    """The parameters by name, in the dtypes of the defaults."""
    expected: Any = jax.tree.structure(defaults)
    found: Any = jax.tree.structure(env_params)
    if found != expected:
        raise FieldError("env_params", f"have the structure {_short(expected)}", _short(found))
    named, arrays = _named(env_params), {}
    for name, default in _named(defaults).items():
        try:
            arrays[name] = np.asarray(named[name]).astype(
                np.asarray(default).dtype, casting="same_kind"
            )
        except TypeError as error:
            raise ValueError(f"{name}: {_short_error(error)}") from error
    return arrays


def _params(arrays: Arrays, defaults: Any) -> Any:
    """The parameters in `arrays`, with Python numbers where the defaults have some; or None."""
    named = _named(defaults)
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
        raise FieldError(name, f"have shape {default.shape}", _short(array.shape))
    if array.dtype.kind != default.dtype.kind:
        raise FieldError(name, f"be of a kind with {default.dtype}", _short(array.dtype))


def _short(value: Any) -> str:
    return _REPR.repr(value if isinstance(value, str | int | list | tuple | dict) else str(value))


def _short_error(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
