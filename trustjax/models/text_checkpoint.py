"""Checkpoints of Hugging Face's text models: they are read and written here.

A checkpoint is a folder with
  config.json         the sizes, as fields of transformers' configuration of the family
  model.safetensors   the tensors, or shards of them with model.safetensors.index.json; float32,
                      bfloat16 or float16
  tokenizer.json      and other files of the tokenizer, which are only copied here
The families are those in `trustjax.models._families`.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice, check_count
from trustjax._files import local_folder, read_json
from trustjax.models._config import labels_field
from trustjax.models._families import Family
from trustjax.models._store import (
    CONFIG,
    DTYPES,
    FILES,
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
from trustjax.models._text_config import family_of, module_fields, read_text_config, text_config
from trustjax.models.encoder import Encoder
from trustjax.models.transformer import Decoder, PyTree

TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
]
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


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
            tensor = _in_out(self.family, names, self.tensors[name].read())
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
    model = family.model(**fields)
    if isinstance(model, Decoder):
        _check_heads(folder, path, family, model, found, prefix)
    shapes = parameter_shapes(model, _TOKENS)
    parts = _parts(family, shapes, fields.get("head"), prefix)
    expected = {}
    for names, (name, _, count) in parts.items():
        *rows, columns = shapes[names]
        leaf = np.broadcast_to(np.float32(0), (*rows, columns * count))  # it takes no memory
        expected[name] = _in_out(family, names, leaf).shape
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


def _parts(
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


def _in_out(family: Family, names: Names, tensor: Any) -> Any:
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


# ---- models


class _Pretrained:
    """What a `Decoder` and an `Encoder` of a checkpoint have in common."""

    @nn.nowrap  # makes another module
    def load_pretrained(self) -> dict[str, PyTree]:
        """The checkpoint's parameters but those of a new head, float32 arrays on the host.

        Raises CheckpointError if files have changed since `pretrained_transformer` and no longer
        fit.
        """
        checkpoint = open_text_checkpoint(Path(self.folder))  # type: ignore[attr-defined]
        given, own = (
            {name: fields.get(name) for name in ("head", "num_classes", "pooler")}
            for fields in (checkpoint.fields, vars(self))
        )
        return checkpoint.load(set() if isinstance(self, Decoder) else _dropped(given, own))


def _dropped(given: Mapping[str, Any], own: Mapping[str, Any]) -> set[str]:
    """The modules of a checkpoint's head that another head leaves out."""
    if own["head"] != given["head"]:
        kept = {"pooler_dense"} if own["pooler"] or own["head"] == "sequence" else set()
        return {"pooler_dense", "classifier", *_MASKED_LM} - kept
    return {"classifier"} if own["num_classes"] != given.get("num_classes", 0) else set()


_MASKED_LM = ("masked_lm_dense", "masked_lm_norm", "masked_lm_bias")


class PretrainedDecoder(_Pretrained, Decoder):
    """A `Decoder` with the sizes of a checkpoint, made by `pretrained_transformer`.

    Attributes:
      folder: Folder of the checkpoint.
    """

    folder: str = ""


class PretrainedEncoder(_Pretrained, Encoder):
    """An `Encoder` with the sizes of a checkpoint, made by `pretrained_transformer`.

    Attributes:
      folder: Folder of the checkpoint.
    """

    folder: str = ""


