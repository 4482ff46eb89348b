"""Folders of safetensors: their headers, checks of config.json, and how they are written.

Pickles, as in pytorch_model.bin, are not read: unpickling runs the code in them.
"""

import functools
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, InputError
from trustjax._files import experiments_extra, one_line, read_json

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
FILES = [CONFIG, _WEIGHTS, _INDEX, "model-*-of-*.safetensors"]
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FLOAT32 = np.finfo(np.float32)
Names = tuple[str, ...]  # path to a parameter in the tree of Flax


class CheckpointError(InputError):
    """A checkpoint that cannot be read. The message names the file, and the field or tensor."""


# ---- config.json


def check_sizes(path: Path, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the fields of config.json agree with the tensors."""
    for name, size in sizes.items():
        if config[name] != size:
            raise wrong(path, name, f"{size}, as in the tensors", config[name])


def check_size(path: Path, name: str, value: Any) -> None:
    """Raises CheckpointError, for field `name` of config.json, unless `value` is an int above 0."""
    if type(value) is not int or value <= 0:  # not by isinstance, as bool is a kind of int
        raise wrong(path, name, "int above 0", value)


def is_number(value: Any, *, at_least: float) -> bool:
    """Whether `value` is an int or float (no bool) from `at_least` to the largest float32."""
    return type(value) in (int, float) and at_least <= value <= float(FLOAT32.max)


def wrong(path: Path, name: str, must: str, got: Any, more: str = "") -> CheckpointError:
    """The error of a field of config.json that must be something else, in one line."""
    return CheckpointError(f"{path}: {name} must be {must}, got {reprlib.repr(got)}{more}")


# ---- tensors


class Stored(NamedTuple):
    """A tensor in a file, with the shape and dtype in its header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> npt.NDArray[np.float32]:
        """The tensor in float32. Raises CheckpointError unless it is finite."""
        with _open(self.file) as file:
            tensor: npt.NDArray[np.float32] = file.get_tensor(self.name).astype(np.float32)
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{self.file}: tensor {self.name!r} is not finite")
        return tensor


def tensor_shape(
    folder: Path, found: Mapping[str, Stored], name: str, rank: int
) -> tuple[int, ...]:
    """The shape of a tensor that every such checkpoint has."""
    if name not in found:
        raise CheckpointError(f"{folder}: tensor {name!r} is missing")
    file, _, shape, _ = found[name]
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{file}: tensor {name!r} must have {rank} axes, none of length 0, got shape {shape}"
        )
    return shape


def check_tensors(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Stored],
    *,
    kind: str,
) -> None:
    """Raises CheckpointError unless the tensors are those expected of the `kind` of model."""
    problems = [
        f"tensor {name!r} of shape {shape} is missing"
        for name, shape in expected.items()
        if name not in found
    ]
    for name, stored in found.items():
        stored_as = f"{stored.file.name}: tensor {name!r}"
        if name not in expected:
            problems.append(
                f"{stored_as} of shape {stored.shape} belongs to no part of this {kind}"
            )
        elif stored.shape != expected[name]:
            problems.append(f"{stored_as} must have shape {expected[name]}, got {stored.shape}")
        elif stored.dtype not in DTYPES:
            problems.append(f"{stored_as} must be {', '.join(DTYPES)}, got {stored.dtype}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder}: the tensors must be those of its {CONFIG}: {'; '.join(problems[:3])}{more}"
        )


def headers(folder: Path) -> dict[str, Stored]:
    """All tensors in the folder by name, from the headers of its files."""
    tensors: dict[str, Stored] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in {tensors[name].file.name} too"
                    )
                header = file.get_slice(name)
                tensors[name] = Stored(path, name, tuple(header.get_shape()), header.get_dtype())
    return tensors


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file; raises CheckpointError for one that is damaged."""
    with experiments_extra():
        from safetensors import SafetensorError, safe_open
    if not path.is_file():  # reading a pipe would not end
        raise CheckpointError(f"{path} must be a whole safetensors file: it is not a file")
    try:
        with safe_open(path, "np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        problem = one_line(error)
        raise CheckpointError(f"{path} must be a whole safetensors file: {problem}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        shards = read_json(folder / _INDEX, CheckpointError).get("weight_map")
        if not isinstance(shards, dict) or not all(map(_is_file_name, shards.values())):
            raise CheckpointError(
                f"{folder / _INDEX}: weight_map must give tensors file names *.safetensors"
            )
        return [folder / name for name in sorted(set(shards.values()))]
    pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
    hint = f"; {pickles} is not read: pickles can run any code" if pickles else ""
    raise CheckpointError(f"{folder} must hold {_WEIGHTS} or {_INDEX}{hint}")


def _is_file_name(value: Any) -> bool:
    """Whether `value` names a safetensors file in the folder itself, not elsewhere."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


# ---- writing


def flatten(params: Any) -> dict[Names, npt.NDArray[Any]]:
    """Parameters on the host by their paths."""
    flat = flax.traverse_util.flatten_dict(params)
    return {names: np.asarray(leaf) for names, leaf in flat.items()}


def parameter_shapes(model: Any, example: jax.ShapeDtypeStruct) -> dict[Names, tuple[int, ...]]:
    """The shapes of all parameters for such inputs; one block is traced for all."""
    shapes = dict(_traced_shapes(model.clone(depth=min(model.depth, 1)), example))
    block = {names[1:]: shape for names, shape in shapes.items() if names[0] == "block_0"}
    for index in range(1, model.depth):
        shapes |= {(f"block_{index}", *names): shape for names, shape in block.items()}
    return shapes


@functools.lru_cache(maxsize=4)  # a checkpoint is opened for its model and for its weights
def _traced_shapes(model: Any, example: jax.ShapeDtypeStruct) -> Mapping[Names, tuple[int, ...]]:
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    flat = flax.traverse_util.flatten_dict(variables["params"])
    return {names: leaf.shape for names, leaf in flat.items()}


def check_params(
    flat: Mapping[Names, npt.NDArray[Any]], shapes: Mapping[Names, tuple[int, ...]], dtype: str
) -> None:
    """Raises ValueError unless the parameters are floats of these shapes, finite in `dtype`."""
    for names, leaf in flat.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params must be floats, but {'/'.join(names)} is {leaf.dtype}")
    found = {names: leaf.shape for names, leaf in flat.items()}
    for names in sorted({*shapes, *found}):
        if shapes.get(names) != found.get(names):
            must = f"be the model's: {'/'.join(names)} must have shape {shapes.get(names)}"
            raise FieldError("params", must, found.get(names))
    for names, leaf in flat.items():
        with np.errstate(over="ignore"):  # an overflow is what is looked for
            if not np.isfinite(leaf.astype(dtype)).all():
                raise ValueError(f"params must be finite in {dtype}: {'/'.join(names)} is not")


def write_tensors(folder: Path, tensors: Mapping[str, npt.NDArray[Any]], dtype: str) -> None:
    """Writes model.safetensors beside its place and renames it; makes the folder if need be."""
    with experiments_extra():
        from safetensors.numpy import save_file
    # Of transposed views, safetensors would write the bytes in the wrong order.
    stored = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{_WEIGHTS}.new"
    save_file(stored, beside, metadata={"format": "pt"})  # transformers asks for the format
    beside.replace(folder / _WEIGHTS)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object beside its place and renames it, so that no half of it is ever there."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
