"""Checkpoints of Hugging Face's vision transformers: reads their headers, writes them.

A checkpoint is a folder with
  config.json                sizes, in the words of transformers' ViTConfig
  model.safetensors          the tensors of ViTModel or ViTForImageClassification; or shards of them
                             and model.safetensors.index.json; float32, bfloat16 or float16
  preprocessor_config.json   mean and standard deviation of the pixels, if they are not 0.5
The layers are those of `trustjax.models.ViT`, under the names and in the layout of
`trustjax.models._layout`. Files that hold pickles, pytorch_model.bin, are not read: unpickling runs
whatever code is in them.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import check_choice
from trustjax._files import experiments_extra
from trustjax.models._layout import Names, their_name, their_shape, to_ours, to_theirs
from trustjax.models.vit import Preprocessing, PyTree, ViT

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
FILES = [_CONFIG, _PREPROCESSOR, _WEIGHTS, _INDEX, "model-*-of-*.safetensors"]
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# What ViTConfig takes where config.json does not say.
_CONFIG_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "pooler_act": "tanh",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, and the tensor if there is."""


def save_pretrained(
    folder: str | os.PathLike[str], model: ViT, params: PyTree, *, dtype: str = "float32"
) -> None:
    """Writes a checkpoint that `trustjax.models.pretrained_vit` and transformers read.

    It is a ViTForImageClassification or, of a model without a head, a ViTModel. Each file is
    written beside its place and renamed. What is read back has the same bits if `dtype` holds them.

    Args:
      folder: made if it is not there; files of the same names are replaced.
      model: pools "cls" and sees square images. Without `preprocess`, pixels are saved as not
        normalised.
      params: of one network, without axes of seeds.
      dtype: of the stored tensors: "float32", "bfloat16" or "float16".

    Raises:
      ValueError: a model that transformers' ViT cannot be, parameters that are not the model's, or
        an unknown dtype.
      ImportError: a package of the `experiments` extra is missing.
    """
    check_choice("dtype", dtype, _DTYPES.values())
    check_choice("pool", model.pool, ("cls",))
    if model.num_classes and model.representation_width is not None:
        raise ValueError(
            "representation_width must be None beside a head: transformers has no such ViT, "
            f"got {model.representation_width}"
        )
    with experiments_extra():
        from safetensors.numpy import save_file
    flat = {names: np.asarray(leaf) for names, leaf in _flatten(params).items()}
    size, channels = _image_shape(model, flat)
    shapes = _shapes(model.clone(preprocess=None), (1, size, size, channels))
    found = {names: leaf.shape for names, leaf in flat.items()}
    if found != shapes:
        wrong = sorted(n for n in shapes | found if shapes.get(n) != found.get(n))
        name = wrong[0]
        raise ValueError(
            f"params must be the model's: {'/'.join(name)} must have shape {shapes.get(name)}, "
            f"got {found.get(name)}"
        )

    prefix = "vit." if model.num_classes else ""
    tensors = {
        # Of transposed views, safetensors would write the bytes in the wrong order.
        their_name(names, prefix): np.ascontiguousarray(
            to_theirs(names, leaf, model.patch_size), dtype
        )
        for names, leaf in flat.items()
    }
    preprocess = model.preprocess
    if not isinstance(preprocess, Preprocessing):
        preprocess = Preprocessing((size, size), channels, (0.0,) * channels, (1.0,) * channels)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{_WEIGHTS}.new"
    save_file(tensors, beside, metadata={"format": "pt"})  # transformers asks for the format
    beside.replace(folder / _WEIGHTS)
    _write_json(folder / _CONFIG, _their_config(model, size, channels, dtype))
    _write_json(folder / _PREPROCESSOR, _their_preprocessor(preprocess))


# ---- reading


class _Stored(NamedTuple):
    """A tensor in a file; shape and dtype as its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors fit its config.

    Attributes:
      fields: those of the `ViT` that it holds.
      tensors: for each of its parameters, where it is stored.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[Names, _Stored]

    def read(self, names: Names) -> npt.NDArray[np.float32]:
        """One parameter in our layout."""

        from safetensors import safe_open

        stored = self.tensors[names]
        with safe_open(stored.file, "np") as file:
            tensor: npt.NDArray[np.float32] = file.get_tensor(stored.name).astype(np.float32)
        return to_ours(names, tensor)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the config and the headers, and checks that they fit."""
    config = _read_config(folder / _CONFIG)
    found = {stored.name: stored for stored in _headers(folder)}
    prefix = "vit." if any(name.startswith("vit.") for name in found) else ""
    has_head = "classifier.weight" in found
    has_pooler = f"{prefix}pooler.dense.weight" in found
    if has_pooler and config["pooler_act"] != "tanh":
        raise CheckpointError(
            f"{folder / _CONFIG}: pooler_act must be 'tanh', got {config['pooler_act']!r}"
        )
    size, channels = config["image_size"], config["num_channels"]
    mean, std = _read_normalization(folder / _PREPROCESSOR, channels)
    fields = {
        "num_classes": _number_of_labels(config) if has_head else 0,
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "qkv_bias": config["qkv_bias"],
        "representation_width": config.get("pooler_output_size") or config["hidden_size"]
        if has_pooler
        else None,
        "preprocess": Preprocessing((size, size), channels, mean, std),
    }
    try:
        shapes = _shapes(model := ViT(**fields), (1, size, size, channels))
    except ValueError as error:  # sizes that do not divide each other
        raise CheckpointError(f"{folder / _CONFIG}: {error}") from error
    expected = {
        their_name(names, prefix): (names, their_shape(names, shape, model.patch_size))
        for names, shape in shapes.items()
    }
    _check_tensors(folder, {name: shape for name, (_, shape) in expected.items()}, found)
    return Checkpoint(fields, {names: found[name] for name, (names, _) in expected.items()})


