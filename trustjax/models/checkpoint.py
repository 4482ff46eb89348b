"""Checkpoints of Hugging Face's vision transformers: they are read and written here.

A checkpoint is a folder with
  config.json                the sizes, as fields of transformers' ViTConfig
  model.safetensors          the tensors of ViTModel or ViTForImageClassification, or shards of them
                             with model.safetensors.index.json; float32, bfloat16 or float16
  preprocessor_config.json   the preprocessing of images; without it mean and std are 0.5
The layers are those of `trustjax.models.ViT`; `trustjax.models._layout` translates their names and
layouts. Pickles, as in pytorch_model.bin, are not read: unpickling runs the code in them.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_choice
from trustjax.models._config import (
    RESAMPLE,
    labels_field,
    read_config,
    read_preprocessor,
)
from trustjax.models._layout import (
    from_huggingface,
    huggingface_name,
    huggingface_shape,
    to_huggingface,
)
from trustjax.models._store import (
    CONFIG,
    DTYPES,
    CheckpointError,
    Names,
    Stored,
    check_params,
    check_sizes,
    check_tensors,
    flatten,
    headers,
    parameter_shapes,
    tensor_shape,
    write_json,
    write_tensors,
)
from trustjax.models._store import FILES as STORE_FILES
from trustjax.models.vit import Preprocessing, PyTree, ViT

_PREPROCESSOR = "preprocessor_config.json"
FILES = [*STORE_FILES, _PREPROCESSOR]


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
    check_choice("dtype", dtype, DTYPES.values())
    if not isinstance(model, ViT):
        advice = "save_transformer writes text models"  # type: ignore[unreachable]
        raise FieldError("model", "be a ViT", type(model).__name__, advice=advice)
    check_choice("pool", model.pool, ("cls",))
    if model.num_classes and model.representation_width is not None:
        raise FieldError(
            "representation_width",
            "be None beside a head: transformers has no such ViT",
            model.representation_width,
        )
    flat = flatten(params)
    size, channels = _image_shape(model, flat)
    shapes = _shapes(model.clone(preprocess=None), (1, size, size, channels))
    check_params(flat, shapes, dtype)

    prefix = "vit." if model.num_classes else ""
    tensors = {
        huggingface_name(names, prefix): to_huggingface(names, leaf, model.patch_size)
        for names, leaf in flat.items()
    }
    preprocess = model.preprocess
    if not isinstance(preprocess, Preprocessing):
        preprocess = Preprocessing((size, size), channels, (0.0,) * channels, (1.0,) * channels)

    folder = Path(folder)
    write_tensors(folder, tensors, dtype)
    write_json(folder / CONFIG, _huggingface_config(model, size, channels, dtype))
    write_json(folder / _PREPROCESSOR, _huggingface_preprocessor(preprocess))


# ---- reading


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors fit its config.

    Attributes:
      fields: Fields of the `ViT` that it holds.
      tensors: The stored tensor of every parameter, by the path of the parameter.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[Names, Stored]

    def read(self, names: Names) -> npt.NDArray[np.float32]:
        """One parameter in the layout of Flax. Raises CheckpointError unless it is finite."""
        return from_huggingface(names, self.tensors[names].read())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the config and the headers, and checks that they fit each other."""
    path = folder / CONFIG
    config = read_config(path)
    found = headers(folder)
    prefix = "vit." if any(name.startswith("vit.") for name in found) else ""
    has_head = "classifier.weight" in found
    has_pooler = f"{prefix}pooler.dense.weight" in found
    # First the sizes are compared: building a model from a wrong config could take forever.
    check_sizes(path, config, _sizes(folder, found, prefix))
    if has_head:
        labels, num_classes = labels_field(path, config)
        rows = tensor_shape(folder, found, "classifier.weight", 2)[0]
        check_sizes(path, {labels: num_classes}, {labels: rows})
    if has_pooler:
        width = tensor_shape(folder, found, f"{prefix}pooler.dense.weight", 2)[0]
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
    shapes_of = {name: shape for name, (_, shape) in expected.items()}
    check_tensors(folder, shapes_of, found, kind="ViT")
    return Checkpoint(fields, {names: found[name] for name, (names, _) in expected.items()})


def _sizes(folder: Path, found: Mapping[str, Stored], prefix: str) -> dict[str, Any]:
    """The fields of config.json that follow from the tensors."""
    embeddings = f"{prefix}embeddings."
    layer = f"{prefix}encoder.layer."
    layers = {
        index
        for name in found
        if name.startswith(layer) and (index := name.removeprefix(layer).split(".")[0]).isdecimal()
    }
    width, channels, patch, _ = tensor_shape(
        folder, found, f"{embeddings}patch_embeddings.projection.weight", 4
    )
    tokens = tensor_shape(folder, found, f"{embeddings}position_embeddings", 3)[1]
    return {
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "num_hidden_layers": len(layers),
        "intermediate_size": tensor_shape(folder, found, f"{layer}0.intermediate.dense.weight", 2)[
            0
        ],
        "qkv_bias": f"{layer}0.attention.attention.query.bias" in found,
        "image_size": math.isqrt(tokens - 1) * patch,
    }


# ---- the model's side


def _shapes(model: ViT, images: tuple[int, ...]) -> dict[Names, tuple[int, ...]]:
    """The shapes of all parameters for images of this shape."""
    plain = model.clone(frozen_blocks=None, preprocess=None)
    return parameter_shapes(plain, jax.ShapeDtypeStruct(images, jnp.float32))


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
