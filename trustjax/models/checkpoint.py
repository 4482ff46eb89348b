"""Checkpoints of Hugging Face's vision transformers: they are read and written here.

A checkpoint is a folder with
  config.json                the sizes, as fields of transformers' ViTConfig
  model.safetensors          the tensors of ViTModel or ViTForImageClassification, or shards of them
                             with model.safetensors.index.json; float32, bfloat16 or float16
  preprocessor_config.json   the preprocessing of images; without it mean and std are 0.5
The layers are those of `trustjax.models.ViT`; `trustjax.models._layout` translates their names and
layouts. Pickles, as in pytorch_model.bin, are not read: unpickling runs the code in them.
"""

import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_choice
from trustjax._files import experiments_extra, one_line, read_json
from trustjax.models._config import (
    RESAMPLE,
    CheckpointError,
    check_sizes,
    labels_field,
    read_config,
    read_preprocessor,
)
from trustjax.models._layout import (
    Names,
    from_huggingface,
    huggingface_name,
    huggingface_shape,
    to_huggingface,
)
from trustjax.models.vit import Preprocessing, PyTree, ViT

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
FILES = [_CONFIG, _PREPROCESSOR, _WEIGHTS, _INDEX, "model-*-of-*.safetensors"]
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def save_pretrained(
    folder: str | os.PathLike[str], model: ViT, params: PyTree, *, dtype: str = "float32"
) -> None:
    """Writes a checkpoint that `trustjax.models.pretrained_vit` and transformers read.

    It is a ViTForImageClassification or, for a model without a head, a ViTModel. Each file is
    written beside its place and renamed. The parameters are read back bit by bit unless `dtype`
    rounds them.

    Args:
      folder: The folder, which is created if need be. Files of the same names are replaced.
      model: A model with pool "cls" for square images. Without `preprocess`, the saved
        preprocessing does not normalise images.
      params: Parameters of one network, without an axis of seeds.
      dtype: Dtype of the stored tensors: "float32", "bfloat16" or "float16".

    Raises:
      ValueError: transformers' ViT cannot be this model; the parameters are not the model's, not
        floats, or not finite in `dtype`; or the dtype is unknown.
      ImportError: A package of the `experiments` extra is missing.
    """
    check_choice("dtype", dtype, _DTYPES.values())
    check_choice("pool", model.pool, ("cls",))
    if model.num_classes and model.representation_width is not None:
        raise FieldError(
            "representation_width",
            "be None beside a head: transformers has no such ViT",
            model.representation_width,
        )
    with experiments_extra():
        from safetensors.numpy import save_file
    flat = {names: np.asarray(leaf) for names, leaf in _flatten(params).items()}
    size, channels = _image_shape(model, flat)
    shapes = _shapes(model.clone(preprocess=None), (1, size, size, channels))
    for names, leaf in flat.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"params must be floats, but {'/'.join(names)} is {leaf.dtype}")
    found = {names: leaf.shape for names, leaf in flat.items()}
    if found != shapes:
        wrong = sorted(n for n in shapes | found if shapes.get(n) != found.get(n))
        name = wrong[0]
        raise FieldError(
            "params",
            f"be the model's: {'/'.join(name)} must have shape {shapes.get(name)}",
            found.get(name),
        )

    prefix = "vit." if model.num_classes else ""
    tensors = {}
    for names, leaf in flat.items():
        with np.errstate(over="ignore"):  # found by the check that follows
            # Of transposed views, safetensors would write the bytes in the wrong order.
            tensor = np.ascontiguousarray(to_huggingface(names, leaf, model.patch_size), dtype)
        if not np.isfinite(tensor).all():
            raise ValueError(f"params must be finite in {dtype}: {'/'.join(names)} is not")
        tensors[huggingface_name(names, prefix)] = tensor
    preprocess = model.preprocess
    if not isinstance(preprocess, Preprocessing):
        preprocess = Preprocessing((size, size), channels, (0.0,) * channels, (1.0,) * channels)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{_WEIGHTS}.new"
    save_file(tensors, beside, metadata={"format": "pt"})  # transformers asks for the format
    beside.replace(folder / _WEIGHTS)
    _write_json(folder / _CONFIG, _huggingface_config(model, size, channels, dtype))
    _write_json(folder / _PREPROCESSOR, _huggingface_preprocessor(preprocess))


# ---- reading


class _Stored(NamedTuple):
    """A tensor in a file, with the shape and dtype in its header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors fit its config.

    Attributes:
      fields: Fields of the `ViT` that it holds.
      tensors: The stored tensor of every parameter, by the path of the parameter.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[Names, _Stored]

    def read(self, names: Names) -> npt.NDArray[np.float32]:
        """One parameter in the layout of Flax. Raises CheckpointError unless it is finite."""
        stored = self.tensors[names]
        with _open(stored.file) as file:
            tensor: npt.NDArray[np.float32] = file.get_tensor(stored.name).astype(np.float32)
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{stored.file}: tensor {stored.name!r} is not finite")
        return from_huggingface(names, tensor)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the config and the headers, and checks that they fit each other."""
    path = folder / _CONFIG
    config = read_config(path)
    found = _headers(folder)
    prefix = "vit." if any(name.startswith("vit.") for name in found) else ""
    has_head = "classifier.weight" in found
    has_pooler = f"{prefix}pooler.dense.weight" in found
    # First the sizes are compared: building a model from a wrong config could take forever.
    check_sizes(path, config, _sizes(folder, found, prefix))
    if has_head:
        labels, num_classes = labels_field(path, config)
        rows = _shape(folder, found, "classifier.weight", 2)[0]
        check_sizes(path, {labels: num_classes}, {labels: rows})
    if has_pooler:
        width = _shape(folder, found, f"{prefix}pooler.dense.weight", 2)[0]
        check_sizes(path, config, {"pooler_output_size": width})
        if config["pooler_act"] != "tanh":
            raise CheckpointError(
                f"{path}: pooler_act must be 'tanh', got {config['pooler_act']!r}"
            )
    size, channels = config["image_size"], config["num_channels"]
    fields = {
        "num_classes": num_classes if has_head else 0,
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "qkv_bias": config["qkv_bias"],
        "representation_width": config["pooler_output_size"] if has_pooler else None,
        "preprocess": read_preprocessor(folder / _PREPROCESSOR, size, channels),
    }
    shapes = _shapes(model := ViT(**fields), (1, size, size, channels))
    expected = {
        huggingface_name(names, prefix): (names, huggingface_shape(names, shape, model.patch_size))
        for names, shape in shapes.items()
    }
    _check_tensors(folder, {name: shape for name, (_, shape) in expected.items()}, found)
    return Checkpoint(fields, {names: found[name] for name, (names, _) in expected.items()})


