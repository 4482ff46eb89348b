"""Tensors of Hugging Face's text models: which parameters they are, and whether they fit."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from trustjax.models._config import labels_field
from trustjax.models._families import Family
from trustjax.models._store import (
    CONFIG,
    CheckpointError,
    Names,
    Stored,
    check_sizes,
    check_tensors,
    headers,
    parameter_shapes,
    tensor_shape,
    wrong,
)
from trustjax.models._text_config import module_fields, read_text_config
from trustjax.models.encoder import Encoder
from trustjax.models.transformer import Decoder, PyTree

TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)  # an example of the models' input
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class TextCheckpoint(NamedTuple):
    """A checkpoint whose tensors fit its config.

    Attributes:
      family: The family of the model.
      fields: Fields of the module that it holds.
      tensors: The stored tensor of each name.
      parts: The tensor's name, the number of its columns' part, and the number of parts, by the
        path of the parameter.
    """

    family: Family
    fields: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    parts: Mapping[Names, tuple[str, int, int]]

    def load(self, dropped: set[str]) -> dict[str, PyTree]:
        """All parameters in the layout of Flax but the dropped modules; float32 on the host.

        Raises CheckpointError unless they are finite.
        """
        loaded = {}
        for names, (name, part, parts) in self.parts.items():
            if names[0] in dropped:
                continue
            tensor = in_out(self.family, names, self.tensors[name].read())
            loaded[names] = np.split(tensor, parts, axis=-1)[part]
        params: dict[str, PyTree] = flax.traverse_util.unflatten_dict(loaded)
        return params


def open_text_checkpoint(folder: Path) -> TextCheckpoint:
    """Reads the config and the headers, and checks that they fit each other."""
    family, config = read_text_config(folder / CONFIG)
    return fit_checkpoint(folder, folder / CONFIG, family, config, headers(folder))


def fit_checkpoint(
    folder: Path,
    path: Path,
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
) -> TextCheckpoint:
    """The checkpoint of a config and tensors. Raises CheckpointError unless they fit each other.

    Args:
      folder: Where the tensors are, for messages.
      path: Where the config is, for messages.
      family: The family of the model.
      config: What config.json says, with the family's defaults.
      tensors: The tensors by their names.
    """
    found = _parameters(family, tensors, tied=config.get("tie_word_embeddings") is True)
    prefix = family.prefix if any(name.startswith(family.prefix) for name in found) else ""
    # First the sizes are compared: building a model from a wrong config could take forever.
    check_sizes(path, config, _sizes(folder, family, config, found, prefix))
    fields = module_fields(path, family, config)
    if family.model is Encoder:
        fields |= _head(folder, path, config, found, prefix)
        if fields["head"] == "masked_lm":  # pre-training's other head is not read
            found = {n: t for n, t in found.items() if not n.startswith(f"{prefix}pooler.")}
            if (tied := config.get("tie_word_embeddings", True)) is not True:
                raise wrong(path, "tie_word_embeddings", "true for masked language models", tied)
    model = family.model(**fields)
    if isinstance(model, Decoder):
        _check_heads(folder, path, family, model, found, prefix)
    shapes = parameter_shapes(model, TOKENS)
    parts = parts_of(family, shapes, fields.get("head"), prefix)
    expected = {}
    for names, (name, _, count) in parts.items():
        *rows, columns = shapes[names]
        leaf = np.broadcast_to(np.float32(0), (*rows, columns * count))  # it takes no memory
        expected[name] = in_out(family, names, leaf).shape
    check_tensors(folder, expected, found, kind=family.model_type)
    return TextCheckpoint(family, fields, found, parts)


def _parameters(family: Family, found: Mapping[str, Stored], tied: bool) -> dict[str, Stored]:
    """The tensors that are parameters, by their present names."""
    kept = {}
    for name, stored in found.items():
        # BERT's first checkpoints have TensorFlow's names.
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if not re.fullmatch(family.ignored, name) and not (tied and name == "lm_head.weight"):
            kept[name] = stored
    return kept


def _module(family: Family, names: Names, head: str | None, prefix: str) -> str:
    """The tensor's name of a module or bare parameter, without "weight" or "bias"."""
    block = ""
    if names[0].startswith("block_"):
        block = f"{family.block}{names[0].removeprefix('block_')}."
        names = names[1:]
    table = {**family.names, **family.heads.get(head, {})}
    name = table["/".join(names)]
    return name[1:] if name.startswith(":") else f"{prefix}{block}{name}"


