"""The JSON files of a checkpoint, checked: its sizes and the preprocessing of images."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trustjax._files import read_json
from trustjax.models._store import (
    FLOAT32,
    CheckpointError,
    check_size,
    is_number,
    wrong,
)
from trustjax.models.vit import Preprocessing

# The defaults of ViTConfig for fields that config.json leaves out.
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
# The names in JAX of Pillow's resampling filters, by Pillow's numbers. JAX has no box (4) and no
# Hamming filter (5).
RESAMPLE = {0: "nearest", 1: "lanczos3", 2: "linear", 3: "cubic"}


def read_config(path: Path) -> dict[str, Any]:
    """config.json with ViTConfig's defaults. Raises CheckpointError if it is not a ViT's."""
    config = read_json(path, CheckpointError)
    if config.get("model_type") != "vit":
        kind, architectures = config.get("model_type"), config.get("architectures")
        raise wrong(
            path, "model_type", "'vit'", kind, f" (architectures {reprlib.repr(architectures)})"
        )
    config = _CONFIG_DEFAULTS | config
    for name, default in _CONFIG_DEFAULTS.items():
        value = config[name]
        if type(default) is float:
            if not is_number(value, at_least=float(FLOAT32.tiny)):
                raise wrong(path, name, "a float32 above 0", value)
            config[name] = float(value)  # JAX takes no int of 64 bits
        elif type(default) is int:
            check_size(path, name, value)
        elif type(value) is not type(default):
            raise wrong(path, name, type(default).__name__, value)
    if config["hidden_act"] != "gelu":
        raise wrong(path, "hidden_act", "'gelu'", config["hidden_act"])
    if config["hidden_size"] % config["num_attention_heads"]:
        must = f"a divisor of hidden_size = {reprlib.repr(config['hidden_size'])}"
        raise wrong(path, "num_attention_heads", must, config["num_attention_heads"])
    if config.get("pooler_output_size") is None:
        config["pooler_output_size"] = config["hidden_size"]
    check_size(path, "pooler_output_size", config["pooler_output_size"])
    return config


def labels_field(path: Path, config: Mapping[str, Any]) -> tuple[str, int]:
    """The field that gives the number of classes, and that number, as in transformers."""
    labels = config.get("id2label")
    if labels is not None and not isinstance(labels, dict):
        raise wrong(path, "id2label", "an object", labels)
    if labels:
        return "len(id2label)", len(labels)
    number = config.get("num_labels", 2)
    check_size(path, "num_labels", number)
    return "num_labels", number


def read_preprocessor(path: Path, size: int, channels: int) -> Preprocessing:
    """The preprocessing in preprocessor_config.json; without the file, mean and std are 0.5.

    transformers computes (factor * pixels - mean) / std of pixels in 0..255. On images in [0, 1]
    that is (images - mean / s) / (std / s) with s = 255 * factor. Without `do_rescale` the factor
    is 1; without `do_normalize` mean and std are 0 and 1.
    """
    # A broken link is an error: only a file that is really absent gives the defaults.
    there = path.exists() or path.is_symlink()
    given = read_json(path, CheckpointError) if there else {}
    config = {name: value for name, value in given.items() if value is not None}

    def flag(name: str, default: bool) -> bool:
        value = config.get(name, default)
        if not isinstance(value, bool):
            raise wrong(path, name, "true or false", value)
        return value

    for name in ("do_center_crop", "do_pad"):
        if flag(name, False):
            raise wrong(path, name, "false", True, ": images are resized as a whole")
    resize = flag("do_resize", True)
    sides = config.get("size", size)
    if resize and sides not in (size, {"height": size, "width": size}):
        raise wrong(path, "size", f"{size} x {size}, image_size in config.json", sides)
    resample = config.get("resample", 2)
    if type(resample) is not int or resample not in RESAMPLE:
        must = "one of " + ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise wrong(path, "resample", must, resample)

    scale = 255.0
    if flag("do_rescale", True):
        factor = config.get("rescale_factor", 1 / 255)
        if not is_number(factor, at_least=float(FLOAT32.tiny)):
            raise wrong(path, "rescale_factor", "a float32 above 0", factor)
        scale *= factor
    mean, std = [0.0] * channels, [1.0] * channels
    if flag("do_normalize", True):
        mean = _channels(path, "image_mean", config, channels, at_least=-float(FLOAT32.max))
        std = _channels(path, "image_std", config, channels, at_least=float(FLOAT32.tiny))
    try:
        return Preprocessing(
            (size, size),
            channels,
            tuple(each / scale for each in mean),
            tuple(each / scale for each in std),
            RESAMPLE[resample],
            resize,
        )
    except ValueError as error:  # numbers that only together leave the range of float32
        raise CheckpointError(f"{path}: rescale_factor, image_mean, image_std: {error}") from error


def _channels(
    path: Path, name: str, config: Mapping[str, Any], channels: int, *, at_least: float
) -> list[float]:
    values = config.get(name, [0.5] * channels)
    if (
        not isinstance(values, list)
        or len(values) != channels
        or not all(is_number(value, at_least=at_least) for value in values)
    ):
        above = " above 0" if at_least > 0 else ""
        raise wrong(path, name, f"{channels} numbers{above}", values)
    return [float(value) for value in values]