def pretrained_transformer(
    pretrained: str | os.PathLike[str],
    *,
    head: str | None = "checkpoint",
    num_classes: int | None = None,
    dropout: float = 0.0,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> PretrainedDecoder | PretrainedEncoder:
    """The network of a checkpoint; its method `load_pretrained` returns the weights.

    >>> model = pretrained_transformer("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    >>> params = model.load_pretrained()  # doctest: +SKIP
    >>> logits = model.apply({"params": params}, tokens)  # doctest: +SKIP

    Args:
      pretrained: A folder, or a hub id `owner/name`, which is downloaded once.
      head: Head of an encoder, see `Encoder`; "checkpoint" keeps that of the checkpoint. The
        parameters of a new head come from `init`, as with `pretrained_vit`. Decoders have their
        own head.
      num_classes: Number of classes of a head "tokens" or "sequence"; None for the checkpoint's.
      dropout: As for `Decoder`; the checkpoint's own rate is ignored.
      remat: As for `Decoder`.
      dtype: Dtype of the computation; parameters are float32, whatever the file's dtype.

    Raises:
      CheckpointError: There is no such folder or hub id, or it has no config.json or safetensors
        file; the architecture is not one of gpt2, llama, qwen2, qwen3, bert and xlm-roberta; or
        tensors are missing, unknown, of another shape or not floating. All of this is checked
        here, before any tensor is read.
      ValueError: An argument is out of range.
      ImportError: A package of the `experiments` extra is missing.
    """
    check_count("num_classes", num_classes, at_least=1)
    patterns = [*FILES, *TOKENIZER_FILES]
    folder = local_folder(
        "pretrained", pretrained, CheckpointError, "model", allow_patterns=patterns
    )
    checkpoint = open_text_checkpoint(folder)
    fields = dict(checkpoint.fields)
    training: dict[str, Any] = {
        "dropout": dropout,
        "remat": remat,
        "dtype": dtype,
        "folder": str(folder),
    }
    if checkpoint.family.model is Decoder:
        if head != "checkpoint" or num_classes is not None:
            got = f"head {head!r} and num_classes {num_classes}"
            raise FieldError("head", "be left out for a decoder", got)
        return PretrainedDecoder(**fields, **training)
    if head != "checkpoint" and head != fields["head"]:
        fields |= {"head": head, "num_classes": 0, "pooler": fields.get("pooler") and head is None}
    if num_classes is not None:
        fields["num_classes"] = num_classes
    return PretrainedEncoder(**fields, **training)


def save_transformer(
    folder: str | os.PathLike[str],
    model: Decoder | Encoder,
    params: PyTree,
    *,
    dtype: str = "float32",
) -> None:
    """Writes a checkpoint that `pretrained_transformer` and transformers read.

    Its family is the one that has the model's layers. Of a model from `pretrained_transformer`, the
    files of the tokenizer and the numbers of the special tokens go with it. The parameters are read
    back bit by bit unless `dtype` rounds them.

    Args:
      folder: The folder, which is created if need be. Files of the same names are replaced.
      model: A `Decoder` or `Encoder`.
      params: Parameters of one network, without an axis of seeds.
      dtype: Dtype of the stored tensors: "float32", "bfloat16" or "float16".

    Raises:
      ValueError: No family has these layers; the parameters are not the model's, not floats, or not
        finite in `dtype`; or the dtype is unknown.
      ImportError: A package of the `experiments` extra is missing.
    """
    check_choice("dtype", dtype, DTYPES.values())
    family = family_of(model)
    flat = flatten(params)
    shapes = parameter_shapes(model, _TOKENS)
    check_params(flat, shapes, dtype)
    head = model.head if isinstance(model, Encoder) else None
    prefix = family.prefix if isinstance(model, Decoder) or head is not None else ""
    columns: dict[str, list[Any]] = {}
    parts = _parts(family, shapes, head, prefix)
    for names, (name, _, _) in sorted(parts.items(), key=lambda item: item[1]):
        columns.setdefault(name, []).append((names, flat[names]))
    tensors = {
        name: _in_out(family, group[0][0], np.concatenate([leaf for _, leaf in group], axis=-1))
        for name, group in columns.items()
    }
    folder, source = Path(folder), Path(getattr(model, "folder", "") or folder)
    before = read_json(source / CONFIG, CheckpointError) if (source / CONFIG).exists() else {}
    write_tensors(folder, tensors, dtype)
    write_json(folder / CONFIG, text_config(model, family, before, dtype))
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
