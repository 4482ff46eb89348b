"""GGUF, the files of llama.cpp: they are read and turned into a Hugging Face folder.

The format is described in ggml's docs/gguf.md, its blocks in ggml-common.h. A file holds metadata,
then the headers of tensors, then their data: float32, float16, bfloat16 or quantised in blocks of
32 numbers with one scale.
"""

import os
import reprlib
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trustjax._checks import FieldError, check_choice
from trustjax.models._families import FAMILIES, Family
from trustjax.models._gguf_tokenizer import gguf_tokenizer
from trustjax.models._store import (
    CONFIG,
    DTYPES,
    CheckpointError,
    Stored,
    check_size,
    is_number,
    write_json,
    write_tensors,
    wrong,
)
from trustjax.models._text_config import text_config
from trustjax.models._text_layout import fit_checkpoint
from trustjax.models.transformer import Decoder

Array = npt.NDArray[Any]
_ALIGNMENT = 32
_BLOCK = 32  # numbers that share a scale


def _q8_0(blocks: Array) -> Array:
    return _float16(blocks[:, :2]) * blocks[:, 2:].view(np.int8)


def _q4_0(blocks: Array) -> Array:
    return _float16(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - np.float32(8))


def _q4_1(blocks: Array) -> Array:
    return _float16(blocks[:, :2]) * _nibbles(blocks[:, 2:]) + _float16(blocks[:, 2:4])