def parts_of(
    family: Family, shapes: Mapping[Names, Any], head: str | None, prefix: str
) -> dict[Names, tuple[str, int, int]]:
    """For each parameter the tensor's name, which part of its columns it is, and of how many."""
    order = list(family.names)
    together: dict[str, list[Names]] = {}
    for names in shapes:
        leaf = _LEAVES.get(names[-1])
        module = _module(family, names[:-1] if leaf else names, head, prefix)
        together.setdefault(f"{module}.{leaf}" if leaf else module, []).append(names)
    parts: dict[Names, tuple[str, int, int]] = {}
    for name, group in together.items():
        if len(group) > 1:  # only modules of a block
            group = sorted(group, key=lambda names: order.index("/".join(names[1:-1])))
        parts |= {names: (name, index, len(group)) for index, names in enumerate(group)}
    return parts


def in_out(family: Family, names: Names, tensor: Any) -> Any:
    """A stored matrix as [in, out], or back; all else as it is."""
    # The head is nn.Linear even in GPT-2, whose other matrices are stored as [in, out].
    matrix = names[-1] == "kernel" and (family.transposed or names[0] == "head")
    return tensor.T if matrix else tensor


def _sizes(
    folder: Path,
    family: Family,
    config: Mapping[str, Any],
    found: Mapping[str, Stored],
    prefix: str,
) -> dict[str, Any]:
    """The keys of config.json that follow from the tensors."""

    def shape(*names: str) -> tuple[int, ...]:
        return tensor_shape(folder, found, f"{_module(family, names, None, prefix)}.weight", 2)

    blocks = f"{prefix}{family.block}"
    indices = {
        index
        for name in found
        if name.startswith(blocks)
        and (index := name.removeprefix(blocks).split(".")[0]).isdecimal()
    }
    vocab_size, width = shape("token_embedding")
    sizes = {"vocab_size": vocab_size, "width": width, "depth": len(indices)}
    if config[family.keys["mlp_width"]] is not None:
        sizes["mlp_width"] = shape("block_0", "mlp", "in")[0 if family.transposed else 1]
    if "position_embedding" in family.names:
        sizes["max_length"] = shape("position_embedding")[0]
    if "num_token_types" in family.keys:
        sizes["num_token_types"] = shape("type_embedding")[0]
    return {family.keys[name]: size for name, size in sizes.items()}


def _check_heads(
    folder: Path,
    path: Path,
    family: Family,
    model: Decoder,
    found: Mapping[str, Stored],
    prefix: str,
) -> None:
    """Raises CheckpointError unless the attention's matrices have the heads of the config."""
    if not family.transposed:  # one matrix of all three, as wide as the model: nothing is free
        return
    kv_heads, head_dim = model.kv_sizes
    parts = (("query", "num_heads", model.num_heads), ("key", "num_kv_heads", kv_heads))
    for part, field, heads in parts:
        name = f"{_module(family, ('block_0', 'attention', part), None, prefix)}.weight"
        rows = tensor_shape(folder, found, name, 2)[0]
        if rows != heads * head_dim:
            must = f"be {rows} divided by the {head_dim} features of a head, as in the tensors"
            raise CheckpointError(f"{path}: {family.keys[field]} must {must}, got {heads}")


def _head(
    folder: Path, path: Path, config: Mapping[str, Any], found: Mapping[str, Stored], prefix: str
) -> dict[str, Any]:
    """The fields of an encoder's head, as the tensors have it."""
    pooler = f"{prefix}pooler.dense.weight" in found
    if "cls.predictions.bias" in found or "lm_head.bias" in found:
        return {"head": "masked_lm"}
    for name in ("classifier.out_proj.weight", "classifier.weight"):
        if name in found:
            classes = tensor_shape(folder, found, name, 2)[0]
            labels, number = labels_field(path, config)
            check_sizes(path, {labels: number}, {labels: classes})
            sequence = pooler or "out_proj" in name
            return {"head": "sequence" if sequence else "tokens", "num_classes": classes}
    return {"head": None, "pooler": pooler}