def _check_tensors(
    folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, _Stored]
) -> None:
    problems = [
        f"tensor {name!r} of shape {shape} is missing"
        for name, shape in expected.items()
        if name not in found
    ]
    for name, stored in found.items():
        place = f"{stored.file.name}: tensor {name!r}"
        if name not in expected:
            problems.append(f"{place} of shape {stored.shape} belongs to no part of this ViT")
        elif stored.shape != expected[name]:
            problems.append(f"{place} must have shape {expected[name]}, got {stored.shape}")
        elif stored.dtype not in _DTYPES:
            problems.append(f"{place} must be {', '.join(_DTYPES)}, got {stored.dtype}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder}: the tensors must be those of its {_CONFIG}: {'; '.join(problems[:3])}{more}"
        )


def _headers(folder: Path) -> list[_Stored]:
    """All tensors in the folder, from the headers of its files."""
    with experiments_extra():
        from safetensors import SafetensorError, safe_open
    tensors = []
    for path in _weight_files(folder):
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118
                    header = file.get_slice(name)
                    shape = tuple(header.get_shape())
                    tensors.append(_Stored(path, name, shape, header.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} must be a whole safetensors file: {error}") from error
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(map(_is_file_name, shards.values())):
            raise CheckpointError(f"{folder / _INDEX}: weight_map must give tensors file names")
        return [folder / name for name in sorted(set(shards.values()))]
    pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
    hint = f"; {pickles} is not read: pickles can run any code" if pickles else ""
    raise CheckpointError(f"{folder} must hold {_WEIGHTS} or {_INDEX}{hint}")


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _read_config(path: Path) -> dict[str, Any]:
    """config.json with ViTConfig's defaults; raises CheckpointError if it is not a ViT's."""
    config = _read_json(path)
    if config.get("model_type") != "vit":
        raise CheckpointError(
            f"{path}: model_type must be 'vit', got {config.get('model_type')!r} "
            f"(architectures {config.get('architectures')})"
        )
    config = _CONFIG_DEFAULTS | config
    for name, default in _CONFIG_DEFAULTS.items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        value = config[name]
        number = type(default) in (int, float)  # not by isinstance, as bool is a kind of int
        if type(value) not in kinds or (number and value <= 0):
            kind = f"{type(default).__name__}{' above 0' if number else ''}"
            raise CheckpointError(f"{path}: {name} must be {kind}, got {value!r}")
    if config["hidden_act"] != "gelu":
        raise CheckpointError(f"{path}: hidden_act must be 'gelu', got {config['hidden_act']!r}")
    return config


def _number_of_labels(config: Mapping[str, Any]) -> int:
    """As transformers counts them: its default is two."""
    labels = config.get("id2label")
    return len(labels) if labels else int(config.get("num_labels", 2))


def _read_normalization(path: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; 0.5 where the file or the entry is missing."""
    config = _read_json(path) if path.is_file() else {}
    found = []
    for name in ("image_mean", "image_std"):
        values = config.get(name, [0.5] * channels)
        if (
            not isinstance(values, list)
            or len(values) != channels
            or not all(isinstance(value, int | float) for value in values)
        ):
            raise CheckpointError(f"{path}: {name} must be {channels} numbers, got {values!r}")
        found.append(tuple(map(float, values)))
    mean, std = found
    return mean, std


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


# ---- the model's side


def _flatten(params: PyTree) -> dict[Names, Any]:
    flat: dict[Names, Any] = flax.traverse_util.flatten_dict(params)
    return flat


def _shapes(model: ViT, images: tuple[int, ...]) -> dict[Names, tuple[int, ...]]:
    """The shapes of all parameters, for images of this shape."""
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32)
    )
    return {names: leaf.shape for names, leaf in _flatten(variables["params"]).items()}


def _image_shape(model: ViT, flat: Mapping[Names, Any]) -> tuple[int, int]:
    """Side and channels of the images that parameters are for."""
    for names in (("position_embedding",), ("patch_embedding", "kernel")):
        if names not in flat:
            raise ValueError(f"params must be the model's: no {'/'.join(names)}")
    tokens = flat[("position_embedding",)].shape[-2]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ValueError(f"the model must be for square images, got {tokens - 1} patches")
    rows = flat[("patch_embedding", "kernel")].shape[-2]
    return side * model.patch_size, rows // model.patch_size**2


def _their_config(model: ViT, size: int, channels: int, dtype: str) -> dict[str, Any]:
    config = {
        "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": round(model.width * model.mlp_ratio),
        "image_size": size,
        "patch_size": model.patch_size,
        "num_channels": channels,
        "layer_norm_eps": model.layer_norm_epsilon,
        "qkv_bias": model.qkv_bias,
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        "dtype": dtype,
    }
    if model.representation_width is not None:
        config |= {"pooler_act": "tanh", "pooler_output_size": model.representation_width}
    if model.num_classes:
        labels = {str(index): f"LABEL_{index}" for index in range(model.num_classes)}
        config |= {"id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    return config


def _their_preprocessor(preprocess: Preprocessing) -> dict[str, Any]:
    height, width = preprocess.size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
