"""Checkpoints of Hugging Face's text models: they are read and written here.

A checkpoint is a folder with
  config.json         the sizes, as fields of transformers' configuration of the family
  model.safetensors   the tensors, or shards of them with model.safetensors.index.json; float32,
                      bfloat16 or float16
  tokenizer.json      and other files of the tokenizer, which are only copied here
The families are those in `trustjax.models._families`.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from trustjax._checks import FieldError, check_choice, check_count
from trustjax._files import local_folder, read_json
from trustjax.models._store import (
    CONFIG,
    DTYPES,
    FILES,
    CheckpointError,
    check_params,
    flatten,
    parameter_shapes,
    write_json,
    write_tensors,
)
from trustjax.models._text_config import family_of, text_config
from trustjax.models._text_layout import TOKENS, in_out, open_text_checkpoint, parts_of
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
    shapes = parameter_shapes(model, TOKENS)
    check_params(flat, shapes, dtype)
    head = model.head if isinstance(model, Encoder) else None
    prefix = family.prefix if isinstance(model, Decoder) or head is not None else ""
    columns: dict[str, list[Any]] = {}
    parts = parts_of(family, shapes, head, prefix)
    for names, (name, _, _) in sorted(parts.items(), key=lambda item: item[1]):
        columns.setdefault(name, []).append((names, flat[names]))
    tensors = {
        name: in_out(family, group[0][0], np.concatenate([leaf for _, leaf in group], axis=-1))
        for name, group in columns.items()
    }
    folder, source = Path(folder), Path(getattr(model, "folder", "") or folder)
    before = read_json(source / CONFIG, CheckpointError) if (source / CONFIG).exists() else {}
    write_tensors(folder, tensors, dtype)
    write_json(folder / CONFIG, text_config(model, family, before, dtype))
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)