def _sizes(folder: Path, found: Mapping[str, _Stored], prefix: str) -> dict[str, Any]:
    """The fields of config.json that follow from the tensors."""
    embeddings = f"{prefix}embeddings."
    layer = f"{prefix}encoder.layer."
    layers = {
        index
        for name in found
        if name.startswith(layer) and (index := name.removeprefix(layer).split(".")[0]).isdecimal()
    }
    width, channels, patch, _ = _shape(
        folder, found, f"{embeddings}patch_embeddings.projection.weight", 4
    )
    tokens = _shape(folder, found, f"{embeddings}position_embeddings", 3)[1]
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "num_hidden_layers": len(layers),
        "intermediate_size": _shape(folder, found, f"{layer}0.intermediate.dense.weight", 2)[0],
        "qkv_bias": f"{layer}0.attention.attention.query.bias" in found,
        "image_size": math.isqrt(tokens - 1) * patch,
    }


def _shape(folder: Path, found: Mapping[str, _Stored], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that every ViT checkpoint has."""
    if name not in found:
        raise CheckpointError(f"{folder}: tensor {name!r} is missing")
    file, _, shape, _ = found[name]
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(
            f"{file}: tensor {name!r} must have {rank} axes, none of length 0, got shape {shape}"
        )
    return shape


def _check_tensors(
    folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, _Stored]
) -> None:
    problems = [
        f"tensor {name!r} of shape {shape} is missing"
        for name, shape in expected.items()
        if name not in found
    ]
    for name, stored in found.items():
        stored_as = f"{stored.file.name}: tensor {name!r}"
        if name not in expected:
            problems.append(f"{stored_as} of shape {stored.shape} belongs to no part of this ViT")
        elif stored.shape != expected[name]:
            problems.append(f"{stored_as} must have shape {expected[name]}, got {stored.shape}")
        elif stored.dtype not in _DTYPES:
            problems.append(f"{stored_as} must be {', '.join(_DTYPES)}, got {stored.dtype}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder}: the tensors must be those of its {_CONFIG}: {'; '.join(problems[:3])}{more}"
        )


def _headers(folder: Path) -> dict[str, _Stored]:
    """All tensors in the folder by name, from the headers of its files."""
    tensors: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in {tensors[name].file.name} too"
                    )
                header = file.get_slice(name)
                tensors[name] = _Stored(path, name, tuple(header.get_shape()), header.get_dtype())
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


# ---- the model's side


def _flatten(params: PyTree) -> dict[Names, Any]:
    flat: dict[Names, Any] = flax.traverse_util.flatten_dict(params)
    return flat


def _shapes(model: ViT, images: tuple[int, ...]) -> dict[Names, tuple[int, ...]]:
    """The shapes of all parameters for images of this shape; a single block is traced for all."""
    one = model.clone(depth=min(model.depth, 1), frozen_blocks=None, preprocess=None)
    shapes = dict(_traced_shapes(one, images))
    block = {names[1:]: shape for names, shape in shapes.items() if names[0] == "block_0"}
    for index in range(1, model.depth):
        shapes |= {(f"block_{index}", *names): shape for names, shape in block.items()}
    return shapes


@functools.lru_cache(maxsize=4)  # a checkpoint is opened for its model and for its weights
def _traced_shapes(model: ViT, images: tuple[int, ...]) -> Mapping[Names, tuple[int, ...]]:
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32)
    )
    return {names: leaf.shape for names, leaf in _flatten(variables["params"]).items()}


def _image_shape(model: ViT, flat: Mapping[Names, Any]) -> tuple[int, int]:
    """The side and the number of channels of the images that parameters are for."""
    for names in (("position_embedding",), ("patch_embedding", "kernel")):
        if names not in flat:
            raise ValueError(f"params must be the model's: no {'/'.join(names)}")
    tokens = flat[("position_embedding",)].shape[-2]
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise ValueError(f"the model must be for square images, got {tokens - 1} patches")
    rows = flat[("patch_embedding", "kernel")].shape[-2]
    return side * model.patch_size, rows // model.patch_size**2


def _huggingface_config(model: ViT, size: int, channels: int, dtype: str) -> dict[str, Any]:
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


def _huggingface_preprocessor(preprocess: Preprocessing) -> dict[str, Any]:
    height, width = preprocess.size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": preprocess.resize,
        "size": {"height": height, "width": width},
        "resample": next(n for n, method in RESAMPLE.items() if method == preprocess.method),
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
