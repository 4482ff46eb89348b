"""Checkpoints of text models: that they come back, that transformers reads them, what is refused.

tests/golden/make_text.py made the checkpoints with transformers.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changing import change_config, change_tensors
from safetensors.numpy import load_file, save_file

from trustjax.models import (
    CheckpointError,
    Decoder,
    Encoder,
    RopeScaling,
    pretrained_transformer,
    save_pretrained,
    save_transformer,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
DTYPES = {"llama": "float16", "smollm2": "bfloat16"}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_keeps_the_bits(name: str, tmp_path: Path) -> None:
    """The tensors are stored under the same names, so the layouts are undone, too."""
    model = pretrained_transformer(GOLDEN / name)
    save_transformer(tmp_path, model, model.load_pretrained(), dtype=DTYPES.get(name, "float32"))
    before, after = tensors_of(GOLDEN / name), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        np.testing.assert_array_equal(after[key], tensor)
    assert pretrained_transformer(tmp_path).clone(folder="") == model.clone(folder="")
    given, written = (
        json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / name, tmp_path)
    )
    for key in ("model_type", "architectures", "eos_token_id", "rope_parameters", "id2label"):
        if key in written:
            assert written[key] == given[key]


def test_files_of_the_tokenizer_go_along(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "smollm2", tmp_path / "a"))
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not of the tokenizer")
    model = pretrained_transformer(source)
    for _ in range(2):  # into another folder, and again into the model's own
        save_transformer(tmp_path / "b", model, model.load_pretrained())
        model = pretrained_transformer(tmp_path / "b")
    names = {file.name for file in (tmp_path / "b").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("name", "head", "new"),
    [
        ("bert", "tokens", {"classifier"}),
        ("bert", "sequence", {"classifier"}),  # the pooler is kept
        ("bert_masked_lm", "tokens", {"classifier"}),
        ("xlm_roberta_sequence", "sequence", {"classifier"}),  # for another number of classes
        ("xlm_roberta_tokens", None, set()),
    ],
)
def test_new_head(name: str, head: str | None, new: set[str]) -> None:
    number = None if head is None else 5
    model = pretrained_transformer(GOLDEN / name, head=head, num_classes=number)
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    needed = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert needed.keys() - model.load_pretrained().keys() == new
    assert not model.load_pretrained().keys() - needed.keys()
    loaded = jax.tree.map(jnp.shape, {**needed, **model.load_pretrained()})
    assert loaded == jax.tree.map(lambda leaf: leaf.shape, needed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": GOLDEN / "gpt2", "head": "tokens"}, "head must be left out for a decoder"),
        ({"pretrained": GOLDEN / "gpt2", "num_classes": 3}, "head must be left out for a decoder"),
        ({"pretrained": GOLDEN / "bert", "num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"pretrained": GOLDEN / "bert", "head": "tokens"}, "num_classes must be above 0 with"),
        ({"pretrained": "/nowhere"}, "pretrained must be a folder or a hub id"),
        ({"pretrained": GOLDEN.parent / "vit" / "classifier"}, "model_type must be one of 'gpt2'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained_transformer(**arguments)


# What is refused


NORM = "model.layers.1.input_layernorm.weight"
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", change_config({"model_type": "mamba"}), "model_type must be one of .* 'mamba'"),
        ("qwen3", change_config({"model_type": ["bert"]}), "model_type must be one of"),
        ("qwen3", change_config({"hidden_size": "16"}), "hidden_size must be int above 0"),
        ("qwen3", change_config({"hidden_size": 2**60}), "hidden_size must be 16, as in"),
        ("qwen3", change_config({"vocab_size": 41}), "vocab_size must be 40, as in .* got 41"),
        ("qwen3", change_config({"num_hidden_layers": 2**40}), "num_hidden_layers must be 2, as"),
        ("qwen3", change_config({"intermediate_size": 25}), "intermediate_size must be 24, as in"),
        ("qwen3", change_config({"num_attention_heads": 2**40}),
         "num_attention_heads must be 32 divided by the 8 features of a head"),
        ("qwen3", change_config({"num_attention_heads": 3}), "num_attention_heads must be a mult"),
        ("qwen3", change_config({"num_key_value_heads": 4}), "num_key_value_heads must be 16 div"),
        ("qwen3", change_config({"head_dim": 7}), "head_dim must be even for rotary positions"),
        ("qwen3", change_config({"hidden_act": "tanh"}), "hidden_act must be one of 'gelu'"),
        ("qwen3", change_config({"rms_norm_eps": math.nan}), "rms_norm_eps must be a float32 abo"),
        ("qwen3", change_config({"tie_word_embeddings": 1}), "tie_word_embeddings must be bool"),
        ("qwen3", change_config({"use_sliding_window": True}), "use_sliding_window must be False"),
        ("qwen3", change_config({"attention_bias": True}), "q_proj.bias' of shape .* is missing"),
        ("qwen3", change_config({"rope_parameters": {"rope_type": "yarn"}}),
         "rope_type must be 'default', 'linear' or 'llama3', got 'yarn'"),
        ("qwen3", change_config({"rope_parameters": 3}), "rope_parameters must be an object"),
        ("qwen3", change_config({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
         "rope_scaling must be the same as rope_parameters, .*, got .*'factor': 2.0"),
        ("bert_masked_lm", change_config({"tie_word_embeddings": False}),
         "tie_word_embeddings must be true for masked language models, got False"),
        ("qwen3", change_config({"rope_parameters": ROPE | {"factor": "4"}}), "factor must be a f"),
        ("qwen3", change_config({"rope_parameters": ROPE | {"factor": 0.5}}), "factor must be >="),
        ("qwen3", change_config({"rope_parameters": {"rope_type": "linear"}}),
         "'factor' is missing for rope_type 'linear'"),
        ("qwen3", change_config({"rope_parameters": {"rope_theta": -1}}), "rope_theta must be a"),
        ("qwen3", change_config({"rope_parameters": {"partial_rotary_factor": 0.5}}),
         "partial_rotary_factor must be 1, got 0.5"),
        ("qwen3", change_tensors(lambda t: t.pop(NORM)), f"tensor '{NORM}' of shape .* missing"),
        ("qwen3", change_tensors(lambda t: t.update(more=t[NORM])), "belongs to no part of this q"),
        ("qwen3", change_tensors(lambda t: t.update({NORM: t[NORM][:3].copy()})),
         rf"tensor '{NORM}' must have shape \(16,\), got \(3,\)"),
        ("qwen3", change_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int32)})),
         "must be F32, BF16, F16, got I32"),
        ("qwen3", change_tensors(lambda t: t.pop("lm_head.weight")), "'lm_head.weight' of shape"),
        ("qwen3", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
         "pytorch_model.bin is not read"),
        ("gpt2", change_config({"scale_attn_by_inverse_layer_idx": True}), "layer_idx must be Fal"),
        ("gpt2", change_config({"n_head": 3}), "n_embd must be a multiple of num_heads"),
        ("gpt2", change_config({"n_positions": 21}), "n_positions must be 20, as in the tensors"),
        ("gpt2", change_config({"n_inner": 65}), "n_inner must be 64, as in the tensors"),
        ("bert_sequence", change_config({"id2label": {"0": "a"}}), r"len\(id2label\) must be 3"),
        ("bert_sequence", change_config({"type_vocab_size": 3}), "type_vocab_size must be 2, as"),
        ("bert_sequence", change_config({"is_decoder": True}), "is_decoder must be False"),
        ("xlm_roberta_tokens", change_config({"pad_token_id": 0}), "pad_token_id must be 1, got 0"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(
    name: str, change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        pretrained_transformer(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_weights_must_be_finite(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2"))
    name = "transformer.h.0.attn.c_attn.bias"
    change_tensors(lambda t: t.update({name: np.full_like(t[name], np.nan)}))(folder)
    model = pretrained_transformer(folder)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is not finite"):
        model.load_pretrained()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # OpenAI's own GPT-2 has no prefix, and stores its causal masks.
        ("gpt2", lambda t: {n.removeprefix("transformer."): x for n, x in t.items()}
         | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}),
        # Some tied checkpoints store the head again; old ones store the rotary frequencies.
        ("smollm2", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"],
                                   "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)}),
        # Google's BERT has TensorFlow's names of layer norms, a pooler and the second head.
        ("bert_masked_lm", lambda t: {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): x
            for n, x in t.items()
        } | {"cls.seq_relationship.weight": np.ones((2, 16)), "bert.pooler.dense.bias": np.ones(16),
             "bert.pooler.dense.weight": np.ones((16, 16))}),
    ],
)  # fmt: skip
def test_what_old_checkpoints_hold_besides(name: str, change: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    expected = pretrained_transformer(GOLDEN / name).load_pretrained()
    found = pretrained_transformer(folder).load_pretrained()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8, "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 8}
    for model in (
        Decoder(**sizes, norm="layer"),
        Decoder(**sizes, gated=False),
        Encoder(**sizes, position_offset=1),
        Encoder(**sizes, num_token_types=0),
    ):
        with pytest.raises(ValueError, match="model must have the layers of one of gpt2, llama, q"):
            save_transformer(tmp_path, model, {})
    model = pretrained_transformer(GOLDEN / "bert")
    params = model.load_pretrained()
    with pytest.raises(ValueError, match="dtype must be one of"):
        save_transformer(tmp_path, model, params, dtype="int8")
    broken = {**params, "pooler_dense": jax.tree.map(lambda x: x + 1e6, params["pooler_dense"])}
    with pytest.raises(ValueError, match="params must be finite in float16: pooler_dense/bias is"):
        save_transformer(tmp_path, model, broken, dtype="float16")
    with pytest.raises(ValueError, match=r"block_0/attention/key/bias must have shape \(16,\)"):
        save_transformer(tmp_path, model, jax.tree.map(lambda x: np.stack([x, x]), params))
    with pytest.raises(ValueError, match="model must be a ViT"):
        save_pretrained(tmp_path, model, params)
    assert not list(tmp_path.iterdir())


# Against transformers itself: the crosscheck extra


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    """A model whose weights have changed computes the same in transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = pretrained_transformer(GOLDEN / name)
    params = jax.tree.map(lambda leaf: leaf * 1.1, model.load_pretrained())
    save_transformer(tmp_path, model, params)
    config = json.loads((tmp_path / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    theirs, loading = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.array([[3, 17, 5, 11, 29, 8, 2, 31, 4]])
    with torch.no_grad():
        out = theirs.eval()(torch.from_numpy(tokens))
    ours = jax.jit(model.apply)({"params": params}, tokens)
    expected = out.last_hidden_state if name == "bert" else out.logits
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


def test_scaling_is_written(tmp_path: Path) -> None:
    scaling = RopeScaling("linear", 2.0)
    model = Decoder(8, 8, 1, 2, 8, rope_scaling=scaling, tied=False)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)),
    )["params"]
    save_transformer(tmp_path, model, params)
    again = pretrained_transformer(tmp_path)
    assert again.rope_scaling == scaling
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"]["factor"] == 2