def _float16(column: Array) -> Array:
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """The low halves of the bytes, then the high ones."""
    packed = packed[:, -_BLOCK // 2 :]
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


class _Type(NamedTuple):
    """How numbers are stored: `size` bytes hold `numbers` of them."""

    name: str
    size: int
    numbers: int
    decode: Callable[[Array], Array]


_TYPES = {
    0: _Type("F32", 4, 1, lambda raw: raw.view("<f4")),
    1: _Type("F16", 2, 1, lambda raw: raw.view("<f2")),
    2: _Type("Q4_0", 18, _BLOCK, _q4_0),
    3: _Type("Q4_1", 20, _BLOCK, _q4_1),
    8: _Type("Q8_0", 34, _BLOCK, _q8_0),
    30: _Type("BF16", 2, 1, lambda raw: raw.view(ml_dtypes.bfloat16)),
}


class GGUF(NamedTuple):
    """A GGUF file.

    Attributes:
      metadata: Numbers, texts and lists by their keys.
      tensors: Shape, in NumPy's order, and raw bytes of each tensor, with its type's number.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], int, Array]]

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor in float32."""
        shape, number, raw = self.tensors[name]
        kind = _TYPES[number]
        return kind.decode(raw.reshape(-1, kind.size)).astype(np.float32).reshape(shape)


def read_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Reads the headers of a GGUF file; the data of tensors is read when it is asked for.

    Raises CheckpointError if there is no such file, if it is damaged, or if a tensor is of another
    type than F32, F16, BF16, Q8_0, Q4_0 and Q4_1.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} must be a GGUF file: there is no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} must be a GGUF file: it is empty")
    reader = _Reader(path, np.memmap(path, np.uint8, "r"))
    if bytes(reader.take(4)) != b"GGUF" or reader.number("<I") not in (2, 3):
        raise CheckpointError(f"{path} must be a GGUF file of version 2 or 3")
    tensors, entries = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(entries):
        key = reader.text()
        metadata[key] = reader.value(reader.number("<I"))
    heads = []
    for _ in range(tensors):
        name = reader.text()
        rank = reader.number("<I")
        if rank > 8:
            raise reader.damaged(f"tensor {reprlib.repr(name)} has {rank} axes")
        shape = tuple(reader.number("<Q") for _ in range(rank))[::-1]
        heads.append((name, shape, reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise reader.damaged(f"general.alignment is {reprlib.repr(alignment)}")
    names = [head[0] for head in heads]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CheckpointError(f"{path}: tensor {min(twice)!r} is there twice")
    start = -(-reader.at // alignment) * alignment
    return GGUF(metadata, {head[0]: reader.tensor(start, *head) for head in heads})


class _Reader:
    """Reads a file from front to back; what lies beyond its end raises CheckpointError."""

    _SCALARS: Mapping[int, str] = {
        0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
        11: "<q", 12: "<d",
    }  # fmt: skip

    def __init__(self, path: Path, data: Array) -> None:
        self.path, self.data, self.at = path, data, 0

    def damaged(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} must be a whole GGUF file: {problem}")

    def take(self, count: int) -> Array:
        if count > len(self.data) - self.at:
            raise self.damaged("it ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)).tobytes())[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).tobytes().decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in self._SCALARS:
            return self.number(self._SCALARS[kind])
        if kind == 8:
            return self.text()
        if kind != 9 or depth > 3:
            raise self.damaged(f"a value of the type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if count > len(self.data):  # each takes a byte or more
            raise self.damaged("it ends too early")
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor(
        self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> tuple[tuple[int, ...], int, Array]:
        if number not in _TYPES:
            names = ", ".join(kind.name for kind in _TYPES.values())
            raise CheckpointError(
                f"{self.path}: tensor {name!r} must be {names}, got the type {number}"
            )
        kind = _TYPES[number]
        count = 1
        for side in shape:
            count *= side
        if not shape or shape[-1] % kind.numbers:
            raise self.damaged(f"tensor {name!r} of {kind.name} has shape {shape}")
        self.at = min(start + offset, len(self.data))
        return shape, number, self.take(count // kind.numbers * kind.size)


# ---- a Hugging Face folder


# llama.cpp's name of each field of `Decoder`, behind the name of the architecture.
_FIELDS = {
    "width": "embedding_length",
    "depth": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "mlp_width": "feed_forward_length",
    "max_length": "context_length",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
}
_NAMES = {
    "token_embd": "token_embedding",
    "output_norm": "final_norm",
    "output": "head",
    "attn_norm": "attention_norm",
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_q_norm": "attention/query_norm",
    "attn_k_norm": "attention/key_norm",
    "attn_output": "attention/out",
    "ffn_norm": "mlp_norm",
    "ffn_up": "mlp/in",
    "ffn_gate": "mlp/gate",
    "ffn_down": "mlp/out",
}


def convert_gguf(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], *, dtype: str = "float32"
) -> None:
    """Turns a GGUF file into a folder that `pretrained_transformer` and transformers read.

    The rows of Llama's query and key are put back: GGUF has them in the order of interleaved rotary
    positions, (0, h/2, 1, h/2 + 1, ...) for a head of h features. The tokenizer goes along, and so
    does its chat template.

    Args:
      path: A GGUF file of the architecture llama, qwen2 or qwen3 with a byte-level tokenizer.
      folder: The folder, which is created if need be. Files of the same names are replaced.
      dtype: Dtype of the stored tensors: "float32", "bfloat16" or "float16".

    Raises:
      CheckpointError: The file is damaged, or has another architecture, tokenizer or type of
        tensors; or tensors are missing, unknown or of another shape than the metadata says.
      ValueError: The dtype is unknown.
      ImportError: A package of the `experiments` extra is missing.
    """
    check_choice("dtype", dtype, DTYPES.values())
    path, folder = Path(path), Path(folder)
    file = read_gguf(path)
    kind = file.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise wrong(path, "general.architecture", "'llama', 'qwen2' or 'qwen3'", kind)
    family = FAMILIES[kind]
    model = _decoder(path, kind, file)
    tokenizer, tokenizer_config, special = gguf_tokenizer(path, file.metadata)
    config = text_config(model, family, special, dtype)
    names = {name: _names(path, family, name) for name in file.tensors}
    headers = {
        theirs: Stored(path, name, file.tensors[name][0], "F32")
        for name, (_, theirs) in names.items()
    }
    fit_checkpoint(path, path, family, config, headers)  # before anything is written
    tensors = {}
    for name, (module, theirs) in names.items():
        tensor = file.tensor(name)
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r} is not finite")
        if kind == "llama" and module in ("attention/query", "attention/key"):
            heads = model.num_heads if module == "attention/query" else model.kv_sizes[0]
            tensor = _halves(tensor, heads)
        tensors[theirs] = tensor
    write_tensors(folder, tensors, dtype)
    write_json(folder / CONFIG, config)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def _halves(tensor: Array, heads: int) -> Array:
    """Rows of each head from interleaved pairs (a0, b0, a1, ...) to halves (a0, a1, ..., b0)."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _decoder(path: Path, kind: str, file: GGUF) -> Decoder:
    """The module of the metadata."""
    fields: dict[str, Any] = {}
    for field, key in _FIELDS.items():
        value = file.metadata.get(f"{kind}.{key}")
        if field == "norm_epsilon":
            if not is_number(value, at_least=0):
                raise wrong(path, f"{kind}.{key}", "a number", value)
            # Stored in float32, of which the shortest decimal is what was meant.
            value = float(str(np.float32(value)))
        else:
            check_size(path, f"{kind}.{key}", value)
        fields[field] = value
    theta = file.metadata.get(f"{kind}.rope.freq_base", 10000.0)
    if not is_number(theta, at_least=1):
        raise wrong(path, f"{kind}.rope.freq_base", "a number", theta)
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none":
        raise wrong(path, f"{kind}.rope.scaling.type", "'none'", scaling)
    family = FAMILIES[kind]
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing")
    bias = "blk.0.attn_q.bias" in file.tensors
    try:
        model = Decoder(
            **fields
            | {"head_dim": file.metadata.get(f"{kind}.attention.key_length")}
            | {"qkv_bias": bias, "out_bias": "blk.0.attn_output.bias" in file.tensors}
            | dict(family.fixed),
            vocab_size=file.tensors["token_embd.weight"][0][0],
            rope_theta=float(theta),
            tied="output.weight" not in file.tensors,
        )
    except FieldError as error:
        raise CheckpointError(f"{path}: {error}") from error
    head_dim = model.kv_sizes[1]
    rotated = file.metadata.get(f"{kind}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise wrong(path, f"{kind}.rope.dimension_count", f"{head_dim}, the head's width", rotated)
    return model


def _names(path: Path, family: Family, name: str) -> tuple[str, str]:
    """Our module's name of a GGUF tensor, and the tensor's name at Hugging Face."""
    module, _, leaf = name.rpartition(".")
    where = family.prefix
    if module.startswith("blk."):
        _, index, module = module.split(".", 2)
        where = f"{family.prefix}{family.block}{index}."
    if module not in _NAMES:  # such as the frequencies of Llama 3.1's stretched positions
        raise CheckpointError(f"{path}: tensor {name!r} belongs to no part of the model")
    theirs = family.names[_NAMES[module]]
    theirs = theirs[1:] if theirs.startswith(":") else where + theirs
    return _NAMES[module], f"{theirs}.{leaf}"
