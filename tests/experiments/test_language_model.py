"""Language models of experiments: two parts of weights, rows of answers, log-probabilities."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import models, pre_tokenizers

from experiments.runtime.checkpoint import CheckpointMetadata, Checkpoints
from experiments.runtime.config import CONF
from experiments.tasks.language_model import (
    LanguageModel,
    answer_log_probs,
    answer_tokens,
    language_loss,
    prompt_tokens,
    rows_of,
)
from trustjax.data import DataError, pretrained_tokenizer
from trustjax.models import Decoder, save_transformer

SMALL = LanguageModel(width=16, depth=1, num_heads=2, mlp_width=16, vocab_size=12)
TEXTS = ["a b c d e f g h", "a b c"]
WORDS = ["<eos>", "<unk>", "<user>", "<assistant>", "hello", "you", "there"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, and a tokenizer of words with a chat template."""
    path = tmp_path_factory.mktemp("checkpoint")
    model = Decoder(len(WORDS), 16, 1, 2, 16)
    save_transformer(path, model, model.init(jax.random.key(5), jnp.zeros((1, 2), int))["params"])
    library = tokenizers.Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_the_file_of_conf_makes_one() -> None:
    made = instantiate(OmegaConf.load(CONF / "model" / "decoder.yaml"))
    assert made == LanguageModel(width=64, depth=2, num_heads=4, mlp_width=128, vocab_size=2000)


def test_a_new_network_differs_by_seed_and_has_nothing_frozen() -> None:
    network = SMALL.build(TEXTS, jnp.float32)
    assert (network.frozen, network.tokenizer.vocab_size) == ({}, 10)
    trained = network.init(jax.random.split(jax.random.key(0), 2))
    table = trained["token_embedding"]["embedding"]
    assert table.shape == (2, 10, 16)
    assert not np.array_equal(table[0], table[1])
    assert dataclasses.replace(SMALL, vocab_size=None).build((), "float32").model.vocab_size == 257


def test_lora_starts_at_the_checkpoint_and_survives_one(folder: Path, tmp_path: Path) -> None:
    """Its factors have paths for names, which checkpoints cannot store."""
    spec = dataclasses.replace(SMALL, pretrained=str(folder), lora_rank=3)
    network = spec.build((), jnp.float32)
    trained = network.init(jax.random.split(jax.random.key(0), 2))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(trained)} == {2}
    one = jax.tree.map(lambda x: x[0], trained)
    equal = jax.tree.map(np.array_equal, network.params(network.frozen, one), network.loaded)
    assert all(jax.tree.leaves(equal))
    # A change of one factor changes one kernel.
    b = one["block_0"]["attention"]["query"]["kernel"]["b"]
    one["block_0"]["attention"]["query"]["kernel"]["b"] = b + 1
    moved = jax.tree.map(np.array_equal, network.params(network.frozen, one), network.loaded)
    assert jax.tree.leaves(moved).count(False) == 1
    checkpoints = Checkpoints(tmp_path / "stage", keep=1)
    checkpoints.save(trained, CheckpointMetadata(step=1))
    again = checkpoints.restore(trained)
    checkpoints.close()
    assert jax.tree.structure(again) == jax.tree.structure(trained)
    # Without LoRA all weights are trained, from the same start.
    whole = dataclasses.replace(spec, lora_rank=None).build((), jnp.float32)
    start = whole.init(jax.random.split(jax.random.key(0), 2))
    assert whole.frozen == {}
    table = whole.loaded["token_embedding"]["embedding"]
    np.testing.assert_array_equal(start["token_embedding"]["embedding"], np.stack([table, table]))


def test_conversations_take_the_form_of_the_template(folder: Path) -> None:
    tokenizer = pretrained_tokenizer(folder)
    prompt = [{"role": "user", "content": "hello you"}]
    answer = [{"role": "assistant", "content": "hello there"}]
    assert prompt_tokens(tokenizer, prompt, 9) == [2, 4, 5, 0, 3]
    assert prompt_tokens(tokenizer, prompt, 2) == [0, 3]
    assert answer_tokens(tokenizer, prompt, answer, 9) == [4, 6, 0]
    assert answer_tokens(tokenizer, prompt, answer, 2) == [4, 6]
    assert answer_tokens(tokenizer, "hello", "you there", 9) == [5, 6, 0]
    assert prompt_tokens(tokenizer, "", 9) == [0]
    # The token that begins a text stays where its beginning is cut off.
    begins = dataclasses.replace(tokenizer, prefix=(3,), suffix=(0,))
    assert prompt_tokens(begins, "hello you there", 9) == [3, 4, 5, 6]
    assert prompt_tokens(begins, "hello you there", 3) == [3, 5, 6]
    assert prompt_tokens(begins, "hello you there", 1) == [3]
    with pytest.raises(DataError, match="both be strings or both be conversations"):
        answer_tokens(tokenizer, "hello", answer, 9)
    other = dataclasses.replace(tokenizer, chat_template="{{ messages | length }}")
    with pytest.raises(DataError, match="changes the prompt"):
        answer_tokens(other, prompt, answer, 9)


def test_log_probs_are_those_of_the_answer_alone() -> None:
    """Against the softmax over all logits, written out in NumPy."""
    network = SMALL.build(TEXTS, jnp.float32)
    params = jax.tree.map(lambda x: x[0], network.init(jax.random.key(1)[None]))
    rows = rows_of([[2, 3], [4]], [[5, 6, 0], [7, 0]], pad_token=0)
    np.testing.assert_array_equal(rows.tokens, [[2, 3, 5, 6, 0], [4, 7, 0, 0, 0]])
    np.testing.assert_array_equal(rows.segments, [[1] * 5, [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.answer, [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])

    @jax.jit
    def found(params: Any) -> Any:
        mean = language_loss(network.model, params, rows.tokens, rows.segments)
        logits = network.model.apply({"params": params}, rows.tokens)
        return answer_log_probs(network.model, params, *rows), mean, logits

    log_probs, mean, logits = (np.asarray(x, float) for x in found(params))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    first = log_p[0, 1, 5] + log_p[0, 2, 6] + log_p[0, 3, 0]
    second = log_p[1, 0, 7] + log_p[1, 1, 0]
    np.testing.assert_allclose(log_probs, [first, second], rtol=1e-5)
    np.testing.assert_allclose(mean, -(first + second + log_p[0, 0, 3]) / 6, rtol=1e-5)


def test_wrong_fields(folder: Path) -> None:
    with pytest.raises(ValueError, match="lora_rank must be null without pretrained"):
        dataclasses.replace(SMALL, lora_rank=2)
    with pytest.raises(ValueError, match="lora_alpha must be > 0"):
        dataclasses.replace(SMALL, lora_alpha=0.0)
    encoder = Path(__file__).parents[1] / "golden" / "text" / "bert"
    with pytest.raises(ValueError, match="pretrained must be a decoder, got PretrainedEncoder"):
        dataclasses.replace(SMALL, pretrained=str(encoder)).build((), jnp.float32)
